"""How far one model's next-token distribution is from another's: pure functions of logits.

`compare_rows` is the definition; `NativeCompare` is the same by the native kernel, in one pass over both.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvik import _native
from kvik.errors import ParameterError, TryAgainError

__all__ = ["Compare", "NativeCompare", "RowFigures", "compare_rows", "kl_divergence", "log_softmax"]

Floats = NDArray[np.float64]
Logits = NDArray[np.floating]

_BLOCK_ELEMENTS = 1 << 21  # float64 working memory stays a few times 16 MB, whatever the vocabulary


class RowFigures(NamedTuple):
    """One entry a row. kl: KL(base || other) in nats; base_logprob, other_logprob: of the token that came; base_best,
    other_best: the most probable token, of equals the one with the lowest id."""

    kl: Floats
    base_logprob: Floats
    other_logprob: Floats
    base_best: NDArray[np.int32]
    other_best: NDArray[np.int32]


Compare = Callable[[Logits, Logits, NDArray[np.integer]], RowFigures]


def log_softmax(logits: Logits) -> Floats:
    """Log-probabilities of logits [rows, V], in float64."""
    shifted: Floats = logits.astype(np.float64)
    shifted -= shifted.max(axis=1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return shifted


def kl_divergence(p: Floats, q: Floats) -> Floats:
    """KL(p || q) = sum p (log p - log q) of each row, in nats (Kullback & Leibler 1951).

    p, q: log-probabilities [rows, V]. A token p gives nothing adds nothing; one only p gives something makes infinity.
    """
    mass = np.exp(p)
    gap = np.zeros_like(p)
    np.subtract(p, q, out=gap, where=mass > 0)
    found: Floats = (mass * gap).sum(axis=1)
    return found


def compare_rows(base: Logits, other: Logits, targets: NDArray[np.integer]) -> RowFigures:
    """The figures of each row, from logits [rows, V] of both models and the tokens that came [rows].

    Raises ParameterError where the shapes disagree, as those of two vocabularies do.
    """
    _check(base, other, targets)
    found = []
    step = max(1, _BLOCK_ELEMENTS // base.shape[1])
    for start in range(0, len(base), step):
        part = slice(start, start + step)
        p, q, wanted = log_softmax(base[part]), log_softmax(other[part]), targets[part]
        rows = np.arange(len(wanted))
        best, other_best = p.argmax(axis=1).astype(np.int32), q.argmax(axis=1).astype(np.int32)
        found.append(RowFigures(kl_divergence(p, q), p[rows, wanted], q[rows, wanted], best, other_best))
    return RowFigures(*(np.concatenate(column) for column in zip(*found, strict=True)))


def _check(base: Logits, other: Logits, targets: NDArray[np.integer]) -> None:
    if base.shape != other.shape or base.ndim != 2 or targets.shape != base.shape[:1]:
        raise ParameterError(
            f"logits {list(base.shape)} and {list(other.shape)} with targets {list(targets.shape)} cannot be compared"
        )


class NativeCompare:
    """`compare_rows` by the native kernel. threads: None takes every core this process may run on.

    Raises what `compare_rows` does, TryAgainError where the system gives no more threads. Figures of a row with NaN,
    +infinity or nothing but -infinity are NaN.
    """

    def __init__(self, threads: int | None = None) -> None:
        try:
            self._pool = _native.Pool(threads or len(os.sched_getaffinity(0)))
        except RuntimeError as error:
            raise TryAgainError(f"{error}; fewer threads may do") from None

    def __call__(self, base: Logits, other: Logits, targets: NDArray[np.integer]) -> RowFigures:
        _check(base, other, targets)
        rows = len(base)
        found = RowFigures(
            np.empty(rows), np.empty(rows), np.empty(rows), np.empty(rows, np.int32), np.empty(rows, np.int32)
        )
        _native.compare_logits(
            self._pool, np.ascontiguousarray(base, np.float32), np.ascontiguousarray(other, np.float32),
            np.ascontiguousarray(targets, np.int32), *found,
        )  # fmt: skip
        return found
