"""Attention of rows to come (Expected Attention: Devoto et al. 2025, arXiv:2510.00636)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvik.cache.eviction.scoring import Scoring, Seen
from kvik.ops import RopeTable
from kvik.params import ExpectedAttention

__all__ = ["SCORING"]


_SMALL = 2**18  # multiplications that OpenBLAS does in one thread


class _Queries(NamedTuple):
    """Queries to come of a layer, taken to be normal. mean: [H, D]; covariance: [H, D, D]."""

    mean: NDArray[np.float32]
    covariance: NDArray[np.float32]


def scores(policy: ExpectedAttention, seen: Seen) -> NDArray[np.float32]:
    """E[e^(scale q k)] over queries to come, normalized over the slots, times |value|: [L', H_kv, n], mean of query heads.

    For normal q with mean m and covariance S it is e^(scale m k + scale^2 k S k / 2). m and S are those of the last
    `window` queries, turned by the mean rotation of the next `future` positions. The sinks, which stay anyway, have a score of
    0 and no part in m, S (where other rows were observed) and the sum that normalizes: they would decide how much each query
    head of a KV head counts.
    """
    assert seen.queries is not None
    found = np.zeros((*seen.held.shape, int(seen.held.max())), np.float32)
    turn = None if seen.rope is None else _mean_rotation(seen.rope, seen.tokens, policy.future)
    outliers = max(0, policy.sinks - (seen.tokens - seen.queries.shape[1]))  # sinks' rows among those observed
    first = outliers if outliers < seen.queries.shape[1] else 0
    for place, layer in enumerate(seen.layers):
        coming = _coming(seen.queries[place, first:], turn)
        for head, heads in enumerate(np.split(np.arange(len(coming.mean)), seen.held.shape[1])):
            keys, values = (seen.read(layer, head, what)[policy.sinks :] for what in ("keys", "values"))
            expected = _expected(keys, _Queries(*(x[heads] for x in coming)), seen.scale)
            found[place, head, policy.sinks : policy.sinks + len(values)] = expected * np.sqrt(
                np.einsum("nd,nd->n", values, values)
            )
    return found


def _expected(keys: NDArray[np.float32], queries: _Queries, scale: float) -> NDArray[np.float32]:
    """Expected shares of attention of keys [n, D], mean of the query heads: [n]."""
    total, products = np.zeros(len(keys), np.float32), np.empty_like(keys)
    for mean, covariance in zip(queries.mean, queries.covariance, strict=True):
        _product(keys, covariance * np.float32(scale * scale / 2), products)
        logits = np.einsum("nd,nd->n", products, keys)
        logits += np.einsum("nd,d->n", keys, mean * np.float32(scale))
        logits -= logits.max(initial=-np.inf)  # of no keys, nothing
        np.exp(logits, out=logits)
        logits /= logits.sum()
        total += logits
    return total / np.float32(len(queries.mean))


def _coming(queries: NDArray[np.float32], turn: NDArray[np.float32] | None) -> _Queries:
    """Mean and covariance of queries [rows, H, D], turned by [D, D]."""
    mean = queries.mean(0)
    centred = np.ascontiguousarray((queries - mean).transpose(1, 2, 0))  # [H, D, rows]
    covariance = np.zeros((*mean.shape, mean.shape[1]), np.float32)
    for first in range(0, len(queries), step := max(1, _SMALL // mean.shape[1] ** 2)):
        part = centred[:, :, first : first + step]
        covariance += part @ part.transpose(0, 2, 1)
    covariance /= np.float32(len(queries))
    if turn is None:
        return _Queries(mean, covariance)
    half = np.stack([_product(turn, x) for x in covariance])
    return _Queries(
        np.einsum("de,he->hd", turn, mean), np.stack([_product(x, np.ascontiguousarray(turn.T)) for x in half])
    )


def _product(
    a: NDArray[np.float32], b: NDArray[np.float32], out: NDArray[np.float32] | None = None
) -> NDArray[np.float32]:
    """a @ b for [n, D] and [D, D], in blocks so small that BLAS keeps to this thread.

    Its threads spin for each other, which costs 30 times as much where a core is busy, and could change the last bit.
    """
    found = np.empty_like(a) if out is None else out
    rows = max(1, _SMALL // b.size)
    whole = len(a) // rows * rows
    np.matmul(a[:whole].reshape(-1, rows, a.shape[1]), b, out=found[:whole].reshape(-1, rows, a.shape[1]))
    np.matmul(a[whole:], b, out=found[whole:])
    return found


def _mean_rotation(rope: RopeTable, first: int, count: int) -> NDArray[np.float32]:
    """The mean of the rotations of positions [first, first + count): [D, D]."""
    angles = np.arange(first, first + count)[:, None] * rope.inv_freq
    cosine, sine = (np.diag(x.mean(0) * rope.factor) for x in (np.cos(angles), np.sin(angles)))
    return np.block([[cosine, -sine], [sine, cosine]]).astype(np.float32)


SCORING = Scoring("queries", lambda policy: policy.window, scores)
