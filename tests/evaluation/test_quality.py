from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from kvik.errors import DataError, ParameterError
from kvik.evaluation.quality import measure_quality, offline_text, text_windows

VOCABULARY = 30


def words(text: str) -> list[int]:
    return [ord(c) % VOCABULARY for c in text]


class Model:
    """Logits from a fixed table by token, moved by noise of its own; notes what it was asked and what is alive."""

    def __init__(self, noise: float, seed: int = 1) -> None:
        table = np.random.default_rng(0).normal(0, 2, (VOCABULARY, VOCABULARY))
        self.table = (table + np.random.default_rng(seed).normal(0, 1, table.shape) * noise).astype(np.float32)
        self.asked: list[list[int]] = []

    def score(self, inputs, *, reduce=True):
        assert not reduce
        self.asked += [list(ids) for ids in inputs]
        return [SimpleNamespace(logits=self.table[list(ids)]) for ids in inputs]


class Sure:
    """Gives the next token a probability of its own, the others share the rest."""

    def __init__(self, probability: float) -> None:
        self.probability = probability

    def score(self, inputs, *, reduce=True):
        (ids,) = inputs
        rest = (1 - self.probability) / (VOCABULARY - 1)
        found = np.full((len(ids), VOCABULARY), np.log(rest), np.float32)
        found[np.arange(len(ids) - 1), ids[1:]] = np.log(self.probability)
        return [SimpleNamespace(logits=found)]


def measured(base, other, windows):
    seen = []
    return measure_quality(base, other, windows, lambda done, total: seen.append((done, total))), seen


def test_a_model_against_itself_loses_nothing() -> None:
    windows = text_windows(words, "some text that goes on " * 20, 100, size=32)
    found, seen = measured(Model(0), Model(0), windows)
    assert (found.tokens, found.kl_mean, found.kl_p99, found.same_top, found.perplexity_ratio) == (100, 0, 0, 1, 1)
    assert found.perplexity == found.base_perplexity > 1
    assert seen[0] == (0, 100) and seen[-1] == (100, 100) and len(seen) == len(windows) + 1


def test_figures_whose_answer_is_known() -> None:
    windows = text_windows(words, "abcdefgh" * 40, 64, size=17)
    found, _ = measured(Sure(0.5), Sure(0.25), windows)
    kl = 0.5 * np.log(0.5 / 0.25) + 0.5 * np.log(0.5 / 0.75)
    assert found.kl_mean == pytest.approx(kl, rel=1e-6) and found.kl_p99 == pytest.approx(kl, rel=1e-6)
    assert found.base_perplexity == pytest.approx(2, rel=1e-6) and found.perplexity == pytest.approx(4, rel=1e-6)
    assert found.perplexity_ratio == pytest.approx(2, rel=1e-6) and found.same_top == 1.0


def test_the_figures_are_those_of_all_rows_at_once() -> None:
    """Against plain numpy on the concatenated rows."""
    windows = text_windows(words, "windows of unequal length, one after another; " * 9, 150, size=40)
    base, other = Model(0), Model(0.3)
    found, _ = measured(base, other, windows)
    before = np.concatenate([window[:-1] for window in windows])
    after = np.concatenate([window[1:] for window in windows])

    def distribution(model: Model) -> np.ndarray:
        weight = np.exp(model.table[before].astype(np.float64))
        return weight / weight.sum(axis=1, keepdims=True)

    p, q = distribution(base), distribution(other)
    kl = (p * np.log(p / q)).sum(axis=1)
    assert found.tokens == len(after) == 150
    assert found.kl_mean == pytest.approx(kl.mean()) and found.kl_p99 == pytest.approx(np.percentile(kl, 99))
    assert found.same_top == np.mean(p.argmax(axis=1) == q.argmax(axis=1)) < 1
    rows = np.arange(150)
    assert found.perplexity == pytest.approx(np.exp(-np.log(q[rows, after]).mean()))
    assert found.perplexity_ratio == pytest.approx(found.perplexity / found.base_perplexity)


class TestWindows:
    text = "".join(map(chr, range(65, 65 + 100)))

    def test_each_token_is_read_once_and_every_prediction_counts(self) -> None:
        windows = text_windows(ord_ids, self.text, 50, size=20)
        assert [len(window) for window in windows] == [20, 20, 13]
        assert [i for window in windows for i in window] == ord_ids(self.text)[:53] and sum(
            len(w) - 1 for w in windows
        ) == 50

    def test_every_window_begins_as_the_model_s_texts_do(self) -> None:
        windows = text_windows(ord_ids, self.text, 50, size=20, bos=1)
        assert all(window[0] == 1 for window in windows) and max(map(len, windows)) == 20
        assert [i for window in windows for i in window[1:]] == ord_ids(self.text)[:50]

    def test_a_text_too_short_gives_what_it_has(self) -> None:
        assert text_windows(ord_ids, "abc", 50, size=20) == [[97, 98, 99]]
        with pytest.raises(DataError, match="no token to predict"):
            text_windows(ord_ids, "a", 50, size=20)
        assert text_windows(ord_ids, "a", 50, size=20, bos=1) == [[1, 97]]

    @pytest.mark.parametrize(("tokens", "size"), [(0, 20), (5, 1)])
    def test_refusals(self, tokens: int, size: int) -> None:
        with pytest.raises(ParameterError, match="at least"):
            text_windows(ord_ids, self.text, tokens, size=size)


def ord_ids(text: str) -> list[int]:
    return [ord(c) for c in text]


def test_the_offline_text_is_english_and_long_enough() -> None:
    text = offline_text()
    assert len(text) > 200_000 and " the " in text
