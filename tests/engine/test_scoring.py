"""Texts that are scored: rows of logits reduced, kept or read, from any token on, beside whatever else runs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from engine.fakes import Seeing, engine, run_out, seeing
from engine.small_engines import small_engine
from hypothesis import given, settings
from hypothesis import strategies as st

from kvik.engine.engine import Engine
from kvik.engine.request import LogitRows, ScoreResult
from kvik.engine.scoring import SCORE_COST, Reading
from kvik.engine.sequence import Group
from kvik.errors import DataError, ParameterError, TryAgainError
from kvik.llm import LLM, score_result
from kvik.params import SamplingParams
from kvik.text.tokenizer import Tokenizer

IDS = tuple(np.random.default_rng(0).integers(0, 98, 90).tolist())


def add(made: Engine, ids: tuple[int, ...] = IDS, **asked: Any) -> Group:
    return made.add_score(made.score_request(ids, **asked))


def score(made: Engine, ids: tuple[int, ...] = IDS, **asked: Any) -> ScoreResult:
    group = add(made, ids, **asked)
    run_out(made)
    return score_result(group)


def llm_of(made: Engine) -> LLM:
    """The part of an LLM that reads rows."""
    llm = LLM.__new__(LLM)
    llm.engine = made
    return llm


def assert_same(some: ScoreResult, others: ScoreResult) -> None:
    assert (some.token_ids, some.first, some.top) == (others.token_ids, others.first, others.top)
    assert np.array_equal(some.logprobs, others.logprobs) and np.array_equal(some.logsumexp, others.logsumexp)


def from_token(whole: ScoreResult, first: int, top: int) -> ScoreResult:
    """What scoring from another token on must say."""
    at = first - whole.first
    return ScoreResult(
        whole.token_ids, first, whole.logprobs[at:], whole.logsumexp[at:],
        tuple(place[:top] for place in whole.top[at:]) if top else (),
    )  # fmt: skip


def test_figures_are_those_of_the_kept_rows(small_tokenizer: Tokenizer) -> None:
    made = seeing(small_tokenizer, prefix_sharing=False)
    kept, reduced = score(made, reduce=False, top=3), score(made, top=3)
    assert reduced.logits is None and kept.logits is not None
    assert kept.logits.shape == (90, small_tokenizer.vocab_size) and kept.logits.dtype == np.float32
    assert_same(kept, reduced)
    rows = kept.logits[:-1].astype(np.float64)
    total = np.log(np.exp(rows).sum(axis=1))
    assert np.abs(reduced.logsumexp - total).max() < 1e-6
    assert np.abs(reduced.logprobs - (rows[np.arange(89), IDS[1:]] - total)).max() < 1e-6
    order = np.argsort(-rows, axis=1, kind="stable")[:, :3]
    assert [[one.token_id for one in place] for place in reduced.top] == order.tolist()
    best = [[one.logprob for one in place] for place in reduced.top]
    assert np.abs(best - (np.take_along_axis(rows, order, 1) - total[:, None])).max() < 1e-6


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_schedule_says_the_same(small_tokenizer: Tokenizer, data: st.DataObject) -> None:
    """Several texts from any token on, in chunks of any size, beside generating, with preemptions and shared prefixes."""
    whole = score(seeing(small_tokenizer, prefix_sharing=False), reduce=False, top=4)
    slabs = data.draw(st.sampled_from([8, 11, 400]))
    batch, sharing = data.draw(st.sampled_from([1, 7, 33, 512])), data.draw(st.booleans())
    made = seeing(small_tokenizer, num_slabs=slabs, max_batch_tokens=batch, prefix_sharing=sharing)
    asked = []
    for _ in range(data.draw(st.integers(1, 4))):
        first, top = data.draw(st.integers(1, 90)), data.draw(st.sampled_from([0, 1, 4]))
        reduce = data.draw(st.booleans())
        asked.append((first, top, add(made, reduce=reduce, first=first, top=top)))
        if data.draw(st.booleans()):
            made.add(made.request(IDS[:40], SamplingParams(max_tokens=20, ignore_eos=True)), lambda chunk: None)
    run_out(made)
    for first, top, group in asked:
        got = score_result(group)
        assert_same(got, from_token(whole, first, top))
        if got.logits is not None:
            assert whole.logits is not None and np.array_equal(got.logits, whole.logits[first - 1 :])


@pytest.mark.parametrize("model", ["grouped heads", "windows"])
def test_both_executors_say_nearly_the_same(small_tokenizer: Tokenizer, model: str) -> None:
    engines = [small_engine(small_tokenizer, model, kv="f32", definition=d, max_batch_tokens=50) for d in (False, True)]
    native, defined = (score(made, top=3, first=7) for made in engines)
    assert native.first == defined.first == 7 and len(native.logprobs) == 83
    assert np.abs(native.logprobs - defined.logprobs).max() < 0.1  # int8 steps that round to the other side
    assert np.abs(native.logprobs - defined.logprobs).mean() < 0.01
    kept = score(engines[1], reduce=False)
    assert kept.logits is not None
    rows = kept.logits[6:-1].astype(np.float64)
    assert np.abs(defined.logsumexp - np.log(np.exp(rows).sum(axis=1))).max() < 1e-6


def test_rows_before_the_first_cost_no_logits_and_may_be_in_the_cache(small_tokenizer: Tokenizer) -> None:
    made, script = engine(small_tokenizer, batch=64, prefix_sharing=True, num_blocks=16)
    score(made, first=70)
    assert sum(len(work.reduce_rows) for work in script.passes) == 20
    assert sum(len(work.tokens) for work in script.passes) == 89  # nothing follows the last
    script.passes.clear()
    score(made, first=70)
    assert made.stats.prefix_hit_tokens == 64 and sum(len(work.tokens) for work in script.passes) == 25
    script.passes.clear()
    score(made, first=64, reduce=False)  # row 63 is wanted, so that only 48 tokens may be hits
    assert sum(len(work.tokens) for work in script.passes) == 42 and sum(len(w.logit_rows) for w in script.passes) == 27


def test_reduced_rows_fill_a_step_and_kept_ones_do_not(small_tokenizer: Tokenizer) -> None:
    ids = IDS * 4
    for asked, most in (({}, 359), ({"reduce": False}, 64), ({"top": 1024}, 64), ({"top": 500}, 131)):
        made, script = engine(small_tokenizer, batch=512, context=400, num_blocks=60)
        add(made, ids, **asked)
        add(made, ids, **asked)
        run_out(made)
        rows = [len(work.logit_rows) + len(work.reduce_rows) for work in script.passes]
        assert max(rows) == (512 if not asked else most) and sum(rows) == 2 * (360 if "reduce" in asked else 359)
        assert max(len(work.reduce_rows) * work.top for work in script.passes) <= SCORE_COST


@pytest.mark.parametrize("reduce", [True, False])
def test_nothing_to_score(small_tokenizer: Tokenizer, reduce: bool) -> None:
    made = seeing(small_tokenizer)
    for ids in ((5,), IDS):
        found = score(made, ids, first=len(ids), top=2, reduce=reduce)
        assert len(found.logprobs) == len(found.logsumexp) == len(found.top) == 0 and found.first == len(ids)
        assert (found.logits is None) == reduce
        if found.logits is not None:
            whole = score(made, ids, reduce=False).logits
            assert whole is not None and np.array_equal(found.logits, whole[-1:])
    assert made.stats.requests == made.stats.finished


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"first": 0}, r"first must be an integer in \[1, 90\], got 0"), ({"first": 91}, "got 91"),
        ({"first": True}, "got True"), ({"first": 1.0}, "got 1.0"), ({"top": 1025}, r"top must be an integer in \[0, 1024\]"),
    ],
)  # fmt: skip
def test_refusals(small_tokenizer: Tokenizer, asked: dict[str, Any], message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        add(seeing(small_tokenizer), **asked)


@pytest.mark.parametrize("asked", [{}, {"reduce": False}, {"top": 3}])
def test_a_row_that_is_not_finite_ends_its_text_only(small_tokenizer: Tokenizer, asked: dict[str, Any]) -> None:
    made = seeing(small_tokenizer, max_batch_tokens=40, prefix_sharing=False)
    executor: Any = made.executor
    make = executor.make

    def damaged(work: Any, rows: Any) -> Any:
        logits = make(work, rows)
        logits[(work.slots[rows] == 50) & (work.tokens[rows] == IDS[50]), 3] = np.nan
        return logits

    executor.make = damaged
    bad, good = add(made, **asked), add(made, IDS[1:], **asked)
    run_out(made)
    with pytest.raises(DataError, match="the logits after token 50 are not finite: the model's weights are damaged"):
        score_result(bad)
    assert len(score_result(good).logprobs) == 88
    assert len(score(made, first=52, **asked).logprobs) == 38  # the row is not wanted


# ---- reading rows


def read(made: Engine, ids: tuple[int, ...] = IDS, first: int = 1) -> list[LogitRows]:
    return [rows._replace(logits=rows.logits.copy()) for rows in llm_of(made).score_rows(ids, first=first)]


@pytest.mark.parametrize("batch", [1, 20, 512])
@pytest.mark.parametrize("first", [1, 34, 89, 90])
def test_rows_come_in_order(small_tokenizer: Tokenizer, batch: int, first: int) -> None:
    made = seeing(small_tokenizer, max_batch_tokens=batch)
    made.add(made.request(IDS[:40], SamplingParams(max_tokens=60, ignore_eos=True)), lambda chunk: None)
    assert_whole(read(made, first=first), first, small_tokenizer)
    run_out(made)


def assert_whole(found: list[LogitRows], first: int, tokenizer: Tokenizer) -> None:
    whole = score(seeing(tokenizer, prefix_sharing=False), reduce=False).logits
    assert all(1 <= len(rows.logits) <= 64 for rows in found)
    assert [rows.first for rows in found] == [first + sum(len(r.logits) for r in found[:i]) for i in range(len(found))]
    joined = np.concatenate([np.empty((0, tokenizer.vocab_size), np.float32), *(r.logits for r in found)])
    assert whole is not None and np.array_equal(joined, whole[first - 1 : -1])


def test_rows_come_once_though_their_blocks_are_taken(small_tokenizer: Tokenizer) -> None:
    made = seeing(small_tokenizer, num_slabs=10, max_batch_tokens=20, prefix_sharing=False)
    made.add(made.request(IDS[:40], SamplingParams(max_tokens=60, ignore_eos=True)), lambda chunk: None)
    found = []
    for rows in llm_of(made).score_rows(IDS):
        found.append(rows._replace(logits=rows.logits.copy()))
        for _ in range(15):
            made.step()
        assert np.array_equal(rows.logits, found[-1].logits)
    assert made.stats.preemptions
    assert_whole(found, 1, small_tokenizer)
    run_out(made)


def test_a_text_that_is_read_waits_for_its_reader(small_tokenizer: Tokenizer) -> None:
    """Others go on meanwhile, and a wait is no defect; what was handed out stays as it was."""
    made = seeing(small_tokenizer, max_batch_tokens=512)
    rows = llm_of(made).score_rows(IDS)
    first = next(rows)
    before = first.logits.copy()
    assert len(before) == 64 and not made.step() and made.has_work
    assert len(score_other := add(made, IDS[:30]).samples) == 1 and made.step() and not made.step()
    assert score_other[0].unscored == 0 and np.array_equal(first.logits, before)
    second = next(rows)
    assert (second.first, len(second.logits)) == (65, 25)
    assert not list(rows)
    run_out(made)


def test_closing_cancels(small_tokenizer: Tokenizer) -> None:
    made = seeing(small_tokenizer)
    rows = llm_of(made).score_rows(IDS)
    assert not made.has_work  # nothing is queued before the first is asked for
    next(rows)
    assert made.scheduler.pool.num_held
    rows.close()
    assert not made.has_work and made.stats.cancelled == 1
    run_out(made)


def test_a_reader_is_told_why_rows_end(small_tokenizer: Tokenizer) -> None:
    made = seeing(small_tokenizer, max_batch_tokens=20)
    rows = llm_of(made).score_rows(IDS)
    next(rows)
    (group,) = made.scheduler.running
    made.cancel(group)
    with pytest.raises(TryAgainError, match="cancelled"):
        next(rows)
    executor: Any = made.executor
    assert isinstance(executor, Seeing)

    def broken(work: Any) -> Any:
        raise RuntimeError("broken")

    rows = llm_of(made).score_rows(IDS)
    next(rows)
    executor.run = broken
    with pytest.raises(RuntimeError, match="broken"):
        next(rows)
    with pytest.raises(ParameterError, match="first must be"):
        llm_of(made).score_rows(IDS, first=0)  # at the call
    run_out(made)


def test_rows_read_are_those_of_the_executor(small_tokenizer: Tokenizer) -> None:
    """The executor writes into the reader's memory where it can, and may not touch it while it is read."""
    made = small_engine(small_tokenizer, "windows", max_batch_tokens=30)
    whole = score(small_engine(small_tokenizer, "windows"), reduce=False).logits
    rows = llm_of(made).score_rows(IDS, first=3)
    for item in rows:
        add(made, IDS[::-1], reduce=False)
        made.step()
        assert whole is not None and np.array_equal(item.logits, whole[item.first - 1 :][: len(item.logits)])
    run_out(made)


def test_a_reading_without_rows_is_done_at_once(small_tokenizer: Tokenizer) -> None:
    made = seeing(small_tokenizer)
    group = made.add_reading(made.score_request((4,)))
    assert group.done and isinstance(group.samples[0], Reading) and read(made, (4,)) == []


@pytest.mark.parametrize("tight", [{"num_slabs": 10}, {"max_sequences": 1}])
def test_readers_make_room_for_each_other(small_tokenizer: Tokenizer, tight: dict[str, Any]) -> None:
    """Who waits for its reader gives its blocks to those that could go on, so that taking turns always comes to an end."""
    made = seeing(small_tokenizer, max_batch_tokens=20, prefix_sharing=False, **tight)
    llm = llm_of(made)
    found: list[list[LogitRows]] = [[], []]
    for each in zip(llm.score_rows(IDS), llm.score_rows(IDS), strict=True):
        for rows, kept in zip(each, found, strict=True):
            kept.append(rows._replace(logits=rows.logits.copy()))
        assert len(llm_score(llm, IDS[:70])) == 69
        made.scheduler.check_integrity()
    for rows in found:
        assert_whole(rows, 1, small_tokenizer)
    assert made.stats.preemptions > 8
    run_out(made)


def llm_score(llm: LLM, ids: tuple[int, ...]) -> Any:
    """As a caller scores something between two items that it reads."""
    (found,) = llm.score([list(ids)])
    return found.logprobs
