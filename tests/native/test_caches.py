"""Passes over every kind of cache: the same bits whatever is computed together, and close to the definition."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from native.tiny import cache_layout, config, definition, tokens, weights
from oracles.small_caches import Held, Space, pass_of

from kvik import _native
from kvik.cache.storage import allocate_cache
from kvik.models import llama
from kvik.models.config import ModelConfig
from kvik.ops import Observation
from kvik.ops.native_ops import NativeExecutor
from kvik.ops.pages import ADDRESS_BYTES, BLOCK_TOKENS, RECENT, CacheLayout
from kvik.weights.layouts import Layout

C = config(num_layers=2, num_heads=4, num_kv_heads=2, head_size=32, windows=(None, None))
WINDOWED = config(num_layers=3, num_heads=4, num_kv_heads=2, head_size=16, windows=(70, None, 24))
MADE = weights(C, Layout.F32)
STREAM = {"sinks": 5, "window": 70, "keep": 16}
LAYOUTS: dict[str, dict[str, Any]] = {
    "bf16, f32": {"k": "bf16", "v": "f32"},
    "int8": {"k": "int8", "v": "int8"},
    "int8 by 16": {"k": "int8", "v": "int8", "group_size": 16, "keep": 16},
    "k8v4 by 32": {"k": "int8", "v": "int4", "group_size": 32, "keep": 16},
    "int4 by 128": {"k": "int4", "v": "int4", "group_size": 128, "keep": 32},
    "rotated int4": {"k": "int4", "v": "int4", "rotate": True, "by": "layer"},
    "keys f16": {"k": "f16", "v": "int4", "group_size": 32, "by": "head"},
    "values bf16": {"k": "int4", "v": "bf16", "group_size": 16},
    "rotated f16": {"k": "f16", "v": "f16", "rotate": True},
    "streaming f16": {"k": "f16", "v": "f16", **STREAM},
    "streaming f32, many sinks": {"k": "f32", "v": "f32", "sinks": 67, "window": 30, "keep": 80},
    "streaming int8": {"k": "int8", "v": "int8", "group_size": 16, **STREAM},
    "streaming rotated int4": {"k": "int4", "v": "int4", "rotate": True, "by": "head", **STREAM},
    "a window of packed tokens never": {"k": "int8", "v": "int8", "sinks": 3, "window": 20, "keep": 16},
}


def layout(c: ModelConfig, name: str) -> CacheLayout:
    return cache_layout(c, **LAYOUTS[name])


def forget(c: ModelConfig, held: Held, memory: np.ndarray[Any, Any]) -> None:
    """Free and ruin whatever no later row looks at."""
    of = held.layout
    flat = [group for heads in of.group_of for group in heads]
    for group, units in enumerate(of.units):
        windows = {c.windows[i // c.num_kv_heads] or of.window for i, g in enumerate(flat) if g == group}
        reach = 0 if 0 in windows else max(windows)
        length, packs = held.length - held.shifts[group], of.packed is not None and (reach == 0 or reach > RECENT)
        start = max(0, length + 1 - reach) if reach else 0
        first, table = of.packed_end(length - 1) if packs else start, group * (1 if of.packed is None else 2)
        for b in range(len(held.tables[table])):
            at, end = b * BLOCK_TOKENS, (b + 1) * BLOCK_TOKENS
            if end <= first and not (at < of.keep and end > start) and at >= of.sinks:
                ruin(memory, c, held, table, b, units, of.full)
        if of.packed is None:
            continue
        for b in range(len(held.tables[table + 1])):
            if not packs or (b + 1) * of.packed.tokens <= max(start, of.keep):
                ruin(memory, c, held, table + 1, b, units, of.packed)


def ruin(
    memory: np.ndarray[Any, Any], c: ModelConfig, held: Held, table: int, block: int, units: int, page: Any
) -> None:
    address = held.tables[table][block] * ADDRESS_BYTES
    if address >= 0:
        memory[address : address + units * page.share_bytes(c.head_size)] = 0xFF
        held.free(table, block, block + 1)


class Small:
    """An executor over memory of its own that hands out sequences."""

    def __init__(self, c: ModelConfig = C, made: Any = MADE, threads: int = 2, isa: str = "auto") -> None:
        self.config, self.space, self.memory = c, Space(c), allocate_cache(1 << 22)
        self.runner = NativeExecutor(
            c, llama.forward, made, pool=_native.Pool(threads), kv=self.memory, max_rows=256, isa=isa
        )

    def held(self, of: CacheLayout, count: int, **how: Any) -> Held:
        return Held.of(self.space, of, self.runner.register(of), count, **how)

    def run(
        self, *chunks: tuple[Held, Sequence[int]], observations: Sequence[Observation] = ()
    ) -> np.ndarray[Any, Any]:
        return self.runner.run(pass_of(chunks, observations=observations)).copy()

    def forget(self, held: Held) -> None:
        forget(self.config, held, self.memory)


def in_chunks(
    small: Small, held: Held, ids: list[int], guest: Held, others: list[int], seed: int
) -> np.ndarray[Any, Any]:
    """Logits of all tokens, of every size of chunk, with another sequence's before or behind them or not at all."""
    rng, rows, at = np.random.default_rng(seed), [], 0
    while at < len(ids):
        count = min(int(rng.choice([1, 1, 2, 3, 20, 60])), len(ids) - at)
        beside = min(int(rng.choice([0, 0, 1, 30])), len(others) - guest.length)
        own, its = (held, ids[at : at + count]), (guest, others[guest.length : guest.length + beside])
        chunks = [own] if not beside else [its, own] if rng.random() < 0.5 else [own, its]
        logits = small.run(*chunks)
        first = beside if chunks[0] is its else 0
        rows.append(logits[first : first + count])
        at += count
        small.forget(held)
        small.forget(guest)
    return np.concatenate(rows)


@pytest.mark.parametrize("name", LAYOUTS)
def test_bits_are_invariant(name: str) -> None:
    """Chunks, threads, instruction sets, a sequence of another layout beside it, and all that is freed: the same bits."""
    ids, others = tokens(C.vocab_size, 250), tokens(C.vocab_size, 120, 5)
    of, other = layout(C, name), layout(C, "k8v4 by 32" if name != "k8v4 by 32" else "streaming f16")
    whole = Small()
    want = whole.run((whole.held(of, 256), ids))
    assert np.isfinite(want).all()
    for isa in _native.isa_available():
        for threads in (1, 3):
            small = Small(isa=isa, threads=threads)
            got = in_chunks(small, small.held(of, 256), ids, small.held(other, 128), others, threads)
            assert np.array_equal(got, want), (isa, threads)


@pytest.mark.parametrize("name", ["int8", "k8v4 by 32", "streaming int8", "streaming f16"])
def test_layers_with_windows_of_their_own(name: str) -> None:
    made, ids, others = weights(WINDOWED, Layout.F32), tokens(97, 250), tokens(97, 120, 5)
    of = layout(WINDOWED, name)
    groups = tuple((i, i) for i in range(3))  # each window's blocks are freed by itself
    of = CacheLayout(of.full, of.packed, groups, of.keep, of.rotate, of.sinks, of.window)
    whole = Small(WINDOWED, made)
    want = whole.run((whole.held(of, 256), ids))
    for threads in (1, 3):
        small = Small(WINDOWED, made, threads=threads)
        got = in_chunks(small, small.held(of, 256), ids, small.held(of, 128), others, threads)
        assert np.array_equal(got, want), threads


@pytest.mark.parametrize("name", LAYOUTS)
def test_native_equals_the_definition(name: str) -> None:
    of, ids = layout(C, name), tokens(C.vocab_size, 250)
    small, torch, space = Small(), definition(C, MADE, kv=layout(C, name)), Space(C)
    mine, its = small.held(of, 256), Held.of(space, of, 0, 256)
    at = 0
    for count in (100, 37, 1, 2, 110):
        part = ids[at : at + count]
        want, got = torch.run(pass_of([(its, part)])), small.run((mine, part))
        errors = np.abs(got - want) / np.abs(want).max()
        # A number that falls on the other side of a half moves by a step.
        assert errors.max() <= (3e-3 if of.packed is None else 6e-2) and errors.mean() <= 1e-3, at
        at += count


def test_tables_begin_where_evicted_slots_end() -> None:
    """A table with a shift holds what one without does at earlier slots; each row keeps its position."""
    ids = tokens(C.vocab_size, 150)
    for name in ("rotated f16", "k8v4 by 32", "keys f16"):
        of, small = layout(C, name), Small()
        near, far = small.held(of, 160), small.held(of, 160, shifts=[1000] * len(of.units))
        far.length = 1000
        for part in (ids[:90], ids[90:91], ids[91:]):
            want = pass_of([(near, part)])
            moved = pass_of([(far, part)])
            got = small.runner.run(moved).copy()
            assert np.array_equal(got, small.runner.run(want._replace(positions=moved.positions))), name


def observing(held: Held, first: int, end: int, index: int = 0) -> Observation:
    shape = (C.num_layers, C.num_kv_heads, 256)
    queries = np.zeros((C.num_layers, end - first, C.num_heads * C.head_size), np.float32)
    return Observation(index, first, end, np.zeros(shape, np.int64), queries)


@pytest.mark.parametrize("name", ["bf16, f32", "k8v4 by 32", "rotated int4", "streaming int8", "keys f16"])
def test_observations_are_sums_that_nothing_changes(name: str) -> None:
    of, ids, others = layout(C, name), tokens(C.vocab_size, 250), tokens(C.vocab_size, 30, 5)
    first, end = 90, 240
    whole = Small(threads=1)
    held = whole.held(of, 256)
    want = observing(held, first, end)
    plain = whole.run((whole.held(of, 256), ids))
    assert np.array_equal(whole.run((held, ids), observations=[want]), plain)
    assert want.sums is not None and want.queries is not None
    rows = (end - first) * C.num_heads // C.num_kv_heads
    totals = want.sums.sum(2) / 2**24
    assert np.abs(totals - rows).max() < 1e-4 * rows and (want.sums >= 0).all()
    for threads in (1, 3):
        small = Small(threads=threads)
        mine, guest = small.held(of, 256), small.held(of, 64)
        got, at = observing(mine, first, end), 0
        for count in (80, 1, 2, 20, 60, 1, 86):
            beside = [(guest, others[:1])] if count == 60 else []
            seen = [got._replace(sequence=len(beside))]
            small.run(*beside, (mine, ids[at : at + count]), observations=seen)
            at += count
        assert got.sums is not None and got.queries is not None
        assert np.array_equal(got.sums, want.sums) and np.array_equal(got.queries, want.queries), threads
    torch, space = definition(C, MADE, kv=of), Space(C)
    its = Held.of(space, of, 0, 256)
    defined = observing(its, first, end)
    torch.run(pass_of([(its, ids)], observations=[defined]))
    assert defined.sums is not None and defined.queries is not None
    assert np.abs(defined.sums - want.sums).max() <= 2**24 * (2e-3 if of.packed is None else 3e-2)
    assert np.abs(defined.queries - want.queries).max() <= 5e-3 * np.abs(want.queries).max()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sequence": 1}, "not in the pass"), ({"sequence": -1}, "not in the pass"), ({"first": -1, "queries": None}, "ascend"),
        ({"first": 9, "end": 8, "queries": None}, "ascend"), ({"end": 21}, "wrong shape"), ({"sums": np.zeros((2, 2, 19), np.int64)}, "fewer than"),
        ({"sums": np.zeros((2, 1, 99), np.int64)}, "by layer"), ({"queries": np.zeros((2, 20, 8), np.float32)}, "wrong shape"),
    ],
)  # fmt: skip
def test_observations_are_checked(change: dict[str, Any], message: str) -> None:
    small = Small()
    held = small.held(cache_layout(C), 32)
    seen = observing(held, 0, 20)
    with pytest.raises(ValueError, match=message):
        small.run((held, tokens(97, 20)), observations=[seen._replace(**change)])
    held.length = 0
    with pytest.raises(ValueError, match="one observation"):
        small.run((held, tokens(97, 20)), observations=[seen, seen])


@pytest.mark.parametrize("name", ["int8", "streaming int8"])
def test_blocks_that_are_needed_must_be_there(name: str) -> None:
    """Each block and page that a pass refuses to miss is one that changes its logits or its pages; no other is."""
    of, ids = (
        cache_layout(C, "int8", "int8", 16, keep=16, **({"sinks": 5, "window": 70} if "stream" in name else {})),
        tokens(97, 200),
    )
    small = Small()
    held = small.held(of, 256)
    small.run((held, ids[:150]))
    work = pass_of([(held, ids[150:190])])
    small.runner.run(work)
    start = 150 + 1 - 70 if of.window else 0
    full = {b for b in range(16) if b == 0 or (b + 1) * 16 > 112}  # 112 = packed_end(149)
    packed = {g for g in range(16) if (g + 1) * 16 > max(16, start) and g * 16 < of.packed_end(189)}
    for block in range(32):
        blocks = work.blocks.copy()
        blocks[block] = -1
        if block in full or block - 16 in packed:
            with pytest.raises(ValueError, match="out of range"):
                small.runner.run(work._replace(blocks=blocks))
        else:
            small.runner.run(work._replace(blocks=blocks))


def test_copies_are_made_in_order_before_anything() -> None:
    small = Small()
    of = cache_layout(C)
    held, fork = small.held(of, 64), small.held(of, 64)
    ids, steps = tokens(97, 40), of.units[0] * of.full.share_bytes(C.head_size) // ADDRESS_BYTES
    small.run((held, ids))
    want = small.run((held, ids[:9]))
    fork.length = 40
    spare = small.space.take(of.units[0], of.full, 1)[0]
    copies = [(held.tables[0][b], spare if b == 2 else fork.tables[0][b], steps) for b in range(3)]
    copies.append((spare, fork.tables[0][2], steps))
    work = pass_of([(fork, ids[:9])])
    assert np.array_equal(small.runner.run(work._replace(copies=np.array(copies, np.int32))), want)
    for bad in ([0, 1 << 20, 1], [-1, 5, 1], [0, 4, 8], [0, 8, 0], [8, 8, 8]):
        with pytest.raises(ValueError, match=r"cop(y|ied)"):
            small.runner.run(work._replace(copies=np.array([bad], np.int32)))
