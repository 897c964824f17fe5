"""Random schedules over the executor that sees: hundreds of them, bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from engine.fakes import LAYOUT, ONLY_WINDOWS, WINDOWS, Seeing, Shape, seeing
from engine.schedules import Totals, alone, assert_same, pool_for, random_jobs, run_schedule

from kvik.text.tokenizer import Tokenizer

LAYOUTS = {"plain": LAYOUT, "windows": WINDOWS, "only windows": ONLY_WINDOWS}


def one_schedule(tokenizer: Tokenizer, layout: Shape, seed: int, totals: Totals, count: int = 8) -> None:
    rng = np.random.default_rng(seed)
    settings: dict[str, Any] = {
        "max_batch_tokens": int(rng.choice([1, 7, 16, 40, 100, 512])), "max_sequences": int(rng.choice([3, 8, 64])),
        "prefix_sharing": bool(rng.random() < 0.8),
    }  # fmt: skip
    jobs = random_jobs(rng, tokenizer.vocab_size, count)
    build = lambda slabs: seeing(tokenizer, layout, slabs, **settings)  # noqa: E731
    made = build(pool_for(build, jobs, float(rng.choice([0.25, 0.4, 0.7, 1.5]))))
    scores: list[Any] = []
    run_schedule(made, jobs, rng, totals, scores)
    assert isinstance(made.executor, Seeing)
    totals.splits += made.executor.splits
    single = seeing(tokenizer, layout, prefix_sharing=False)
    for job in jobs:
        assert_same(job, alone(single, job))
    for group in scores:
        single_score = single.add_score(single.score_request(group.samples[0].request.token_ids, reduce=False))
        while single.step():
            pass
        assert np.array_equal(group.samples[0].result().logits, single_score.samples[0].result().logits)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("schedules", [12, pytest.param(200, marks=pytest.mark.slow)])
def test_any_schedule_says_what_each_request_says_alone(small_tokenizer: Tokenizer, name: str, schedules: int) -> None:
    totals = Totals()
    for seed in range(schedules):
        one_schedule(small_tokenizer, LAYOUTS[name], 1000 * schedules + seed, totals)
    assert totals.preemptions > 0 and totals.splits > 0 and totals.copies > 0 and totals.hits > 0
    assert totals.cancelled > 0
