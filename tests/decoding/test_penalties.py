"""What changes single logits: against obvious loops, transformers' processors bit for bit, and llama.cpp's DRY written anew."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from transformers.generation.logits_process import (
    MinLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
)

from kvik.decoding import DecodingState, Words, penalties
from kvik.decoding.edits import edit_stages, edited
from kvik.decoding.history import Breakers
from kvik.errors import ParameterError
from kvik.params import SamplingParams

MakeRow = Callable[[np.random.Generator, int, str], np.ndarray]
SIZE = 300


def ids(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def after(row: np.ndarray, params: SamplingParams, prompt: list[int], answer: list[int], **more: object) -> np.ndarray:
    """The row as the next draw sees it."""
    state = DecodingState(params, prompt, row.size, **more)  # type: ignore[arg-type]
    for token in answer:
        state.accept(token)
    return edited(row, state.edits())


def process(row: np.ndarray, processor: Callable[..., torch.Tensor], text: list[int]) -> np.ndarray:
    return processor(torch.tensor([text]), torch.from_numpy(row.copy())[None])[0].numpy()


@pytest.fixture(params=["normal", "peaked", "flat"])
def row(request: pytest.FixtureRequest, make_row: MakeRow) -> np.ndarray:
    made = make_row(np.random.default_rng(4), SIZE, request.param)
    made.flags.writeable = False
    return made


TEXT = np.random.default_rng(8).integers(0, 40, 60).tolist()


@pytest.mark.parametrize("value", [0.5, 1.1, 1.3, 9.7])
def test_repetition_penalty_is_transformers_own(row: np.ndarray, value: float) -> None:
    ours = after(row, SamplingParams(repetition_penalty=value), TEXT[:20], TEXT[20:])
    np.testing.assert_array_equal(ours, process(row, RepetitionPenaltyLogitsProcessor(value), TEXT))


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_no_repeat_ngram_is_transformers_own(row: np.ndarray, n: int) -> None:
    text = np.random.default_rng(n).integers(0, 4, 200).tolist()
    for end in (1, 2, 5, 80, 200):
        ours = after(row, SamplingParams(no_repeat_ngram_size=n), text[: end // 2], text[end // 2 : end])
        np.testing.assert_array_equal(ours, process(row, NoRepeatNGramLogitsProcessor(n), text[:end]))


def test_bad_words_are_transformers_own(row: np.ndarray) -> None:
    words = [[5], [7, 8], [1, 2, 3], [2, 3], [9, 9, 9]]
    processor = NoBadWordsLogitsProcessor(words)
    params = SamplingParams(bad_words=("their tokens are given",))
    for text in ([1, 2], [3, 7], [9, 9], [9], [2], [0, 1, 2, 9, 9]):
        ours = after(row, params, text[:1], text[1:], words=Words(tuple(map(tuple, words))))
        np.testing.assert_array_equal(ours, process(row, processor, text))


def test_logit_bias_is_transformers_sequence_bias(row: np.ndarray) -> None:
    biases = {3: 1.7, 250: -100.0, 0: 0.1}
    ours = after(row, SamplingParams(logit_bias=biases), [1], [])
    processor = SequenceBiasLogitsProcessor({(token,): bias for token, bias in biases.items()})
    np.testing.assert_array_equal(ours, process(row, processor, [1]))


def test_min_tokens_is_transformers_min_length(row: np.ndarray) -> None:
    for count in range(4):
        text = [1] * (1 + count)
        ours = after(row, SamplingParams(min_tokens=2, stop_token_ids=(7,)), [1], [1] * count, end_ids=(9,))
        processor = MinLengthLogitsProcessor(3, [7, 9])
        np.testing.assert_array_equal(ours, process(row, processor, text))


def test_presence_and_frequency_look_at_the_answer_only(row: np.ndarray) -> None:
    params = SamplingParams(presence_penalty=0.7, frequency_penalty=-0.3)
    ours = after(row, params, [1, 2, 2], [2, 5, 5, 2, 2])
    want = row.copy()
    for token, count in ((2, 3), (5, 2)):
        want[token] = want[token] - np.float32(0.7)
        want[token] = want[token] - np.float32(count) * np.float32(-0.3)
    np.testing.assert_array_equal(ours, want)
    np.testing.assert_array_equal(after(row, params, [1, 2], []), row)


def dry(text: list[int], params: SamplingParams, breakers: list[list[int]]) -> dict[int, float]:
    """llama.cpp's penalties, from its description: each earlier place compared with the end, token by token."""
    window = text[-params.dry_range :] if params.dry_range else text
    size = len(window)
    limit = size
    for back in range(size):  # the breaker that begins last, and the longest of those
        begin = size - 1 - back
        fits = [b for b in breakers if window[begin : begin + len(b)] == b]
        if fits:
            limit = size - begin - max(map(len, fits))
            break
    longest: dict[int, int] = {}
    for place in range(size - 1):
        length = 0
        while length <= place and window[place - length] == window[size - 1 - length]:
            length += 1
        length = min(length, limit)
        if length >= params.dry_allowed_length and size > params.dry_allowed_length:
            following = window[place + 1]
            longest[following] = max(longest.get(following, 0), length)
    cap = math.inf if params.dry_base <= 1.000001 else int(88.7228391 / math.log(params.dry_base))
    return {
        token: params.dry_multiplier * params.dry_base ** min(length - params.dry_allowed_length, cap)
        for token, length in longest.items()
    }


@pytest.mark.parametrize("seed", range(30))
def test_dry_is_llama_cpps(seed: int) -> None:
    rng = np.random.default_rng(seed)
    text = rng.integers(0, int(rng.choice([1, 2, 3, 6])), int(rng.integers(1, 90))).tolist()
    breakers = [[int(t) for t in rng.integers(0, 6, size)] for size in rng.integers(1, 4, int(rng.integers(0, 4)))]
    params = SamplingParams(
        dry_multiplier=0.8, dry_base=float(rng.choice([1.0, 1.75, 4.0])),
        dry_allowed_length=int(rng.choice([1, 2, 5])), dry_range=int(rng.choice([0, 3, 40])),
    )  # fmt: skip
    state = DecodingState(params, text[:1], 9, words=Words(breakers=Breakers(breakers)))
    for end in range(1, len(text) + 1):
        edits = state.edits()
        found = {} if edits is None or edits.dry_ids is None else dict(
            zip(edits.dry_ids.tolist(), edits.dry_penalties.tolist(), strict=True)  # type: ignore[union-attr]
        )  # fmt: skip
        want = dry(text[:end], params, breakers)
        assert found.keys() == want.keys()
        np.testing.assert_allclose([found[t] for t in want], list(want.values()), rtol=1e-6)
        if end < len(text):
            state.accept(text[end])


def test_dry_is_bounded() -> None:
    params = SamplingParams(dry_multiplier=100.0, dry_base=10.0)
    ours = after(np.array([3, 2, -np.inf], np.float32), params, [0] * 500, [])
    assert np.isfinite(ours[0]) and ours[0] < -1e38 and ours[1] == 2 and ours[2] == -np.inf


def test_finite_stays_finite_and_removed_stays_removed() -> None:
    big = np.finfo(np.float32).max
    row = np.array([big, -big, -np.inf, 0.0], np.float32)
    every = ids(0, 1, 2, 3)
    for changed in (
        penalties.with_bias(row, every, np.full(4, 100, np.float32)),
        penalties.repetition(row, every, 0.1),
        penalties.repetition(row, every, 10.0),
        penalties.presence(row, every, -2.0),
        penalties.frequency(row, every, ids(1, 2, 2**31 - 1, 2**31 - 1), 2.0),
        penalties.subtract(row, every, np.full(4, big, np.float32)),
    ):
        assert np.isfinite(changed[[0, 1, 3]]).all() and changed[2] == -np.inf and changed.dtype == np.float32


def test_mask_and_ban() -> None:
    row = np.arange(70, dtype=np.float32)
    allowed = np.zeros(3, np.uint32)
    for token in (0, 31, 32, 69):
        allowed[token // 32] |= np.uint32(1 << (token % 32))
    assert np.flatnonzero(penalties.mask(row, allowed) > -np.inf).tolist() == [0, 31, 32, 69]
    assert (penalties.ban(row, ids(3, 3, 69)) == -np.inf).sum() == 2
    with pytest.raises(ParameterError, match="3 words, got"):
        penalties.mask(row, allowed[:2])
    with pytest.raises(ParameterError, match=r"in \[0, 69\], got 70, -1"):
        penalties.ban(row, ids(70, 4, -1))
    with pytest.raises(ParameterError, match="repetition_penalty"):
        penalties.repetition(row, ids(1), 0.0)


def test_stages_come_in_the_declared_order() -> None:
    params = SamplingParams(
        logit_bias={1: 2.0}, min_tokens=9, stop_token_ids=(2,), repetition_penalty=1.1, presence_penalty=0.1,
        frequency_penalty=0.1, dry_multiplier=1.0, no_repeat_ngram_size=2,
    )  # fmt: skip
    state = DecodingState(params, [3, 4, 5, 3, 4], 40)
    for token in (5, 3, 4):
        state.accept(token)
    names = [name for name, _ in edit_stages(np.zeros(40, np.float32), state.edits())]
    assert names == [
        "logit_bias", "banned", "repetition_penalty", "presence_penalty", "frequency_penalty", "dry", "no_repeat_ngram_size"
    ]  # fmt: skip


def test_all_ids_outside_the_vocabulary_are_named() -> None:
    with pytest.raises(ParameterError, match=r"logit_bias must be in \[0, 9\], got 10, 12"):
        DecodingState(SamplingParams(logit_bias={10: 1.0, 3: 1.0, 12: 1.0}), [1], 10)
    with pytest.raises(ParameterError, match=r"end-of-text and stop token ids .* got 11"):
        DecodingState(SamplingParams(stop_token_ids=(11,)), [1], 10)
    with pytest.raises(ParameterError, match=r"bad_words .* got 99"):
        DecodingState(SamplingParams(), [1], 10, words=Words(bad=((1, 99),)))
