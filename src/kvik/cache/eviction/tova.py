"""Attention of the last row alone (TOVA: Oren et al. 2024, arXiv:2401.06104)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kvik.cache.eviction.scoring import Scoring, Seen
from kvik.params import TOVA

__all__ = ["SCORING"]


def scores(policy: TOVA, seen: Seen) -> NDArray[np.int64]:
    """Attention that each slot had from the last row, all heads of the layer together: [L', H_kv, n], alike for its heads.

    The paper averages; the sum ranks alike.
    """
    assert seen.sums is not None
    return np.broadcast_to(seen.sums.sum(1, keepdims=True), seen.sums.shape)


SCORING = Scoring("sums", lambda policy: 1, scores)
