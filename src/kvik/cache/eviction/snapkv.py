"""Attention of the last rows, pooled (SnapKV: Li et al. 2024, arXiv:2404.14469)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kvik.cache.eviction.scoring import Scoring, Seen
from kvik.params import SnapKV

__all__ = ["SCORING"]


def scores(policy: SnapKV, seen: Seen) -> NDArray[np.int64]:
    """The largest of the `kernel` slots' sums around each, sums over the last `window` rows: [L', H_kv, n].

    The window's own slots, which are protected, lend their neighbours nothing.
    """
    assert seen.sums is not None
    before = np.arange(seen.sums.shape[2]) < seen.held[:, :, None] - policy.window
    return _largest_around(np.where(before, seen.sums, 0), policy.kernel)


def _largest_around(x: NDArray[np.int64], kernel: int) -> NDArray[np.int64]:
    """The largest of x[..., t - kernel // 2 : t + kernel // 2 + 1], for x >= 0: runs of twice the length, then two overlapping."""
    n = x.shape[-1]
    run = np.zeros((*x.shape[:-1], n + kernel - 1), x.dtype)
    run[..., kernel // 2 : kernel // 2 + n] = x
    length = 1
    while length < kernel:  # run[t]: the largest of `length` padded ones from t on
        step = min(length, kernel - length)
        run = np.maximum(run[..., :-step], run[..., step:])
        length += step
    return run


SCORING = Scoring("sums", lambda policy: policy.window, scores)
