"""Which sequences a step computes, and how many tokens of each. Knows blocks and counts, no model."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from kvik.cache.blocks import BlockPool
from kvik.engine.sequence import Sequence

__all__ = ["Scheduled", "Scheduler"]


class Scheduled(NamedTuple):
    """The next `tokens` tokens of a sequence, starting at its `num_computed`."""

    sequence: Sequence
    tokens: int


class Scheduler:
    """First come, first served, within a budget of tokens a step. One sequence runs at a time so far."""

    def __init__(self, pool: BlockPool, max_batch_tokens: int) -> None:
        self.pool = pool
        self.max_batch_tokens = max_batch_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence. The engine has made sure that it fits the pool."""
        self.waiting.append(sequence)

    def schedule(self) -> list[Scheduled]:
        """The step's work; block tables have room for it afterwards. Empty when nothing is left to do."""
        if not self.running and self.waiting:
            self.running.append(self.waiting.popleft())
        step, budget = [], self.max_batch_tokens
        for sequence in self.running:
            count = min(sequence.most_tokens, budget)
            if count:
                sequence.table.append(count)
                step.append(Scheduled(sequence, count))
                budget -= count
        return step

    def end(self, sequence: Sequence) -> None:
        """Forget a sequence, finished or cancelled, and free its blocks."""
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        sequence.table.free()

    def check_integrity(self) -> None:
        """Raise KvikError unless every block is free or held by exactly the tables that list it."""
        self.pool.check_integrity([s.table for s in (*self.running, *self.waiting)])
