"""Sums over segments of bytes: what pairs up figures of models that cut the same text into other tokens."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["MOST", "SEGMENT_BYTES", "SegmentSums", "Segments", "paired"]

Floats = NDArray[np.float64]

SEGMENT_BYTES = 2048
MOST = 2048


class Segments(NamedTuple):
    """Segments of the texts, one after another. size: bytes of text in one, but the last.

    nll, predictions, bytes: of each, over the tokens that begin in it: negative log-likelihood in nats, how many were
    predicted, and the bytes of these.
    """

    size: int
    nll: tuple[float, ...]
    predictions: tuple[int, ...]
    bytes: tuple[float, ...]


class SegmentSums:
    """Adds up as figures come. Of at most 2,048 segments: where there would be more, neighbours are merged."""

    def __init__(self) -> None:
        self._size = SEGMENT_BYTES
        self._sums = np.zeros((64, 3))
        self._count = 0

    def add(self, at: NDArray[np.int64], nll: Floats, predictions: NDArray[np.int64], sizes: NDArray[np.int64]) -> None:
        """at: segments of SEGMENT_BYTES, ascending, each once; the others: what is added to each."""
        if not len(at):
            return
        while at[-1] * SEGMENT_BYTES // self._size >= MOST:
            self._sums = _halved(self._sums)
            self._count = (self._count + 1) // 2
            self._size *= 2
        places = at * SEGMENT_BYTES // self._size
        self._count = max(self._count, int(places[-1]) + 1)
        if self._count > len(self._sums):
            self._sums = np.concatenate([self._sums, np.zeros((max(self._count, len(self._sums)), 3))])
        np.add.at(self._sums, places, np.stack([nll, predictions, sizes], axis=1))

    def result(self, num_bytes: int) -> Segments:
        """The sums. num_bytes: what the predicted tokens are of the text; normalization makes their own another number."""
        nll, predictions, sizes = self._sums[: self._count].T
        total = sizes.sum()
        if total and total != num_bytes:
            sizes = sizes * (num_bytes / total)
        return Segments(self._size, tuple(nll.tolist()), tuple(map(int, predictions.tolist())), tuple(sizes.tolist()))


def paired(a: Segments, b: Segments) -> tuple[Floats, Floats]:
    """Sums [B, 3] of nll, predictions and bytes of both, over the same segments: the larger ones of the two."""
    size = max(a.size, b.size)
    one, other = _coarsened(a, size), _coarsened(b, size)
    count = max(len(one), len(other))
    return _padded(one, count), _padded(other, count)


def _padded(sums: Floats, count: int) -> Floats:
    return np.concatenate([sums, np.zeros((count - len(sums), sums.shape[1]))])


def _coarsened(segments: Segments, size: int) -> Floats:
    """Sums [B, 3] by segments of `size` bytes, which is theirs times a power of two."""
    sums = np.array([segments.nll, segments.predictions, segments.bytes], np.float64).T
    now = segments.size
    while now < size:
        sums, now = _halved(sums), 2 * now
    return sums


def _halved(sums: Floats) -> Floats:
    """Neighbours [2n or 2n - 1, 3] added up."""
    sums = _padded(sums, len(sums) + len(sums) % 2)
    found: Floats = sums[0::2] + sums[1::2]
    return found
