"""Random schedules over small native models: tokens, text and log-probabilities to the last bit, and so all logits."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from engine.schedules import (
    Job,
    Totals,
    alone,
    assert_same,
    pool_for,
    random_beams,
    random_cache,
    random_jobs,
    run_schedule,
    scored_from,
)
from engine.small_engines import CONFIGS, small_engine

from kvik.engine.engine import Engine
from kvik.text.tokenizer import Tokenizer
from kvik.weights.layouts import Layout

JOBS = 48  # whose answers alone are computed once
EACH = 8


class Crowd:
    """Jobs with what they say alone. mixed: each with its own cache."""

    def __init__(self, tokenizer: Tokenizer, name: str, mixed: bool = False) -> None:
        self.tokenizer, self.name, self.mixed = tokenizer, name, mixed
        self.single = small_engine(tokenizer, name, any_format=mixed, prefix_sharing=False)
        self.jobs = random_jobs(np.random.default_rng(5), 98, JOBS)
        rng = np.random.default_rng(6)
        for job in self.jobs[::6]:
            job.params = random_beams(rng)
        for job in self.jobs if mixed else ():
            job.cache, job.prompt = random_cache(rng), (*job.prompt, *range(12))
        self.answers = [alone(self.single, job) for job in self.jobs]
        self.logits = [self._logits(job) for job in self.jobs]

    def _logits(self, job: Job) -> Any:
        group = self.single.add_score(
            self.single.score_request(job.prompt, reduce=False, first=scored_from(job), cache=job.cache)
        )
        while self.single.step():
            pass
        return group.samples[0].result().logits

    def check(self, rng: np.random.Generator, totals: Totals, **settings: Any) -> None:
        """One random schedule of some of the jobs."""
        chosen = rng.choice(JOBS, 2 * EACH if self.mixed else EACH, replace=False).tolist()
        jobs = []
        for i in chosen:
            cancelled = int(rng.integers(1, 60)) if rng.random() < 0.1 else None
            one = self.jobs[i]
            jobs.append(
                Job(one.prompt, one.params, int(rng.integers(0, 6 if self.mixed else 20)), cancelled, one.cache)
            )
        build = lambda slabs: self.build(slabs, **settings)  # noqa: E731
        made = build(
            pool_for(build, jobs, float(rng.choice([0.03, 0.06, 0.1] if self.mixed else [0.25, 0.4, 0.7, 1.5])))
        )
        run = made.executor.run
        splits = 0

        def counted(work: Any) -> Any:
            nonlocal splits
            splits += sum(int(end) - 1 not in work.logit_rows for end in work.spans[1:])
            return run(work)

        made.executor.run = counted  # type: ignore[method-assign]
        scores: list[Any] = []
        run_schedule(made, jobs, rng, totals, scores, 0.03 if self.mixed else 0.0)
        totals.splits += splits
        for i, job in zip(chosen, jobs, strict=True):
            assert_same(job, self.answers[i])
        prompts = {job.prompt: i for i, job in zip(chosen, jobs, strict=True)}
        for group in scores:
            result = group.samples[0].result()
            assert np.array_equal(result.logits, self.logits[prompts[result.token_ids]])

    def build(self, slabs: int, **settings: Any) -> Engine:
        return small_engine(self.tokenizer, self.name, slabs, any_format=self.mixed, **settings)


@cache
def crowd_of(tokenizer: Tokenizer, name: str, mixed: bool = False) -> Crowd:
    return Crowd(tokenizer, name, mixed)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("schedules", [100, pytest.param(600, marks=pytest.mark.slow)])
def test_any_schedule_says_what_each_request_says_alone(small_tokenizer: Tokenizer, name: str, schedules: int) -> None:
    crowd, totals = crowd_of(small_tokenizer, name), Totals()
    for seed in range(schedules):
        rng = np.random.default_rng(1000 * schedules + seed)
        crowd.check(
            rng, totals, threads=int(rng.integers(1, 3)), prefix_sharing=bool(rng.random() < 0.8),
            max_batch_tokens=int(rng.choice([1, 7, 16, 40, 100, 512])), max_sequences=int(rng.choice([3, 8, 64])),
        )  # fmt: skip
    assert totals.preemptions > 0 and totals.splits > 0 and totals.copies > 0 and totals.hits > 0
    assert totals.cancelled > 0


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("schedules", [12, pytest.param(300, marks=pytest.mark.slow)])
def test_so_does_any_schedule_of_mixed_caches(small_tokenizer: Tokenizer, name: str, schedules: int) -> None:
    crowd, totals = crowd_of(small_tokenizer, name, True), Totals()
    for seed in range(schedules):
        rng = np.random.default_rng(1000 * schedules + seed)
        crowd.check(
            rng, totals, threads=int(rng.integers(1, 3)), prefix_sharing=bool(rng.random() < 0.8),
            max_batch_tokens=int(rng.choice([1, 7, 16, 40])), max_sequences=int(rng.choice([8, 64])),
        )  # fmt: skip
    assert totals.preemptions > 0 and totals.splits > 0 and totals.copies > 0 and totals.hits > 0
    assert totals.parked > 0


@pytest.mark.parametrize("name", CONFIGS)
def test_the_definition_gives_nearly_the_same_logits(small_tokenizer: Tokenizer, name: str) -> None:
    """In the same crowd, with freed blocks, copies and two groups; in f32, so that only the order of sums differs."""
    jobs = [Job(j.prompt, replace(j.params, n=2), 0) for j in random_jobs(np.random.default_rng(2), 98, 3, 8)]
    logits = []
    for definition in (False, True):
        made = small_engine(
            small_tokenizer, name, 40, kv="f32", layout=Layout.F32, definition=definition, max_batch_tokens=30
        )
        groups = []
        for job in jobs:
            groups.append(made.add(made.request(job.prompt, job.params), job.chunks.append))
            groups.append(made.add_score(made.score_request((*job.prompt, *job.prompt), reduce=False)))
        while made.step():
            made.scheduler.check_integrity()
        assert made.stats.copies > 0 and not [group.error for group in groups if group.error]
        logits.append([group.samples[0].result().logits for group in groups[1::2]])
    for native, torch in zip(*logits, strict=True):
        assert np.abs(native - torch).max() <= 1e-4 * np.abs(torch).max()
