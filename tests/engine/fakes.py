"""Executors without a model: one says the tokens it was told to, one what follows from all that its block tables show."""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvik.cache.layout import KVLayout, kv_layout
from kvik.cache.storage import PoolSize, choose_slab_bytes, usual_layouts
from kvik.engine.admission import Model
from kvik.engine.engine import Engine
from kvik.ops import CacheView, Executor, Observation, Pass, Reduced, RopeTable, StepTimes
from kvik.ops.pages import ADDRESS_BYTES, BLOCK_TOKENS, CacheLayout
from kvik.ops.reduction import empty_reduced, reduce_logits
from kvik.params import CacheParams, EngineParams
from kvik.text.tokenizer import Tokenizer

ROPE = RopeTable(10000.0 ** (-np.arange(0, 16, 2) / 16))


@dataclass(frozen=True)
class Shape:
    """Of a model that is none. windows: of its layers, 0 sees all."""

    windows: tuple[int | None, ...] = (None,)
    num_kv_heads: int = 1
    num_heads: int = 1
    head_size: int = 16
    context_length: int = 400
    vocab_size: int = 98
    rope: RopeTable | None = ROPE

    @property
    def num_layers(self) -> int:
        return len(self.windows)

    def layout(self, cache: CacheParams | str = "f16") -> KVLayout:
        return kv_layout(self, cache)

    @property
    def block_bytes(self) -> tuple[int, ...]:
        """Of f16, by group."""
        return tuple(table.steps * ADDRESS_BYTES for table in self.layout().tables)

    @property
    def slab_bytes(self) -> int:
        """Whole blocks of each group in f16."""
        return math.lcm(*self.block_bytes)


LAYOUT = Shape()
WINDOWS = Shape((None, 20, None, 20, None))
ONE_WINDOW = Shape((20, 20))
ONLY_WINDOWS = Shape((20, 20, 40))
HEADS = Shape((None, None), num_kv_heads=2, num_heads=4)
HEADS_AND_WINDOW = Shape((None, 20, None), num_kv_heads=2, num_heads=4)


class Reducing:
    """Reduces the rows that `make` gives beside those that are asked for."""

    def __init__(self) -> None:
        self._reduced = empty_reduced(0, 0)
        self._registered: dict[CacheLayout, int] = {}

    def make(self, work: Pass, rows: NDArray[np.int32]) -> NDArray[np.float32]:
        raise NotImplementedError

    def run(self, work: Pass) -> NDArray[np.float32]:
        logits, kept = self.make(work, np.concatenate([work.logit_rows, work.reduce_rows])), len(work.logit_rows)
        self._reduced = reduce_logits(logits[kept:], work.targets, work.top)
        return logits[:kept]

    def reduced(self) -> Reduced:
        return self._reduced

    def register(self, layout: CacheLayout) -> int:
        return self._registered.setdefault(layout, len(self._registered))

    def times(self) -> StepTimes:
        return StepTimes(0.0, 0.0, 0.0)


class Script(Reducing):
    """After token i of the vocabulary comes i + 1; notes every pass."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.passes: list[Pass] = []
        self.isa: str | None = None
        self.pool = None

    def make(self, work: Pass, rows: NDArray[np.int32]) -> NDArray[np.float32]:
        self.passes.append(work)
        logits = np.zeros((len(rows), self.vocab_size), np.float32)
        follow = (work.tokens[rows] + 1) % self.vocab_size
        logits[np.arange(len(follow)), follow] = 9.0
        return logits

    def evict(self, *_: object) -> None:
        """Nothing lies anywhere."""

    def read(self, view: CacheView, layer: int, head: int, what: str) -> NDArray[np.float32]:
        return np.zeros((view.num_tokens - int(view.shifts.max()), 16), np.float32)

    def save(self, blocks: NDArray[np.int32], steps: int) -> NDArray[np.uint8]:
        return np.zeros((len(blocks), steps * ADDRESS_BYTES), np.uint8)

    def restore(self, blocks: NDArray[np.int32], data: NDArray[np.uint8]) -> None:
        """Nothing lies anywhere."""


CELLS = ADDRESS_BYTES // 8  # numbers in a step
MIX = np.uint64(0x9E3779B97F4A7C15)


class _Unit(NamedTuple):
    """Numbers of one group: of a share's cells in a block, and of its window."""

    full: NDArray[np.int64]  # [units] first cell of each share
    packed: NDArray[np.int64]
    keys: NDArray[np.uint64]  # [units, 1] that tell the units apart
    places: tuple[tuple[int, int], ...]  # layer, head of each
    window: int
    sinks: int


class _Tables(NamedTuple):
    """The cells of one group's slots: full [slots], packed [slots]; negative where there is no block."""

    full: NDArray[np.int64]
    packed: NDArray[np.int64]
    shift: int


class Seeing(Reducing):
    """Logits are a hash of everything a row sees through its block tables, and so is what it leaves in the cache.

    A (layer, head) of a slot is a number in a cell of its block. A packed page has other numbers, which depend on all tokens of
    its group. So a wrong block, slot, window, page or copy, one that was packed too soon, or that somebody else wrote to,
    changes what comes out.
    """

    isa: str | None = None
    pool: None = None
    BUCKETS = 509

    def __init__(self, shape: Shape, size: PoolSize, vocab_size: int) -> None:
        super().__init__()
        self.shape = shape
        self.memory = np.zeros(size.nbytes // 8, np.uint64)
        rng = np.random.default_rng(7)
        self.table = rng.normal(0, 2, (2, self.BUCKETS, vocab_size)).astype(np.float32)
        self.factors = rng.integers(0, 2**63, 1 << 17, dtype=np.uint64) * 2 + 1
        self.rows = self.splits = 0
        self._groups: dict[int, tuple[CacheLayout, list[_Unit]]] = {}
        self._salts: list[np.uint64] = []  # of layouts

    def register(self, layout: CacheLayout) -> int:
        number = super().register(layout)
        if number not in self._groups:
            what = (layout.full, layout.packed, layout.keep, layout.rotate, layout.sinks, layout.window)
            self._salts.append(np.uint64(zlib.crc32(repr(what).encode())))
            self._groups[number] = layout, [self._unit(layout, group) for group in range(len(layout.units))]
        return number

    def _unit(self, layout: CacheLayout, group: int) -> _Unit:
        places = [
            (layer, head) for layer, heads in enumerate(layout.group_of) for head, of in enumerate(heads) if of == group
        ]
        shares = [
            0 if page is None else page.share_bytes(self.shape.head_size) // 8 for page in (layout.full, layout.packed)
        ]
        firsts = [np.arange(len(places), dtype=np.int64)[:, None] * share for share in shares]
        keys = np.array([[(layer * 64 + head) * 2 + 1] for layer, head in places], np.uint64)
        own = {self.shape.windows[layer] or 0 for layer, _ in places}
        assert len(own) == 1, "layers with different windows share a table"
        (window,) = own
        sinks = 0 if window else layout.sinks
        return _Unit(firsts[0], firsts[1], keys, tuple(places), window or layout.window, sinks)

    def _tables(self, layout: CacheLayout, blocks: Any, spans: Any, shifts: Any, first: int) -> list[_Tables]:
        """Of a sequence whose tables begin at number `first`."""
        found, per_group = [], 1 if layout.packed is None else 2
        for group in range(len(layout.units)):
            at = first + group * per_group
            cells = [np.empty(0, np.int64)] * 2
            for kind in range(per_group):
                tokens = BLOCK_TOKENS if kind == 0 or layout.packed is None else layout.packed.tokens
                each = blocks[spans[at + kind] : spans[at + kind + 1]].astype(np.int64)
                cell = np.where(each[:, None] < 0, -1, each[:, None] * CELLS + np.arange(tokens))
                cells[kind] = cell.reshape(-1)
                assert shifts[at + kind] == shifts[at]
            found.append(_Tables(cells[0], cells[1], int(shifts[at])))
        return found

    def make(self, work: Pass, rows: NDArray[np.int32]) -> NDArray[np.float32]:
        for source, target, steps in work.copies.tolist():
            size = steps * CELLS
            self.memory[target * CELLS :][:size] = self.memory[source * CELLS :][:size]
        wanted = set(rows.tolist())
        watched = {one.sequence: one for one in work.observations}
        out, at = {}, 0
        for s, number in enumerate(work.layouts.tolist()):
            layout, units = self._groups[number]
            tables = self._tables(layout, work.blocks, work.block_spans, work.shifts, at)
            at += layout.num_tables
            first, end = work.spans[s : s + 2].tolist()
            self.splits += end - 1 not in wanted
            for row in range(first, end):
                seen = self._row(
                    int(work.tokens[row]), int(work.slots[row]), layout, units, tables, number, watched.get(s)
                )
                if row in wanted:
                    out[row] = self.table[0, seen % self.BUCKETS] + self.table[1, (seen >> 20) % self.BUCKETS]
        assert at == len(work.block_spans) - 1 == len(work.shifts)
        self.rows += len(work.tokens)
        return np.array([out[row] for row in rows.tolist()], np.float32).reshape(len(out), self.table.shape[2])

    def _cells(self, layout: CacheLayout, unit: _Unit, table: _Tables, slot: int, packed_end: int) -> tuple[Any, Any]:
        """What a row at `slot` of the table sees before it: slots, and cells [units, slots]."""
        low = max(0, slot + 1 - unit.window) if unit.window else 0
        slots = np.arange(low, slot)
        if low > 0 and unit.sinks:
            slots = np.concatenate([np.arange(min(unit.sinks, low)), slots])
        if packed_end > layout.keep:
            of_page = (slots >= layout.keep) & (slots < packed_end)
            full = table.full[slots]
            packed = np.full(len(slots), -1, np.int64)
            packed[of_page] = table.packed[slots[of_page]]
            cells = np.where(of_page, packed + unit.packed, full + unit.full)
            places = np.where(of_page, packed, full)
        else:
            places = table.full[slots]
            cells = places + unit.full
        assert (places >= 0).all(), "a block that is seen was freed"
        return slots, cells

    def _pack(self, layout: CacheLayout, unit: _Unit, table: _Tables, group: int, numbers: Any = None) -> None:
        """Numbers [units, tokens] of a group, or those of the full blocks, into its page."""
        assert layout.packed is not None
        each = layout.packed.tokens
        slots = slice(group * each, (group + 1) * each)
        cells = table.packed[slots]
        if len(cells) == 0 or cells[0] < 0:
            assert numbers is None or numbers is False, "no page to pack into"
            return
        if numbers is None:
            assert (table.full[slots] >= 0).all(), "a block that is packed was freed"
            numbers = self.memory[table.full[slots] + unit.full]
        with np.errstate(over="ignore"):
            kind = np.uint64(len(layout.packed.k) * 3 + len(layout.packed.v) + each)
            self.memory[cells + unit.packed] = numbers * np.uint64(3) + numbers.sum(1, keepdims=True) + kind

    def _row(
        self, token: int, slot: int, layout: CacheLayout, units: list[_Unit], tables: list[_Tables], number: int,
        watched: Observation | None,
    ) -> int:  # fmt: skip
        seen = np.uint64((token + 1) * int(MIX) % 2**64) ^ np.uint64(slot) ^ self._salts[number]
        looked = []
        with np.errstate(over="ignore"):
            for unit, table in zip(units, tables, strict=True):
                here = slot - table.shift
                if layout.packed is not None:
                    each = layout.packed.tokens
                    before = layout.packed_end(here - 1) if here else 0
                    for group in range(before // each, layout.packed_end(here) // each):
                        self._pack(layout, unit, table, group)
                slots, cells = self._cells(layout, unit, table, here, layout.packed_end(here))
                values = self.memory[cells]
                looked.append((slots, values))
                seen += (values * self.factors[slots] * unit.keys).sum()
            seen ^= seen >> np.uint64(29)
            seen *= np.uint64(0xBF58476D1CE4E5B9)
            seen ^= seen >> np.uint64(32)
            for unit, table in zip(units, tables, strict=True):
                cell = table.full[slot - table.shift]
                assert cell >= 0
                self.memory[cell + unit.full[:, 0]] = (seen ^ unit.keys[:, 0]) * MIX
            if watched is not None and watched.first <= slot < watched.end:
                self._watch(watched, slot, seen, units, looked)
        return int(seen)

    def _watch(self, watched: Observation, slot: int, seen: Any, units: list[_Unit], looked: list[Any]) -> None:
        if watched.sums is not None:
            for unit, (slots, values) in zip(units, looked, strict=True):
                for (layer, head), own in zip(unit.places, values, strict=True):
                    watched.sums[layer, head, slots] += ((own ^ seen) >> np.uint64(40)).astype(np.int64)
        if watched.queries is not None:
            count = watched.queries.shape[2]
            for layer in range(len(watched.queries)):
                numbers = (seen ^ np.uint64(layer + 1)) * self.factors[:count]
                watched.queries[layer, slot - watched.first] = (numbers >> np.uint64(50)).astype(np.float32) / 8192 - 1

    # ---- between passes

    def _viewed(self, view: CacheView) -> tuple[CacheLayout, list[_Unit], list[_Tables]]:
        layout, units = self._groups[view.layout]
        return layout, units, self._tables(layout, view.blocks, view.block_spans, view.shifts, 0)

    def _numbers(self, view: CacheView, layer: int, head: int) -> NDArray[np.uint64]:
        """As it lies there: what the next row is the first to read packed still is not."""
        layout, units, tables = self._viewed(view)
        group = layout.group_of[layer][head]
        unit, table = units[group], tables[group]
        count = view.num_tokens - table.shift
        _, cells = self._cells(layout, unit, table, count, layout.packed_end(count - 1))
        return self.memory[cells[unit.places.index((layer, head))]]

    def read(self, view: CacheView, layer: int, head: int, what: str) -> NDArray[np.float32]:
        numbers = self._numbers(view, layer, head)
        mixed = numbers[:, None] * self.factors[: self.shape.head_size] * np.uint64(1 if what == "keys" else 3)
        return (mixed >> np.uint64(48)).astype(np.float32) / 32768 - 1

    def evict(self, source: CacheView, target: CacheView, kept: NDArray[np.int32], counts: NDArray[np.int32]) -> None:
        layout, units, tables = self._viewed(target)
        old, _, sources = self._viewed(source)
        for (layer, head), count in np.ndenumerate(counts):
            if count < 0:
                continue
            group = layout.group_of[layer][head]
            unit, table, before = units[group], tables[group], sources[old.group_of[layer][head]]
            one = unit.places.index((layer, head))
            unit = unit._replace(full=unit.full[one : one + 1], packed=unit.packed[one : one + 1])
            assert target.num_tokens - table.shift == count, (target.num_tokens, table.shift, count)
            slots = kept[layer, head, :count].astype(np.int64)
            assert (np.diff(slots) > 0).all() and (kept[layer, head, count:] == -1).all()
            numbers = self._numbers(source, layer, head)[slots]
            there = table.full[:count] >= 0
            self.memory[table.full[:count][there] + unit.full[0]] = numbers[there]
            if layout.packed is not None:
                self._evict_pages(layout, unit, table, slots, numbers, source.num_tokens - before.shift)

    def _evict_pages(
        self, layout: CacheLayout, unit: _Unit, table: _Tables, slots: Any, numbers: Any, held: int
    ) -> None:
        assert layout.packed is not None
        each, packed = layout.packed.tokens, layout.packed_end(held - 1)
        for group in range(layout.packed_end(len(slots) - 1) // each):
            part = slice(group * each, (group + 1) * each)
            first = int(slots[part][0])
            if table.packed[part][0] < 0:
                continue
            as_it_was = first % each == 0 and first >= layout.keep and first + each <= packed
            if as_it_was and slots[part][-1] - first == each - 1:
                self.memory[table.packed[part] + unit.packed[0]] = numbers[part]
            else:
                self._pack(layout, unit, table, group, numbers[None, part])

    def save(self, blocks: NDArray[np.int32], steps: int) -> NDArray[np.uint8]:
        cells = blocks.astype(np.int64)[:, None] * CELLS + np.arange(steps * CELLS)
        return self.memory[cells].view(np.uint8)

    def restore(self, blocks: NDArray[np.int32], data: NDArray[np.uint8]) -> None:
        cells = blocks.astype(np.int64)[:, None] * CELLS + np.arange(data.shape[1] // 8)
        self.memory[cells] = np.ascontiguousarray(data).view(np.uint64)


def make_engine(
    executor: Executor, tokenizer: Tokenizer, shape: Shape, size: PoolSize, cache: CacheParams | None = None,
    **params: object,
) -> Engine:  # fmt: skip
    model = Model(tokenizer, shape, rope=shape.rope)
    return Engine(executor, model, cache or CacheParams(), size, EngineParams(**params))  # type: ignore[arg-type]


def engine(
    tokenizer: Tokenizer,
    *,
    num_blocks: int = 8,
    slab_blocks: int = 1,
    context: int = 100,
    batch: int = 32,
    **params: object,
) -> tuple[Engine, Script]:
    script = Script(tokenizer.vocab_size)
    shape = Shape(context_length=context, vocab_size=tokenizer.vocab_size)
    params = {"max_batch_tokens": batch, "prefix_sharing": False} | params
    return make_engine(script, tokenizer, shape, PoolSize(num_blocks, slab_blocks * shape.slab_bytes), **params), script  # type: ignore[arg-type]


def seeing(
    tokenizer: Tokenizer, shape: Shape = LAYOUT, num_slabs: int = 400, *, cache: CacheParams | None = None,
    any_format: bool = False, **params: object,
) -> Engine:  # fmt: skip
    """any_format: slabs serve blocks of all formats; else of f16, as tightly as can be."""
    wide = CacheParams(k="int8", v="f32")
    slab = choose_slab_bytes((*usual_layouts(shape), shape.layout(wide)), 0) if any_format else shape.slab_bytes
    size = PoolSize(num_slabs, slab)
    return make_engine(Seeing(shape, size, tokenizer.vocab_size), tokenizer, shape, size, cache, **params)  # type: ignore[arg-type]


def run_out(made: Engine) -> None:
    """Step to the end, checking the books after every step; nobody holds a block afterwards."""
    while made.step():
        made.scheduler.check_integrity()
    assert made.scheduler.pool.num_held == 0
    assert made.scheduler.pool.num_free_slabs == made.scheduler.pool.num_slabs
