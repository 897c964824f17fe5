"""Heavy hitters (H2O: Zhang et al. 2023, arXiv:2306.14048)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kvik.cache.eviction.scoring import Scoring, Seen
from kvik.params import H2O

__all__ = ["SCORING"]


def scores(policy: H2O, seen: Seen) -> NDArray[np.int64]:
    """Attention that each slot had from all rows since it is there, evictions notwithstanding: [L', H_kv, n].

    The paper's last slots (`recent`) are protected whatever their sums.
    """
    assert seen.sums is not None
    return seen.sums


SCORING = Scoring("sums", lambda policy: None, scores)
