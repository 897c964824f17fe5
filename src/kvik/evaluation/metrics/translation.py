"""BLEU, chrF and TER of translations, by sacrebleu (Post 2018, "A call for clarity in reporting BLEU scores").

Figures and signatures are sacrebleu's, on its scale: percent. `value` is that of the corpus, made of what is counted over all
samples, not the mean of the samples; `sums` has these counts, so that an interval needs no second look at the texts.

Samples may have different numbers of references; the signature then says nrefs:var. How several are taken is the metric's own:
BLEU clips n-grams by the reference that has most of each and takes the length nearest to the prediction's (the shorter of two);
chrF takes the reference with the best score; TER the fewest edits over the mean length.

An empty prediction is scored. A sample whose references are all empty or whitespace is not, and counts nowhere: sacrebleu makes
something of it (0, or a TER of 100) though nothing was to be said. Texts are compared as they are: NFC and NFD differ.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from kvik.errors import ParameterError
from kvik.evaluation.metrics.result import MetricResult, References, Sums, Unscored, check_pairs
from kvik.params import choose
from kvik.params.checks import flag, integer, real

__all__ = ["Smoothing", "Tokenizer", "bleu", "chrf", "ter"]

Tokenizer = Literal["13a", "intl", "char", "zh", "ja-mecab", "ko-mecab", "none"]
"""Those of sacrebleu that download nothing."""
TOKENIZERS: tuple[Tokenizer, ...] = ("13a", "intl", "char", "zh", "ja-mecab", "ko-mecab", "none")

Smoothing = Literal["exp", "floor", "add-k", "none"]
SMOOTHINGS: tuple[Smoothing, ...] = ("exp", "floor", "add-k", "none")

Row = list[float]


def bleu(
    predictions: Sequence[str],
    references: References,
    *,
    tokenize: Tokenizer = "13a",
    lowercase: bool = False,
    smooth_method: Smoothing = "exp",
    smooth_value: float | None = None,
) -> MetricResult:
    """Geometric mean of the n-gram precisions times the brevity penalty (Papineni et al. 2002). Not for short answers.

    In [0, 100]; 0 without a common word. per_sample: sentence BLEU, over the orders that the sentence has (sacrebleu's
    effective order, its default for sentences). smooth_value: for floor (0.1) and add-k (1), by default these.
    """
    metrics = _sacrebleu("bleu")
    choose("tokenize", tokenize, TOKENIZERS)
    choose("smooth_method", smooth_method, SMOOTHINGS)
    flag("lowercase", lowercase)
    if smooth_value is not None:
        real("smooth_value", smooth_value, 0.0)
        if smooth_method not in ("floor", "add-k"):
            raise ParameterError(f"smooth_value goes with smooth_method floor or add-k, not {smooth_method}")
    try:
        # what it counts is read before any smoothing
        counter = metrics.BLEU(lowercase, tokenize=tokenize, smooth_method="none", effective_order=True)
    except RuntimeError as missing:  # sacrebleu's way to say so
        raise ParameterError(
            f'tokenize={tokenize!r} needs more: pip install "sacrebleu[{tokenize.partition("-")[0]}]"'
        ) from missing
    signer = metrics.BLEU(lowercase, tokenize=tokenize, smooth_method=smooth_method, smooth_value=smooth_value)

    def count(prediction: str, several: Sequence[str]) -> Row:
        score = counter.sentence_score(prediction, several)
        return [score.sys_len, score.ref_len, *score.counts, *score.totals]

    def score_of(row: Row, sentence: bool = False) -> float:
        length, nearest, *counts = row
        matches, totals = counts[: len(counts) // 2], counts[len(counts) // 2 :]
        found = metrics.BLEU.compute_bleu(
            matches, totals, int(length), int(nearest), smooth_method, smooth_value, effective_order=sentence
        )
        return float(found.score)

    pairs = check_pairs(predictions, references)
    return _result(predictions, pairs, count, lambda row: score_of(row, sentence=True), score_of, signer)


def chrf(
    predictions: Sequence[str],
    references: References,
    *,
    char_order: int = 6,
    word_order: int = 0,
    beta: int = 2,
    lowercase: bool = False,
    whitespace: bool = False,
    eps_smoothing: bool = False,
) -> MetricResult:
    """F-beta of character n-grams (Popović 2015); with word_order 2 it is chrF++ (Popović 2017).

    In [0, 100]; 0 without a common character. per_sample: sentence chrF. beta: how much more recall weighs than precision.
    """
    metrics = _sacrebleu("chrf")
    integer("char_order", char_order, 1)
    integer("word_order", word_order, 0)
    integer("beta", beta, 0)
    for name, value in (("lowercase", lowercase), ("whitespace", whitespace), ("eps_smoothing", eps_smoothing)):
        flag(name, value)

    class Counting(metrics.CHRF):  # type: ignore[misc, name-defined] # the base is imported when it is needed
        """Its score does not tell what was counted; the two methods are those that every metric of sacrebleu must define."""

        row: Row

        def _aggregate_and_compute(self, stats: list[Row]) -> Any:
            (self.row,) = stats
            return super()._aggregate_and_compute(stats)

        def score_of(self, row: Row) -> float:
            return float(self._compute_score_from_stats(row).score)

    counter = Counting(char_order, word_order, beta, lowercase, whitespace, eps_smoothing)

    def count(prediction: str, several: Sequence[str]) -> Row:
        counter.sentence_score(prediction, several)
        return counter.row

    pairs = check_pairs(predictions, references)
    return _result(predictions, pairs, count, counter.score_of, counter.score_of, counter)


def ter(
    predictions: Sequence[str],
    references: References,
    *,
    normalized: bool = False,
    no_punct: bool = False,
    asian_support: bool = False,
    case_sensitive: bool = False,
) -> MetricResult:
    """Edits (insert, delete, replace a word, shift a run of words) to get the reference, over its words (Snover et al. 2006).

    At least 0, above 100 where more is wrong than there is to say; lower is better. per_sample: sentence TER. For sentences
    and paragraphs: sacrebleu's search for shifts takes seconds at 300 words and grows faster than their square.
    """
    metrics = _sacrebleu("ter")
    settings = {
        "normalized": normalized, "no_punct": no_punct, "asian_support": asian_support, "case_sensitive": case_sensitive,
    }  # fmt: skip
    for name, value in settings.items():
        flag(name, value)
    if asian_support and not (normalized or no_punct):
        raise ParameterError("asian_support changes nothing without normalized or no_punct")
    counter = metrics.TER(**settings)

    def count(prediction: str, several: Sequence[str]) -> Row:
        score = counter.sentence_score(prediction, several)
        return [score.num_edits, score.ref_length]

    def score_of(row: Row) -> float:
        edits, length = row
        if length:
            return 100 * (edits / length)
        return 100.0 if edits else 0.0  # only punctuation to say, and no_punct: as sacrebleu

    pairs = check_pairs(predictions, references)
    return _result(predictions, pairs, count, score_of, score_of, counter)


def _sacrebleu(what: str) -> ModuleType:
    try:
        import sacrebleu.metrics
    except ImportError as missing:
        raise ParameterError(f'{what} needs sacrebleu: pip install "kvik[eval]"') from missing
    return sacrebleu.metrics


def _result(
    predictions: Sequence[str],
    pairs: Sequence[tuple[str, ...]],
    count: Callable[[str, Sequence[str]], Row],
    sentence: Callable[[Row], float],
    corpus: Callable[[Row], float],
    metric: Any,
) -> MetricResult:
    """Every sample is counted once; its own score and that of the corpus come of the counts.

    metric: sacrebleu's, for its name and signature. A row of `sums` begins with 1 for a sample that counts.
    """
    rows: list[Row | None] = [
        count(given, several) if any(text.strip() for text in several) else None
        for given, several in zip(predictions, pairs, strict=True)
    ]
    scored = [row for row in rows if row is not None]
    width = len(scored[0]) if scored else 0
    table = np.array([[0.0] * (1 + width) if row is None else [1.0, *row] for row in rows]).reshape(-1, 1 + width)

    def value(sums: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.array([corpus(row) if there else math.nan for there, *row in sums.tolist()])

    return MetricResult(
        float(value(table.sum(axis=0, keepdims=True))[0]) if scored else None,
        tuple(None if row is None else sentence(row) for row in rows),
        tuple(Unscored(i, "the reference is empty") for i, row in enumerate(rows) if row is None),
        _signature(metric, pairs), sums=Sums(table, value),
    )  # fmt: skip


def _signature(metric: Any, pairs: Sequence[tuple[str, ...]]) -> str:
    name = metric.sentence_score("", [""]).name  # sacrebleu signs what has scored something
    signature = metric.get_signature()
    numbers = {len(several) for several in pairs}
    signature.update("nrefs", numbers.pop() if len(numbers) == 1 else "var")
    return f"{name}|{signature.format()}"
