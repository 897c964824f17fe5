"""What happens to blocks between passes: tokens are evicted, and blocks of those that wait lie outside the pool."""

from __future__ import annotations

from collections.abc import Sequence as Sequences

import numpy as np

from kvik.cache.blocks import BlockPool
from kvik.cache.eviction import Kept
from kvik.cache.layout import KVLayout
from kvik.cache.parking import park
from kvik.cache.sequence_cache import BlockCopy, SequenceCache
from kvik.engine.sequence import Group, Sequence
from kvik.ops import Executor

__all__ = ["LayoutNumbers", "Mover"]


class LayoutNumbers:
    """The executor's numbers of layouts, each registered once."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self._numbers: dict[KVLayout, int] = {}

    def of(self, layout: KVLayout) -> int:
        number = self._numbers.get(layout)
        if number is None:
            number = self._numbers[layout] = self._executor.register(layout.executor)
        return number


class Mover:
    """Moves blocks between two passes, on an executor and its pool."""

    def __init__(self, executor: Executor, pool: BlockPool) -> None:
        self._executor, self._pool = executor, pool
        self.numbers = LayoutNumbers(executor)

    def choose(self, sequence: Sequence) -> Kept:
        """What the sequence keeps at the event that is due."""
        assert sequence.evictor is not None
        view = sequence.cache.view(sequence.layout)
        return sequence.evictor.choose(
            sequence.num_computed, lambda layer, head, what: self._executor.read(view, layer, head, what)
        )

    def evict(self, sequence: Sequence, kept: Kept) -> SequenceCache:
        """A cache that holds what is kept; the sequence's own is still there."""
        fresh = sequence.cache.evict(kept.counts)
        try:
            source = sequence.cache.view(sequence.layout)
            self._executor.evict(source, fresh.view(self.numbers.of(fresh.layout)), kept.kept, kept.counts)
        except BaseException:
            fresh.free()
            raise
        return fresh

    def take(self, sequence: Sequence, fresh: SequenceCache, kept: Kept) -> None:
        """The sequence goes on with what it kept."""
        assert sequence.evictor is not None
        sequence.cache.free()
        sequence.cache, sequence.layout = fresh, self.numbers.of(fresh.layout)
        sequence.evictor.evicted(kept)

    def copy(self, copies: Sequences[BlockCopy]) -> None:
        """What a pass would copy first, at once."""
        for source, target, steps in copies:
            data = self._executor.save(np.array([source], np.int32), steps)
            self._executor.restore(np.array([target], np.int32), data)

    def park(self, group: Group) -> None:
        """Take the group's blocks out of the pool."""
        group.parked = park([sequence.cache for sequence in group.sequences], self._executor)

    def restore(self, group: Group) -> None:
        """Bring them back; the pool has room for them."""
        assert group.parked is not None
        caches = group.parked.restore(self._executor, self._pool)
        for sequence, cache in zip(group.sequences, caches, strict=True):
            sequence.cache = cache
        group.parked = None
