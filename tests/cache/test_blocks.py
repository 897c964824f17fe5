"""Blocks and their tables, and the byte formula against real buffers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvik.cache.blocks import BlockPool, BlockTable
from kvik.cache.layout import BLOCK_TOKENS, KVLayout, parse_kv
from kvik.cache.storage import allocate_cache, num_blocks_for
from kvik.errors import KvikError, ParameterError


@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.sampled_from(["append", "truncate", "free"]), st.integers(0, 90)), max_size=60
    )
)
def test_counts_are_right_after_every_operation(steps: list[tuple[int, str, int]]) -> None:
    pool = BlockPool(12)
    tables = [BlockTable(pool) for _ in range(4)]
    lengths = [0] * 4
    for which, what, amount in steps:
        table = tables[which]
        if what == "append":
            need = -(-(lengths[which] + amount) // BLOCK_TOKENS) - len(table.blocks)
            if need > pool.num_free:
                continue
            table.append(amount)
            lengths[which] += amount
        elif what == "truncate":
            lengths[which] = min(lengths[which], amount)
            table.truncate(lengths[which])
        else:
            table.free()
            lengths[which] = 0
        pool.check_integrity(tables)
        assert [t.num_tokens for t in tables] == lengths
        assert all(len(t.blocks) == -(-t.num_tokens // BLOCK_TOKENS) for t in tables)
        held = [b for t in tables for b in t.blocks.tolist()]
        assert len(set(held)) == len(held) == pool.num_used
    for table in tables:
        table.free()
    assert pool.num_free == 12


def test_wrong_use_is_an_error() -> None:
    pool = BlockPool(2)
    table = BlockTable(pool)
    with pytest.raises(KvikError, match="all 2 blocks"):
        table.append(33)
    table.free()
    with pytest.raises(KvikError, match="more often"):
        pool.release(0)
    with pytest.raises(KvikError, match="cannot truncate"):
        table.truncate(1)


def test_integrity_finds_a_lost_block() -> None:
    pool = BlockPool(3)
    table = BlockTable(pool)
    table.append(20)
    with pytest.raises(KvikError, match="differ"):
        pool.check_integrity([])


@pytest.mark.parametrize(("kv", "element"), [("f16", 2), ("f32", 4)])
def test_formula_is_what_the_buffers_take(kv: str, element: int) -> None:
    layout = KVLayout(parse_kv(kv), layers=30, kv_heads=3, head_size=64)
    assert layout.token_bytes == 30 * 3 * 64 * 2 * element
    assert layout.block_bytes == 16 * layout.token_bytes
    assert allocate_cache(5 * layout.block_bytes).nbytes == 5 * layout.block_bytes
    assert [layout.blocks_for(n) for n in (0, 1, 16, 17)] == [0, 1, 1, 2]


def test_pool_size() -> None:
    layout = KVLayout("f16", 2, 1, 16)
    assert num_blocks_for(layout, 100, None) == 7
    assert num_blocks_for(layout, 100, 5 * layout.block_bytes + 1) == 5
    with pytest.raises(ParameterError, match=f"kv_bytes is 10; one block of 16 tokens takes {layout.block_bytes}"):
        num_blocks_for(layout, 100, 10)


def test_format_names() -> None:
    assert parse_kv("fp16") == "f16" and parse_kv("float32") == "f32"
    with pytest.raises(ParameterError, match=r"kv must be one of f16, f32, got 'f61'; did you mean 'f16'"):
        parse_kv("f61")
