"""ROUGE (Lin 2004, "ROUGE: a package for automatic evaluation of summaries"), as the package rouge-score 0.1.2 computes it.

Figures are the same as rouge-score's; longest common subsequences are found a row of bits at a time, which is what makes it fast
(Hyyrö 2004, "Bit-parallel LCS-length computation revisited").

Tokens are runs of a-z and 0-9 of the text in lower case. Everything else parts them and is left out, letters of other scripts and
with accents too: ROUGE is for English. A sample without a token in any reference is not scored (rouge-score says 0 there).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, Literal, NamedTuple

from kvik.evaluation.metrics.result import MetricResult, References, Unscored, check_pairs, mean_of, signature
from kvik.evaluation.metrics.words import porter
from kvik.params import choose
from kvik.params.checks import flag

__all__ = ["Kind", "rouge", "rouge1", "rouge2", "rougeL", "rougeLsum"]

Kind = Literal["rouge1", "rouge2", "rougeL", "rougeLsum"]
KINDS: tuple[Kind, ...] = ("rouge1", "rouge2", "rougeL", "rougeLsum")
STEMMED_FROM = 4  # letters: shorter words stay as they are

_TOKEN = re.compile("[a-z0-9]+")

Tokens = list[str]


class _Score(NamedTuple):
    f1: float
    precision: float
    recall: float


def rouge(
    predictions: Sequence[str], references: References, *, kind: Kind = "rougeL", stem: bool = False
) -> MetricResult:
    """F1 of what prediction and reference share; of several references the one with the best F1 counts.

    kind: rouge1 words; rouge2 pairs of words; rougeL the longest common subsequence of words; rougeLsum the same by lines, for
    each line of the reference the union of its longest common subsequences with the lines of the prediction.
    stem: words of more than three letters are compared by their Porter stems; needs nltk.

    In [0, 1]; 0 where nothing is shared. value: mean F1. parts: precision and recall, means over the samples' best references.
    """
    pairs = check_pairs(predictions, references)
    prepare, shared = _KINDS[choose("kind", kind, KINDS)]
    flag("stem", stem)
    tokens = partial(_stemmed, porter("stem=True")) if stem else _plain
    scores: list[_Score | None] = []
    for given, several in zip(predictions, pairs, strict=True):
        wanted = [prepare(tokens, text) for text in several]
        if not any(_TOKEN.search(text.lower()) for text in several):
            scores.append(None)
            continue
        mine = prepare(tokens, given)
        scores.append(max((shared(one, mine) for one in wanted), key=lambda score: score.f1))
    return _result(scores, signature(kind, tok="a-z0-9", stem=stem))


def rouge1(predictions: Sequence[str], references: References, *, stem: bool = False) -> MetricResult:
    """`rouge` of words."""
    return rouge(predictions, references, kind="rouge1", stem=stem)


def rouge2(predictions: Sequence[str], references: References, *, stem: bool = False) -> MetricResult:
    """`rouge` of pairs of words."""
    return rouge(predictions, references, kind="rouge2", stem=stem)


def rougeL(predictions: Sequence[str], references: References, *, stem: bool = False) -> MetricResult:
    """`rouge` of the longest common subsequence."""
    return rouge(predictions, references, kind="rougeL", stem=stem)


def rougeLsum(predictions: Sequence[str], references: References, *, stem: bool = False) -> MetricResult:
    """`rouge` of the longest common subsequences by lines."""
    return rouge(predictions, references, kind="rougeLsum", stem=stem)


def _result(scores: Sequence[_Score | None], signed: str) -> MetricResult:
    scored = [score for score in scores if score is not None]
    missing = [Unscored(i, "no reference has a token (a-z, 0-9)") for i, score in enumerate(scores) if score is None]
    per_sample = tuple(None if score is None else score.f1 for score in scores)
    parts = {"precision": [score.precision for score in scored], "recall": [score.recall for score in scored]}
    means = {name: mean for name, found in parts.items() if (mean := mean_of(found)) is not None}
    return MetricResult(mean_of(per_sample), per_sample, tuple(missing), signed, means)


def _plain(text: str) -> Tokens:
    return _TOKEN.findall(text.lower())


def _stemmed(stem: Callable[[str], str], text: str) -> Tokens:
    return [stem(token) if len(token) >= STEMMED_FROM else token for token in _plain(text)]


def _score(shared: int, reference: int, prediction: int) -> _Score:
    """Of what both share and what each has. Nothing on a side makes 0, as in rouge-score."""
    precision, recall = shared / max(prediction, 1), shared / max(reference, 1)
    f1 = 2 * precision * recall / (precision + recall) if shared else 0.0
    return _Score(f1, precision, recall)


def _counted(grams: Callable[[Tokens], Iterable[Any]], tokens: Callable[[str], Tokens], text: str) -> Counter[Any]:
    return Counter(grams(tokens(text)))


def _in_common(reference: Counter[Any], prediction: Counter[Any]) -> _Score:
    shared = sum(min(count, prediction[gram]) for gram, count in reference.items() if gram in prediction)
    return _score(shared, reference.total(), prediction.total())


def _whole(tokens: Callable[[str], Tokens], text: str) -> Tokens:
    return tokens(text)


def _subsequence(reference: Tokens, prediction: Tokens) -> _Score:
    shared = _lcs_length(_places(reference), len(reference), prediction)
    return _score(shared, len(reference), len(prediction))


def _lines(tokens: Callable[[str], Tokens], text: str) -> list[Tokens]:
    return [tokens(line) for line in text.split("\n") if line]


def _by_lines(reference: list[Tokens], prediction: list[Tokens]) -> _Score:
    """A token counts at most as often as the prediction has it, whatever the lines that it is matched from."""
    found: Counter[str] = Counter()
    for line in reference:
        places = _places(line)
        union = 0
        for other in prediction:
            union |= _lcs_places(places, len(line), other)
        for token, where in places.items():
            found[token] += (union & where).bit_count()
    there = Counter(token for line in prediction for token in line)
    shared = sum(min(count, there[token]) for token, count in found.items())
    return _score(shared, sum(map(len, reference)), there.total())


def _places(tokens: Tokens) -> dict[str, int]:
    """Of each token the bits of its places: bit i for place i."""
    places: dict[str, int] = {}
    for i, token in enumerate(tokens):
        places[token] = places.get(token, 0) | (1 << i)
    return places


def _lcs_length(places: dict[str, int], length: int, other: Tokens) -> int:
    """Length of the longest common subsequence of `other` and the `length` tokens whose places are given.

    A clear bit i of `row` says that the tokens up to i share one more with `other` so far than those before i.
    """
    full = row = (1 << length) - 1
    for token in other:
        here = row & places.get(token, 0)
        if here:
            row = ((row + here) | (row - here)) & full
    return length - row.bit_count()


def _lcs_places(places: dict[str, int], length: int, other: Tokens) -> int:
    """The places of one longest common subsequence, as bits: that which rouge-score picks among several.

    It walks back from the ends of both. Where the tokens are the same they are taken; where the last token so far adds to the
    length (a clear bit of the row) it stays and `other` is shortened by one; else it is dropped.
    """
    full = row = (1 << length) - 1
    steps = []
    for token in other:
        same = places.get(token, 0)
        here = row & same
        row = ((row + here) | (row - here)) & full
        steps.append((same, row))
    chosen, left = 0, length
    for same, row in reversed(steps):
        left = ((same | (full ^ row)) & ((1 << left) - 1)).bit_length()  # what is above it is dropped
        if not left:
            break
        if (same >> (left - 1)) & 1:
            left -= 1
            chosen |= 1 << left
    return chosen


_KINDS: dict[str, tuple[Callable[..., Any], Callable[[Any, Any], _Score]]] = {
    "rouge1": (partial(_counted, iter), _in_common),
    "rouge2": (partial(_counted, pairwise), _in_common),
    "rougeL": (_whole, _subsequence),
    "rougeLsum": (_lines, _by_lines),
}
