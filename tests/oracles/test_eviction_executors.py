"""What executors do with a cache beside passes: sinks, eviction, reading, saving; against references that keep lists."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from oracles.small_caches import Held, Space, pass_of, run_chunks
from torch import Tensor

from kvik.errors import ParameterError
from kvik.models import llama
from kvik.models.config import ModelConfig
from kvik.ops import Executor, Observation, RopeTable
from kvik.ops.pages import ADDRESS_BYTES, CacheLayout
from kvik.ops.torch_cache import TorchCache
from kvik.ops.torch_ops import TorchOps
from kvik.weights.layouts import Layout
from native import tiny

pytestmark = pytest.mark.usefixtures("one_torch_thread")

Array = np.ndarray[Any, Any]
CONFIG = tiny.config(num_layers=2, vocab_size=53, hidden_size=64, intermediate_size=64, num_heads=4, num_kv_heads=2)
TOKENS = tiny.tokens(53, 300, 3)
EXECUTORS: dict[str, Callable[..., Executor]] = {"torch": tiny.definition, "native": tiny.executor}


@cache
def tensors_of(config: ModelConfig) -> dict[str, Any]:
    return tiny.weights(config, Layout.F32)


def executor_of(kind: str, layout: CacheLayout, config: ModelConfig = CONFIG) -> Executor:
    return EXECUTORS[kind](config, tensors_of(config), kv=layout, num_blocks=256)


def relative(ours: Array, others: Array) -> float:
    return float(np.abs(ours - others).max() / np.abs(others).max())


# ---- references


class Lists:
    """A cache in lists: of each (layer, KV head) the positions [n], keys as they were before rotation and values [n, D]."""

    def __init__(self) -> None:
        self.kept = {
            at: (torch.empty(0).long(), *[torch.empty(0, CONFIG.head_size).double()] * 2) for at in np.ndindex(2, 2)
        }
        self.tokens = 0

    def evict(self, kept: Array, counts: Array) -> None:
        for at, held in self.kept.items():
            self.kept[at] = tuple(x[kept[at][: counts[at]]] for x in held)  # type: ignore[assignment]


class ListOps(TorchOps):
    """One row in float64 over `Lists`. within: positions of keys and query are those within the cache, which holds the first
    sinks and the last `window` tokens.
    """

    lists: Lists
    within: tuple[int, int] | None = None
    table: RopeTable

    def rope(self, x: Tensor, heads: int, table: RopeTable) -> Tensor:
        self.table = table
        return x

    def turned(self, x: Tensor, positions: Tensor) -> Tensor:
        angles = positions[:, None] * torch.from_numpy(self.table.inv_freq)
        a, b = x.chunk(2, -1)
        return torch.cat((a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()), -1)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, layer: int, window: int | None, scale: float | None = None
    ) -> Tensor:
        size = CONFIG.head_size
        out = []
        for head, queries in enumerate(q.reshape(2, -1, size)):
            new = torch.tensor([self.lists.tokens]), k.reshape(2, 1, size)[head], v.reshape(2, 1, size)[head]
            positions, keys, values = (torch.cat(x) for x in zip(self.lists.kept[layer, head], new, strict=True))
            if self.within is not None and len(positions) > sum(self.within):
                stay = [i for i in range(len(positions)) if i != self.within[0]]
                positions, keys, values = positions[stay], keys[stay], values[stay]
            self.lists.kept[layer, head] = positions, keys, values
            at = positions if self.within is None else torch.arange(len(positions))
            scores = self.turned(queries, at[-1:]) @ self.turned(keys, at).T * size**-0.5
            out.append(scores.softmax(-1) @ values)
        return torch.cat(out).reshape(1, -1)


def run_lists(lists: Lists, tokens: list[int], within: tuple[int, int] | None = None) -> Array:
    """Logits of the next tokens, one after another."""
    weights = {name: torch.from_numpy(t.floats()).double() for name, t in tensors_of(CONFIG).items()}
    storage = TorchCache(CONFIG, 1 << 20, torch.device("cpu"))
    layout = tiny.cache_layout(CONFIG)
    storage.register(layout)
    found = []
    for token in tokens:
        ops = ListOps(pass_of([(Held.of(Space(CONFIG), layout, 0, 16), [token])]), weights, {}, storage)
        ops.lists, ops.within = lists, within
        llama.forward(ops, CONFIG)
        assert ops.result is not None
        found.append(ops.result.numpy())
        lists.tokens += 1
    return np.concatenate(found)


@cache
def streamed(sinks: int, window: int) -> Array:
    return run_lists(Lists(), TOKENS[:64], (sinks, window))


# ---- sinks


@pytest.mark.parametrize("kind", EXECUTORS)
@pytest.mark.parametrize(("sinks", "window"), [(4, 20), (1, 40), (0, 16), (17, 3)])
def test_streaming_is_as_if_all_keys_were_rotated_anew_each_step(kind: str, sinks: int, window: int) -> None:
    """The reference keeps keys as they are before rotation and gives all, in every step, positions within the cache."""
    layout = tiny.cache_layout(CONFIG, "f32", keep=-(-sinks // 16) * 16, sinks=sinks, window=window)
    executor = executor_of(kind, layout)
    held = Held.of(Space(CONFIG), layout, 0, 64)
    got = run_chunks(executor, held, TOKENS[:50], (1, 30, 7))
    held.free(0, -(-sinks // 16), (50 - window) // 16)
    got = np.concatenate((got, run_chunks(executor, held, TOKENS[50:64], (1, 1, 10))))
    assert relative(got, streamed(sinks, window)) < 1e-5


def test_sinks_need_rotary_embedding() -> None:
    layout = tiny.cache_layout(CONFIG, keep=16, sinks=2, window=9)
    storage = TorchCache(CONFIG, 1 << 20, torch.device("cpu"))
    held = Held.of(Space(CONFIG), layout, storage.register(layout), 16)
    ops = TorchOps(pass_of([(held, [0])]), {}, {}, storage)
    with pytest.raises(ParameterError, match="sinks need queries with rotary embedding"):
        ops.attend(torch.zeros(1, 64), torch.zeros(1, 32), torch.zeros(1, 32), 0, None)


# ---- eviction


def choose(rng: np.random.Generator, length: int, counts: Array) -> Array:
    """Ascending slots, so many of each layer and head, the last one always."""
    kept = np.zeros((*counts.shape, counts.max()), np.int32)
    for at in np.ndindex(counts.shape):
        chosen = rng.choice(length - 1, max(0, counts[at] - 1), replace=False)
        kept[at][: max(0, counts[at])] = np.sort([*chosen, length - 1])[: max(0, counts[at])]
    return kept


def evicted(executor: Executor, space: Space, held: Held, kept: Array, counts: Array, by: str, room: int = 64) -> Held:
    """The sequence after an event, with tables of its own."""
    layout = replace(held.layout, group_of=tiny.cache_layout(CONFIG, by=by).group_of)
    first = {group: at for at in reversed(list(np.ndindex(counts.shape))) for group in [layout.group_of[at[0]][at[1]]]}
    shifts = [held.length - int(counts[first[group]]) for group in range(len(first))]
    target = Held.of(space, layout, executor.register(layout), int(counts.max()) + room, shifts)
    target.length = held.length
    executor.evict(held.view, target.view, kept, counts)
    return target


COUNTS = {
    "": np.full((2, 2), 37, np.int32), "layer": np.array([[50, 50], [21, 21]], np.int32),
    "head": np.array([[1, 60], [33, 48]], np.int32),
}  # fmt: skip


@cache
def after_events(by: str) -> tuple[Array, list[Array], list[Array]]:
    """Logits of 100 tokens in which the 60th and the 80th are followed by events; what these keep, how many."""
    lists, rng = Lists(), np.random.default_rng(1)
    counts = [COUNTS[by], COUNTS[by] // 3 + 1]
    kept = [choose(rng, 60, counts[0]), choose(rng, int(counts[0].min()) + 20, counts[1])]
    logits = [run_lists(lists, TOKENS[:60])]
    for event, begin in enumerate((60, 80)):
        lists.evict(kept[event], counts[event])
        logits.append(run_lists(lists, TOKENS[begin : begin + 20]))
    return np.concatenate(logits), kept, counts


@pytest.mark.parametrize("kind", EXECUTORS)
@pytest.mark.parametrize("by", COUNTS)
def test_rows_after_an_event_see_what_was_kept(kind: str, by: str) -> None:
    """Twice, the second time from tables that are already evicted; positions stay those of the text."""
    expected, kept, counts = after_events(by)
    space, layout = Space(CONFIG), tiny.cache_layout(CONFIG, "f32")
    executor, held = executor_of(kind, layout), Held.of(space, layout, 0, 60)
    got = [run_chunks(executor, held, TOKENS[:60], (50,))]
    for event, begin in enumerate((60, 80)):
        held = evicted(executor, space, held, kept[event], counts[event], by)
        got.append(run_chunks(executor, held, TOKENS[begin : begin + 20], (1, 9)))
    assert relative(np.concatenate(got), expected) < 1e-5


FORMATS: dict[str, dict[str, Any]] = {
    "f16": {}, "bf16": {"k": "bf16"}, "k16v8": {"k": "f16", "v": "int8", "group_size": 16},
    "k16v4": {"k": "f16", "v": "int4", "group_size": 32, "keep": 16, "rotate": True}, "int8": {"k": "int8", "group_size": 16},
    "int4": {"k": "int4", "group_size": 64, "keep": 16, "rotate": True}, "k8v4": {"k": "int8", "v": "int4", "group_size": 32},
}  # fmt: skip


@pytest.mark.parametrize("kind", EXECUTORS)
@pytest.mark.parametrize("name", FORMATS)
def test_kept_numbers_move(kind: str, name: str) -> None:
    """To the bit where the formats are equal; the source keeps its bytes, and layers without an event their blocks."""
    layout = tiny.cache_layout(CONFIG, **FORMATS[name], by="head")
    executor, space = executor_of(kind, layout), Space(CONFIG)
    source = Held.of(space, layout, 0, 176)
    run_chunks(executor, source, TOKENS[:170])
    before = executor.save(np.zeros(1, np.int32), space.used).copy()
    counts = np.array([[130, 99], [-1, -1]], np.int32)
    kept = choose(np.random.default_rng(2), 170, counts)
    target = Held.of(space, layout, 0, 176, [40, 71, 0, 0])
    target.length, each = 170, layout.num_tables // 4
    target.tables[2 * each :] = source.tables[2 * each :]
    executor.evict(source.view, target.view, kept, counts)
    np.testing.assert_array_equal(executor.save(np.zeros(1, np.int32), before.shape[1] // ADDRESS_BYTES), before)
    for head in (0, 1):
        slots = kept[0, head, : counts[0, head]]
        was, is_now = packed_slots(layout, slots, 169), packed_slots(layout, np.arange(len(slots)), len(slots) - 1)
        k_old, v_old = (executor.read(source.view, 0, head, what)[slots] for what in ("keys", "values"))  # type: ignore[arg-type]
        k_new, v_new = (executor.read(target.view, 0, head, what) for what in ("keys", "values"))  # type: ignore[arg-type]
        np.testing.assert_array_equal(v_new[was == is_now], v_old[was == is_now])
        keys_are_coded = layout.packed is not None and layout.packed.k != layout.full.k
        same = ~was & ~is_now if keys_are_coded else np.ones(len(slots), bool)
        np.testing.assert_allclose(k_new[same], k_old[same], rtol=0, atol=1e-6 if layout.rotate else 0)
        for new, old in ((k_new, k_old), (v_new, v_old)):
            assert np.abs(new - old).max() <= (0.2 if "4" in name else 0.02) * np.abs(old).max()
        for what in ("keys", "values"):
            unmoved = (executor.read(x.view, 1, head, what) for x in (source, target))  # type: ignore[arg-type]
            np.testing.assert_array_equal(*unmoved)


def packed_slots(layout: CacheLayout, slots: Array, reader: int) -> Array:
    return (slots >= layout.keep) & (slots < layout.packed_end(reader))


@pytest.mark.parametrize("kind", EXECUTORS)
@pytest.mark.parametrize("name", ["f16", "bf16", "k16v8", "k16v4"])
def test_with_a_full_budget_nothing_changes(kind: str, name: str) -> None:
    layout = tiny.cache_layout(CONFIG, **FORMATS[name])
    executor, space = executor_of(kind, layout), Space(CONFIG)
    held = Held.of(space, layout, 0, 240)
    run_chunks(executor, held, TOKENS[:170])
    counts = np.full((2, 2), 170, np.int32)
    moved = evicted(executor, space, held, choose(np.random.default_rng(0), 170, counts), counts, "")
    expected = run_chunks(executor, held, TOKENS[170:220], (1, 20))
    np.testing.assert_array_equal(run_chunks(executor, moved, TOKENS[170:220], (1, 20)), expected)


@pytest.mark.parametrize("kind", EXECUTORS)
@pytest.mark.parametrize("name", ["f16", "k16v4", "int8"])
def test_chunks_after_an_event_make_no_difference(kind: str, name: str) -> None:
    """Whole and in pieces, beside another sequence with another layout, whose observation is its own."""
    layout, beside = tiny.cache_layout(CONFIG, **FORMATS[name]), tiny.cache_layout(CONFIG, "f16", by="layer")
    executor, space = executor_of(kind, layout), Space(CONFIG)
    held, other = (Held.of(space, x, executor.register(x), 100) for x in (layout, beside))
    run_chunks(executor, held, TOKENS[:90])
    counts = np.array([[50, 80], [60, 23]], np.int32)
    kept = choose(np.random.default_rng(4), 90, counts)
    whole, pieces = (evicted(executor, space, held, kept, counts, "head") for _ in range(2))
    sums = np.zeros((2, 2, 2, 150), np.int64)
    expected = executor.run(pass_of([(whole, TOKENS[90:140])], None, [Observation(0, 100, 140, sums[0])])).copy()
    got = []
    for begin, end in ((90, 91), (91, 130), (130, 140)):
        observation = Observation(1, 100, 140, sums[1])
        work = pass_of([(other, TOKENS[begin - 90 : end - 90]), (pieces, TOKENS[begin:end])], None, [observation])
        got.append(executor.run(work)[end - begin :].copy())
    tolerance = 0 if kind == "native" else 1e-3
    assert relative(np.concatenate(got), expected) <= tolerance
    np.testing.assert_allclose(sums[1], sums[0], rtol=0, atol=tolerance * 2**24)
    assert abs(sums[0].sum() / 2**24 - 2 * 4 * 40) < 1e-3


@pytest.mark.parametrize("kind", EXECUTORS)
def test_saved_blocks_go_elsewhere(kind: str) -> None:
    layout = tiny.cache_layout(CONFIG, "int8", "int4", 16)
    executor, space = executor_of(kind, layout), Space(CONFIG)
    held, elsewhere = (Held.of(space, layout, 0, 128) for _ in range(2))
    run_chunks(executor, held, TOKENS[:100])
    for table, page in enumerate((layout.full, layout.packed)):
        assert page is not None
        steps = 4 * page.share_bytes(CONFIG.head_size) // ADDRESS_BYTES
        saved = executor.save(held.tables[table], steps)
        assert saved.shape == (len(held.tables[table]), steps * ADDRESS_BYTES) and saved.dtype == np.uint8
        executor.restore(elsewhere.tables[table], saved)
    elsewhere.length = held.length
    expected = run_chunks(executor, held, TOKENS[100:120])
    np.testing.assert_array_equal(run_chunks(executor, elsewhere, TOKENS[100:120]), expected)


@pytest.mark.parametrize("kind", EXECUTORS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kept": -1}, "kept slot"),
        ({"kept": 60}, "kept slot"),
        ({"twice": True}, "ascend|rise"),
        ({"length": 61}, "kept slots"),
    ],
)
def test_evictions_that_do_not_fit_are_refused(kind: str, change: dict[str, Any], message: str) -> None:
    layout = tiny.cache_layout(CONFIG)
    executor, space = executor_of(kind, layout), Space(CONFIG)
    held = Held.of(space, layout, 0, 64)
    run_chunks(executor, held, TOKENS[:60])
    target = Held.of(space, layout, 0, 64, [40])
    target.length = change.get("length", 60)
    kept = np.tile(np.arange(40, 60, dtype=np.int32), (2, 2, 1))
    if "kept" in change:
        kept[1, 1, 0 if change["kept"] < 0 else -1] = change["kept"]
    if "twice" in change:
        kept[0, 1, 5] = kept[0, 1, 6]
    with pytest.raises(ValueError, match=message):
        executor.evict(held.view, target.view, kept, np.full((2, 2), 20, np.int32))


def test_a_block_that_a_row_looks_at_must_be_there() -> None:
    layout = tiny.cache_layout(CONFIG, window=20)
    executor = executor_of("torch", layout)
    held = Held.of(Space(CONFIG), layout, 0, 64)
    run_chunks(executor, held, TOKENS[:50])
    held.free(0, 0, 1)
    run_chunks(executor, held, TOKENS[50:52])
    held.free(0, 2, 3)
    with pytest.raises(ParameterError, match="looked at"):
        run_chunks(executor, held, TOKENS[52:53])
