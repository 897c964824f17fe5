"""The pool of blocks, what is found in it, and sequences' tables over it."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from cache.memory import Memory, shape

from kvik.cache.blocks import BlockPool, slabs_for
from kvik.cache.layout import KVLayout, kv_layout
from kvik.cache.parking import park
from kvik.cache.prefix import BlockKey, PrefixIndex, block_keys, longest_hit
from kvik.cache.sequence_cache import FREED, SequenceCache, held_together
from kvik.errors import KvikError
from kvik.params.cache import CacheParams

PLAIN = kv_layout(shape((None,)))
STEPS = PLAIN.tables[0].steps
WINDOWS = kv_layout(shape((None, 20, None, 20, None)))
ALL, SOME = (table.steps for table in WINDOWS.tables)
SLAB = 2 * 64 * ALL  # 2 blocks of one size, 3 of the other
PACKED = kv_layout(shape((None,)), CacheParams(k="int8", v="int8", group_size=32))


def plain_pool(slabs: int, index: PrefixIndex | None = None) -> BlockPool:
    return BlockPool(slabs, 64 * STEPS, index)


def test_wrong_use_is_an_error() -> None:
    pool = plain_pool(2)
    cache = SequenceCache(pool, PLAIN)
    assert cache.can_append(32) and not cache.can_append(33)
    with pytest.raises(KvikError, match="all 2 slabs"):
        cache.append(33, [])
    cache.free()
    assert pool.num_free_slabs == 2
    with pytest.raises(KvikError, match="more often"):
        pool.release(0)
    for call in (cache.truncate, cache.fork):
        with pytest.raises(KvikError, match="cannot"):
            call(1)
    with pytest.raises(KvikError, match=rf"a block of {65 * STEPS * 64} bytes does not fit a slab of {64 * STEPS}"):
        pool.take(65 * STEPS)
    with pytest.raises(KvikError, match="multiple of 64"):
        BlockPool(2, 100)


def test_what_a_window_has_lost_is_not_gone_back_to() -> None:
    pool = BlockPool(20, SLAB)
    cache = SequenceCache(pool, WINDOWS)
    cache.append(100, [])
    cache.free_unseen()
    assert cache.held_blocks == [7, 2]
    assert cache.tables[1].blocks.tolist()[:5] == [FREED] * 5
    assert cache.fork(100).num_tokens == 100
    for call in (cache.truncate, cache.fork):
        with pytest.raises(KvikError, match="a window's blocks"):
            call(90)
    cache.truncate(0)
    assert cache.held_blocks == [0, 0] and cache.tables[1].first == 0


def test_what_was_packed_is_not_gone_back_to_before() -> None:
    """With groups of 32, 96 tokens are the first after which group 1 is packed; before its blocks are freed it can be undone."""
    pool = BlockPool(20, 64 * PACKED.tables[1].steps)
    cache = SequenceCache(pool, PACKED)
    cache.append(95, [])
    cache.free_unseen()
    assert cache.tables[0].blocks.tolist().count(FREED) == 1 and cache.tables[1].count == 1  # block 0 is kept, 1 packed
    cache.append(8, [])
    assert cache.tables[1].count == 2
    cache.truncate(95)  # a rejected draft
    assert cache.tables[1].count == 1 and cache.tables[0].num_held == 5
    cache.append(1, [])
    cache.free_unseen()
    assert cache.held_blocks == [1 + 2, 2]
    for call in (cache.truncate, cache.fork):
        with pytest.raises(KvikError, match=r"cannot .* to 95 tokens: blocks from there were packed"):
            call(95)
    cache.truncate(96)


def test_what_was_evicted_is_not_gone_back_to() -> None:
    layout = kv_layout(shape((None, 20)), CacheParams(policy="tova", layers="pyramid"))
    pool = BlockPool(40, 64 * 32)
    cache = SequenceCache(pool, layout)
    cache.append(100, [])
    cache.free_unseen()
    counts = np.array([[40, 40], [-1, -1]], np.int32)
    for wrong in ([[40, 41], [-1, -1]], [[40, 40], [9, 9]], [[0, 0], [-1, -1]], [[101, 101], [-1, -1]], [[-1, -1]] * 2):
        with pytest.raises(KvikError, match="cannot keep"):
            cache.evict(np.array(wrong, np.int32))
    target = cache.evict(counts)
    assert target.held_blocks == [3, 2] and list(target.arrays.shifts) == [60, 0]
    assert target.tables[1].held() == cache.tables[1].held() and target.tokens_kept == (40 + 100 - 16 * 5) / 2
    cache.free()
    pool.check_integrity([target.held()])
    target.append(30, [])
    for call in (target.truncate, target.fork):
        with pytest.raises(KvikError, match="some of the first 100 were evicted"):
            call(99)
    target.truncate(120)
    assert target.tables[0].count == 4 and target.unregistered == 0


def test_integrity_finds_a_lost_block() -> None:
    pool = plain_pool(3)
    cache = SequenceCache(pool, PLAIN)
    cache.append(20, [])
    pool.check_integrity([cache.held()])
    with pytest.raises(KvikError, match="differ"):
        pool.check_integrity([])


def filled(pool: BlockPool, tokens: list[int], layout: KVLayout = PLAIN, salt: str = "") -> SequenceCache:
    """A sequence whose full blocks can be found."""
    cache, keys = SequenceCache(pool, layout), list[BlockKey]()
    cache.append(len(tokens), [])
    assert pool.index is not None
    block_keys(pool.index, pool.index.root(salt, layout.name), tokens, keys, cache.num_full)
    cache.register(keys)
    cache.free_unseen()
    return cache


def hit(pool: BlockPool, tokens: list[int], layout: KVLayout = PLAIN, salt: str = "") -> int:
    cache, keys = SequenceCache(pool, layout), list[BlockKey]()
    assert pool.index is not None
    block_keys(pool.index, pool.index.root(salt, layout.name), tokens, keys, len(tokens) // 16)
    found = cache.claim_prefix(keys)
    pool.check_integrity([cache.held()])
    cache.free()
    return found


def test_a_prefix_is_found_by_its_tokens_salt_and_layout() -> None:
    pool = plain_pool(10, PrefixIndex())
    tokens = list(range(70))
    filled(pool, tokens).free()
    assert hit(pool, tokens) == 64 and hit(pool, tokens[:40] + [0] * 30) == 32
    assert hit(pool, tokens[16:]) == 0 and hit(pool, tokens, salt="x") == 0
    assert hit(pool, tokens, kv_layout(shape((None,)), "bf16")) == 0
    assert hit(pool, tokens, kv_layout(shape((None,)), CacheParams(rotate=True))) == 0
    assert hit(pool, tokens, kv_layout(shape((None,)), CacheParams(policy="tova"))) == 64  # evicts later
    assert pool.num_held == 0 and pool.num_free_slabs == 10


def test_a_hit_of_packed_pages_needs_what_the_next_row_packs() -> None:
    """150 tokens: block 0 is kept, groups 0 to 2 are packed, blocks from 6 on are full. What was freed can be found too."""
    index = PrefixIndex()
    pool = BlockPool(20, 64 * PACKED.tables[1].steps, index)
    tokens = list(range(150))
    filled(pool, tokens, PACKED).free()
    assert hit(pool, tokens, PACKED) == 144
    assert hit(pool, tokens[:60] + [0] * 90, PACKED) == 48
    keys = list[BlockKey]()
    block_keys(index, index.root("", PACKED.name), tokens, keys, 9)
    for table, key, long, short in ((0, 1, 144, 16), (1, 3, 80, 16), (0, 0, 0, 0)):
        block = index.find(table, keys[key])  # block 1, then page 1, then block 0
        assert block is not None
        index.forget(block)
        assert hit_quietly(index, tokens, PACKED) == long and hit_quietly(index, tokens[:48], PACKED) == short


def hit_quietly(index: PrefixIndex, tokens: list[int], layout: KVLayout) -> int:
    """Tokens that would be found; nothing is claimed."""
    keys = list[BlockKey]()
    block_keys(index, index.root("", layout.name), tokens, keys, len(tokens) // 16)
    return 16 * longest_hit(index, layout, keys)


def test_the_least_recently_used_goes_first_and_from_its_end() -> None:

    pool = BlockPool(9, 64 * STEPS, PrefixIndex())
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
    block_keys(index, index.root("", PLAIN.name), tokens, keys, len(tokens) // 16)
    return sum(1 for _ in itertools.takewhile(lambda key: index.find(0, key) is not None, keys))


@pytest.mark.parametrize("distinct", [1, 2, 5])
def test_a_collision_of_hashes_is_no_hit(distinct: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a handful of hashes every block collides with others: what is found has the same tokens from the start."""
    monkeypatch.setattr(PrefixIndex, "_hash", lambda self, data: bytes([sum(data) % distinct]))
    pool, owner = plain_pool(60, PrefixIndex()), dict[int, tuple[str, str, tuple[int, ...]]]()
    texts = [[n % 3] * 16 + [n % 2] * 16 + [n] * 16 for n in range(6)] + [[1] * 48]
    hits = 0
    for salt, name, text in itertools.product(("", "y"), ("", "other"), texts * 2):
        cache, keys = SequenceCache(pool, PLAIN), list[BlockKey]()
        assert pool.index is not None
        block_keys(pool.index, pool.index.root(salt, name), text, keys, 3)
        hits += cache.claim_prefix(keys)
        for place, block in enumerate(cache.tables[0].blocks.tolist()):
            assert owner[block] == (salt, name, tuple(text[: 16 * place + 16]))
        cache.append(48 - cache.num_tokens, [])
        for place, block in enumerate(cache.tables[0].blocks.tolist()):
            owner[block] = (salt, name, tuple(text[: 16 * place + 16]))
        cache.register(keys)
        cache.free()
    assert hits > 0


def test_kept_blocks_stand_in_nobodys_way() -> None:
    """A slab held in part and kept in part counts as room for its size, so it must be used before another slab is."""
    pool = BlockPool(2, SLAB, PrefixIndex())
    index = pool.index
    assert index is not None
    first, second = pool.take(ALL), pool.take(ALL)
    index.add(0, second, index.key(index.root(""), range(16)))
    pool.release(second)
    assert pool.can_take({ALL: 1, SOME: 3})
    assert not pool.can_take({ALL: 1, SOME: 4}) and not pool.can_take({ALL: 2, SOME: 1})
    blocks = [pool.take(ALL), *pool.take_many(SOME, 3)]
    pool.check_integrity([[first, *blocks]])
    for steps in (ALL, SOME):
        with pytest.raises(KvikError, match="all 2 slabs"):
            pool.take(steps)
    with pytest.raises(KvikError, match="all 2 slabs"):
        pool.take_many(1, 5)
    assert pool.held_blocks() == {ALL: 2, SOME: 3} and pool.held_bytes == 64 * (2 * ALL + 3 * SOME)


def test_a_slab_is_carved_anew_and_its_rest_is_waste() -> None:
    pool = BlockPool(2, 64 * 100)
    sevens, thirties = pool.take_many(7, 14), pool.take_many(30, 3)
    assert sorted(sevens) == [7 * i for i in range(14)] and sorted(thirties) == [100, 130, 160]
    assert pool.waste_bytes == 64 * (2 + 10) and pool.num_free_slabs == 0
    pool.release_many(sevens)
    assert pool.can_take({33: 3}) and not pool.can_take({33: 4}) and not pool.can_take({101: 1})
    assert sorted(pool.take_many(33, 3)) == [0, 33, 66] and pool.waste_bytes == 64 * (1 + 10)
    assert slabs_for({7: 15, 33: 3}, 6400) == 3


def test_what_a_mixed_batch_saves_is_free_for_others() -> None:
    """int4 sequences beside f16 ones leave as much as they save, but for a slab that they fill in part."""
    full, packed = kv_layout(shape()), kv_layout(shape(), CacheParams(k="int4", v="int4"))
    slab = 4 * 64 * full.tables[0].steps
    pool = BlockPool(200, slab)
    for layout in (full, packed, full, packed):
        cache = SequenceCache(pool, layout)
        for _ in range(40):
            cache.append(16, [])
            cache.free_unseen()
        assert cache.held_bytes == layout.bytes_at(640)
    bound = 2 * (full.bytes_at(640) + packed.bytes_at(640))
    assert pool.held_bytes == bound
    assert (200 - pool.num_free_slabs) * slab <= 1.04 * bound + 3 * slab
    assert packed.bytes_at(640) < 0.5 * full.bytes_at(640)


def test_a_packed_page_is_found_by_all_its_tokens() -> None:
    """Two texts part within a page: the second finds its own page, whatever the first block of the page says."""
    index = PrefixIndex()
    pool = BlockPool(40, 64 * PACKED.tables[1].steps, index)
    one, two = list(range(150)), [*range(57), *range(900, 993)]
    caches = [filled(pool, tokens, PACKED) for tokens in (one, two)]
    for own, tokens in zip(caches, (one, two), strict=True):
        keys = list[BlockKey]()
        block_keys(index, index.root("", PACKED.name), tokens, keys, 9)
        cache = SequenceCache(pool, PACKED)
        assert cache.claim_prefix(keys) == 144
        assert cache.tables[1].blocks[1:].tolist() == own.tables[1].blocks[1:].tolist()
        assert cache.tables[0].blocks[6:].tolist() == own.tables[0].blocks[6:9].tolist()
        assert cache.tables[1].blocks[0] == caches[0].tables[1].blocks[0]  # the same 32 tokens


@pytest.mark.parametrize("layout", [WINDOWS, PACKED], ids=["windows", "packed"])
def test_what_is_parked_together_shares_as_before(layout: KVLayout) -> None:
    slab = 64 * max(table.steps for table in layout.tables)
    pool = BlockPool(60, slab)
    memory = Memory(60 * slab)
    memory.bytes[:] = np.random.default_rng(1).integers(0, 256, memory.bytes.size, np.uint8)
    one = SequenceCache(pool, layout)
    one.append(150, [])
    one.free_unseen()
    two = one.fork(150)
    two.append(20, copies := [])
    memory.copy(copies)
    caches = [one, two]
    before, together = [saved(memory, pool, cache) for cache in caches], held_together(caches)
    state = [(cache.num_tokens, cache.arrays.lengths, cache.tokens_kept) for cache in caches]
    parked = park(caches, memory)  # type: ignore[arg-type] # save and restore are all it needs
    assert pool.num_held == 0 == one.num_tokens and parked.nbytes == together
    others = SequenceCache(pool, layout)
    others.append(33, [])
    memory.bytes[:] = 0
    caches = parked.restore(memory, pool)  # type: ignore[arg-type]
    pool.check_integrity([others.held(), *(cache.held() for cache in caches)])
    assert [saved(memory, pool, cache) for cache in caches] == before and held_together(caches) == together
    assert [(cache.num_tokens, cache.arrays.lengths, cache.tokens_kept) for cache in caches] == state
    assert parked.needs == {} and parked.restore(memory, pool) == []  # type: ignore[arg-type] # once
    for cache in (*caches, others):
        cache.free()
    assert pool.num_held == 0 and pool.num_free_slabs == 60


def saved(memory: Memory, pool: BlockPool, cache: SequenceCache) -> list[bytes]:
    """Bytes of each block it holds."""
    return [memory.save(np.array([block], np.int32), pool.steps_of(block)).tobytes() for block in cache.held()]


def test_a_block_that_is_written_to_again_is_not_found_by_what_it_held() -> None:
    pool = plain_pool(10, PrefixIndex())
    tokens = list(range(64))
    cache = filled(pool, tokens)
    cache.truncate(40)
    cache.append(24, copies := [])
    assert pool.index is not None and copies == [] and hit_quietly(pool.index, tokens[:48], PLAIN) == 32
