"""A sequence's place in the cache: one block table per group of layers, and the verbs append, fork, truncate, evict."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvik.cache.blocks import BlockPool
from kvik.cache.layout import BLOCK_TOKENS, KVLayout, blocks_for
from kvik.cache.prefix import BlockKey
from kvik.errors import KvikError

__all__ = ["FREED", "BlockCopy", "BlockTable", "SequenceCache"]

FREED = -1
"""In a block table, where a block was that no row sees any more."""


class BlockCopy(NamedTuple):
    """Bytes of a group's block to copy into another, before a step writes there."""

    group: int
    source: int
    target: int


class BlockTable:
    """The blocks of one sequence in one group, in order of slot. Slot s lies in block s // 16."""

    def __init__(self, pool: BlockPool, group: int) -> None:
        self._pool, self._group = pool, group
        self._blocks = np.empty(8, np.int32)
        self.count = 0  # places in the table
        self.first = 0  # places before it are FREED

    @property
    def blocks(self) -> NDArray[np.int32]:
        """Block ids [places]; a view."""
        return self._blocks[: self.count]

    @property
    def num_held(self) -> int:
        return self.count - self.first

    @property
    def last_is_shared(self) -> bool:
        """Whether others hold the last block too."""
        return self._pool.is_shared(self._group, int(self._blocks[self.count - 1]))

    def held(self) -> Iterator[tuple[int, int]]:
        """(group, block) of what it holds."""
        return ((self._group, int(block)) for block in self._blocks[self.first : self.count])

    def push(self, block: int) -> None:
        if self.count == len(self._blocks):
            self._blocks = np.concatenate((self._blocks, np.empty_like(self._blocks)))
        self._blocks[self.count] = block
        self.count += 1

    def grow(self, count: int) -> None:
        """Take blocks up to `count` places."""
        while self.count < count:
            self.push(self._pool.take(self._group))

    def make_writable(self, place: int) -> BlockCopy | None:
        """A block that others hold is replaced by a copy of one's own."""
        block = int(self._blocks[place])
        if self._pool.sole(self._group, block):
            return None
        fresh = self._pool.take(self._group)
        self._pool.release(self._group, block)
        self._blocks[place] = fresh
        return BlockCopy(self._group, block, fresh)

    def shared(self, count: int) -> BlockTable:
        """A table that holds the first `count` places too."""
        other = BlockTable(self._pool, self._group)
        other._blocks = self._blocks[: max(8, count)].copy()
        other.count, other.first = count, min(self.first, count)
        for block in other._blocks[other.first : count].tolist():
            self._pool.share(self._group, block)
        return other

    def drop_after(self, count: int) -> None:
        """Give the places from `count` on back, the last first: a prefix is forgotten from its end."""
        for block in self._blocks[max(count, self.first) : self.count][::-1].tolist():
            self._pool.release(self._group, block)
        self.count = min(self.count, count)
        self.first = min(self.first, self.count)

    def drop_before(self, first: int) -> None:
        """Give the places before `first` back; they stay in the table as FREED."""
        first = min(first, self.count)
        for block in self._blocks[self.first : first].tolist():
            self._pool.release(self._group, block)
        self._blocks[self.first : first] = FREED
        self.first = max(self.first, first)


class SequenceCache:
    """What one sequence holds of the cache. num_tokens: slots in use, the same in every group."""

    def __init__(self, pool: BlockPool, layout: KVLayout) -> None:
        self._pool, self._layout = pool, layout
        self.tables = [BlockTable(pool, group) for group in range(len(layout.groups))]
        self.forgets = any(group.window for group in layout.groups)
        self.num_tokens = 0
        self._registered = 0  # full blocks that were shown to the index

    @property
    def held_blocks(self) -> list[int]:
        """Blocks held, by group."""
        return [table.num_held for table in self.tables]

    @property
    def held_bytes(self) -> int:
        """Bytes of the blocks held, shared ones included."""
        return self._layout.held_bytes(self.held_blocks)

    @property
    def num_held(self) -> int:
        """Blocks held, in all groups."""
        return sum(table.num_held for table in self.tables)

    @property
    def unused_slots(self) -> int:
        """Slots of the last block that nothing lies in yet."""
        return -self.num_tokens % BLOCK_TOKENS

    def held(self) -> Iterator[tuple[int, int]]:
        """(group, block) of everything held."""
        return (pair for table in self.tables for pair in table.held())

    @property
    def num_full(self) -> int:
        """Blocks all of whose slots are in use."""
        return self.num_tokens // BLOCK_TOKENS

    def bytes_of(self, pairs: Iterable[tuple[int, int]]) -> int:
        """Bytes of (group, block) pairs."""
        return sum(self._layout.block_bytes[group] for group, _ in pairs)

    def bytes_of_counts(self, blocks: Sequence[int]) -> int:
        """Bytes of so many blocks of each group."""
        return self._layout.held_bytes(blocks)

    def can_append(self, tokens: int) -> bool:
        """Whether the pool has the blocks that `append(tokens)` takes: new ones, and a copy of a last one that is shared."""
        more = blocks_for(self.num_tokens + tokens) - self.tables[0].count
        if self.num_tokens % BLOCK_TOKENS == 0:
            return not more or self._pool.can_take([more] * len(self.tables))
        needs = [more + table.last_is_shared for table in self.tables]
        return not any(needs) or self._pool.can_take(needs)

    def most_to_append(self, tokens: int, chunk: int) -> list[int]:
        """Blocks, by group, that `tokens` more slots take at most at once, computed at most `chunk` at a time."""
        more = blocks_for(self.num_tokens + tokens) - self.tables[0].count
        return [min(more, most) for most in self._layout.sequence_blocks(self.num_tokens + tokens, chunk)]

    def append(self, tokens: int, copies: list[BlockCopy]) -> None:
        """Make room for `tokens` more slots and count them as used; what must be copied first is added to `copies`."""
        partial, place = self.num_tokens % BLOCK_TOKENS, self.num_tokens // BLOCK_TOKENS
        self.num_tokens += tokens
        count = blocks_for(self.num_tokens)
        for table in self.tables:
            if partial:
                copy = table.make_writable(place)
                if copy is not None:
                    copies.append(copy)
            if table.count < count:
                table.grow(count)

    def fork(self, num_tokens: int) -> SequenceCache:
        """Another sequence's cache with the same first `num_tokens` slots; it shares their blocks.

        Whoever writes to a shared block first copies it.
        """
        if not 0 <= num_tokens <= self.num_tokens:
            raise KvikError(f"cannot fork {num_tokens} of {self.num_tokens} tokens")
        self._check_seen(num_tokens)
        other = SequenceCache(self._pool, self._layout)
        other.tables = [table.shared(blocks_for(num_tokens)) for table in self.tables]
        other.num_tokens = num_tokens
        other._registered = min(self._registered, num_tokens // BLOCK_TOKENS)
        return other

    def truncate(self, num_tokens: int) -> None:
        """Keep the first `num_tokens` slots; blocks that hold none of them are given back."""
        if not 0 <= num_tokens <= self.num_tokens:
            raise KvikError(f"cannot truncate {self.num_tokens} tokens to {num_tokens}")
        if num_tokens:
            self._check_seen(num_tokens)
        self.num_tokens = num_tokens
        self._registered = min(self._registered, num_tokens // BLOCK_TOKENS)
        for table in self.tables:
            table.drop_after(blocks_for(num_tokens))

    def _check_seen(self, num_tokens: int) -> None:
        """KvikError where the row at slot num_tokens would see blocks that were freed."""
        for group, table in zip(self._layout.groups, self.tables, strict=True):
            if table.first > group.first_block(num_tokens):
                raise KvikError(f"cannot go back to {num_tokens} tokens: a window's blocks from there were freed")

    def free(self) -> None:
        """Give every block back."""
        self.num_tokens = self._registered = 0
        for table in self.tables:
            table.drop_after(0)

    def evict_unseen(self) -> None:
        """Free the blocks that no row from slot num_tokens on sees."""
        for group, table in zip(self._layout.groups, self.tables, strict=True):
            if group.window:
                first = group.first_block(self.num_tokens)
                if first > table.first:
                    table.drop_before(first)

    def claim_prefix(self, keys: Sequence[BlockKey]) -> int:
        """Take over blocks of the index for the longest beginning of `keys` that is all there; tokens gained.

        Of a group with a window only the blocks that the next row still sees are needed.
        """
        index = self._pool.index
        assert self.num_tokens == 0
        if index is None:
            return 0
        count = 0
        for count, key in enumerate(keys):  # noqa: B007 - how far the first group goes
            if index.find(0, key) is None:
                break
        else:
            count = len(keys)
        while count and not self._all_there(keys, count):
            count -= 1
        for group, (shape, table) in enumerate(zip(self._layout.groups, self.tables, strict=True)):
            first = min(shape.first_block(count * BLOCK_TOKENS), count)
            for place in range(count):
                block = FREED if place < first else self._pool.claim(group, keys[place])
                assert block is not None
                table.push(block)
            table.first = first
        self.num_tokens = count * BLOCK_TOKENS
        self._registered = count
        return self.num_tokens

    def _all_there(self, keys: Sequence[BlockKey], count: int) -> bool:
        index = self._pool.index
        assert index is not None
        return all(
            index.find(group, key) is not None
            for group, shape in enumerate(self._layout.groups)
            for key in keys[shape.first_block(count * BLOCK_TOKENS) : count]
        )

    @property
    def unregistered(self) -> int:
        """Full blocks there are, where some were not shown to the index yet; else 0."""
        return self.num_full if self.num_full > self._registered else 0

    def register(self, keys: Sequence[BlockKey]) -> None:
        """Let the index find the full blocks, whose keys these are."""
        index = self._pool.index
        assert index is not None
        for group, table in enumerate(self.tables):
            blocks = table.blocks
            for place in range(max(self._registered, table.first), len(keys)):
                index.add(group, int(blocks[place]), keys[place])
        self._registered = len(keys)
