"""A state that goes back and forth, or splits, says what one says that never did."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvik.decoding import DecodingState, Edits, Sampler, Words
from kvik.decoding.history import Breakers, Repeats
from kvik.decoding.state import UNBOUNDED
from kvik.errors import ParameterError
from kvik.params import BeamParams, SamplingParams

WORDS = Words(bad=((3,), (1, 2), (2, 2, 0)), breakers=Breakers([(4,), (0, 1)]))
EVERYTHING = SamplingParams(
    logit_bias={1: 2.0}, min_tokens=3, stop_token_ids=(2,), bad_words=("given as tokens",), repetition_penalty=1.1,
    presence_penalty=0.1, frequency_penalty=0.1, dry_multiplier=1.0, dry_allowed_length=1, no_repeat_ngram_size=2,
)  # fmt: skip


class Counting:
    """A grammar that allows the token of its number of tokens, modulo 5."""

    def __init__(self, accepted: int = 7) -> None:
        self.accepted = accepted  # a snapshot need not begin at 0

    def mask(self) -> np.ndarray:
        return np.array([1 << (self.accepted % 5)], np.uint32)

    def accept(self, token: int) -> None:
        self.accepted += 1

    def snapshot(self) -> int:
        return self.accepted

    def restore(self, snapshot: int) -> None:
        self.accepted = snapshot

    def fork(self) -> Counting:
        return Counting(self.accepted)

    stopped = False


def made(params: SamplingParams | BeamParams, prompt: list[int]) -> DecodingState:
    return DecodingState(params, prompt, 5, end_ids=(0,), words=WORDS, matcher=Counting())


def same(left: Edits | None, right: Edits | None) -> bool:
    if left is None or right is None:
        return left is right
    pairs = zip(left, right, strict=True)
    return all(
        np.array_equal(np.sort(a), np.sort(b))
        if isinstance(a, np.ndarray) and isinstance(b, np.ndarray)
        else a is b or a == b
        for a, b in pairs
    )


def counts(edits: Edits | None) -> dict[int, int]:
    if edits is None or edits.counted is None or edits.counts is None:
        return {}
    return dict(zip(edits.counted.tolist(), edits.counts.tolist(), strict=True))


tokens = st.integers(0, 4)
moves = st.lists(
    st.one_of(
        st.tuples(st.just("accept"), tokens), st.tuples(st.sampled_from(["back", "fork", "leave"]), st.integers(0, 6))
    ),
    max_size=40,
)
kinds = st.sampled_from(
    [EVERYTHING, SamplingParams(no_repeat_ngram_size=1), SamplingParams(no_repeat_ngram_size=4),
     SamplingParams(dry_multiplier=0.5, dry_range=5, dry_base=1.0), SamplingParams(repetition_penalty=2.0),
     SamplingParams(frequency_penalty=1.0), BeamParams(repetition_penalty=1.2, no_repeat_ngram_size=3, min_tokens=2)]
)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(kinds, st.lists(tokens, min_size=1, max_size=12), moves)
def test_restore_and_fork_are_a_replay_from_scratch(
    params: SamplingParams | BeamParams, prompt: list[int], path: list[tuple[str, int]]
) -> None:
    state, answer = made(params, prompt), list[int]()
    for move, value in path:
        if move == "accept":
            state.accept(value)
            answer.append(value)
        elif move == "back":
            place = max(0, len(answer) - value)
            state.restore(place)
            del answer[place:]
        elif move == "fork":
            state, left = state.fork(), state
            for token in range(value):  # the one left behind goes its own way
                left.accept(token % 5)
        else:
            other = state.fork()
            for token in range(value):
                other.accept(token % 5)
        fresh = made(params, prompt)
        for token in answer:
            fresh.accept(token)
        assert state.snapshot() == len(answer)
        assert same(state.edits(), fresh.edits()) and counts(state.edits()) == counts(fresh.edits())


def test_nothing_to_do_is_none() -> None:
    for params in (SamplingParams(), SamplingParams(temperature=0.0, top_k=3), BeamParams()):
        state = DecodingState(params, [1, 2], 5, end_ids=(0,))
        assert state.edits() is None
        state.accept(1)
        assert state.edits() is None


def test_min_tokens_bans_the_ends_and_stop_tokens_until_then() -> None:
    row = np.array([5, 4, 3, 2], np.float32)
    params = SamplingParams(temperature=0.0, min_tokens=2, stop_token_ids=(1,))
    sampler, state = Sampler(4, params, 0), DecodingState(params, [3], 4, end_ids=(0,))
    drawn = []
    for _ in range(4):
        drawn.append(sampler.sample(row, 10, state).token_id)
        state.accept(2)
    assert drawn == [2, 2, 0, 0]
    state.restore(1)
    assert sampler.sample(row, 10, state).token_id == 2


def test_a_snapshot_ahead_is_refused() -> None:
    state = made(EVERYTHING, [1])
    state.accept(2)
    for place in (2, -1):
        with pytest.raises(ParameterError, match=r"in \[0, 1\]"):
            state.restore(place)


def test_a_long_prompt_costs_little_a_token() -> None:
    rng = np.random.default_rng(0)
    words = (np.arange(1, 3001) ** -1.0).cumsum()
    text = np.searchsorted(words, rng.random(4400) * words[-1]).tolist()  # as frequent as words of a text are
    params = SamplingParams(dry_multiplier=0.8, no_repeat_ngram_size=3, repetition_penalty=1.1, frequency_penalty=0.1)
    state = DecodingState(params, text[:4000], 3000, words=Words(breakers=Breakers([(11,), (12, 13)])))
    took = []
    for token in text[4000:]:
        begun = time.perf_counter()
        state.accept(token)
        state.edits()
        took.append(time.perf_counter() - begun)
    assert np.median(took) < 2e-4  # about 4e-5 on an idle machine


def repeats_one_by_one(ids: np.ndarray, most: int) -> tuple[list[int], list[int]]:
    """The definition: each place compared token by token."""
    places, lengths = [], []
    for place in range(len(ids) - 1):
        length = 0
        while length <= place and ids[place - length] == ids[len(ids) - 1 - length]:
            length += 1
        if length:
            places.append(place)
            lengths.append(min(length, most))
    return places, lengths


@given(st.integers(0, 3).flatmap(lambda top: st.lists(st.integers(0, top), max_size=60)), st.integers(1, 70))
def test_repeats_are_those_of_each_place(text: list[int], most: int) -> None:
    ids = np.array(text, np.int32)
    found = Repeats(ids, most)
    assert (found.places.tolist(), found.lengths.tolist()) == repeats_one_by_one(ids, most)


@pytest.mark.parametrize("period", [1, 2, 7])
def test_a_text_that_repeats_itself_costs_what_its_length_does(period: int) -> None:
    ids = (np.arange(32_000) % period).astype(np.int32)
    begun = time.perf_counter()
    found = Repeats(ids, UNBOUNDED)
    assert (
        time.perf_counter() - begun < 0.15
    )  # about 0.01 on an idle machine; seconds where passes are as many as tokens
    np.testing.assert_array_equal(found.lengths, found.places + 1)
