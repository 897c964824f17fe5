"""Divergence on models whose distributions are known."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest

from kvik.errors import DataError, ParameterError
from kvik.evaluation import divergence as module
from kvik.evaluation.divergence import divergence
from kvik.evaluation.rows import compare_rows
from kvik.evaluation.statistics import paired_block_bootstrap

VOCABULARY = 30
TEXTS = ["windows of unequal length, one after another; " * 9, "and 一 more text"]


@dataclass(frozen=True)
class Info:
    name: str
    digest: str
    context_length: int = 64
    vocab_size: int = VOCABULARY


class Tokens:
    """A byte's token is its value less a multiple of the vocabulary's size."""

    vocab_size = VOCABULARY
    bos_id = 0

    def __init__(self, add_bos: bool = False, shift: int = 0) -> None:
        self.add_bos, self.shift = add_bos, shift

    def encode(self, text: str, *, add_special: bool = True, first: bool = True) -> list[int]:
        return [byte % VOCABULARY for byte in text.encode()]

    def piece(self, token: int, after: int | None = None) -> bytes:
        return bytes([97 + (token + self.shift) % VOCABULARY])


class Rows(NamedTuple):
    first: int
    logits: Any


class Model:
    """Logits from a fixed table by the token before, moved by noise of its own; `chunk` rows at a time."""

    def __init__(
        self, noise: float = 0.0, *, chunk: int = 7, seed: int = 1, add_bos: bool = False, **info: Any
    ) -> None:
        table = np.random.default_rng(0).normal(0, 2, (VOCABULARY, VOCABULARY))
        self.table = (table + np.random.default_rng(seed).normal(0, 1, table.shape) * noise).astype(np.float32)
        self.tokenizer = Tokens(add_bos)
        self.info = Info(**{"name": f"noise {noise}", "digest": f"{noise} {seed}", **info})
        self.chunk = chunk
        self.open = 0

    def score_rows(self, ids: Any, *, first: int = 1) -> Any:
        assert 1 <= first < len(ids) <= self.info.context_length
        rows = self.table[list(ids[first - 1 : -1])]
        buffer = np.empty((self.chunk, rows.shape[1]), np.float32)  # what was given before is overwritten
        self.open += 1
        try:
            for start in range(0, len(rows), self.chunk):
                part = rows[start : start + self.chunk]
                buffer[: len(part)] = part
                yield Rows(first + start, buffer[: len(part)])
        finally:
            self.open -= 1


class Sure(Model):
    """Gives the next token a probability of its own, the others share the rest."""

    def __init__(self, probability: float) -> None:
        super().__init__(digest=f"{probability}")
        self.probability = probability

    def score_rows(self, ids: Any, *, first: int = 1) -> Any:
        rest = (1 - self.probability) / (VOCABULARY - 1)
        rows = np.full((len(ids) - first, VOCABULARY), np.log(rest), np.float32)
        rows[np.arange(len(rows)), ids[first:]] = np.log(self.probability)
        yield Rows(first, rows)


def test_a_model_against_itself_loses_nothing() -> None:
    one = Model(0.5)
    for other in (one, Model(0.5, chunk=5)):
        for compare in (None, compare_rows):
            found = divergence(one, other, TEXTS, window=32, compare=compare)
            assert (found.kl_mean, found.kl_median, found.kl_p99, found.kl_max) == (0, 0, 0, 0)
            assert (found.same_top, found.num_flipped, found.flipped, found.perplexity_ratio) == (1, 0, (), 1)
            assert found.kl_interval == (0, 0, 0) and found.ratio_interval == (1, 1, 1)
            assert found.perplexity == found.reference_perplexity > 1


def test_figures_whose_answer_is_known() -> None:
    found = divergence(Sure(0.25), Sure(0.5), "abcdefgh" * 40, window=17, tokens=64)
    kl = 0.5 * np.log(0.5 / 0.25) + 0.5 * np.log(0.5 / 0.75)
    assert found.tokens == 64
    for figure in (found.kl_mean, found.kl_median, found.kl_p99, found.kl_max):
        assert figure == pytest.approx(kl, rel=1e-6)
    assert found.reference_perplexity == pytest.approx(2, rel=1e-6) and found.perplexity == pytest.approx(4, rel=1e-6)
    assert found.perplexity_ratio == pytest.approx(2, rel=1e-6) and found.same_top == 1.0
    forth = divergence(Sure(0.5), Sure(0.25), "abcdefgh" * 40, window=17, tokens=64)
    assert forth.kl_mean == pytest.approx(0.25 * np.log(0.5) + 0.75 * np.log(0.75 / 0.5), rel=1e-6)  # not symmetric


def distribution(model: Model, before: list[int]) -> np.ndarray:
    weight = np.exp(model.table[before].astype(np.float64))
    return weight / weight.sum(axis=1, keepdims=True)


@pytest.mark.parametrize(("window", "stride"), [(64, None), (20, 8)])
def test_the_figures_are_those_of_all_rows_at_once(window: int, stride: int | None) -> None:
    """Against plain numpy: in the fake a row follows from the token before only, so that every window gives the same."""
    model, reference = Model(0.3, chunk=6), Model(chunk=11)
    found = divergence(model, reference, TEXTS, window=window, stride=stride)
    texts = [reference.tokenizer.encode(text) for text in TEXTS]
    before, after = ([i for ids in texts for i in ids[part]] for part in (slice(-1), slice(1, None)))
    p, q = distribution(reference, before), distribution(model, before)
    kl = (p * np.log(p / q)).sum(axis=1)
    rows = np.arange(len(after))
    assert found.tokens == len(after) and (found.window, found.stride) == (window, stride or window - 1)
    assert found.kl_mean == pytest.approx(kl.mean()) and found.kl_max == pytest.approx(kl.max())
    assert found.kl_median == pytest.approx(np.median(kl)) and found.kl_p99 == pytest.approx(np.percentile(kl, 99))
    flipped = p.argmax(axis=1) != q.argmax(axis=1)
    assert found.num_flipped == flipped.sum() > 20 and found.same_top == pytest.approx(1 - flipped.mean())
    assert found.perplexity == pytest.approx(np.exp(-np.log(q[rows, after]).mean()))
    assert found.reference_perplexity == pytest.approx(np.exp(-np.log(p[rows, after]).mean()))
    assert found.perplexity_ratio == pytest.approx(found.perplexity / found.reference_perplexity)
    assert sum(one.predictions for one in found.by_position) == found.tokens
    assert sum(one.predictions * one.kl for one in found.by_position) == pytest.approx(kl.sum())
    assert sum(one.predictions * one.same_top for one in found.by_position) == pytest.approx((~flipped).sum())
    assert found.by_position[-1].last == window - 1
    for share, reached in found.kl_above:
        assert (kl > reached + 1e-9).mean() - 1.01 / len(kl) <= share <= (kl >= reached - 1e-9).mean() + 1.01 / len(kl)


def test_the_flips_of_the_largest_kl_are_told_with_their_place() -> None:
    model, reference = Model(0.3), Model()
    found = divergence(model, reference, TEXTS, window=20, flips=5)
    assert len(found.flipped) == 5 < found.num_flipped
    every = divergence(model, reference, TEXTS, window=20, flips=10_000).flipped
    assert len(every) == found.num_flipped and every[:5] == found.flipped
    assert [flip.kl for flip in every] == sorted((flip.kl for flip in every), reverse=True)
    assert {flip.text for flip in every} == {0, 1}
    assert divergence(model, reference, TEXTS, window=20, flips=0).flipped == ()
    for flip in every:
        ids = reference.tokenizer.encode(TEXTS[flip.text])
        before, came = ids[flip.offset - 1], ids[flip.offset]  # a byte a token
        assert flip.came == (came, chr(97 + came))
        assert flip.reference.id == reference.table[before].argmax() != model.table[before].argmax() == flip.model.id
        known = "".join(chr(97 + i) for i in ids[: flip.offset])
        assert flip.context and known.endswith(flip.context) and len(flip.context) <= 16


def test_equal_flips_are_told_in_order() -> None:
    """The token that is certain to come is another for each: all KL are the same."""
    one, other = Sure(0.9), Model()
    other.table[:] = 0
    found = divergence(other, one, "abcdef" * 10, window=20, flips=4)
    assert [flip.offset for flip in found.flipped] == sorted(flip.offset for flip in found.flipped)


def test_intervals_are_of_windows() -> None:
    model, reference = Model(0.3), Model()
    found = divergence(model, reference, TEXTS[0], window=20)
    ids = reference.tokenizer.encode(TEXTS[0])
    parts = [ids[start : start + 20] for start in range(0, len(ids) - 1, 19)]
    nll = [
        [-np.log(distribution(one, part[:-1])[np.arange(len(part) - 1), part[1:]]).sum() for part in parts]
        for one in (reference, model)
    ]
    counts = [len(part) - 1 for part in parts]
    ratio = paired_block_bootstrap(nll[0], counts, nll[1], counts, compare=lambda a, b: np.exp(b - a)).interval
    assert found.ratio_interval == pytest.approx(ratio, rel=1e-5)
    assert found.kl_interval is not None and found.kl_interval.low < found.kl_mean < found.kl_interval.high
    assert divergence(model, reference, TEXTS[0], window=20, tokens=19).kl_interval is None


def test_many_windows_become_blocks(monkeypatch) -> None:
    monkeypatch.setattr(module, "_MOST_BLOCKS", 8)
    blocks = []
    monkeypatch.setattr(module, "bootstrap_sums", lambda rows, figure: blocks.append(rows) or _Nothing())
    found = divergence(Model(0.3), Model(), TEXTS[0], window=4)
    assert 4 < len(blocks[0]) <= 8 and blocks[0][:, 0].sum() == found.tokens
    assert len(set(blocks[0][:-1, 0])) == 1
    assert blocks[0][:, 1].sum() == pytest.approx(found.kl_mean * found.tokens)


class _Nothing:
    interval = None


def test_texts_begin_as_the_model_s_do() -> None:
    found = divergence(Model(0.3, add_bos=True), Model(add_bos=True), "abcdef", window=20)
    assert found.tokens == 6 and divergence(Model(0.3), Model(), "abcdef", window=20).tokens == 5


def test_where_the_model_rules_out_what_may_come() -> None:
    model = Model()
    model.table[:, 3] = -np.inf
    found = divergence(model, Model(), "abc" * 20, window=20)
    assert found.kl_mean == found.kl_p99 == math.inf and found.kl_interval is None
    assert math.isfinite(found.perplexity) and found.ratio_interval is not None


@pytest.mark.parametrize("compare", [None, compare_rows])
def test_logits_that_are_no_numbers(compare) -> None:
    model = Model()
    model.table[ord("e") % VOCABULARY] = np.nan
    with pytest.raises(DataError, match=r"noise 0.0 or reference gives logits that are not numbers"):
        divergence(model, Model(name="reference"), TEXTS, window=20, compare=compare)


def test_rows_that_end_early_are_noticed() -> None:
    class Short(Model):
        def score_rows(self, ids: Any, *, first: int = 1) -> Any:
            return super().score_rows(ids[:-1], first=first)

    with pytest.raises(DataError, match="rows of logits end before token 19 of a window of 20"):
        divergence(Short(), Model(digest="other"), TEXTS, window=20)


class TestRefusals:
    def test_two_vocabularies(self) -> None:
        with pytest.raises(
            ParameterError, match="a and b have vocabularies of 30 and 31 tokens and cannot be compared"
        ):
            divergence(Model(name="a"), Model(name="b", vocab_size=31), TEXTS)

    def test_other_tokens_of_the_same_number(self) -> None:
        other = Model(name="b", digest="other")
        other.tokenizer.shift = 1
        with pytest.raises(
            ParameterError, match=r"a and b have different vocabularies of 30 .* token 0 is 'a' and 'b'"
        ):
            divergence(Model(name="a"), other, TEXTS)

    def test_models_without_distributions(self) -> None:
        class Scorer:
            info = Info("endpoint", "x")
            tokenizer = Tokens()

        class Endpoint(Scorer):
            info = type("Info", (), {"name": "served", "digest": "x", "context_length": 64})()

            def score_rows(self, ids: Any, *, first: int = 1) -> Any:
                raise AssertionError("asked")

        for one, name in ((Scorer(), "endpoint"), (Endpoint(), "served")):
            with pytest.raises(ParameterError, match=f"{name} does not give whole distributions"):
                divergence(one, Model(), TEXTS)  # type: ignore[arg-type]
            with pytest.raises(ParameterError, match=f"{name} does not give whole distributions"):
                divergence(Model(), one, TEXTS)  # type: ignore[arg-type]

    @pytest.mark.parametrize(
        ("settings", "said"),
        [
            ({"window": 65}, r"window must be an integer in \[2, 64\]"), ({"window": 1}, "window"),
            ({"window": 8, "stride": 8}, "stride"), ({"tokens": 0}, "tokens must be an integer of at least 1, got 0"),
            ({"tokens": True}, "tokens"), ({"flips": -1}, "flips must be an integer of at least 0, got -1"),
        ],
    )  # fmt: skip
    def test_settings(self, settings: dict[str, Any], said: str) -> None:
        with pytest.raises(ParameterError, match=said):
            divergence(Model(), Model(0.1), TEXTS, **settings)

    @pytest.mark.parametrize("texts", [[], "", ["", "a"]])
    def test_nothing_to_predict(self, texts: Any) -> None:
        with pytest.raises(DataError, match="the texts have no token to predict"):
            divergence(Model(), Model(0.1), texts)


def test_a_token_that_neither_model_expects() -> None:
    """Both perplexities are infinite, and their ratio is no number; the distributions can be compared all the same."""
    models = [Model(noise) for noise in (0.0, 0.1)]
    for model in models:
        model.table[:, ord("x") % VOCABULARY] = -np.inf
    for compare in (None, compare_rows):
        found = divergence(*models, "windows, x and more", window=8, compare=compare)
        assert found.perplexity == found.reference_perplexity == np.inf and np.isnan(found.perplexity_ratio)
        assert 0 < found.kl_mean < 1 and found.kl_interval is not None and found.ratio_interval is None


def test_readers_are_closed_whatever_ends_it() -> None:
    model, reference = Model(), Model(0.1)

    def stop(*done: int) -> None:
        raise KeyboardInterrupt

    def broken(*rows: Any) -> Any:
        raise DataError("broken")

    for asked, error in (({"progress": stop}, KeyboardInterrupt), ({"compare": broken}, DataError)):
        with pytest.raises(error) as held:  # while the error, and with it every frame, is still there
            divergence(model, reference, TEXTS, **asked)  # type: ignore[arg-type]
        assert held.tb is not None and model.open == reference.open == 0


def test_progress_counts_predictions_and_bytes() -> None:
    seen: list[tuple[int, int]] = []
    found = divergence(Model(), Model(0.1), TEXTS, tokens=100, progress=lambda *done: seen.append(done))
    done = [count for count, _ in seen]
    assert done == sorted(set(done)) and done[-1] == found.tokens == 100
    seen.clear()
    divergence(Model(), Model(0.1), ["a b c", "", "d e", "f"], window=2, progress=lambda *done: seen.append(done))
    assert [size for _, size in seen] == [1, 2, 3, 4, 6, 7]
