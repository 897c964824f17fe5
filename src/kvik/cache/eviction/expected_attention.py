"""Attention of rows to come (Expected Attention: Devoto et al. 2025, arXiv:2510.00636)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvik.cache.eviction.scoring import Scoring, Seen
from kvik.ops import RopeTable
from kvik.params import ExpectedAttention

__all__ = ["SCORING"]


class _Queries(NamedTuple):
    """Queries to come of a layer, taken to be normal. mean: [H, D]; covariance: [H, D, D]."""

    mean: NDArray[np.float32]
    covariance: NDArray[np.float32]


def scores(policy: ExpectedAttention, seen: Seen) -> NDArray[np.float32]:
    """E[e^(scale q k)] over queries to come, normalized over the slots, times |value|: [L', H_kv, n], mean of query heads.

    For normal q with mean m and covariance S it is e^(scale m k + scale^2 k S k / 2). m and S are those of the last
    `window` queries, turned by the mean rotation of the next `future` positions.
    """
    assert seen.queries is not None
    found = np.zeros((*seen.held.shape, int(seen.held.max())), np.float32)
    turn = None if seen.rope is None else _mean_rotation(seen.rope, seen.tokens, policy.future)
    for place, layer in enumerate(seen.layers):
        coming = _coming(seen.queries[place], turn)
        for head, heads in enumerate(np.split(np.arange(len(coming.mean)), seen.held.shape[1])):
            expected = _expected(seen.read(layer, head, "keys"), _Queries(*(x[heads] for x in coming)), seen.scale)
            values = seen.read(layer, head, "values")
            found[place, head, : len(values)] = expected * np.sqrt(np.einsum("nd,nd->n", values, values))
    return found


def _expected(keys: NDArray[np.float32], queries: _Queries, scale: float) -> NDArray[np.float32]:
    """Expected shares of attention of keys [n, D], mean of the query heads: [n]."""
    total = np.zeros(len(keys), np.float32)
    for mean, covariance in zip(queries.mean, queries.covariance, strict=True):
        products = keys @ (covariance * np.float32(scale * scale / 2))
        products += mean * np.float32(scale)
        logits = np.einsum("nd,nd->n", products, keys)
        logits -= logits.max()
        np.exp(logits, out=logits)
        total += logits / logits.sum()
    return total / np.float32(len(queries.mean))


def _coming(queries: NDArray[np.float32], turn: NDArray[np.float32] | None) -> _Queries:
    """Mean and covariance of queries [rows, H, D], turned by [D, D]."""
    mean = queries.mean(0)
    centred = (queries - mean).transpose(1, 2, 0)  # [H, D, rows]
    covariance = centred @ centred.transpose(0, 2, 1) / np.float32(len(queries))
    if turn is None:
        return _Queries(mean, covariance)
    return _Queries(mean @ turn.T, turn @ covariance @ turn.T)


def _mean_rotation(rope: RopeTable, first: int, count: int) -> NDArray[np.float32]:
    """The mean of the rotations of positions [first, first + count): [D, D]."""
    angles = np.arange(first, first + count)[:, None] * rope.inv_freq
    cosine, sine = (np.diag(x.mean(0) * rope.factor) for x in (np.cos(angles), np.sin(angles)))
    return np.block([[cosine, -sine], [sine, cosine]]).astype(np.float32)


SCORING = Scoring("queries", lambda policy: policy.window, scores)
