"""A pool's bytes with a number for each slot in place of keys and values: what executors do with the cache, to the letter."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvik.cache.block_table import BlockCopy
from kvik.cache.layout import KVLayout
from kvik.cache.sequence_cache import SequenceCache
from kvik.models.config import ModelConfig, RopeConfig
from kvik.ops import CacheView

STEP = 8  # numbers in 64 bytes
Numbers = NDArray[np.int64]


def shape(
    windows: tuple[int | None, ...] = (None,) * 3, *, heads: int = 2, head_size: int = 16, context: int = 400,
    learned: bool = False,
) -> ModelConfig:  # fmt: skip
    rope = None if learned else RopeConfig()
    return ModelConfig("llama", 9, 9, 9, len(windows), heads, heads, head_size, context, 1e-5, rope, False, windows)


class Tables(NamedTuple):
    """One sequence's, as a pass has them."""

    layout: KVLayout
    view: CacheView

    def table(self, number: int) -> NDArray[np.int32]:
        spans = self.view.block_spans
        return self.view.blocks[spans[number] : spans[number + 1]]

    def of_group(self, group: int) -> tuple[NDArray[np.int32], NDArray[np.int32], int]:
        """Full and packed table, and the shift."""
        each = 1 if self.layout.executor.packed is None else 2
        packed = self.table(group * each + 1) if each == 2 else np.empty(0, np.int32)
        return self.table(group * each), packed, int(self.view.shifts[group * each])


def tables_of(cache: SequenceCache) -> Tables:
    return Tables(cache.layout, cache.view(0))


class Memory:
    """The numbers of a slot are all the same, and a block is full of them: what overlaps it changes them."""

    def __init__(self, nbytes: int) -> None:
        self.bytes = np.zeros(nbytes, np.uint8)
        self.numbers = self.bytes.view(np.int64)

    def block(self, address: int, steps: int, tokens: int) -> Numbers:
        """[copies, tokens] of a block; a view."""
        assert address >= 0, "a block that was freed is looked at"
        part = self.numbers[address * STEP : (address + steps) * STEP]
        return part[: len(part) // tokens * tokens].reshape(-1, tokens)

    def read(self, layout: KVLayout, group: int, packed: bool, address: int) -> Numbers:
        """The numbers of a block's slots [tokens]."""
        table = layout.tables[group * (1 if layout.executor.packed is None else 2) + packed]
        found = self.block(address, table.steps, table.tokens)
        assert (found == found[0]).all(), "blocks overlap"
        return found[0]

    def write(self, layout: KVLayout, group: int, packed: bool, address: int, at: int, numbers: Numbers) -> None:
        table = layout.tables[group * (1 if layout.executor.packed is None else 2) + packed]
        self.block(address, table.steps, table.tokens)[:, at : at + len(numbers)] = numbers

    # ---- what executors do

    def copy(self, copies: list[BlockCopy]) -> None:
        for source, target, steps in copies:
            self.numbers[target * STEP : (target + steps) * STEP] = self.numbers[source * STEP : (source + steps) * STEP]

    def run(self, tables: Tables, begin: int, numbers: Numbers) -> list[Numbers]:
        """Rows from slot `begin` on leave their numbers; pages are packed when they are first read.

        Returns what each group's last row reads.
        """
        layout = tables.layout.executor
        for group, rule in enumerate(tables.layout.groups):
            full, packed, shift = tables.of_group(group)
            for slot, number in enumerate(numbers, begin - shift):
                self.write(tables.layout, group, False, full[slot // 16], slot % 16, np.array([number]))
            if layout.packed is None or not rule.packs:
                continue
            each, last = layout.packed.tokens, begin - shift + len(numbers) - 1
            for page in range(layout.packed_end(begin - shift - 1) // each, layout.packed_end(last) // each):
                if page >= layout.keep // each:
                    parts = [self.read(tables.layout, group, False, int(b)) for b in _blocks(full, page, each)]
                    self.write(tables.layout, group, True, int(packed[page]), 0, np.concatenate(parts))
        last = begin + len(numbers) - 1
        for row in (begin, (begin + last) // 2, last):
            found = [self.seen(tables, group, row) for group in range(len(tables.layout.groups))]
        return found

    def seen(self, tables: Tables, group: int, row: int, coming: bool = False) -> Numbers:
        """What a row of the sequence reads of its table up to its own slot, in order.

        coming: the row is the next one, which has not written yet, nor packed; what it will pack is read, too.
        """
        layout, rule = tables.layout.executor, tables.layout.groups[group]
        full, packed, shift = tables.of_group(group)
        seen = visible(rule.window, 0 if rule.own else layout.sinks, row - shift)
        packed_end = layout.packed_end(row - shift - coming)
        if coming:
            seen = seen[:-1]
            if rule.packs:
                seen = np.union1d(seen, np.arange(packed_end, row - shift))
        in_pages = (seen >= layout.keep) & (seen < packed_end)
        found = np.zeros(row - shift + 256, np.int64)
        for is_packed, table, each in ((False, full, 16), (True, packed, layout.packed.tokens if layout.packed else 1)):
            slots = seen[in_pages == is_packed]
            for place in np.unique(slots // each).tolist():
                numbers = self.read(tables.layout, group, is_packed, int(table[place]))
                mine = slots[slots // each == place]
                found[mine] = numbers[mine - place * each]
        return found[seen]

    def evict(self, source: Tables, target: Tables, kept: dict[int, NDArray[np.int64]]) -> None:
        """Copy the kept slots of each of the target's groups; those of layers with a window are not named."""
        for group, slots in kept.items():
            layer, head = target.layout.groups[group].units[0]
            old = source.layout.executor.group_of[layer][head]
            everything = self.seen(source, old, source.view.num_tokens - 1)
            numbers = everything[slots]
            full, packed, shift = target.of_group(group)
            assert shift == target.view.num_tokens - len(slots)
            layout = target.layout.executor
            packed_end = layout.packed_end(len(slots) - 1)
            for block in range(len(full)):
                if block * 16 < layout.keep or block * 16 >= packed_end:
                    self.write(target.layout, group, False, int(full[block]), 0, numbers[block * 16 : block * 16 + 16])
                else:
                    assert full[block] == -1
            if layout.packed is not None:
                each = layout.packed.tokens
                assert len(packed) == packed_end // each
                for page in range(layout.keep // each, len(packed)):
                    self.write(target.layout, group, True, int(packed[page]), 0, numbers[page * each :][:each])

    def save(self, blocks: NDArray[np.int32], steps: int) -> NDArray[np.uint8]:
        return np.stack([self.bytes[b * 64 : (b + steps) * 64] for b in blocks.tolist()])

    def restore(self, blocks: NDArray[np.int32], data: NDArray[np.uint8]) -> None:
        for block, each in zip(blocks.tolist(), data, strict=True):
            self.bytes[block * 64 : block * 64 + len(each)] = each


def visible(window: int, sinks: int, slot: int) -> NDArray[np.int64]:
    """Slots of its table that a row sees."""
    first = max(0, slot + 1 - window) if window else 0
    return np.concatenate((np.arange(min(sinks, first)), np.arange(first, slot + 1)))


def _blocks(full: NDArray[np.int32], page: int, each: int) -> NDArray[np.int32]:
    return full[page * each // 16 : (page + 1) * each // 16]


def units(layout: KVLayout) -> list[tuple[int, int]]:
    return sorted(itertools.chain.from_iterable(group.units for group in layout.groups))
