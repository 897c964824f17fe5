"""Beam searches on the engine's path: without a model where the text decides, over the executor that sees where tokens do."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import numpy as np
import pytest
from engine.fakes import LAYOUT, ONLY_WINDOWS, WINDOWS, engine, run_out, seeing
from engine.schedules import Job, Totals, alone, assert_same, random_beams, random_jobs, run_schedule

from kvik.decoding.grammar import GrammarMatcher
from kvik.engine.engine import Engine
from kvik.engine.request import Chunk
from kvik.errors import DataError, ParameterError
from kvik.params import BeamParams, Grammar, SamplingParams
from kvik.text.tokenizer import Tokenizer

LAYOUTS = {"plain": LAYOUT, "windows": WINDOWS, "only windows": ONLY_WINDOWS}
PROMPT = tuple(i * 7 % 96 for i in range(40))


def run(made: Engine, prompt: tuple[int, ...] = PROMPT, **params: Any) -> tuple[Any, list[Chunk]]:
    chunks: list[Chunk] = []
    group = made.add(made.request(prompt, BeamParams(**params)), chunks.append)
    run_out(made)
    if group.error is not None:
        raise group.error
    return group, chunks


def test_beams_share_what_they_have_in_common(small_tokenizer: Tokenizer) -> None:
    made = seeing(small_tokenizer)
    group, chunks = run(made, num_beams=4, num_return_sequences=3, max_tokens=40, ignore_eos=True)
    assert [c.index for c in chunks] == [0, 1, 2]
    assert [len(c.token_ids) for c in chunks] == [40] * 3 and len({c.token_ids for c in chunks}) == 3
    assert [c.finish_reason for c in chunks] == ["length"] * 3 and [c.usage is None for c in chunks] == [
        True,
        True,
        False,
    ]
    usage = chunks[-1].usage
    assert usage is not None and usage.completion_tokens == 120 and usage.prompt_tokens == 40
    assert made.stats.copies > 0 and made.executor.rows == 40 + 39 * 4  # the prompt once, then a row a beam
    block = LAYOUT.block_bytes[0]
    assert usage.kv_bytes_unshared == 4 * 5 * block
    assert 5 * block < usage.kv_bytes_peak < usage.kv_bytes_unshared
    scores = [answer.choice().score for answer in group.samples]
    assert scores == sorted(scores, reverse=True)
    for answer in group.samples:
        choice = answer.choice()
        assert choice.score == pytest.approx(choice.cumulative_logprob / 40, abs=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_noted_bytes_are_those_of_the_tables(small_tokenizer: Tokenizer, layout: str) -> None:
    made = seeing(small_tokenizer, LAYOUTS[layout])
    group = made.add(made.request(PROMPT, BeamParams(num_beams=3, max_tokens=50, ignore_eos=True)), lambda chunk: None)
    seen = 0
    while made.step():
        if not group.done:
            blocks = {block for beam in group.sequences for block in beam.cache.held()}
            assert group.held_bytes() == group.sequences[0].cache.bytes_of(blocks)
            seen += 1
    assert seen == 49


def test_one_beam_is_greedy(small_tokenizer: Tokenizer) -> None:
    made = seeing(small_tokenizer)
    chunks: list[Chunk] = []
    made.add(made.request(PROMPT, SamplingParams(temperature=0.0, max_tokens=60)), chunks.append)
    run_out(made)
    _, (found,) = run(seeing(small_tokenizer), num_beams=1, max_tokens=60)
    assert found.token_ids == tuple(token for chunk in chunks for token in chunk.token_ids)
    assert found.text == "".join(chunk.text for chunk in chunks) and found.finish_reason == chunks[-1].finish_reason


def follow(made: Engine, script: Any, rows: dict[int, dict[int, float]]) -> None:
    """After a token come those of its entry with their probabilities, after any other the next one."""

    def logits(work: Any) -> Any:
        found = np.full((len(work.logit_rows), script.vocab_size), -1e4, np.float32)
        for row, token in zip(found, work.tokens[work.logit_rows].tolist(), strict=True):
            for following, probability in rows.get(token, {(token + 1) % script.vocab_size: 1.0}).items():
                row[following] = np.log(probability)
        return found

    script.run = logits


def test_a_better_answer_than_the_greedy_one(small_tokenizer: Tokenizer) -> None:
    made, script = engine(small_tokenizer)
    follow(made, script, {10: {20: 0.6, 30: 0.4}, 20: {40: 0.5, 41: 0.5}, 30: {50: 1.0}})
    _, (found,) = run(made, (10,), num_beams=1, max_tokens=2, ignore_eos=True)
    assert found.token_ids == (20, 40)
    group, (found,) = run(made, (10,), num_beams=2, max_tokens=2, ignore_eos=True, length_penalty=0.0, trace=True)
    assert found.token_ids == (30, 50) and group.samples[0].choice().score == pytest.approx(np.log(0.4), abs=1e-5)
    first, second = group.search.steps
    assert [(one.parent, one.token_id) for one in first.beams] == [(0, 20), (0, 30)] and first.finished == ()
    assert second.beams == () and [(one.parent, one.token_id) for one in second.finished] == [(1, 50), (0, 40)]
    assert [one.score for one in second.finished] == pytest.approx([np.log(0.4), np.log(0.3)], abs=1e-5)


def ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return [next(t for t in range(98) if tokenizer.piece(t, 0) == c.encode()) for c in text]


def test_a_stop_string_finishes_a_beam_before_it(small_tokenizer: Tokenizer) -> None:
    made, script = engine(small_tokenizer)
    a, b, c, d = ids(small_tokenizer, "abcd")
    follow(made, script, {a: {b: 0.7, d: 0.3}, b: {c: 1.0}, c: {d: 1.0}, d: {d: 1.0}})
    _, chunks = run(
        made, (a,), num_beams=2, num_return_sequences=2, max_tokens=5, ignore_eos=True, stop=("bc",), length_penalty=0.0
    )
    assert [(one.text, one.token_ids, one.finish_reason) for one in chunks] == [
        ("", (b, c), "stop"), ("ddddd", (d,) * 5, "length"),
    ]  # fmt: skip


def test_a_stop_token_finishes_a_beam_and_is_kept(small_tokenizer: Tokenizer) -> None:
    made, script = engine(small_tokenizer)
    a, b, c = ids(small_tokenizer, "abc")
    follow(made, script, {a: {b: 0.9, a: 0.1}, b: {c: 1.0}})
    _, (found,) = run(
        made, (a,), num_beams=2, max_tokens=9, stop_token_ids=(c,), early_stopping=True, length_penalty=0.0
    )
    assert (found.text, found.token_ids, found.finish_reason) == ("b", (b, c), "stop")


def test_log_probabilities_of_the_chosen_tokens(small_tokenizer: Tokenizer) -> None:
    made = seeing(small_tokenizer)
    group, chunks = run(made, num_beams=3, num_return_sequences=2, max_tokens=20, logprobs=4, repetition_penalty=1.2)
    for answer, chunk in zip(group.samples, chunks, strict=True):
        choice = answer.choice()
        assert chunk.logprobs == choice.logprobs and [x.token_id for x in choice.logprobs] == list(choice.token_ids)
        assert sum(x.logprob for x in choice.logprobs) == pytest.approx(choice.cumulative_logprob)
        for one in choice.logprobs:
            assert len(one.top) == 4 and [x.logprob for x in one.top] == sorted(
                (x.logprob for x in one.top), reverse=True
            )
            assert one.logprob <= one.top[0].logprob
    _, (plain,) = run(seeing(small_tokenizer), num_beams=3, max_tokens=20, repetition_penalty=1.2)
    assert plain.logprobs is None and plain.token_ids == chunks[0].token_ids


def test_where_nothing_can_follow(small_tokenizer: Tokenizer) -> None:
    """No n-gram of one token twice, in a vocabulary of 98: after 98 tokens there is none."""
    made = seeing(small_tokenizer)
    _, (found,) = run(made, (5,), num_beams=2, no_repeat_ngram_size=1, ignore_eos=True, num_return_sequences=2)
    assert found.finish_reason == "no_token" and sorted((5, *found.token_ids)) == list(range(98))


def test_cancelled_on_the_way(small_tokenizer: Tokenizer) -> None:
    made = seeing(small_tokenizer)
    for steps in (0, 1, 2, 30):
        chunks: list[Chunk] = []
        params = BeamParams(num_beams=4, num_return_sequences=2, max_tokens=60, ignore_eos=True)
        group = made.add(made.request(PROMPT, params), chunks.append)
        for _ in range(steps):
            made.step()
        made.cancel(group)
        made.scheduler.check_integrity()
        assert group.done and made.scheduler.pool.num_held == 0
        assert {chunk.finish_reason for chunk in chunks} == {"cancelled"}
        assert [len(chunk.token_ids) for chunk in chunks] == [max(0, steps)] * (2 if steps else 1)
        assert chunks[-1].usage is not None


@pytest.mark.parametrize("params", [BeamParams(num_beams=3), SamplingParams(n=3)])
def test_a_request_that_cannot_be_accounted_for_ends_nevertheless(
    small_tokenizer: Tokenizer, params: BeamParams | SamplingParams
) -> None:
    made = seeing(small_tokenizer)
    group = made.add(made.request(PROMPT, params), lambda chunk: None)
    for _ in range(3):
        made.step()

    def failing() -> int:
        raise RuntimeError("a defect")

    group.note_bytes = failing  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="a defect"):
        made.cancel(group)
    assert group.done and not made.has_work
    run_out(made)


def test_logits_that_are_not_finite_concern_their_search_only(small_tokenizer: Tokenizer) -> None:
    made = seeing(small_tokenizer, prefix_sharing=False)
    run_pass = made.executor.run

    def poisoned(work: Any) -> Any:
        logits = run_pass(work)
        last = work.spans[1:].tolist()
        for row, at in enumerate(work.logit_rows.tolist()):
            if work.tokens[at] >= 0 and work.slots[at] >= 45 and at + 1 in last and work.spans[-1] > 1 and row < 3:
                logits[row, 7] = np.nan
        return logits

    made.executor.run = poisoned  # type: ignore[method-assign]
    params = BeamParams(num_beams=3, max_tokens=20, ignore_eos=True)
    bad, good = ((made.add(made.request(p, params), c.append), c) for p, c in ((PROMPT, []), (PROMPT[:10], [])))
    run_out(made)
    assert isinstance(bad[0].error, DataError) and "position 46: the logit of token 7 is nan" in str(bad[0].error)
    assert [c.finish_reason for c in bad[1]] == ["error"] and [c.finish_reason for c in good[1]] == ["length"]


@pytest.mark.parametrize(("verb", "call"), [("accept", 1), ("accept", 3), ("fork", 1)])
@pytest.mark.parametrize("at", [1, 5])
def test_a_search_that_fails_among_its_forks_frees_them(
    small_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, verb: str, call: int, at: int
) -> None:
    """Its grammar raises in one of the calls for token `at`; a request beside it goes on."""
    beside = SamplingParams(seed=3, max_tokens=12, ignore_eos=True)
    want: list[Chunk] = []
    single = seeing(small_tokenizer)
    single.add(single.request(PROMPT[:20], beside), want.append)
    run_out(single)
    made, calls = seeing(small_tokenizer), Counter[int]()
    sound = getattr(GrammarMatcher, verb)

    def failing(matcher: GrammarMatcher, *args: int) -> Any:
        token = matcher.snapshot() + 1
        calls[token] += 1
        if token == at and calls[token] == call:
            raise RuntimeError("no text of it")
        return sound(matcher, *args)

    monkeypatch.setattr(GrammarMatcher, verb, failing)
    heard: tuple[list[Chunk], list[Chunk]] = ([], [])
    params = BeamParams(num_beams=4, grammar=Grammar.regex("[a-z]{9}"))
    bad = made.add(made.request(PROMPT, params), heard[0].append)
    made.add(made.request(PROMPT[:20], beside), heard[1].append)
    run_out(made)
    assert isinstance(bad.error, RuntimeError) and [c.finish_reason for c in heard[0]] == ["error"]
    assert [c.token_ids for c in heard[1]] == [c.token_ids for c in want]


@pytest.mark.parametrize(
    ("params", "engine_params", "message"),
    [
        ({"num_beams": 5}, {"max_sequences": 4}, "num_beams is 5; max_sequences allows 4 at once"),
        ({"max_tokens": 60}, {}, r"100 tokens of 4 beams need \d+ bytes of KV cache and kv_bytes allows"),
        ({"min_tokens": 361}, {}, "min_tokens is 361; after the prompt the context holds 360"),
        ({"stop_token_ids": (98,)}, {}, r"stop_token_ids must be in \[0, 97\], got 98"),
    ],
)
def test_what_does_not_fit_is_refused(
    small_tokenizer: Tokenizer, params: dict[str, Any], engine_params: dict[str, Any], message: str
) -> None:
    made = seeing(small_tokenizer, num_slabs=12, **engine_params)
    with pytest.raises(ParameterError, match=message):
        made.request(PROMPT, BeamParams(**params))
    assert not made.has_work


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"num_beams": 65}, r"num_beams must be in \[1, 64\]"),
        ({"num_beams": 0}, "num_beams"),
        ({"num_beams": 2, "num_return_sequences": 3}, "num_return_sequences 3 is above num_beams 2"),
        ({"num_return_sequences": 0}, "num_return_sequences"),
        ({"num_beams": 6, "num_beam_groups": 4}, "num_beam_groups 4 does not divide num_beams 6"),
        ({"diversity_penalty": 0.5}, "diversity_penalty needs num_beam_groups above 1"),
        ({"num_beam_groups": 2, "diversity_penalty": -1.0}, "diversity_penalty"),
        ({"length_penalty": float("nan")}, "length_penalty"),
        ({"length_penalty": 11.0}, "length_penalty"),
        ({"early_stopping": "always"}, "early_stopping must be True, False or 'never', got 'always'"),
        ({"early_stopping": None}, "early_stopping"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size"),
        ({"min_tokens": 3, "max_tokens": 2}, "min_tokens 3 is above max_tokens 2"),
        ({"stop": ""}, "stop"),
        ({"logprobs": 1025}, "logprobs"),
        ({"trace": 1}, "trace"),
    ],
)
def test_parameters_out_of_range(params: dict[str, Any], message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        BeamParams(**params)


@pytest.mark.parametrize("lengths", [(10.0, 1.0, 5000), (-10.0, 1.0, 5000)])
def test_extreme_length_penalties_stay_finite(small_tokenizer: Tokenizer, lengths: tuple[float, float, int]) -> None:
    group, _ = run(seeing(small_tokenizer), num_beams=2, length_penalty=lengths[0], max_tokens=100, ignore_eos=True)
    assert np.isfinite(group.samples[0].choice().score)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("schedules", [10, pytest.param(100, marks=pytest.mark.slow)])
def test_beams_in_a_pool_for_hardly_one_of_them(small_tokenizer: Tokenizer, name: str, schedules: int) -> None:
    """Beams among samples, preempted and preempted again: the same answers, and blocks are shared when they come back."""
    totals, seen = Totals(), Counter[str]()
    for seed in range(schedules):
        rng = np.random.default_rng(100 * schedules + seed)
        jobs = [Job(j.prompt, j.params, int(rng.integers(0, 4))) for j in random_jobs(rng, 98, 8)]
        for job in jobs[:5]:
            job.params = random_beams(rng)
        jobs[5].cancelled_at = int(rng.integers(1, 60))
        settings: dict[str, Any] = {"max_batch_tokens": int(rng.choice([7, 40, 512])), "max_sequences": 24}
        probe = seeing(small_tokenizer, LAYOUTS[name], 1, **settings)
        slabs = max(
            probe.admission.slabs(len(j.prompt), j.params.max_tokens or 0, j.params.num_sequences) for j in jobs
        )
        made = seeing(small_tokenizer, LAYOUTS[name], slabs, **settings)
        run_schedule(made, jobs, rng, totals)
        single = seeing(small_tokenizer, LAYOUTS[name], prefix_sharing=False)
        for job in jobs:
            assert_same(job, alone(single, job))
            if isinstance(job.params, BeamParams) and job.group is not None:
                seen["preempted"] += job.group.times.preemptions
    assert totals.preemptions > 0 and totals.copies > 0 and totals.hits > 0
    assert seen["preempted"] > 0 or name != "plain"


def test_the_tree_leads_to_the_answers(small_tokenizer: Tokenizer) -> None:
    group, chunks = run(seeing(small_tokenizer), num_beams=4, num_return_sequences=4, max_tokens=25, trace=True)
    beams: list[tuple[int, ...]] = [()]
    finished: dict[tuple[int, ...], float] = {}
    for step in group.search.steps:
        finished |= {(*beams[end.parent], end.token_id): end.score for end in step.finished}
        beams = [(*beams[one.parent], one.token_id) for one in step.beams]
        totals = [one.total for one in step.beams]
        assert totals == sorted(totals, reverse=True)
    for answer, chunk in zip(group.samples, chunks, strict=True):
        assert finished[chunk.token_ids] == answer.choice().score


def test_without_a_trace_none_is_kept(small_tokenizer: Tokenizer) -> None:
    group, _ = run(seeing(small_tokenizer), num_beams=2, max_tokens=5)
    assert group.search.steps == []


@pytest.mark.parametrize(("pattern", "count"), [("[a-f]{3,9}", 4), ("(xz|q)", 2), ("x", 1)])
def test_answers_are_of_the_grammar(small_tokenizer: Tokenizer, pattern: str, count: int) -> None:
    """All different; fewer than asked for where it has no more."""
    settings: dict[str, Any] = {"num_beams": 4, "num_return_sequences": 4, "max_tokens": 20, "length_penalty": 0.0}
    _, chunks = run(seeing(small_tokenizer), grammar=Grammar.regex(pattern), early_stopping="never", **settings)
    texts = [chunk.text for chunk in chunks]
    assert len(set(texts)) == len(texts) == count and all(re.fullmatch(pattern, text) for text in texts)
    assert {chunk.finish_reason for chunk in chunks} == {"stop"}
    assert [chunk.usage is not None for chunk in chunks] == [False] * (count - 1) + [True]
