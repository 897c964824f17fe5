"""What people's judgements say: whether one side wins, and how much raters agree beyond chance."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence

from kvik.errors import ParameterError

__all__ = ["cohen_kappa", "krippendorff_alpha", "sign_test"]


def sign_test(wins: int, losses: int) -> float:
    """Two-sided p-value of "a win is as likely as a loss", exact; ties are not counted in. In (0, 1], 1 for none.

    Dixon and Mood 1946, "The statistical sign test".
    """
    if wins < 0 or losses < 0:
        raise ParameterError(f"wins and losses must be at least 0, got {wins} and {losses}")
    n, least = wins + losses, min(wins, losses)
    logs = [
        math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) - n * math.log(2) for i in range(least + 1)
    ]
    return min(1.0, 2 * math.fsum(map(math.exp, logs)))


def cohen_kappa(a: Sequence[Hashable], b: Sequence[Hashable]) -> float | None:
    """Agreement of two raters beyond chance, nominal: (observed - expected) / (1 - expected). At most 1, 0 is chance.

    a, b: their labels of the same items, in order. None where both gave one label to everything: there chance explains all.
    Cohen 1960, "A coefficient of agreement for nominal scales".
    """
    if len(a) != len(b):
        raise ParameterError(f"both raters must rate the same items, got {len(a)} and {len(b)} labels")
    if not len(a):
        raise ParameterError("there are no labels to compare")
    n = len(a)
    observed = sum(one == other for one, other in zip(a, b, strict=True))
    counts_a, counts_b = Counter(a), Counter(b)
    expected = sum(counts_a[label] * counts_b[label] for label in counts_a)  # times n², as observed is times n
    return None if expected == n * n else (observed * n - expected) / (n * n - expected)


def krippendorff_alpha(ratings: Sequence[Sequence[Hashable | None]]) -> float | None:
    """Agreement of any number of raters beyond chance, nominal: 1 - observed / expected disagreement. At most 1.

    ratings: one sequence a rater, of labels of the same items in order, None where an item was not rated. An item that
    fewer than two rated says nothing. None where no item is left, or where only one label was given. Krippendorff 2011,
    "Computing Krippendorff's alpha-reliability".
    """
    lengths = {len(labels) for labels in ratings}
    if len(lengths) > 1:
        raise ParameterError(f"all raters must have the same items, got {', '.join(map(str, sorted(lengths)))}")
    items = [Counter(label for label in item if label is not None) for item in zip(*ratings, strict=True)]
    items = [item for item in items if item.total() > 1]
    totals: Counter[Hashable] = Counter()
    for item in items:
        totals.update(item)
    n = totals.total()
    observed = math.fsum(
        (item.total() ** 2 - sum(count * count for count in item.values())) / (item.total() - 1) for item in items
    )
    expected = n * n - sum(count * count for count in totals.values())
    return None if expected == 0 else 1 - (n - 1) * observed / expected
