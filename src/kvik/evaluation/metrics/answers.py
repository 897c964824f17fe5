"""Short answers against reference answers: exact match and F1 of SQuAD (Rajpurkar et al. 2016, arXiv:1606.05250).

The definitions are those of SQuAD 2.0's evaluate-v2.0.py, which differ from 1.1's where nothing is left of a text:

- normalization: lower case; ASCII punctuation out; the words a, an, the out; runs of whitespace to one space. In this order,
  so that "U.S." is "us". Nothing else: letters of other scripts stay, NFC and NFD of a text differ.
- of several references the best counts. Those of which normalization leaves nothing count only where all are such; the question
  then has no answer, and nothing (after normalization) is the right thing to say: 1, anything else 0.

Every sample can be scored: an empty reference is a question without an answer.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

from kvik.evaluation.metrics.result import MetricResult, References, check_pairs, mean_of, signature
from kvik.params import choose

__all__ = ["Normalize", "exact_match", "squad_normalize", "token_f1"]

Normalize = Literal["squad", "none"]
"""squad: as above. none: texts as they are, words by whitespace, every reference counts."""

NORMALIZATIONS: tuple[Normalize, ...] = ("squad", "none")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


class _Overlap(NamedTuple):
    f1: float
    precision: float
    recall: float


def squad_normalize(text: str) -> str:
    """The text as SQuAD compares it."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def exact_match(predictions: Sequence[str], references: References, *, normalize: Normalize = "squad") -> MetricResult:
    """Share of predictions that are one of their references. A sample is 1 or 0; value in [0, 1]: their mean."""
    ready = _prepared(predictions, references, normalize)
    scores = tuple(float(given in wanted) for given, wanted in ready)
    return MetricResult(mean_of(scores), scores, (), signature("exact_match", normalize=normalize))


def token_f1(predictions: Sequence[str], references: References, *, normalize: Normalize = "squad") -> MetricResult:
    """F1 of the words that prediction and reference share, counted as often as they come in both.

    In [0, 1]; 0 without a common word. value: the mean. parts: precision and recall, means over the samples' best references.
    """
    ready = _prepared(predictions, references, normalize)
    best = [max((_overlap(given.split(), one.split()) for one in wanted), key=lambda o: o.f1) for given, wanted in ready]
    scores = tuple(one.f1 for one in best)
    parts = {"precision": [one.precision for one in best], "recall": [one.recall for one in best]}
    return MetricResult(
        mean_of(scores), scores, (), signature("token_f1", normalize=normalize),
        {name: mean for name, found in parts.items() if (mean := mean_of(found)) is not None},
    )  # fmt: skip


def _prepared(
    predictions: Sequence[str], references: References, normalize: Normalize
) -> list[tuple[str, tuple[str, ...]]]:
    """Each prediction, and the references that count, normalized."""
    pairs = check_pairs(predictions, references)
    if choose("normalize", normalize, NORMALIZATIONS) == "none":
        return list(zip(predictions, pairs, strict=True))
    normal: Callable[[str], str] = squad_normalize
    return [
        (normal(given), tuple(text for one in several if (text := normal(one))) or ("",))
        for given, several in zip(predictions, pairs, strict=True)
    ]


def _overlap(given: list[str], wanted: list[str]) -> _Overlap:
    if not given or not wanted:
        agree = float(given == wanted)
        return _Overlap(agree, agree, agree)
    same = (Counter(given) & Counter(wanted)).total()
    if not same:
        return _Overlap(0.0, 0.0, 0.0)
    precision, recall = same / len(given), same / len(wanted)
    return _Overlap(2 * precision * recall / (precision + recall), precision, recall)
