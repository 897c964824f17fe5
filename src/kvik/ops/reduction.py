"""Rows of logits reduced to what scoring asks for."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kvik import _native
from kvik.ops import Reduced

__all__ = ["empty_reduced", "reduce_logits"]


def empty_reduced(rows: int, top: int) -> Reduced:
    """Room for the figures of so many rows."""
    return Reduced(
        np.empty(rows, np.float64), np.empty(rows, np.float32), np.empty((rows, top), np.int32),
        np.empty((rows, top), np.float32),
    )  # fmt: skip


def reduce_logits(
    logits: NDArray[np.float32], targets: NDArray[np.int32], top: int, pool: _native.Pool | None = None
) -> Reduced:
    """The figures of logits [R, V] that are there: the bits are those of rows reduced as they are made.

    targets [R]: tokens; top: best tokens, no more than V.
    """
    found = empty_reduced(len(logits), top)
    _native.reduce_logits(pool, logits, targets, *found)
    return found
