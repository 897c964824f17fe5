"""Sequences whose blocks leave the pool for a while: how those that cannot be computed again are preempted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from kvik.cache.blocks import BlockPool
from kvik.cache.sequence_cache import SequenceCache
from kvik.errors import KvikError
from kvik.ops import Executor

__all__ = ["Parked", "park"]


class Parked:
    """What `park` took out of the pool: bytes of the blocks, and who held which."""

    def __init__(
        self, caches: list[SequenceCache], data: dict[int, tuple[NDArray[np.int32], NDArray[np.uint8]]]
    ) -> None:
        self._caches, self._data = caches, data

    @property
    def needs(self) -> dict[int, int]:
        """Blocks that `restore` takes, by size in steps of 64 bytes."""
        return {steps: len(blocks) for steps, (blocks, _) in self._data.items()}

    @property
    def nbytes(self) -> int:
        """Bytes outside the pool."""
        return sum(data.nbytes for _, data in self._data.values())

    def restore(self, executor: Executor, pool: BlockPool) -> list[SequenceCache]:
        """The caches as they were, in the order of `park`, in other blocks of the pool they came from; once.

        KvikError where it has not the blocks.
        """
        if self._data and not pool.can_take(self.needs):
            raise KvikError("the KV cache has not the blocks that a parked request takes")
        caches, self._caches = self._caches, []
        olds, news = [np.empty(0, np.int32)], [np.empty(0, np.int32)]
        for steps, (blocks, data) in self._data.items():
            fresh = np.array(pool.take_many(steps, len(blocks)), np.int32)
            executor.restore(fresh, data)
            olds.append(blocks)
            news.append(fresh)
        self._data = {}
        old, new = np.concatenate(olds), np.concatenate(news)
        order = np.argsort(old)
        for cache in caches:
            cache.renumber(old[order], new[order])
        for block, holders in Counter(block for cache in caches for block in cache.held()).items():
            pool.share_many([block] * (holders - 1))
        return caches


def park(caches: Sequence[SequenceCache], executor: Executor) -> Parked:
    """Save the bytes of all blocks that the caches, of one pool, hold, shared ones once, and give the blocks back.

    The caches are empty then.
    """
    by_size: dict[int, list[int]] = {}
    for block in sorted({block for cache in caches for block in cache.held()}):
        by_size.setdefault(caches[0].pool.steps_of(block), []).append(block)
    data = {}
    for steps, blocks in by_size.items():
        addresses = np.array(blocks, np.int32)
        data[steps] = (addresses, executor.save(addresses, steps))
    return Parked([cache.leave() for cache in caches], data)
