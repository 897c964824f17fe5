"""Answers of a shape, with everything else a request may ask for."""

from __future__ import annotations

import json
import re

import jsonschema
import pytest
from engine.small_engines import small_engine
from test_matrix import PROMPT, run_all, said

from kvik.decoding import grammar as grammar_module
from kvik.decoding.grammar import GrammarMatcher
from kvik.engine.engine import Engine
from kvik.engine.request import Chunk
from kvik.errors import ParameterError
from kvik.params import BeamParams, Grammar, SamplingParams
from kvik.text.tokenizer import Tokenizer

PERSON = {
    "type": "object",
    "properties": {"a": {"type": "string", "maxLength": 6}, "b": {"enum": ["x", "y"]}, "c": {"type": "boolean"}},
    "required": ["a", "b", "c"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False},
}
SCHEMA = Grammar.json_schema(PERSON)
DATE = Grammar.regex("[0-9]{4}-[01][0-9]")


@pytest.fixture
def engine(small_tokenizer: Tokenizer) -> Engine:
    return small_engine(small_tokenizer, "grouped heads")


def one(
    engine: Engine, params: SamplingParams | BeamParams, prompt: tuple[int, ...] = PROMPT
) -> list[tuple[str, list[int], str]]:
    (chunks,) = run_all(engine, [(prompt, params)])
    count = max(chunk.index for chunk in chunks) + 1
    return [(text, tokens, reasons[-1]) for text, tokens, _, reasons in said(chunks, count)]


@pytest.mark.parametrize(
    "more",
    [{"temperature": 1.5}, {"temperature": 0.0}, {"top_p": 0.5, "repetition_penalty": 1.3}, {"min_p": 0.2, "top_k": 3},
     {"presence_penalty": 2.0, "frequency_penalty": 1.0}, {"logit_bias": {5: 100.0}}],
    ids=str,
)  # fmt: skip
def test_answers_are_of_the_schema(engine: Engine, more: dict[str, object]) -> None:
    for seed in range(3):
        answers = one(engine, SamplingParams(grammar=SCHEMA, seed=seed, n=3, max_tokens=80, **more))
        for text, _, reason in answers:
            assert reason == "stop"
            jsonschema.validate(json.loads(text), PERSON)


@pytest.mark.parametrize("num_beams", [1, 2, 5])
def test_beams_follow_the_grammar(engine: Engine, num_beams: int) -> None:
    params = BeamParams(num_beams=num_beams, num_return_sequences=num_beams, grammar=SCHEMA, max_tokens=80)
    for text, _, reason in one(engine, params):
        assert reason == "stop"
        jsonschema.validate(json.loads(text), PERSON)


def test_the_text_ends_where_the_grammar_does(engine: Engine) -> None:
    ((text, tokens, reason),) = one(engine, SamplingParams(grammar=DATE, seed=1, max_tokens=50))
    assert re.fullmatch(DATE.text, text) and reason == "stop"
    assert not set(tokens) & engine.model.tokenizer.special_ids  # nothing was computed to end it


def test_a_length_cuts_it(engine: Engine) -> None:
    ((text, tokens, reason),) = one(engine, SamplingParams(grammar=DATE, seed=1, max_tokens=3))
    assert reason == "length" and len(tokens) == 3 and re.fullmatch("[0-9]{3}", text)


def test_what_contradicts_it_leaves_no_token(engine: Engine) -> None:
    ((text, _, reason),) = one(engine, SamplingParams(grammar=DATE, seed=1, min_tokens=20, max_tokens=50))
    assert reason == "no_token" and re.fullmatch(DATE.text, text)
    digits = [engine.model.tokenizer.encode(f"a{d}", add_special=False)[-1] for d in range(10)]
    biased = SamplingParams(grammar=DATE, seed=1, max_tokens=50, bad_words=tuple("0123456789"))
    ((text, tokens, reason),) = one(engine, biased)
    assert digits and (text, tokens, reason) == ("", [], "no_token")


def test_stop_strings_and_stop_tokens(engine: Engine) -> None:
    ((text, _, reason),) = one(engine, SamplingParams(grammar=DATE, seed=1, stop=("-",), max_tokens=50))
    assert reason == "stop" and re.fullmatch("[0-9]{4}", text)
    digit = engine.model.tokenizer.encode("a7", add_special=False)[-1]
    several = SamplingParams(grammar=Grammar.regex("[0-8]{2,9}"), stop_token_ids=(digit,), seed=2, max_tokens=50)
    ((text, tokens, reason),) = one(engine, several)  # the token ends the text, where it may end, and is not in it
    assert reason == "stop" and digit not in tokens[:-1] and re.fullmatch("[0-68]{2,9}", text)


@pytest.mark.parametrize("seed", range(6))
def test_a_stop_token_of_the_text_is_not_in_the_text(engine: Engine, seed: int) -> None:
    """It comes where the text may end and nowhere else, even where its bias makes it the most likely token."""
    digit = engine.model.tokenizer.encode("a1", add_special=False)[-1]
    prompt = PROMPT[seed:]
    whole, open_ended = Grammar.regex("[0-9]{6}"), Grammar.regex("[0-9]{2,9}")
    more = {"stop_token_ids": (digit,), "max_tokens": 50}
    beams: list[SamplingParams | BeamParams] = [
        BeamParams(num_beams=3, num_return_sequences=3, grammar=grammar, **more) for grammar in (whole, open_ended)
    ]
    samples = [SamplingParams(seed=seed, n=3, grammar=whole, logit_bias=bias, **more) for bias in ({}, {digit: 100.0})]
    for params in beams + samples:
        for text, tokens, reason in one(engine, params, prompt):
            assert reason == "stop" and params.grammar is not None and re.fullmatch(params.grammar.text, text)
            assert "1" not in text and digit not in tokens[:-1]
    drawn = SamplingParams(seed=seed, grammar=open_ended, logit_bias={digit: 100.0}, **more)
    ((text, tokens, reason),) = one(engine, drawn, prompt)
    assert reason == "stop" and len(text) == 2 and len(tokens) == 3 and tokens[-1] == digit


def test_the_same_through_preemption_and_beside_others(small_tokenizer: Tokenizer) -> None:
    requests = [
        (PROMPT[i : i + 25], SamplingParams(grammar=Grammar.regex("[a-z ]{50}"), seed=i, max_tokens=60, logprobs=1))
        for i in range(6)
    ]
    alone = [run_all(small_engine(small_tokenizer, "windows"), [request])[0] for request in requests]
    tight = small_engine(small_tokenizer, "windows", num_slabs=10)
    together = run_all(tight, requests)
    assert tight.stats.preemptions > 0
    assert [said(chunks, 1) for chunks in together] == [said(chunks, 1) for chunks in alone]


def test_the_request_is_refused_at_once(engine: Engine) -> None:
    for params in (SamplingParams(grammar=Grammar.regex("(a")), BeamParams(grammar=Grammar.regex("(a"))):
        with pytest.raises(ParameterError, match="grammar: "):
            engine.request(PROMPT, params)
    assert not engine.has_work


@pytest.mark.parametrize("at", [0, 3])
@pytest.mark.parametrize("params", [SamplingParams(grammar=DATE, seed=1, n=2), BeamParams(grammar=DATE, num_beams=3)])
def test_a_matcher_that_raises_ends_its_request_alone(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, params: SamplingParams | BeamParams, at: int
) -> None:
    """Whatever it raises; requests beside it, of its kind and of the other, say what they say alone."""
    beside = [SamplingParams(seed=4, max_tokens=12), BeamParams(num_beams=2, max_tokens=12)]
    want = run_all(engine, [(PROMPT, one) for one in beside])
    sound = GrammarMatcher.mask

    def failing(matcher: GrammarMatcher) -> object:
        if matcher.snapshot() == at:
            raise RuntimeError("a defect")
        return sound(matcher)

    monkeypatch.setattr(GrammarMatcher, "mask", failing)
    heard: list[list[Chunk]] = [[], [], []]
    bad, *_ = [
        engine.add(engine.request(PROMPT, one), chunks.append)
        for one, chunks in zip([params, *beside], heard, strict=True)
    ]
    while engine.step():
        engine.scheduler.check_integrity()
    assert isinstance(bad.error, RuntimeError) and {c.finish_reason for c in heard[0]} >= {"error"}
    assert [said(chunks, 1) for chunks in heard[1:]] == [said(chunks, 1) for chunks in want]
    assert engine.scheduler.pool.num_held == 0 and engine.stats.failed == 1


@pytest.mark.parametrize("costly", [SamplingParams(grammar=DATE, seed=1, n=2), BeamParams(grammar=DATE)])
def test_a_grammar_that_turns_out_too_costly_ends_its_request_alone(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, costly: SamplingParams | BeamParams
) -> None:
    (want,) = run_all(engine, [(PROMPT, SamplingParams(seed=4, max_tokens=12))])
    heard: list[list[object]] = [[], []]
    bad = engine.add(engine.request(PROMPT, costly), heard[0].append)
    engine.add(engine.request(PROMPT, SamplingParams(seed=4, max_tokens=12)), heard[1].append)
    monkeypatch.setattr(grammar_module, "BUDGET", -1.0)
    while engine.step():
        engine.scheduler.check_integrity()
    assert isinstance(bad.error, ParameterError) and "grammar: too costly" in str(bad.error)
    assert said(heard[1], 1) == said(want, 1)
    assert engine.scheduler.pool.num_held == 0
