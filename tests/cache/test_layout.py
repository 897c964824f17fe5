"""The byte formula against real buffers, what a model cannot have, and the pool's sizes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from cache.memory import shape, units
from hypothesis import given, settings
from hypothesis import strategies as st

from kvik.cache.blocks import BlockPool
from kvik.cache.layout import KVLayout, blocks_for, kv_layout
from kvik.cache.sequence_cache import SequenceCache
from kvik.cache.storage import (
    MOST_WASTE,
    allocate_cache,
    check_slab,
    choose_slab_bytes,
    num_slabs_for,
    pool_size,
    usual_layouts,
)
from kvik.errors import ParameterError
from kvik.ops.pages import PageFormat, is_packed
from kvik.params import KV_FORMATS
from kvik.params.cache import CacheParams
from kvik.params.eviction import StreamingLLM

SIZES = (16, 64, 80, 128, 256)


def page_end(page: PageFormat, head_size: int) -> int:
    """Where the parts of a share end, one after another as the native core lays them out (its PageShape)."""
    at = 0
    for kv in (page.k, page.v):  # numbers, in sub-blocks of 16 tokens
        at += (
            page.tokens
            // 16
            * (head_size * 16 * {"f32": 4, "f16": 2, "bf16": 2, "int8": 1}.get(kv, 0) or head_size * 8)
        )
    at += 2 * head_size * is_packed(page.k)  # scales of keys
    at += 2 * head_size * (page.k == "int4")  # minimums
    at += 2 * page.tokens * is_packed(page.v)  # scales of values
    return at + page.tokens * (page.v == "int4")  # zeros


@pytest.mark.parametrize("k", KV_FORMATS)
@pytest.mark.parametrize("v", KV_FORMATS)
def test_a_share_has_room_for_its_parts(k: Any, v: Any) -> None:
    for head_size in SIZES:
        for tokens in (16, 32, 64, 128):
            page = PageFormat(k, v, tokens)
            assert 0 <= page.share_bytes(head_size) - page_end(page, head_size) < 64
            assert page.share_bytes(head_size) % 64 == 0


@pytest.mark.parametrize("kv", ["f16", "f32", "bf16", "int8", "k8v4", "int4", "k16v4"])
@pytest.mark.parametrize("windows", [(None,) * 6, (20, None, 20, None, 20, None), (20, 20, 20, 20, None, 9)])
def test_formula_is_what_the_buffers_take(kv: str, windows: tuple[int | None, ...]) -> None:
    layout = kv_layout(shape(windows, heads=3, head_size=64), kv)
    executor = layout.executor
    assert len(layout.tables) == executor.num_tables and sum(executor.units) == 18
    for table in layout.tables:
        page = executor.packed if table.packed else executor.full
        assert page is not None and table.tokens == page.tokens
        shares = [np.empty(page.share_bytes(64), np.uint8) for _ in layout.groups[table.group].units]
        assert table.steps * 64 == np.concatenate(shares).nbytes
    assert units(layout) == [(layer, head) for layer in range(6) for head in range(3)]
    for number, group in enumerate(layout.groups):
        assert {executor.group_of[layer][head] for layer, head in group.units} == {number}
        assert {windows[layer] or 0 for layer, _ in group.units} == {group.window}
    assert allocate_cache(5 * 64 * layout.tables[0].steps).nbytes == 5 * 64 * layout.tables[0].steps
    assert [blocks_for(n) for n in (0, 1, 16, 17)] == [0, 1, 1, 2]


def test_bytes_of_a_token() -> None:
    each = 6 * 3 * 64
    bytes_of = {kv: kv_layout(shape((None,) * 6, heads=3, head_size=64), kv).token_bytes for kv in KV_FORMATS}
    assert (bytes_of["f16"], bytes_of["bf16"], bytes_of["f32"]) == (4 * each, 4 * each, 8 * each)
    assert bytes_of["int8"] == 6 * 3 * (64 * 128 + 2 * 64 + 2 * 64) // 64
    assert bytes_of["int4"] == 6 * 3 * (64 * 64 + 4 * 64 + 3 * 64) // 64
    long = kv_layout(shape((None,) * 6, heads=3, head_size=64), "int4")
    assert abs(long.bytes_at(100_000) / 100_000 / long.token_bytes - 1) < 0.01


def test_bytes_at_4096_are_those_of_the_promise() -> None:
    """Of SmolLM2's shape: what int8, k8v4 and int4 may take beside f16 (full blocks of recent tokens and scales included)."""
    small = shape((None,) * 30, heads=3, head_size=64, context=8192)
    whole = kv_layout(small).bytes_at(4096)
    for kv, most in (("int8", 0.53), ("k8v4", 0.41), ("int4", 0.32)):
        assert kv_layout(small, kv).bytes_at(4096) / whole <= most
        assert kv_layout(small, CacheParams(k=kv, v=kv) if kv != "k8v4" else kv).name != kv_layout(small).name


FORGETTING = {
    "windows": ((None, 20, None, 20, None), CacheParams()),
    "packed": ((None,), CacheParams(k="int8", v="int4", group_size=32)),
    "packed windows": ((None, 20, 70), CacheParams(k="int4", v="int4", group_size=32)),
    "streaming": ((None, 20), CacheParams(policy=StreamingLLM(sinks=20, window=40))),
    "packed streaming": (
        (None,), CacheParams(k="int8", v="int8", group_size=16, policy=StreamingLLM(sinks=4, window=60)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FORGETTING)
@given(st.integers(1, 300), st.integers(1, 64))
@settings(max_examples=30, deadline=None)
def test_a_sequence_never_holds_more_than_the_formula(name: str, tokens: int, chunk: int) -> None:
    layout = kv_layout(shape(FORGETTING[name][0]), FORGETTING[name][1])
    pool = BlockPool(200, max(64 * table.steps for table in layout.tables))
    cache = SequenceCache(pool, layout)
    most = layout.sequence_blocks(tokens, chunk)
    planned = cache.most_to_append(tokens, chunk)
    while cache.num_tokens < tokens:
        cache.append(min(chunk, tokens - cache.num_tokens), [])
        assert all(held <= bound for held, bound in zip(cache.held_blocks, most, strict=True))
        assert all(held <= bound for held, bound in zip(cache.held_blocks, planned, strict=True))
        cache.free_unseen()
        assert cache.held_bytes == pool.held_bytes == layout.bytes_at(cache.num_tokens)
        assert cache.held_blocks == list(layout.blocks_at(cache.num_tokens))
        kept = sum(len(group.units) * there(layout, n, cache.num_tokens) for n, group in enumerate(layout.groups))
        assert cache.tokens_kept == kept / sum(layout.executor.units)


def there(layout: KVLayout, number: int, tokens: int) -> int:
    """Slots of a group that lie in a full block or a page that rows from `tokens` on see or pack."""
    group, executor = layout.groups[number], layout.executor
    full, pages = group.full(tokens), group.pages(tokens)
    found = set()
    for slot in range(tokens):
        if slot // 16 < full.head or slot // 16 >= full.first:
            found.add(slot)
        if executor.packed is not None and pages.first <= slot // executor.packed.tokens < pages.count:
            found.add(slot)
    return len(found)


def test_streaming_takes_constant_memory() -> None:
    layout = kv_layout(shape((None,)), CacheParams(policy=StreamingLLM(sinks=4, window=100)))
    assert {layout.bytes_at(n) for n in range(1000, 200_000, 160)} == {layout.bytes_at(1000)}
    assert layout.bytes_at(10**6) == (1 + 7) * 64 * layout.tables[0].steps


def test_events_split_the_groups_of_layers_that_see_all() -> None:
    base = kv_layout(shape((None, 20, None)), CacheParams(k="int8", policy="tova", layers="pyramid"))
    assert base.evicted("uniform", "uniform") is base
    by_layer = base.after_event
    assert by_layer.executor.group_of == ((0, 0), (2, 2), (1, 1)) and by_layer.executor.units == (2, 2, 2)
    by_head = base.evicted("pyramid", "ada")
    assert by_head.executor.group_of == ((0, 1), (4, 4), (2, 3)) and by_head.executor.units == (1, 1, 1, 1, 2)
    assert by_head.after_event is by_head and len(by_head.tables) == 10
    assert by_head.tables[0].steps * 2 == by_layer.tables[0].steps and by_head.tables[8] == base.tables[2]._replace(
        group=4
    )
    assert [group.own for group in by_head.groups] == [False] * 4 + [True]


def test_what_a_model_cannot_have_is_refused_by_name() -> None:
    for wrong, params, message in (
        (shape(head_size=17), CacheParams(v="int4"), "v is int4, two numbers a byte; this model's heads have 17"),
        (shape((20, 20)), CacheParams(policy="keydiff"), "policy is keydiff; all layers of this model have a window already"),
        (shape((20, 20)), CacheParams(policy=StreamingLLM()), "policy is streamingllm; all layers"),
        (shape(learned=True), CacheParams(policy=StreamingLLM(sinks=4, window=9)), "moves rotary positions; this model's are"),
        (shape(context=2047), CacheParams(policy=StreamingLLM()), "sees 4 sinks \\+ 2044 tokens; the model's context is 2047"),
    ):  # fmt: skip
        with pytest.raises(ParameterError, match=message):
            kv_layout(wrong, params)
    kv_layout(shape(learned=True), CacheParams(policy="h2o", k="int4"))
    kv_layout(shape(context=2048), CacheParams(policy=StreamingLLM()))
    with pytest.raises(ParameterError, match="did you mean 'f16'"):
        kv_layout(shape(), "f61")


def test_slabs_waste_little_of_the_usual_formats() -> None:
    small = shape((None,) * 30, heads=3, head_size=64, context=8192)
    layout, usual = kv_layout(small), usual_layouts(small)
    slab = choose_slab_bytes((layout,), 2**30, usual)
    assert slab % (64 * layout.tables[0].steps) == 0 and slab <= 2**30 // 16
    for each in usual:
        for table in each.tables:
            assert slab % (64 * table.steps) / slab <= MOST_WASTE
    for pool in (97 * 10**6, 128 * 2**20, 3 * 10**9 + 1):
        slab = choose_slab_bytes((layout,), pool, usual)
        for each in usual:
            for table in each.tables:
                assert pool // slab * (slab // (64 * table.steps)) * 64 * table.steps >= 0.9 * pool
    tiny = choose_slab_bytes((layout,), 4 * 2**20, usual)
    assert tiny == 64 * layout.tables[0].steps  # nothing larger leaves 16 slabs
    int8 = kv_layout(small, "int8")
    least = choose_slab_bytes((int8,), 0, ())
    assert least == 3 * 64 * int8.tables[0].steps >= 64 * int8.tables[1].steps  # a page must fit
    with pytest.raises(ParameterError, match=f"in int8 takes {64 * int8.tables[1].steps} bytes and .* have {tiny}"):
        check_slab(int8, tiny)
    check_slab(int8, least)
    assert len(usual_layouts(shape(head_size=17))) == 3


def test_pool_size() -> None:
    layout = kv_layout(shape((None,)))
    slab = 64 * layout.tables[0].steps
    assert num_slabs_for(layout, slab, 100, 3, None) == 21
    assert num_slabs_for(layout, 2 * slab, 100, 3, None) == 11
    assert num_slabs_for(layout, slab, 100, 3, 5 * slab + 1) == 5
    with pytest.raises(ParameterError, match=f"kv_bytes is 10; one slab of blocks of 16 tokens takes {slab}"):
        num_slabs_for(layout, slab, 100, 3, 10)
    with pytest.raises(ParameterError, match="a pool has at most"):
        num_slabs_for(layout, slab, 100, 3, 2**40)
    size = pool_size(layout, (), 100, 3, None)
    assert size == (21, slab) and size.nbytes == 21 * slab
    assert pool_size(layout, usual_layouts(shape((None,))), 100, 3, 100 * slab).nbytes <= 100 * slab
