"""The two n-gram components of CodeBLEU: BLEU, and n-gram recall that weights keywords.

A sample is counted once, as a row of numbers; rows are added over a corpus before anything is divided. Both are geometric
means over n = 1 to 4 and put 0.1 for a count of 0 (Chen and Cherry 2014, smoothing 1), as the implementation of CodeBLEU's
authors does; without a common token they are 0. BLEU has its brevity penalty. Recall has none, since what is missing counts
in it already; the paper has one, but the implementation takes it against a length of 2, so that it never bites where
predictions have two tokens or more.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence, Set

import numpy as np
from numpy.typing import NDArray

__all__ = ["NGRAM_COLUMNS", "count_ngrams", "ngram_match", "weighted_ngram_match"]

Floats = NDArray[np.float64]
Tokens = Sequence[str]

ORDER = 4
SMALLEST = 0.1
OTHER_WEIGHT = 0.2  # of a token that is no keyword; a keyword weighs 1
NGRAM_COLUMNS = 2 + 4 * ORDER


def count_ngrams(prediction: Tokens, references: Sequence[Tokens], keywords: Set[str]) -> list[float]:
    """A sample's row [2 + 16]: length, length of the nearest reference; then by n matches of BLEU, all n-grams; weighted
    matches, all weighted n-grams of the references.

    BLEU clips an n-gram's matches by the reference that has most of them. The weighted component is recall, added over the
    references, and weights single tokens only: for n > 1 each n-gram weighs 1. Totals are at least 1.
    """
    nearest = min((len(tokens) for tokens in references), key=lambda n: (abs(n - len(prediction)), n))
    rows: list[list[float]] = [[], [], [], []]
    for n in range(1, ORDER + 1):
        own = _ngrams(prediction, n)
        others = [_ngrams(tokens, n) for tokens in references]
        rows[0].append(sum(min(count, max(other[gram] for other in others)) for gram, count in own.items()))
        rows[1].append(max(1, own.total()))
        shared = [_weight(other & own, keywords) for other in others]
        rows[2].append(sum(shared))
        rows[3].append(sum(max(1, _weight(other, keywords)) for other in others))
    return [len(prediction), nearest, *rows[0], *rows[1], *rows[2], *rows[3]]


def ngram_match(counts: Floats) -> Floats:
    """BLEU of added rows [R, 18]: [R] in [0, 1]."""
    length, nearest = counts[:, 0], counts[:, 1]
    brevity = np.exp(np.minimum(0, 1 - nearest / np.maximum(length, 1)))
    return brevity * _geometric(counts[:, 2:6], counts[:, 6:10])


def weighted_ngram_match(counts: Floats) -> Floats:
    """Weighted n-gram recall of added rows [R, 18]: [R] in [0, 1]."""
    return _geometric(counts[:, 10:14], counts[:, 14:18])


def _ngrams(tokens: Tokens, n: int) -> Counter[tuple[str, ...]]:
    return Counter(zip(*(tokens[i:] for i in range(n)), strict=False))


def _weight(grams: Counter[tuple[str, ...]], keywords: Set[str]) -> float:
    return sum(count * (1.0 if len(gram) > 1 or gram[0] in keywords else OTHER_WEIGHT) for gram, count in grams.items())


def _geometric(matches: Floats, totals: Floats) -> Floats:
    shares = np.where(matches == 0, SMALLEST, matches) / np.maximum(totals, 1)
    return np.where(matches[:, 0] == 0, 0.0, np.exp(np.log(shares).mean(axis=1)))
