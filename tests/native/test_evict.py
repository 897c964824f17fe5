"""Between passes: kept slots move together, what is read is what is there, and what was saved comes back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from native.test_caches import LAYOUTS, MADE, C, Small, in_chunks
from native.tiny import STEP, cache_layout, config, executor, tokens, weights
from numpy.typing import NDArray
from oracles.small_caches import Held

from kvik.ops import CacheView
from kvik.ops.pages import ADDRESS_BYTES, CacheLayout, PageFormat, is_packed
from kvik.ops.torch_pages import code_keys, code_values
from kvik.params import KVFormat
from kvik.weights.layouts import Layout

SHAPE = C.num_layers, C.num_kv_heads
EVICTING = [name for name, how in LAYOUTS.items() if "window" not in how]


def ran(small: Small, of: CacheLayout, ids: list[int]) -> Held:
    held = small.held(of, 256)
    small.run((held, ids))
    small.forget(held)
    return held


def chosen(counts: NDArray[np.int32], length: int, seed: int = 0) -> NDArray[np.int32]:
    """Random slots, ascending, so many of each layer and head."""
    rng = np.random.default_rng(seed)
    kept = np.zeros((*counts.shape, max(1, counts.max())), np.int32)
    for at, count in np.ndenumerate(counts):
        if count > 0:
            kept[at][:count] = np.sort(rng.choice(length, count, replace=False))
    return kept


def target_of(small: Small, of: CacheLayout, source: Held, counts: NDArray[np.int32]) -> Held:
    """With room for the kept slots, some more, and nothing else."""
    shifts = [0] * len(of.units)
    for at, count in np.ndenumerate(counts):
        shifts[of.group_of[at[0]][at[1]]] = source.length - max(0, int(count))
    held = small.held(of, 256, shifts=shifts)
    held.length = source.length
    small.forget(held)
    return held


def uneven(seed: int) -> NDArray[np.int32]:
    return np.random.default_rng(seed).integers(1, 180, SHAPE).astype(np.int32)


@pytest.mark.parametrize("name", [n for n in EVICTING if cache_layout(C, **LAYOUTS[n]).packed is None])
def test_keeping_all_changes_nothing(name: str) -> None:
    of, ids = cache_layout(C, **LAYOUTS[name]), tokens(C.vocab_size, 200)
    small = Small()
    source = ran(small, of, ids[:150])
    counts = np.full(SHAPE, 150, np.int32)
    target = target_of(small, of, source, counts)
    small.runner.evict(source.view, target.view, chosen(counts, 150), counts)
    for part in (ids[150:170], ids[170:171], ids[171:]):
        assert np.array_equal(small.run((target, part)), small.run((source, part)))


def coded(x: NDArray[np.float32], of: CacheLayout, what: str, shared: bool) -> NDArray[np.float32]:
    """Numbers [n, D] as a table of n slots holds them."""
    code = code_keys if what == "keys" else code_values
    page = of.full if not shared else of.packed
    assert page is not None
    kv = page.k if what == "keys" else page.v
    return code(torch.from_numpy(x)[None], kv).floats()[0].numpy()


@pytest.mark.parametrize("name", [n for n in EVICTING if "rotated" not in n])
def test_kept_slots_lie_together(name: str) -> None:
    """By head, whatever the source's groups; each number rounded as its place says, groups that are due packed."""
    small, ids = Small(threads=3), tokens(C.vocab_size, 200)
    source = ran(small, cache_layout(C, **LAYOUTS[name]), ids)
    of, counts = cache_layout(C, **{**LAYOUTS[name], "by": "head"}), uneven(1)
    kept, target = chosen(counts, 200), target_of(small, of, source, counts)
    before = {
        (*at, what): small.runner.read(source.view, *at, what)
        for at in np.ndindex(SHAPE)
        for what in ("keys", "values")
    }
    small.runner.evict(source.view, target.view, kept, counts)
    for (layer, head, what), numbers in before.items():
        count = counts[layer, head]
        want = numbers[kept[layer, head, :count]]
        got = small.runner.read(target.view, layer, head, what)
        assert got.shape == (count, C.head_size) and np.isfinite(got).all()
        end = of.packed_end(count - 1)
        assert np.array_equal(got[end:], coded(want[end:], of, what, False))
        assert np.array_equal(got[: min(of.keep, count)], coded(want[: of.keep], of, what, False))
        for first in range(0, end, of.packed.tokens if of.packed else 1):
            last = first + (of.packed.tokens if of.packed else 1)
            packed = coded(want[first:last], of, what, True)
            if what == "values" and of.packed and is_packed(of.packed.v):  # integers stay what they are
                slots = kept[layer, head, first:last]
                stay = (slots >= of.keep) & (slots < of.packed_end(199))
                packed[stay] = want[first:last][stay]
            begin = max(first, min(of.keep, last))
            assert np.array_equal(got[begin:last], packed[begin - first :])
        assert np.array_equal(small.runner.read(source.view, layer, head, what), numbers)


@pytest.mark.parametrize("name", EVICTING)
def test_bits_are_invariant_behind_an_uneven_eviction(name: str) -> None:
    ids, more, others = tokens(C.vocab_size, 150), tokens(C.vocab_size, 100, 3), tokens(C.vocab_size, 60, 5)
    of, counts, found = cache_layout(C, **{**LAYOUTS[name], "by": "head"}), uneven(2).clip(max=150), []
    for threads in (1, 3):
        small = Small(threads=threads)
        source = ran(small, cache_layout(C, **LAYOUTS[name]), ids)
        target = target_of(small, of, source, counts)
        small.runner.evict(source.view, target.view, chosen(counts, 150), counts)
        if threads == 1:
            found.append(small.run((target, more)))
        else:
            found.append(in_chunks(small, target, more, small.held(cache_layout(C), 64), others, 7))
    assert np.isfinite(found[0]).all() and np.array_equal(*found)


def test_layers_that_are_left_alone() -> None:
    small, of = Small(), cache_layout(C, "int8", "int4", by="layer")
    source = ran(small, of, tokens(C.vocab_size, 150))
    counts = np.array([[40, 40], [-1, -1]], np.int32)
    target = target_of(small, of, source, counts)
    target.tables[2:] = source.tables[2:]
    target.shifts[1] = 0
    before = small.runner.read(source.view, 1, 1, "keys")
    small.runner.evict(source.view, target.view, chosen(counts, 150), counts)
    assert np.array_equal(small.runner.read(target.view, 1, 1, "keys"), before)
    assert len(small.runner.read(target.view, 0, 1, "keys")) == 40


def test_numbers_of_slots_that_nobody_sees_are_zeros() -> None:
    small, of = Small(), cache_layout(C, sinks=5, window=30, keep=16)
    source = ran(small, of, tokens(C.vocab_size, 150))
    keys = small.runner.read(source.view, 1, 0, "keys")
    assert not keys[16:112].any() and keys[:16].all() and keys[112:].all()


@pytest.mark.parametrize("rotate", [False, True])
def test_keys_are_read_with_rotary_embedding_only(rotate: bool) -> None:
    """Those of the first layer depend on its token and position: the same with and without the transform."""
    small, ids = Small(), tokens(C.vocab_size, 60)
    plain, turned = (ran(small, cache_layout(C, "f32", "f32", rotate=rotated), ids) for rotated in (False, rotate))
    for what in ("keys", "values"):
        want, got = (small.runner.read(held.view, 0, 1, what) for held in (plain, turned))  # type: ignore[arg-type]
        assert np.abs(got - want).max() <= 1e-6 * np.abs(want).max()


def test_saved_blocks_come_back_elsewhere() -> None:
    small, of, ids = Small(), cache_layout(C, "int8", "int4", 32, by="layer"), tokens(C.vocab_size, 200)
    held = ran(small, of, ids[:150])
    want = small.run((held, ids[150:151]))
    held.length -= 1
    saved = []
    for table, blocks in enumerate(held.tables):
        page = of.packed if table % 2 else of.full
        assert page is not None
        steps = of.units[table // 2] * page.share_bytes(C.head_size) // ADDRESS_BYTES
        there = blocks >= 0
        saved.append((there, steps, small.runner.save(blocks[there], steps)))
        assert saved[-1][2].shape == (there.sum(), steps * 64)
    small.memory[:] = 0xFF
    for (there, _, data), blocks, page in zip(saved, held.tables, [of.full, of.packed] * 2, strict=True):
        assert page is not None
        blocks[there] = small.space.take(of.units[0], page, int(there.sum()))
        small.runner.restore(blocks[there], data)
    assert np.array_equal(small.run((held, ids[150:151])), want)


def evicting(change: Callable[[dict[str, Any]], Any]) -> None:
    small, of = Small(), cache_layout(C, "int8", "int4", 32)
    source = ran(small, of, tokens(C.vocab_size, 150))
    counts = np.full(SHAPE, 90, np.int32)
    target = target_of(small, of, source, counts)
    call = {"source": source.view, "target": target.view, "kept": chosen(counts, 150), "counts": counts}
    change(call)
    small.runner.evict(**call)


def put(array: NDArray[np.int32], index: Any, value: int) -> None:
    array[index] = value


VIEWS: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (lambda call: put(call["kept"], (0, 1, 3), 150), "outside its table"),
    (lambda call: put(call["kept"], (0, 0, 0), -1), "outside its table"),
    (lambda call: put(call["kept"], (1, 1, 5), call["kept"][1, 1, 6]), "ascend"),
    (lambda call: put(call["counts"], (1, 1), 91), "out of range"),
    (lambda call: put(call["counts"], (1, 1), -2), "out of range"),
    (lambda call: put(call["counts"], (1, 1), 89), "differ in number"),
    (lambda call: call.update(kept=call["kept"][:1]), "by layer"),
    (lambda call: call.update(counts=call["counts"][:, :1].copy()), "by layer"),
    (lambda call: call.update(source=call["source"]._replace(layout=1)), "not registered"),
    (lambda call: call.update(source=call["source"]._replace(layout=-1)), "not registered"),
    (lambda call: call.update(target=call["target"]._replace(num_tokens=-1)), "negative"),
    (lambda call: call.update(target=call["target"]._replace(num_tokens=149)), "differ in number"),
    (lambda call: call.update(target=call["target"]._replace(num_tokens=9999)), "slot outside"),
    (lambda call: call.update(target=call["target"]._replace(shifts=np.array([60, 59], np.int32))), "shift"),
    (lambda call: call.update(target=call["target"]._replace(shifts=np.array([60], np.int32))), "other tables"),
    (lambda call: call.update(target=call["target"]._replace(block_spans=np.array([0, 16], np.int32))), "do not match"),
    (lambda call: call.update(target=call["target"]._replace(block_spans=np.array([0, 30, 24], np.int32))), "ascend"),
    (lambda call: call.update(target=call["target"]._replace(block_spans=np.array([0, 16, 25], np.int32))), "cover"),
    (lambda call: put(call["target"].blocks, 5, -1), "block of the target"),
    (lambda call: put(call["target"].blocks, 16, -1), "page of the target"),
    (lambda call: put(call["source"].blocks, 16, -1), "kept slot is missing"),
    (lambda call: put(call["source"].blocks, 9, -1), "kept slot is missing"),
    (lambda call: put(call["source"].blocks, 9, 1 << 20), "block out of range"),
    (lambda call: put(call["target"].blocks, 17, -2), "page out of range"),
]


@pytest.mark.parametrize("case", range(len(VIEWS)))
def test_an_eviction_is_checked(case: int) -> None:
    with pytest.raises(ValueError, match=VIEWS[case][1]):
        evicting(VIEWS[case][0])


def test_the_call_that_is_checked_is_right() -> None:
    evicting(lambda call: None)


def test_reading_and_saving_are_checked() -> None:
    small, of = Small(), cache_layout(C)
    held = ran(small, of, tokens(C.vocab_size, 20))
    for layer, head in ((2, 0), (-1, 0), (0, 2), (0, -1)):
        with pytest.raises(ValueError, match="layer or KV head"):
            small.runner.read(held.view, layer, head, "keys")
    last = len(small.memory) // ADDRESS_BYTES
    for address, steps in ((-1, 1), (last, 1), (last - 1, 2)):
        with pytest.raises(ValueError, match="to save"):
            small.runner.save(np.array([address], np.int32), steps)
        with pytest.raises(ValueError, match="to restore"):
            small.runner.restore(np.array([address], np.int32), np.zeros((1, steps * 64), np.uint8))
    with pytest.raises(ValueError, match="step"):
        small.runner.save(np.array([0], np.int32), 0)
    with pytest.raises(ValueError, match="do not fit"):
        small.runner.restore(np.array([0, 9], np.int32), np.zeros((1, 64), np.uint8))
    with pytest.raises(ValueError, match="do not fit"):
        small.runner.restore(np.array([0], np.int32), np.zeros((1, 65), np.uint8))


FULL, PACKED = PageFormat("f16", "f16", 16), PageFormat("int8", "int4", 64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"full": PageFormat("int8", "f16", 16)}, "full block"), ({"full": PageFormat("f16", "f16", 32)}, "16 tokens"),
        ({"packed": PageFormat("int8", "int4", 48)}, "16, 32, 64 or 128"), ({"packed": PageFormat("int8", "int4", 0)}, "16, 32, 64 or 128"),
        ({"packed": PageFormat("f16", "f16", 64)}, "packed format"), ({"packed": PageFormat("f32", "int8", 64)}, "keys"),
        ({"packed": PageFormat("int8", "bf16", 64)}, "values"), ({"keep": 8}, "multiple of 16"), ({"keep": -16}, "multiple of 16"),
        ({"group_of": ((0, 0),)}, "each layer"), ({"group_of": ((0, 0), (0, 4))}, "group of a layer"),
        ({"group_of": ((0, 0), (2, 2))}, "no layers"), ({"group_of": ((0, 0), (-1, 0))}, "group of a layer"),
        ({"sinks": 4}, "need a window"), ({"sinks": -1, "window": 9}, "out of range"), ({"window": -1}, "out of range"),
        ({"sinks": 4, "window": 9}, "must stay full"),
    ],
)  # fmt: skip
def test_layouts_the_kernels_lack_are_refused(change: dict[str, Any], message: str) -> None:
    runner = executor(C, MADE)
    usual: dict[str, Any] = {"full": FULL, "packed": PACKED, "group_of": ((0, 0), (0, 0))}
    assert runner.register(CacheLayout(**usual)) == 1
    with pytest.raises(ValueError, match=message):
        runner.register(CacheLayout(**{**usual, **change}))
    assert runner.register(CacheLayout(**usual)) == 1 and runner.register(CacheLayout(**usual, keep=16)) == 2


@pytest.mark.parametrize("size", [16, 80, 128])
@pytest.mark.parametrize(("k", "v", "group_size"), [("int8", "int8", 16), ("int4", "int4", 128), ("f32", "int4", 64)])
def test_a_block_is_as_large_as_the_formula_says(k: KVFormat, v: KVFormat, group_size: int, size: int) -> None:
    """The last place in the pool where a block or page fits, and the step behind it."""
    c = config(num_layers=1, num_heads=2, num_kv_heads=2, head_size=size, windows=(None,))
    runner, of = executor(c, weights(c, Layout.F32), num_blocks=1), cache_layout(c, k, v, group_size)
    number, zeros = runner.register(of), np.zeros(2, np.int32)
    assert of.packed is not None
    for place, page in enumerate((of.full, of.packed)):
        last = STEP - 2 * page.share_bytes(size) // ADDRESS_BYTES
        view = CacheView(number, np.array([last], np.int32), np.array([0, 1 - place, 1], np.int32), zeros, 0)
        runner.read(view, 0, 0, "keys")
        with pytest.raises(ValueError, match="out of range"):
            runner.read(view._replace(blocks=view.blocks + 1), 0, 0, "keys")
