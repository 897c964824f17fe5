"""The best of some scores."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["best"]


def best(scores: NDArray[np.float64], count: int) -> NDArray[np.bool_]:
    """Which `count` (at least 1) of the scores [N], none NaN, are best; of equal ones the later. All where there are no more."""
    if count >= len(scores):
        return np.ones(len(scores), np.bool_)
    edge = np.partition(scores, len(scores) - count)[len(scores) - count]
    chosen: NDArray[np.bool_] = scores > edge
    equal = np.flatnonzero(scores == edge)
    chosen[equal[len(equal) - (count - np.count_nonzero(chosen)) :]] = True
    return chosen
