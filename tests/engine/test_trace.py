"""Traces on the engine's path: they are there where asked for, change nothing, and cost nothing where not."""

from __future__ import annotations

import math

import pytest
from engine.small_engines import small_engine
from test_matrix import tokenizer  # noqa: F401

from kvik.decoding.sampler import sample_rows_by_definition
from kvik.engine import sequence
from kvik.params import SamplingParams

PROMPT = tuple(i * 7 % 96 for i in range(40))


def answers(made, params, mates=0):
    """The choices of a request among others."""
    groups = [made.add(made.request(PROMPT, params), lambda chunk: None)]
    groups += [
        made.add(made.request(PROMPT[i:], SamplingParams(max_tokens=9, ignore_eos=True, seed=i)), lambda chunk: None)
        for i in range(mates)
    ]
    while made.step():
        pass
    return [sample.choice() for sample in groups[0].samples]


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.0}, {"top_k": 9, "top_p": 0.8}, {"n": 2, "min_tokens": 3}])
def test_a_trace_changes_nothing(tokenizer, settings):  # noqa: F811
    params = {"max_tokens": 12, "seed": 3, "ignore_eos": True, **settings}
    plain = answers(small_engine(tokenizer, "grouped heads"), SamplingParams(**params))
    traced = answers(small_engine(tokenizer, "grouped heads"), SamplingParams(**params, trace=True), mates=3)
    for one, other in zip(plain, traced, strict=True):
        assert one.trace is None and one.token_ids == other.token_ids
        assert one.cumulative_logprob == other.cumulative_logprob
        assert tuple(t.token_id for t in other.trace) == other.token_ids
        assert [t.position for t in other.trace] == [40 + i for i in range(12)]
        assert math.fsum(math.log(t.probability) for t in other.trace) == pytest.approx(
            one.cumulative_logprob, abs=1e-4
        )
        assert all(t.drawn_probability > 0 for t in other.trace)
        assert all(t.stages[-1].kept <= (9 if "top_k" in settings else 10**6) for t in other.trace)


def test_nothing_is_computed_without_being_asked(tokenizer, monkeypatch):  # noqa: F811
    def fail(*_):
        raise AssertionError("traced")

    monkeypatch.setattr(sequence, "trace_token", fail)
    made = small_engine(tokenizer, "grouped heads")
    assert answers(made, SamplingParams(max_tokens=3, ignore_eos=True))[0].finish_reason == "length"
    group = made.add(made.request(PROMPT, SamplingParams(max_tokens=3, trace=True)), lambda chunk: None)
    while made.step():
        pass
    assert isinstance(group.error, AssertionError)  # what fails in a trace ends its request alone


def test_edits_are_seen_as_they_were_at_the_draw(tokenizer, monkeypatch):  # noqa: F811
    rows = []
    kept = sequence.trace_token

    def note(logits, request, token_id):
        (drawn,) = sample_rows_by_definition(logits[None], [request])
        rows.append(drawn.token_id == token_id)
        return kept(logits, request, token_id)

    monkeypatch.setattr(sequence, "trace_token", note)
    params = SamplingParams(
        max_tokens=20, seed=1, ignore_eos=True, trace=True, repetition_penalty=3.0, presence_penalty=1.0
    )
    (choice,) = answers(small_engine(tokenizer, "grouped heads"), params)
    assert rows == [True] * 20
    names = [[stage.name for stage in one.stages] for one in choice.trace]
    assert names[0][:2] == ["logits", "repetition_penalty"] and names[5][2] == "presence_penalty"
