"""What happens to blocks between passes: tokens are evicted, and blocks of those that wait lie outside the pool."""

from __future__ import annotations

from collections.abc import Sequence as Sequences
from typing import NamedTuple

import numpy as np

from kvik.cache.blocks import BlockPool
from kvik.cache.eviction import Kept
from kvik.cache.layout import KVLayout
from kvik.cache.parking import park
from kvik.cache.sequence_cache import BlockCopy, SequenceCache
from kvik.engine.sequence import Group, Sequence
from kvik.ops import Executor

__all__ = ["Eviction", "LayoutNumbers", "Mover"]


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


class Eviction(NamedTuple):
    """What a sequence is about to keep. tokens: that it gives up, the mean over layers and KV heads."""

    kept: Kept
    tokens: float


class Mover:
    """Moves blocks between two passes, on an executor and its pool."""

    def __init__(self, executor: Executor, pool: BlockPool) -> None:
        self._executor, self._pool = executor, pool
        self.numbers = LayoutNumbers(executor)

    def choose(self, sequence: Sequence) -> Eviction:
        """What the sequence keeps at the event that is due."""
        assert sequence.evictor is not None
        view = sequence.cache.view(sequence.layout)
        kept = sequence.evictor.choose(
            sequence.num_computed, lambda layer, head, what: self._executor.read(view, layer, head, what)
        )
        given_up = np.where(kept.counts < 0, 0, sequence.cache.tokens_held() - kept.counts)
        return Eviction(kept, float(given_up.mean()))

    def evict(self, sequence: Sequence, eviction: Eviction) -> SequenceCache:
        """The cache that holds what is kept; the sequence's own is still there."""
        fresh = sequence.cache.evict(eviction.kept.counts)
        try:
            source = sequence.cache.view(sequence.layout)
            target = fresh.view(self.numbers.of(fresh.layout))
            self._executor.evict(source, target, eviction.kept.kept, eviction.kept.counts)
        except BaseException:
            fresh.free()
            raise
        return fresh

    def take(self, sequence: Sequence, fresh: SequenceCache, eviction: Eviction) -> None:
        """The sequence goes on with what it kept."""
        assert sequence.evictor is not None
        sequence.cache.free()
        sequence.cache, sequence.layout, sequence.evicted = fresh, self.numbers.of(fresh.layout), True
        sequence.evictor.evicted(eviction.kept)

    def copy(self, copies: Sequences[BlockCopy]) -> None:
        """What a pass would copy first, at once."""
        for one in copies:
            data = self._executor.save(np.array([one.source], np.int32), one.steps)
            self._executor.restore(np.array([one.target], np.int32), data)

    def park(self, group: Group) -> None:
        """Take the group's blocks out of the pool."""
        group.parked = park([sequence.cache for sequence in group.sequences], self._executor)

    def restore(self, group: Group) -> None:
        """Bring them back; the pool has made sure of room."""
        assert group.parked is not None
        group.parked.restore(self._executor, self._pool)
        group.parked = None
