"""Which blocks of the cache are free and which sequence holds which. No bytes here: storage belongs to the executor."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kvik.cache.layout import BLOCK_TOKENS
from kvik.errors import KvikError

__all__ = ["BlockPool", "BlockTable"]


class BlockPool:
    """Free blocks and reference counts. A block is given back when its last holder frees it."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._holders = [0] * num_blocks

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_blocks - len(self._free)

    def take(self) -> int:
        """A block for one holder. KvikError when none is free: the scheduler must not have admitted this."""
        if not self._free:
            raise KvikError(f"all {self.num_blocks} blocks of the KV cache are in use")
        block = self._free.pop()
        self._holders[block] = 1
        return block

    def release(self, block: int) -> None:
        """One holder gives the block up."""
        if self._holders[block] < 1:
            raise KvikError(f"block {block} is released more often than it is held")
        self._holders[block] -= 1
        if self._holders[block] == 0:
            self._free.append(block)

    def check_integrity(self, tables: list[BlockTable]) -> None:
        """Raise KvikError unless free + used = total and every count equals the tables that hold the block."""
        held = [0] * self.num_blocks
        for table in tables:
            for block in table.blocks:
                held[block] += 1
        if held != self._holders:
            raise KvikError("block counts differ from the block tables")
        free = set(self._free)
        if len(free) != len(self._free) or any((b in free) != (held[b] == 0) for b in range(self.num_blocks)):
            raise KvikError("free list differs from the block counts")


class BlockTable:
    """The blocks of one sequence, in order of slot. Slot s lies in block s // 16."""

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._blocks = np.empty(8, np.int32)
        self._count = 0
        self.num_tokens = 0  # slots in use

    @property
    def blocks(self) -> NDArray[np.int32]:
        """Block ids [blocks in use]; a view."""
        return self._blocks[: self._count]

    @property
    def capacity(self) -> int:
        """Slots the blocks have."""
        return self._count * BLOCK_TOKENS

    def append(self, tokens: int) -> None:
        """Make room for `tokens` more slots and count them as used."""
        self.num_tokens += tokens
        while self.capacity < self.num_tokens:
            if self._count == len(self._blocks):
                self._blocks = np.concatenate((self._blocks, np.empty_like(self._blocks)))
            self._blocks[self._count] = self._pool.take()
            self._count += 1

    def truncate(self, num_tokens: int) -> None:
        """Keep the first `num_tokens` slots; blocks that hold none of them are given back."""
        if not 0 <= num_tokens <= self.num_tokens:
            raise KvikError(f"cannot truncate {self.num_tokens} tokens to {num_tokens}")
        self.num_tokens = num_tokens
        keep = -(-num_tokens // BLOCK_TOKENS)
        while self._count > keep:
            self._count -= 1
            self._pool.release(int(self._blocks[self._count]))

    def free(self) -> None:
        """Give every block back."""
        self.truncate(0)
