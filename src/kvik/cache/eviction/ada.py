"""A layer's budget goes to the heads where scores are best (AdaKV: Feng et al. 2024, arXiv:2407.11550)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kvik.cache.eviction.ranking import best

__all__ = ["best_of_layer", "most_of_head"]

SAFEGUARD = 5
"""A head keeps at least one in so many of what it would keep alone, protected slots apart, and at
least one: the paper's alpha, 0.2."""


def best_of_layer(ranks: NDArray[np.float64], budget: int, protected: int) -> NDArray[np.bool_]:
    """H_kv * budget slots of a layer, the best of all heads together, but of each head its own best first.

    ranks: [H_kv, n], infinite for the `protected` slots of each head, minus infinity past a head's slots. Of equal ones
    the later is kept, then the lower head.
    """
    safe = _own(budget, protected)
    ranks = ranks.copy()
    for row in ranks:
        row[best(row, safe) & (row > -np.inf)] = np.inf
    together = ranks.T[:, ::-1]  # by slot, then the lower head last
    return best(together.ravel(), budget * len(ranks)).reshape(together.shape)[:, ::-1].T


def most_of_head(budget: int, protected: int, heads: int) -> int:
    """Most slots that one head keeps where every other keeps only what is its own."""
    return budget * heads - _own(budget, protected) * (heads - 1)


def _own(budget: int, protected: int) -> int:
    """Slots that a head keeps of its own, at least one."""
    return max(1, protected + (budget - protected) // SAFEGUARD)
