"""The block tables of a sequence: which block holds which slots, and where blocks are no more."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvik.cache.blocks import BlockPool
from kvik.cache.layout import BLOCK_TOKENS, LayerGroup, Places, Table, blocks_for

__all__ = ["FREED", "BlockCopy", "BlockTable", "GroupTables", "group_tables"]

FREED = -1
"""In a block table, where a block was that no row sees any more, or would be that no row sees."""


class BlockCopy(NamedTuple):
    """Bytes of a block to copy into another of the same size, before a step writes there. steps: of 64 bytes."""

    source: int
    target: int
    steps: int


class BlockTable:
    """One table of a sequence, in order of slot: slot s of the table lies in block s // tokens.

    Places from `head` to `first`, where that is more, are FREED; first <= count.
    """

    __slots__ = ("_blocks", "_pool", "count", "first", "head", "steps")

    def __init__(self, pool: BlockPool, steps: int) -> None:
        self._pool, self.steps = pool, steps
        self._blocks = np.empty(8, np.int32)
        self.count = self.head = self.first = 0

    @property
    def blocks(self) -> NDArray[np.int32]:
        """Addresses of blocks [count]; a view."""
        return self._blocks[: self.count]

    @property
    def num_held(self) -> int:
        return self.count - max(0, self.first - self.head)

    @property
    def last_is_shared(self) -> bool:
        """Whether others hold the last block too."""
        return self._pool.is_shared(int(self._blocks[self.count - 1]))

    def held(self) -> list[int]:
        """What it holds."""
        blocks = self.blocks
        return (blocks if self.head >= self.first else blocks[blocks != FREED]).tolist()  # type: ignore[no-any-return]

    def lacks(self, needed: Places) -> bool:
        """Whether some of these places are FREED."""
        lost = max(self.head, needed.first) < min(self.first, needed.count)
        return lost or self.head < min(self.first, needed.head)

    def fill(self, places: Places, blocks: Iterator[int]) -> None:
        """Hold these blocks, in order, at the places where blocks are; the table was empty."""
        self._reserve(places.count)
        head = min(places.head, places.first)
        self._blocks[head : places.first] = FREED
        self._blocks[:head] = list(islice(blocks, head))
        self._blocks[places.first : places.count] = list(islice(blocks, places.count - places.first))
        self.head, self.first, self.count = head, places.first, places.count

    def grow(self, count: int, begin: int = 0) -> None:
        """Take blocks for the places up to `count`; there are none before `begin`."""
        self._reserve(count)
        if begin > self.count:
            begin = min(begin, count)
            self._blocks[self.count : begin] = FREED
            self.count = self.first = begin
        if count == self.count + 1:
            self._blocks[self.count] = self._pool.take(self.steps)
        elif count > self.count:
            self._blocks[self.count : count] = self._pool.take_many(self.steps, count - self.count)
        self.count = count

    def _reserve(self, count: int) -> None:
        if count > len(self._blocks):
            self._blocks = np.concatenate((self._blocks, np.empty(count, np.int32)))

    def make_writable(self, place: int) -> BlockCopy | None:
        """A block that others hold is replaced by a copy of one's own."""
        block = int(self._blocks[place])
        if self._pool.sole(block):
            return None
        fresh = self._pool.take(self.steps)
        self._pool.release(block)
        self._blocks[place] = fresh
        return BlockCopy(block, fresh, self.steps)

    def shared(self, count: int) -> BlockTable:
        """A table that holds the first `count` places too."""
        other = BlockTable(self._pool, self.steps)
        other._blocks = self._blocks[: max(8, count)].copy()
        other._end(self, count)
        self._pool.share_many(other.held())
        return other

    def _end(self, like: BlockTable, count: int) -> None:
        self.count, self.head, self.first = count, like.head, min(like.first, count)

    def drop_after(self, count: int) -> None:
        """Give the places from `count` on back, the last first: a prefix is forgotten from its end."""
        if count < self.count:
            gone = self._blocks[count : self.count][::-1]
            self._pool.release_many(gone[gone != FREED].tolist())
            self._end(self, count)
        if not self.count:
            self.head = 0

    def drop_between(self, head: int, first: int) -> bool:
        """Give the places from `head` to `first` back, which contain those that are FREED. Whether there were any."""
        if first <= max(head, self.first) and (head >= self.head or first <= head):
            return False
        gone = self._blocks[head:first]
        self._pool.release_many(gone[gone != FREED].tolist())
        gone[:] = FREED
        self.head, self.first = head, first
        return True

    def renumber(self, old: NDArray[np.int32], new: NDArray[np.int32]) -> None:
        """Blocks that lie elsewhere now: of `old`, ascending, each at its place in `new`."""
        blocks = self.blocks
        there = blocks != FREED
        blocks[there] = new[np.searchsorted(old, blocks[there])]


class GroupTables:
    """The tables of one group of a sequence. `n` counts the sequence's tokens, of which `shift` were evicted from these."""

    __slots__ = ("_next", "full", "pages", "rule", "shift")

    def __init__(self, rule: LayerGroup, full: BlockTable, pages: BlockTable | None) -> None:
        self.rule, self.full, self.pages = rule, full, pages
        self.shift = 0
        self._next = 0  # local tokens from which on something may be given up

    @property
    def tables(self) -> tuple[BlockTable, ...]:
        return (self.full,) if self.pages is None else (self.full, self.pages)

    def more(self, n: int) -> tuple[int, int]:
        """Full blocks and packed pages to be taken before there are n tokens."""
        n -= self.shift
        blocks = max(0, blocks_for(n) - self.full.count)
        if self.pages is None or not self.rule.packs:
            return blocks, 0
        return blocks, max(0, self.rule.page_count(n) - max(self.pages.count, self.rule.first_page))

    def grow(self, n: int) -> bool:
        """Take the blocks for n tokens. Whether full blocks are packed by the pass that computes them."""
        n -= self.shift
        count = blocks_for(n)
        if count > self.full.count:
            self.full.grow(count)
        if self.pages is None:
            return False
        count = self.rule.page_count(n)
        if count <= self.pages.count:
            return False
        self.pages.grow(count, self.rule.first_page if self.rule.packs else count)
        return self.rule.packs

    def make_writable(self, n: int) -> BlockCopy | None:
        """The block that token n will lie in is one's own, where it has tokens already."""
        place, partial = divmod(n - self.shift, BLOCK_TOKENS)
        return self.full.make_writable(place) if partial else None

    def last_is_shared(self, n: int) -> bool:
        """Whether `make_writable` would copy."""
        return (n - self.shift) % BLOCK_TOKENS != 0 and self.full.last_is_shared

    def lacks(self, n: int) -> bool:
        """Whether something was given up that rows from token n on see, or pack."""
        n -= self.shift
        if self.full.lacks(self.rule.full(n)):
            return True
        return self.pages is not None and self.pages.lacks(self.rule.pages(n))

    def shared(self, n: int) -> GroupTables:
        """Tables that hold the blocks of the first n tokens too."""
        local = n - self.shift
        pages = None if self.pages is None else self.pages.shared(self.rule.page_count(local))
        other = GroupTables(self.rule, self.full.shared(blocks_for(local)), pages)
        other.shift = self.shift
        return other

    def drop_after(self, n: int) -> None:
        """Give back what holds none of the first n tokens."""
        n -= self.shift
        if self.pages is not None:
            self.pages.drop_after(self.rule.page_count(n))
        self.full.drop_after(blocks_for(n))
        if not n:
            self._next = 0

    def drop_all(self) -> None:
        """Give everything back."""
        self.shift = 0
        self.drop_after(0)

    def drop_unseen(self, n: int) -> bool:
        """Give back what no row from token n on sees or packs. Whether there was any."""
        n -= self.shift
        if n < self._next:
            return False
        window = self.rule.window
        to_see = -(n + 2 - window) % BLOCK_TOKENS if window else BLOCK_TOKENS
        self._next = n + 1 + min(to_see, -(n + 1) % BLOCK_TOKENS)
        at = self.rule.full(n)
        dropped = self.full.drop_between(at.head, at.first)
        if self.pages is not None and window:
            dropped |= self.pages.drop_between(0, self.rule.pages(n).first)
        return dropped

    def tokens_kept(self, n: int) -> int:
        """Slots that some block holds."""
        n -= self.shift
        begin, end = self.full.head * BLOCK_TOKENS, min(self.full.first * BLOCK_TOKENS, n)
        if begin >= end:
            return n
        packed = 0
        if self.pages is not None and self.rule.layout.packed is not None:
            each = self.rule.layout.packed.tokens
            packed = max(0, min(end, self.pages.count * each) - max(begin, self.pages.first * each))
        return n - (end - begin) + packed


def group_tables(pool: BlockPool, rule: LayerGroup, tables: Sequence[Table]) -> GroupTables:
    """Empty ones, as its layout says."""
    full, *pages = (BlockTable(pool, table.steps) for table in tables)
    return GroupTables(rule, full, pages[0] if pages else None)
