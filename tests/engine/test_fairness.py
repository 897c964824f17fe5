"""Who runs when, what fails with whom, and what a prompt shared by samples costs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from engine.fakes import LAYOUT, ONE_WINDOW, ONLY_WINDOWS, WINDOWS, Seeing, engine, run_out, seeing

from kvik.engine.engine import Engine
from kvik.engine.request import Chunk
from kvik.engine.scheduler import Step, prompt_tokens_beside
from kvik.engine.sequence import Group
from kvik.errors import ParameterError, TryAgainError
from kvik.params import SamplingParams
from kvik.text.tokenizer import Tokenizer


def add(made: Engine, prompt: Any, tokens: int = 10, chunks: list[Chunk] | None = None, **params: Any) -> Group:
    params = {"max_tokens": tokens, "temperature": 0.0, "ignore_eos": True, "seed": 1} | params
    heard = chunks if chunks is not None else []
    return made.add(made.request(tuple(prompt), SamplingParams(**params)), heard.append)


def steps_to(made: Engine, group: Group) -> int:
    steps = 0
    while not group.done:
        assert made.step() and steps < 5000
        made.scheduler.check_integrity()
        steps += 1
    return steps


def test_a_long_prompt_behind_many_short_ones_gets_its_turn(small_tokenizer: Tokenizer) -> None:
    made, _ = engine(small_tokenizer, num_blocks=40, context=400, batch=32, max_sequences=4, max_waiting=100)
    for i in range(12):
        add(made, [i + 1] * 5)
    long = add(made, [5] * 300)
    for i in range(40):  # who come later do not pass it
        add(made, [i + 1] * 5)
    # three rounds of four short ones, then its chunks of 32 beside those that decode
    assert steps_to(made, long) <= 3 * 11 + 300 // 16 + 20
    assert len(made.scheduler.waiting) >= 30
    run_out(made)


def test_short_ones_behind_a_long_prompt_start_as_soon_as_it_leaves_tokens(small_tokenizer: Tokenizer) -> None:
    made, script = engine(small_tokenizer, num_blocks=40, context=400, batch=32)
    add(made, [5] * 300)
    short = add(made, [7] * 5)
    assert steps_to(made, short) <= 300 // 32 + 1 + 10
    run_out(made)
    assert max(len(work.tokens) for work in script.passes) <= 32


def test_who_decodes_gets_a_token_in_every_step_of_anothers_prompt(small_tokenizer: Tokenizer) -> None:
    made, _ = engine(small_tokenizer, num_blocks=60, context=600, batch=256)
    chunks: list[list[Chunk]] = [[], []]
    for heard in chunks:
        add(made, [3] * 8, 100, heard)
    made.step()
    long = add(made, [5] * 500, 3)
    before = [len(c) for c in chunks]
    steps = 0
    while long.times.first_token is None:
        made.step()
        steps += 1
    each = prompt_tokens_beside(decoding=2)
    assert 500 // each <= steps <= 500 // each + 2
    assert [len(c) for c in chunks] == [n + steps for n in before]


def test_the_youngest_is_preempted_and_comes_back_first(small_tokenizer: Tokenizer) -> None:
    made = seeing(small_tokenizer, num_slabs=9, prefix_sharing=False)
    groups = [add(made, [i + 1] * 30, 40, n=n) for i, n in enumerate((1, 2, 1))]
    orders = []
    while made.step():
        made.scheduler.check_integrity()
        running = [groups.index(group) for group in made.scheduler.running]
        waiting = [groups.index(group) for group in made.scheduler.waiting]
        orders.append(running + waiting)
    assert all(order == sorted(order) for order in orders) and made.stats.preemptions > 0
    assert groups[0].times.preemptions == 0
    assert groups[2].times.preemptions > 0


@pytest.mark.parametrize("layout", [LAYOUT, WINDOWS, ONLY_WINDOWS])
def test_samples_of_a_request_are_preempted_together_and_end_alike(small_tokenizer: Tokenizer, layout: Any) -> None:
    """Also where what the first has said since puts it far behind the window at which the others fork."""
    chunks: list[list[Chunk]] = [[], []]
    single = seeing(small_tokenizer, layout)
    add(single, [9] * 50, 100, chunks[0], n=3, temperature=1.0)
    run_out(single)
    made = seeing(small_tokenizer, layout)
    group = add(made, [9] * 50, 100, chunks[1], n=3, temperature=1.0)
    for _ in range(6):
        for _ in range(12):
            made.step()
            if not group.done:
                assert len({s.num_computed > 0 for s in group.sequences}) == 1
        if not group.done and group in made.scheduler.running:
            step = Step()
            made.scheduler._preempt(group, step)
            assert all(s.cache.num_held == 0 and s.num_computed == 0 for s in group.sequences)
    run_out(made)
    assert group.times.preemptions >= 3
    for index in range(3):
        tokens = [[t for c in heard if c.index == index for t in c.token_ids] for heard in chunks]
        assert tokens[0] == tokens[1] and len(tokens[0]) == 100


@pytest.mark.parametrize("n", [2, 5])
def test_samples_compute_their_prompt_once(small_tokenizer: Tokenizer, n: int) -> None:
    made = seeing(small_tokenizer, prefix_sharing=False)
    group = add(made, [4] * 100, 20, n=n, temperature=1.0)
    run_out(made)
    assert isinstance(made.executor, Seeing)
    assert made.executor.rows == made.stats.tokens == 100 + n * 19
    assert made.stats.copies == n - 1 and made.stats.generated == 20 * n
    assert group.samples[-1].usage is not None or any(s.usage for s in group.samples)


def test_a_prefix_that_is_there_is_not_computed(small_tokenizer: Tokenizer) -> None:
    made = seeing(small_tokenizer)
    add(made, range(70), 5)
    run_out(made)
    before = made.stats.tokens
    again = add(made, [*range(64), 1, 2, 3], 5)
    run_out(made)
    assert made.stats.prefix_hit_tokens == 64 and made.stats.tokens - before == 3 + 4
    (usage,) = [s.usage for s in again.samples]
    assert usage.cached_tokens == again.samples[0].stats.cached_tokens == 64
    other = made.add(made.request((*range(70),), SamplingParams(max_tokens=1, seed=1), "salt"), lambda chunk: None)
    run_out(made)
    assert other.samples[0].usage.cached_tokens == 0


def test_what_can_never_fit_is_refused_with_both_numbers(small_tokenizer: Tokenizer) -> None:
    made = seeing(small_tokenizer, num_slabs=8)
    each = LAYOUT.slab_bytes
    add(made, [1] * 30, 98)
    for n, tokens, needs in ((1, 99, 9), (3, 34, 10)):
        message = f"need {needs * each} bytes of KV cache and kv_bytes allows {8 * each}"
        with pytest.raises(ParameterError, match=message):
            add(made, [1] * 30, tokens, n=n)
    add(made, [1] * 30, 18, n=3)
    windows = seeing(small_tokenizer, ONLY_WINDOWS, num_slabs=8, max_batch_tokens=8)
    group = add(windows, [1] * 30, 360)  # far more than 8 slabs of tokens, never at once
    run_out(made)
    run_out(windows)
    assert group.samples[0].num_generated == 360


def test_waiting_is_bounded(small_tokenizer: Tokenizer) -> None:
    made = seeing(small_tokenizer, max_sequences=2, max_waiting=3)
    for _ in range(5):
        add(made, [1])
    with pytest.raises(TryAgainError, match="5 requests wait already"):
        add(made, [1])
    made.step()
    assert not made.has_room and len(made.scheduler.waiting) == 3
    run_out(made)
    add(made, [1])


def test_cancelling_frees_within_two_steps(small_tokenizer: Tokenizer) -> None:
    made = seeing(small_tokenizer, prefix_sharing=False)
    groups = [add(made, [i + 1] * 40, 50, n=2) for i in range(2)]
    for _ in range(5):
        made.step()
    held = made.scheduler.pool.num_held
    made.cancel(groups[0])
    assert made.scheduler.pool.num_held == held // 2
    made.scheduler.check_integrity()
    run_out(made)
    assert [s.finish_reason for s in groups[0].samples] == ["cancelled"] * 2
    assert [s.finish_reason for s in groups[1].samples] == ["length"] * 2


def broken(made: Engine, at: int, error: BaseException) -> None:
    """The engine's executor raises in its at-th pass from now."""
    run, left = made.executor.run, [at]

    def failing(work: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            raise error
        return run(work)

    made.executor.run = failing  # type: ignore[method-assign]


def test_one_damaged_row_ends_one_request(small_tokenizer: Tokenizer) -> None:
    made = seeing(small_tokenizer)
    chunks: list[list[Chunk]] = [[], [], []]
    groups = [add(made, [i + 1] * 9, 30, heard) for i, heard in enumerate(chunks)]
    made.step()
    run, done = made.executor.run, [False]

    def poisoned(work: Any) -> Any:
        logits = run(work)
        if not done[0]:
            logits[1, 5] = np.nan
            done[0] = True
        return logits

    made.executor.run = poisoned  # type: ignore[method-assign]
    run_out(made)
    assert [type(group.error).__name__ for group in groups] == ["NoneType", "DataError", "NoneType"]
    assert [heard[-1].finish_reason for heard in chunks] == ["length", "error", "length"]
    assert (made.stats.failed, made.stats.finished) == (1, 2)


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt()])
def test_a_step_that_fails_ends_its_requests_only(small_tokenizer: Tokenizer, error: BaseException) -> None:
    made = seeing(small_tokenizer, max_sequences=2)
    groups = [add(made, [i + 1] * 9, 30) for i in range(4)]
    broken(made, 3, error)
    made.step(), made.step()
    if isinstance(error, Exception):
        assert made.step()
    else:
        with pytest.raises(KeyboardInterrupt):
            made.step()
    made.scheduler.check_integrity()
    assert [group.done for group in groups] == [True, True, False, False]
    run_out(made)
    reason = "error" if isinstance(error, Exception) else "cancelled"
    assert [group.samples[0].finish_reason for group in groups] == [reason] * 2 + ["length"] * 2
    again, alone = [], []
    add(made, [1] * 9, 30, again)
    run_out(made)
    other = seeing(small_tokenizer)
    add(other, [1] * 9, 30, alone)
    run_out(other)
    assert [c.token_ids for c in again] == [c.token_ids for c in alone]


def test_usage_and_stats_add_up(small_tokenizer: Tokenizer) -> None:
    made = seeing(small_tokenizer, prefix_sharing=False)
    group = add(made, [4] * 40, 20, n=3, temperature=1.0)
    peak = 0
    while made.step():
        peak = max(peak, made.scheduler.pool.num_held * LAYOUT.slab_bytes)
    ((usage, stats),) = [(s.usage, s.stats) for s in group.samples if s.usage is not None]
    assert usage.prompt_tokens == 40 and usage.completion_tokens == 60 and usage.kv_tokens_kept == 59
    shared, own = 40 // 16, 4 - 40 // 16
    assert usage.kv_bytes_peak == (shared + 3 * own) * LAYOUT.slab_bytes >= peak
    assert usage.kv_bytes_now == 4 * LAYOUT.slab_bytes  # the others ended just before
    assert stats.first_token == pytest.approx(stats.queue + stats.prefill)
    assert sum(stats.inter_token) <= stats.decode and len(stats.inter_token) == 19


@pytest.mark.parametrize("samples", [1, 2, 8])
def test_samples_of_a_model_with_one_window_fit_or_are_refused(small_tokenizer: Tokenizer, samples: int) -> None:
    """In the least pool that takes them, and in one slab less."""
    accepted = []
    for slabs in range(1, 120):
        made = seeing(small_tokenizer, ONE_WINDOW, slabs, max_batch_tokens=32)
        try:
            group = add(made, [3] * 270, 10, n=samples)
        except ParameterError as error:
            assert not accepted and f"allows {slabs * ONE_WINDOW.slab_bytes}" in str(error)
            continue
        accepted.append(slabs)
        if len(accepted) > 2:
            break
        steps_to(made, group)
        assert group.error is None and all(len(s.choice().token_ids) == 10 for s in group.samples)
        run_out(made)
    assert accepted


def test_what_fails_in_one_text_ends_only_its_request(small_tokenizer: Tokenizer) -> None:
    made, _ = engine(small_tokenizer, num_blocks=40)
    heard: list[list[Chunk]] = [[], [], []]
    groups = [add(made, [3 + i] * 5, 10, chunks) for i, chunks in enumerate(heard)]
    made.step()

    def broken(ids: object) -> str:
        raise RuntimeError("no text")

    groups[1].samples[0].detokenizer.add = broken
    run_out(made)
    assert isinstance(groups[1].error, RuntimeError) and heard[1][-1].finish_reason == "error"
    assert [g.error for g in (groups[0], groups[2])] == [None, None]
    assert all(len(g.samples[0].choice().token_ids) == 10 for g in (groups[0], groups[2]))
    assert (made.stats.failed, made.stats.finished) == (1, 2)
