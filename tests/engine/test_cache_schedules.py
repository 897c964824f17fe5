"""Formats and policies in random schedules over the executor that sees: each request says what it says alone, to the last bit."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from engine.fakes import HEADS, HEADS_AND_WINDOW, Shape, run_out, seeing
from engine.schedules import (
    Totals,
    alone,
    assert_same,
    pool_for,
    random_beams,
    random_cache,
    random_jobs,
    run_schedule,
)

from kvik.engine.engine import Engine
from kvik.text.tokenizer import Tokenizer

SHAPES = {"heads": HEADS, "heads and a window": HEADS_AND_WINDOW}


def one_schedule(tokenizer: Tokenizer, shape: Shape, seed: int, totals: Totals, counts: Counter[str]) -> None:
    rng = np.random.default_rng(seed)
    settings: dict[str, Any] = {
        "max_batch_tokens": int(rng.choice([1, 7, 16, 40, 100])), "max_sequences": int(rng.choice([8, 64])),
        "prefix_sharing": bool(rng.random() < 0.8),
    }  # fmt: skip
    caches = [random_cache(rng) for _ in range(3)]
    jobs = random_jobs(rng, tokenizer.vocab_size, 16)
    for place, job in enumerate(jobs):
        job.arrives, job.prompt, job.cache = (
            job.arrives // 3,
            job.prompt if len(job.prompt) > 12 else (*job.prompt, *range(12)),
            caches[place % 3],
        )
        if place % 3 == 1:
            job.params = random_beams(rng)
    build = lambda slabs: seeing(tokenizer, shape, slabs, any_format=True, **settings)  # noqa: E731
    made: Engine = build(pool_for(build, jobs, float(rng.choice([0.03, 0.06, 0.1, 0.4]))))
    scores: list[Any] = []
    run_schedule(made, jobs, rng, totals, scores, float(rng.choice([0.0, 0.03])))
    counts.update(evictions=made.stats.evictions, restored=made.stats.restored)
    single = seeing(tokenizer, shape, any_format=True, prefix_sharing=False)
    for job in jobs:
        assert_same(job, alone(single, job))
    for group in scores:
        request = group.samples[0].request
        again = single.add_score(request)
        run_out(single)
        assert np.array_equal(group.samples[0].result().logits, again.samples[0].result().logits)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("schedules", [4, pytest.param(200, marks=pytest.mark.slow)])
def test_any_schedule_says_what_each_request_says_alone(small_tokenizer: Tokenizer, name: str, schedules: int) -> None:
    totals, counts = Totals(), Counter[str]()
    for seed in range(schedules):
        one_schedule(small_tokenizer, SHAPES[name], 1000 * schedules + seed, totals, counts)
    assert totals.preemptions > 0 and totals.copies > 0 and totals.hits > 0
    assert counts["evictions"] > 0 and totals.parked > 0 and counts["restored"] > 0
