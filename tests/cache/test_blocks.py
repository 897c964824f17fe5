"""The pool of blocks, tables, and the byte formula against real buffers."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvik.cache.blocks import BlockPool
from kvik.cache.layout import KVLayout, LayerGroup, blocks_for, kv_layout, parse_kv
from kvik.cache.prefix import BlockKey, PrefixIndex, block_keys
from kvik.cache.sequence_cache import FREED, SequenceCache
from kvik.cache.storage import allocate_cache, num_slabs_for
from kvik.errors import KvikError, ParameterError
from kvik.models.config import ModelConfig

PLAIN = KVLayout("f16", 1, 16, (LayerGroup((0,), 0),))
WINDOWS = KVLayout("f16", 1, 16, (LayerGroup((0, 2, 4), 0), LayerGroup((1, 3), 20)))


def test_wrong_use_is_an_error() -> None:
    pool = BlockPool(2)
    cache = SequenceCache(pool, PLAIN)
    assert cache.can_append(32) and not cache.can_append(33)
    with pytest.raises(KvikError, match="all 2 slabs"):
        cache.append(33, [])
    cache.free()
    with pytest.raises(KvikError, match="more often"):
        pool.release(0, 0)
    for call in (cache.truncate, cache.fork):
        with pytest.raises(KvikError, match="cannot"):
            call(1)


def test_what_a_window_has_lost_is_not_gone_back_to() -> None:
    pool = BlockPool(20, WINDOWS.slab_blocks)
    cache = SequenceCache(pool, WINDOWS)
    cache.append(100, [])
    cache.evict_unseen()
    assert [table.num_held for table in cache.tables] == [7, 2]
    assert cache.tables[1].blocks.tolist()[:5] == [FREED] * 5
    assert cache.fork(100).num_tokens == 100
    for call in (cache.truncate, cache.fork):
        with pytest.raises(KvikError, match="a window's blocks"):
            call(90)
    cache.truncate(0)
    assert cache.held_blocks == [0, 0] and cache.tables[1].first == 0


def test_integrity_finds_a_lost_block() -> None:
    pool = BlockPool(3)
    cache = SequenceCache(pool, PLAIN)
    cache.append(20, [])
    pool.check_integrity([cache.held()])
    with pytest.raises(KvikError, match="differ"):
        pool.check_integrity([])


@pytest.mark.parametrize(("kv", "element"), [("f16", 2), ("f32", 4)])
@pytest.mark.parametrize("windows", [(None,) * 6, (20, None, 20, None, 20, None), (20, 20, 20, 20, None, 9)])
def test_formula_is_what_the_buffers_take(kv: str, element: int, windows: tuple[int | None, ...]) -> None:
    config = ModelConfig("llama", 9, 9, 9, len(windows), 3, 3, 64, 99, 1e-5, None, False, windows)
    layout = kv_layout(config, parse_kv(kv))
    assert layout.token_bytes == 6 * 3 * 64 * 2 * element
    assert sum(layout.block_bytes) == 16 * layout.token_bytes
    for each, of in zip(layout.block_bytes, layout.slab_blocks, strict=True):
        assert each * of == layout.slab_bytes
    assert sorted(i for group in layout.groups for i in group.layers) == list(range(6))
    assert allocate_cache(5 * layout.slab_bytes).nbytes == 5 * layout.slab_bytes
    assert [blocks_for(n) for n in (0, 1, 16, 17)] == [0, 1, 1, 2]


@given(st.integers(1, 300), st.integers(1, 64))
def test_a_sequence_never_holds_more_than_the_formula(tokens: int, chunk: int) -> None:
    pool = BlockPool(200, WINDOWS.slab_blocks)
    cache = SequenceCache(pool, WINDOWS)
    most = WINDOWS.sequence_blocks(tokens, chunk)
    while cache.num_tokens < tokens:
        cache.append(min(chunk, tokens - cache.num_tokens), [])
        assert all(held <= bound for held, bound in zip(cache.held_blocks, most, strict=True))
        assert cache.held_bytes == sum(n * b for n, b in zip(cache.held_blocks, WINDOWS.block_bytes, strict=True))
        cache.evict_unseen()


def test_pool_size() -> None:
    layout = KVLayout("f16", 1, 16, (LayerGroup((0, 1), 0),))
    assert num_slabs_for(layout, 100, 3, None) == 21
    assert num_slabs_for(layout, 100, 3, 5 * layout.slab_bytes + 1) == 5
    message = f"kv_bytes is 10; one slab of blocks of 16 tokens takes {layout.slab_bytes}"
    with pytest.raises(ParameterError, match=message):
        num_slabs_for(layout, 100, 3, 10)


def test_format_names() -> None:
    assert parse_kv("fp16") == "f16" and parse_kv("float32") == "f32"
    with pytest.raises(ParameterError, match=r"kv must be one of f16, f32, got 'f61'; did you mean 'f16'"):
        parse_kv("f61")


def filled(pool: BlockPool, tokens: list[int], layout: KVLayout = PLAIN, salt: str = "") -> SequenceCache:
    """A sequence whose full blocks can be found."""
    cache, keys = SequenceCache(pool, layout), list[BlockKey]()
    cache.append(len(tokens), [])
    assert pool.index is not None
    block_keys(pool.index, pool.index.root(salt), tokens, keys, cache.num_full)
    cache.register(keys)
    return cache


def hit(pool: BlockPool, tokens: list[int], layout: KVLayout = PLAIN, salt: str = "") -> int:
    cache, keys = SequenceCache(pool, layout), list[BlockKey]()
    assert pool.index is not None
    block_keys(pool.index, pool.index.root(salt), tokens, keys, len(tokens) // 16)
    found = cache.claim_prefix(keys)
    cache.free()
    return found


def test_a_prefix_is_found_by_its_tokens_and_salt() -> None:
    pool = BlockPool(10, index=PrefixIndex())
    tokens = list(range(70))
    filled(pool, tokens).free()
    assert hit(pool, tokens) == 64 and hit(pool, tokens[:40] + [0] * 30) == 32
    assert hit(pool, tokens[16:]) == 0 and hit(pool, tokens, salt="x") == 0
    assert pool.num_held == 0 and pool.num_free_slabs == 10


def test_the_least_recently_used_goes_first_and_from_its_end() -> None:
    pool = BlockPool(9, index=PrefixIndex())
    texts = [[n] * 48 for n in range(3)]
    for text in texts:
        filled(pool, text).free()
    assert hit(pool, texts[0]) == 48  # used again: the second is the oldest now
    left = []
    for count in range(1, 10):
        other = SequenceCache(pool, PLAIN)
        other.append(16 * count, [])
        left.append([len_of(pool, text) for text in texts])
        other.free()
    assert left[:3] == [[3, 2, 3], [3, 1, 3], [3, 0, 3]] and left[-1] == [0, 0, 0]
    assert left[3:6] == [[3, 0, 2], [3, 0, 1], [3, 0, 0]]


def len_of(pool: BlockPool, tokens: list[int]) -> int:
    """Blocks of a text that would be found, which are not used by that."""
    index, keys = pool.index, list[BlockKey]()
    assert index is not None
    block_keys(index, index.root(""), tokens, keys, len(tokens) // 16)
    return sum(1 for _ in itertools.takewhile(lambda key: index.find(0, key) is not None, keys))


@pytest.mark.parametrize("distinct", [1, 2, 5])
def test_a_collision_of_hashes_is_no_hit(distinct: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a handful of hashes every block collides with others: what is found has the same tokens from the start."""
    monkeypatch.setattr(PrefixIndex, "_hash", lambda self, data: bytes([sum(data) % distinct]))
    pool, owner = BlockPool(30, index=PrefixIndex()), dict[int, tuple[str, tuple[int, ...]]]()
    texts = [[n % 3] * 16 + [n % 2] * 16 + [n] * 16 for n in range(6)] + [[1] * 48]
    hits = 0
    for salt, text in itertools.product(("", "y"), texts * 2):
        cache, keys = SequenceCache(pool, PLAIN), list[BlockKey]()
        assert pool.index is not None
        block_keys(pool.index, pool.index.root(salt), text, keys, 3)
        hits += cache.claim_prefix(keys)
        for place, block in enumerate(cache.tables[0].blocks.tolist()):
            assert owner[block] == (salt, tuple(text[: 16 * place + 16]))
        cache.append(48 - cache.num_tokens, [])
        for place, block in enumerate(cache.tables[0].blocks.tolist()):
            owner[block] = (salt, tuple(text[: 16 * place + 16]))
        cache.register(keys)
        cache.free()
    assert hits > 0


def test_kept_blocks_stand_in_nobodys_way() -> None:
    """A slab held in part and kept in part counts as room for its group, so it must be used before another slab is."""
    pool = BlockPool(2, WINDOWS.slab_blocks, PrefixIndex())  # slabs of 2 and 3 blocks
    index = pool.index
    assert index is not None
    first, second = pool.take(0), pool.take(0)
    index.add(0, second, index.key(index.root(""), range(16)))
    pool.release(0, second)
    assert pool.can_take([1, 3]) and not pool.can_take([1, 4]) and not pool.can_take([2, 1])
    blocks = [pool.take(0), *(pool.take(1) for _ in range(3))]
    pool.check_integrity([[(0, first), (0, blocks[0]), *((1, b) for b in blocks[1:])]])
    for group in (0, 1):
        with pytest.raises(KvikError, match="all 2 slabs"):
            pool.take(group)
