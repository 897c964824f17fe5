"""What happens to blocks between passes: tokens are evicted, and blocks of those that wait lie outside the pool."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Sequences
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvik.cache.blocks import BlockPool
from kvik.cache.eviction import Kept
from kvik.cache.eviction.scoring import Read
from kvik.cache.layout import KVLayout
from kvik.cache.parking import park
from kvik.cache.sequence_cache import BlockCopy, SequenceCache
from kvik.engine.sequence import Group, Sequence
from kvik.ops import Executor
from kvik.params import Protected

__all__ = ["EvictionRecord", "LayoutNumbers", "Mover"]


class EvictionRecord(NamedTuple):
    """One event: what a sequence kept, and by what.

    tokens: the sequence's so far; num_tokens of them are computed, evicted ones counted. layers: the L' that evict.
    kept, counts: as in `Kept`, slots of the tables before the event. scores: [L', H_kv, n], higher is better. held: [L', H_kv]
    slots of the tables. protected: first and last slots that stay whatever their score.
    """

    tokens: tuple[int, ...]
    num_tokens: int
    layers: tuple[int, ...]
    kept: NDArray[np.int32]
    counts: NDArray[np.int32]
    scores: NDArray[np.float32]
    held: NDArray[np.int64]
    protected: Protected


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
        self.on_evict: Callable[[EvictionRecord], None] | None = None

    def choose(self, sequence: Sequence) -> Kept:
        """What the sequence keeps at the event that is due."""
        assert sequence.evictor is not None
        return sequence.evictor.choose(sequence.num_computed, self._read(sequence))

    def _read(self, sequence: Sequence) -> Read:
        view = sequence.cache.view(sequence.layout)
        return lambda layer, head, what: self._executor.read(view, layer, head, what)

    def _record(self, sequence: Sequence, kept: Kept) -> EvictionRecord:
        """Of an event that has not happened yet."""
        evictor, tokens = sequence.evictor, sequence.num_computed
        assert evictor is not None
        scores = evictor.scores(tokens, self._read(sequence)).astype(np.float32)
        protected = evictor.policy.protected(evictor.policy.kept(tokens))
        held = evictor.held(tokens)
        return EvictionRecord(
            tuple(sequence.tokens), tokens, evictor.layers, kept.kept, kept.counts, scores, held, protected
        )

    def evict(self, sequence: Sequence, kept: Kept) -> SequenceCache:
        """A cache that holds what is kept; the sequence's own is still there."""
        if self.on_evict is not None:
            self.on_evict(self._record(sequence, kept))
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
