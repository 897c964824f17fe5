"""Keys that differ (KeyDiff: Park et al. 2025, arXiv:2504.15364)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kvik.cache.eviction.scoring import Scoring, Seen
from kvik.params import KeyDiff

__all__ = ["SCORING"]

_TINY = np.float32(1e-12)


def scores(policy: KeyDiff, seen: Seen) -> NDArray[np.float32]:
    """Minus the cosine between each key, as the cache has it, and the mean of the keys of length one: [L', H_kv, n]."""
    found = np.zeros((*seen.held.shape, int(seen.held.max())), np.float32)
    for place, layer in enumerate(seen.layers):
        for head in range(seen.held.shape[1]):
            keys = seen.read(layer, head, "keys")
            inverse = 1 / np.maximum(np.sqrt(np.einsum("nd,nd->n", keys, keys)), _TINY)
            mean = np.einsum("nd,n->d", keys, inverse)
            mean /= max(np.sqrt(np.einsum("d,d->", mean, mean)), _TINY)  # of any length, it ranks alike
            found[place, head, : len(keys)] = -np.einsum("nd,d->n", keys, mean) * inverse
    return found


SCORING = Scoring("nothing", lambda policy: 0, scores)
