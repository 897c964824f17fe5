"""Perplexity on models whose log-probabilities are known."""

from __future__ import annotations

import json
import math
import random
import tracemalloc
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from evaluation.fake_text_model import BOS, FakeModel, Scored, logprob

import kvik.evaluation.window_scores as window_scores
from kvik.errors import DataError, ParameterError
from kvik.evaluation.bands import band
from kvik.evaluation.perplexity import difference, perplexity
from kvik.evaluation.segments import SEGMENT_BYTES, SegmentSums
from kvik.evaluation.window_scores import GroupScores

WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "Ångström",
    "中文",
    "🥪",
    "and",
    "then",
    "some",
]


def some_text(words: int, seed: int = 0) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=words))


class Losses:
    """Texts of given numbers of tokens, each of which costs what the text's first byte says."""

    def __init__(self, losses: dict[str, float]) -> None:
        self.losses = losses
        self.model = FakeModel()
        self.tokenizer, self.info = self.model.tokenizer, self.model.info

    def score(self, inputs: Any, *, reduce: bool = True, top: int = 0, first: Any = 1) -> list[Scored]:
        texts = ["".join(self.tokenizer.piece(t).decode() for t in ids) for ids in inputs]
        return [Scored(1, np.full(len(t) - 1, -self.losses[t[0]])) for t in texts]


def test_every_predicted_token_counts_alike() -> None:
    """Texts of 10 and 100 tokens with a loss of 5 and 3: 9 and 99 predictions, so 23.73; by N it would be 24.09."""
    found = perplexity(Losses({"a": 5.0, "b": 3.0}), ["a" * 10, "b" * 100], window=64, stride=63)  # fmt: skip
    assert found.predictions == 108
    assert found.token_perplexity == pytest.approx(math.exp((9 * 5 + 99 * 3) / 108))
    assert round(found.token_perplexity, 2) == 23.73
    assert round(math.exp((10 * 5 + 100 * 3) / 110), 2) == 24.09


@pytest.mark.parametrize("add_bos", [False, True])
@pytest.mark.parametrize(("window", "stride"), [(64, None), (17, 5), (2, 1), (9, 8)])
def test_figures_are_those_of_the_definition(add_bos: bool, window: int, stride: int | None) -> None:
    """In the fake a token's loss depends on the one before only, so that every window gives the same."""
    texts = [some_text(n, n) for n in (1, 40, 7, 200)]
    found = perplexity(FakeModel(3, add_bos), texts, window=window, stride=stride)
    nll, num_bytes = [], 0
    tokenizer = FakeModel(3).tokenizer
    for text in texts:
        ids = [BOS] * add_bos + tokenizer.encode(text)
        nll += [-logprob(a, b) for a, b in pairwise(ids)]
        num_bytes += len(text.encode()) - (0 if add_bos else 3)
    if add_bos and (stride or window - 1) == window - 1:  # then a window's first token has BOS before it, not its own
        assert found.predictions == len(nll)
        return
    total, words = math.fsum(nll), sum(len(text.split()) for text in texts)
    assert (found.predictions, found.bytes, found.words) == (len(nll), num_bytes, words)
    assert found.nll == pytest.approx(total / len(nll), rel=1e-12)
    assert found.token_perplexity == pytest.approx(math.exp(total / len(nll)))
    assert found.byte_perplexity == pytest.approx(math.exp(total / num_bytes))
    assert found.word_perplexity == pytest.approx(math.exp(total / words))
    assert found.bits_per_byte == pytest.approx(total / num_bytes / math.log(2))
    assert (found.texts, found.texts_without, found.window) == (4, 0, window)
    assert math.fsum(found.segments.nll) == pytest.approx(total)
    assert sum(found.segments.predictions) == len(nll) and sum(found.segments.bytes) == num_bytes
    assert sum(p.predictions for p in found.by_position) == len(nll)
    assert math.fsum(p.predictions * p.nll for p in found.by_position) == pytest.approx(total)
    assert found.by_position[0].first == 1 and found.by_position[-1].last == window - 1


def test_segments_hold_the_tokens_that_begin_in_them() -> None:
    texts = [some_text(700, 1), some_text(900, 2)]
    model = FakeModel(4)
    found = perplexity(model, texts, window=50, stride=20)
    want: dict[int, list[float]] = {}
    base = 0
    for text in texts:
        ids = model.tokenizer.encode(text)
        for i, (a, b) in enumerate(pairwise(ids), 1):
            want.setdefault((base + 4 * i) // SEGMENT_BYTES, []).append(-logprob(a, b))
        base += len(text.encode())
    assert found.segments.size == SEGMENT_BYTES and len(want) > 3
    assert found.segments.nll == pytest.approx([math.fsum(want[i]) for i in range(len(want))])
    assert found.segments.predictions == tuple(len(want[i]) for i in range(len(want)))


def test_many_segments_are_merged() -> None:
    sums = SegmentSums()
    rng = np.random.default_rng(0)
    values = rng.uniform(1, 2, 9001)
    for start in range(0, 9001, 100):
        at = np.arange(start, min(9001, start + 100))
        sums.add(at, values[at], np.full(len(at), 5), np.full(len(at), SEGMENT_BYTES))
    found = sums.result(9001 * SEGMENT_BYTES)
    assert found.size == 8 * SEGMENT_BYTES and len(found.nll) == math.ceil(9001 / 8) <= 2048
    assert found.nll[3] == pytest.approx(values[24:32].sum()) and found.predictions[-1] == 5
    assert sums.result(9001 * 1024).bytes[0] == pytest.approx(4 * SEGMENT_BYTES), "of a text that normalization changed"


def test_pieces_and_whole_texts_are_the_same() -> None:
    text = some_text(500)
    pieces = [text[i : i + 37] for i in range(0, len(text), 37)]
    whole = perplexity(FakeModel(1, context=300), text)
    assert perplexity(FakeModel(1, context=300), [iter(pieces)]) == whole
    assert perplexity(FakeModel(1, context=300), [text]) == whole and whole.window == 300
    assert whole.text_digest != perplexity(FakeModel(1), [text, ""]).text_digest


def test_windows_are_scored_several_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(window_scores, "GROUP_TOKENS", 200)
    model = FakeModel(1, context=64)
    done: list[int] = []
    texts = [some_text(60, n) for n in range(5)] + ["xy"] * 30
    found = perplexity(model, texts, progress=done.append)
    assert all(sum(map(len, call)) <= 200 for call in model.calls) and len(model.calls[0]) == 3
    assert len(model.calls[-1]) >= 10
    assert done == sorted(done) and done[-1] == sum(len(text.encode()) for text in texts)
    model.calls.clear()
    monkeypatch.setattr(window_scores, "GROUP_TOKENS", 16)
    again = perplexity(model, texts)
    assert all(len(call) == 1 or sum(map(len, call)) <= 16 for call in model.calls)
    assert again.nll == pytest.approx(found.nll, rel=1e-13) and again.token_digest == found.token_digest


def test_memory_does_not_grow_with_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three times the text, which never exists as a whole."""

    monkeypatch.setattr(window_scores, "GROUP_TOKENS", 2000)

    class Flat(FakeModel):
        def score(self, inputs: Any, *, reduce: bool = True, top: int = 0, first: Any = 1) -> list[Scored]:
            return [Scored(f, np.full(len(ids) - f, -1.0)) for ids, f in zip(inputs, first, strict=True)]

    def peak(pieces: int) -> int:
        piece, peaks = "sixteen bytes at" * 4096, [0]
        tracemalloc.start()
        try:
            found = perplexity(
                Flat(64, context=300), [(piece for _ in range(pieces))],
                progress=lambda _: peaks.append(tracemalloc.get_traced_memory()[1]),
            )  # fmt: skip
        finally:
            tracemalloc.stop()
        assert found.bytes == pieces * len(piece) - 64 and len(peaks) > pieces // 2
        return peaks[-1]

    assert peak(24) < 1.5 * peak(8)


class TestGoingOn:
    def test_the_same_numbers_wherever_it_stopped(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(window_scores, "GROUP_TOKENS", 300)
        texts = [some_text(300, n) for n in range(4)]
        kept: list[GroupScores] = []
        want = perplexity(FakeModel(2), texts, heard=kept.append)
        lines = [json.dumps(scores._asdict()) for scores in kept]
        assert len(lines) > 8
        for stop in (0, 1, 5, len(lines)):
            model, heard = FakeModel(2), []
            known = [GroupScores(**json.loads(line)) for line in lines[:stop]]
            assert perplexity(model, texts, known=known, heard=heard.append) == want
            assert len(model.calls) == len(heard) == len(lines) - stop

    def test_figures_of_other_texts_are_refused(self) -> None:
        kept: list[GroupScores] = []
        perplexity(FakeModel(2), some_text(30), heard=kept.append)
        with pytest.raises(DataError, match="group 0 of windows is of other tokens"):
            perplexity(FakeModel(2), some_text(31), known=kept)
        broken = kept[0]._replace(segments=((7, 1.0),))
        with pytest.raises(DataError, match="of other tokens"):
            perplexity(FakeModel(2), some_text(30), known=[broken])


class TestHowSure:
    def test_the_interval_holds_the_mean_of_all_such_texts(self) -> None:
        found = [perplexity(FakeModel(3), some_text(4000, n)) for n in range(16)]
        means = [one.nll for one in found]
        errors = [one.standard_error for one in found if one.standard_error is not None]
        assert 0.5 < np.mean(errors) / np.std(means, ddof=1) < 2
        intervals = [one.interval for one in found if one.interval is not None]
        held = [low < math.exp(np.mean(means)) < high for _, low, high in intervals]
        assert len(held) == 16 and sum(held) >= 12
        assert all(one.low < one.value < one.high for one in intervals)
        assert [one.value for one in intervals] == [one.token_perplexity for one in found]

    def test_one_segment_says_nothing(self) -> None:
        found = perplexity(FakeModel(1), "a few words")
        assert found.standard_error is None and found.interval is None and found.nll > 0

    def test_differences_are_paired(self) -> None:
        text = some_text(3000)
        a, b = perplexity(FakeModel(1), text), perplexity(FakeModel(1, shift=-0.01), text)
        gap = difference(a, b)
        assert gap.nll is not None and gap.nll == pytest.approx((0.01, 0.01, 0.01))
        assert gap.bits_per_byte == pytest.approx((0.01 / math.log(2),) * 3, rel=1e-3)
        assert a.interval is not None and a.interval.low < b.token_perplexity < a.interval.high, "unpaired it is lost"

    def test_other_tokens_pair_up_by_bytes(self) -> None:
        text = some_text(3000)
        a, b = perplexity(FakeModel(1), text), perplexity(FakeModel(4), text)
        gap = difference(a, b)
        assert gap.nll is None and a.bits_per_byte is not None and b.bits_per_byte is not None
        assert gap.bits_per_byte.value == pytest.approx(b.bits_per_byte - a.bits_per_byte)
        assert gap.bits_per_byte.low < gap.bits_per_byte.value < gap.bits_per_byte.high < 0
        assert difference(b, a).bits_per_byte.value == pytest.approx(-gap.bits_per_byte.value)

    def test_other_texts_cannot_be_paired(self) -> None:
        a, b = perplexity(FakeModel(1), some_text(20)), perplexity(FakeModel(1), some_text(21))
        with pytest.raises(ParameterError, match="of different texts"):
            difference(a, b)


class TestBadInput:
    @pytest.mark.parametrize(
        ("texts", "why"),
        [
            ([], "there are no texts"),
            ("", "1 text, 1 empty"),
            (["", "a", "b"], "3 texts, 1 empty and 2 of one token"),
        ],
    )
    def test_texts_without_a_prediction(self, texts: Any, why: str) -> None:
        with pytest.raises(DataError, match=f"^no text has a token to predict: {why}$"):
            perplexity(FakeModel(1), texts)

    def test_some_without_a_prediction_are_counted(self) -> None:
        found = perplexity(FakeModel(1), ["", "a", "three more words"])
        assert (found.texts, found.texts_without, found.words) == (3, 2, 3)
        assert perplexity(FakeModel(1, add_bos=True), ["", "a"]).predictions == 1

    def test_settings_and_kinds(self) -> None:
        with pytest.raises(ParameterError, match=r"window must be an integer in \[2, 64\]"):
            perplexity(FakeModel(1), "some text", window=65)
        with pytest.raises(ParameterError, match=r"stride must be an integer in \[1, 63\]"):
            perplexity(FakeModel(1), "some text", stride=64)
        for texts in (b"bytes", 3, [b"bytes"], [3]):
            with pytest.raises(ParameterError, match="texts must be strings or pieces of them"):
                perplexity(FakeModel(1), texts)  # type: ignore[arg-type]

    @pytest.mark.parametrize("wrong", [math.nan, -math.inf])
    def test_log_probabilities_that_are_none(self, wrong: float) -> None:
        model = FakeModel(1, shift=wrong)
        with pytest.raises(DataError, match=f"log-probability {wrong}"):
            perplexity(model, "some text")

    def test_too_few_log_probabilities(self) -> None:
        model = FakeModel(1)
        model.score = lambda inputs, **_: [Scored(1, np.zeros(2))]  # type: ignore[method-assign]
        with pytest.raises(DataError, match="8 log-probabilities were asked for, the model gave 2"):
            perplexity(model, "some text")


def test_bands_are_the_guides() -> None:
    named = {
        1.0: "excellent",
        19.99: "excellent",
        20: "good",
        50: "fair",
        100: "poor",
        300: "poor",
        300.01: "very poor",
    }
    assert {value: band(value) for value in named} == named


def test_words_across_pieces() -> None:
    found = perplexity(FakeModel(1), [["  on", "e tw", "o", "", " ", " three\n"]])
    assert found.words == 3 and found.bytes == len("  one two  three\n") - 1
