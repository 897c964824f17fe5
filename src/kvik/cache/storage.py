"""The cache's memory: how many slabs of how many bytes, and the pages behind them, which cost nothing until they are written."""

from __future__ import annotations

import mmap
import os
import sys
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvik.cache.blocks import slabs_for
from kvik.cache.layout import BLOCK_TOKENS, CacheShape, KVLayout, kv_layout
from kvik.errors import ParameterError, StorageError
from kvik.ops.pages import ADDRESS_BYTES

# Linux's value: Python 3.11 does not name it. Without it a long context's reservation may be refused.
_NO_RESERVE = 0x4000 if sys.platform == "linux" else 0

__all__ = [
    "USUAL", "PoolSize", "allocate_cache", "check_slab", "choose_slab_bytes", "num_slabs_for", "pool_size", "usual_layouts",
]  # fmt: skip

USUAL = ("f16", "f32", "int8", "k8v4", "int4")
"""Formats whose blocks shall waste little of a slab, whatever an engine's own format is."""
MOST_WASTE = 0.03
FEWEST_SLABS = 16  # of a pool, where blocks of every size that must fit leave so many
MOST_MULTIPLE = 4096
MOST_ADDRESS = 2**31 - 1


class PoolSize(NamedTuple):
    """Slabs of a pool and the bytes of each."""

    num_slabs: int
    slab_bytes: int

    @property
    def nbytes(self) -> int:
        return self.num_slabs * self.slab_bytes


def usual_layouts(shape: CacheShape) -> tuple[KVLayout, ...]:
    """Those of the usual formats that the model can have."""
    pairs = shape.head_size % 2 == 0
    return tuple(kv_layout(shape, kv) for kv in USUAL if pairs or not kv.endswith("4"))


def _sizes(layouts: Iterable[KVLayout]) -> set[int]:
    """Bytes of a block, of all their tables."""
    return {table.steps * ADDRESS_BYTES for layout in layouts for table in layout.tables}


def choose_slab_bytes(layouts: Sequence[KVLayout], pool_bytes: int, usual: Iterable[KVLayout] = ()) -> int:
    """Bytes of a slab: the smallest multiple of a full block with which no size of block leaves 3 % of the pool unused.

    That is behind the last block of each slab, and behind the last slab. Slabs have no more than 1/16 of the pool, where
    that is enough for blocks of every size of `layouts`, which fit in any case; if all leave more, one that all sizes fit and
    that leaves least with these, then with others. usual: layouts whose blocks count too.
    """
    must = _sizes(layouts)
    sizes, largest = must | _sizes(usual), max(must)
    base = layouts[0].tables[0].steps * ADDRESS_BYTES
    least = -(-largest // base)
    most = min(max(least, pool_bytes // FEWEST_SLABS // base), least * MOST_MULTIPLE)
    best = (True, 2.0, 2.0, least)
    for count in range(least, most + 1):
        slab = count * base
        share = max(1, pool_bytes // slab) / max(pool_bytes, slab)
        unused, unused_by_own = (1 - min(slab // size * size for size in some) * share for some in (sizes, must))
        if unused <= MOST_WASTE:
            return slab
        best = min(best, (slab < max(sizes), max(unused_by_own, MOST_WASTE), unused, count))
    return best[3] * base


def check_slab(layout: KVLayout, slab_bytes: int) -> None:
    """ParameterError where a block of the layout is larger than a slab of the engine."""
    largest = max(_sizes((layout,)))
    if largest > slab_bytes:
        raise ParameterError(
            f"a block of the cache in {layout.format} takes {largest} bytes and the engine's slabs have {slab_bytes}; "
            "raise kv_bytes, or load the engine with this format"
        )


def num_slabs_for(
    layout: KVLayout, slab_bytes: int, context_length: int, max_sequences: int, kv_bytes: int | None
) -> int:
    """Slabs of the pool: what kv_bytes holds, else what max_sequences whole contexts need, within the machine's memory.

    That is a quarter of it; for a single context up to half.
    """
    limit = MOST_ADDRESS // (slab_bytes // ADDRESS_BYTES)
    if kv_bytes is None:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        needs = layout.by_size(layout.sequence_blocks(context_length, context_length))
        context = slabs_for(needs, slab_bytes)
        all_contexts = slabs_for({steps: max_sequences * count for steps, count in needs.items()}, slab_bytes)
        one = min(context, memory // 2 // slab_bytes)
        return min(limit, max(1, one, min(all_contexts, memory // 4 // slab_bytes)))
    if kv_bytes < slab_bytes:
        raise ParameterError(f"kv_bytes is {kv_bytes}; one slab of blocks of {BLOCK_TOKENS} tokens takes {slab_bytes}")
    if kv_bytes // slab_bytes > limit:
        raise ParameterError(f"kv_bytes is {kv_bytes}; a pool has at most {limit * slab_bytes}")
    return kv_bytes // slab_bytes


def pool_size(
    layout: KVLayout, usual: Iterable[KVLayout], context_length: int, max_sequences: int, kv_bytes: int | None
) -> PoolSize:
    """The pool of an engine whose requests have this layout unless they ask for another."""
    given = kv_bytes
    if given is None:
        finest = max(_sizes((layout,)))
        given = finest * num_slabs_for(layout, finest, context_length, max_sequences, None)
    slab_bytes = choose_slab_bytes((layout,), given, usual)
    return PoolSize(num_slabs_for(layout, slab_bytes, context_length, max_sequences, kv_bytes), slab_bytes)


def allocate_cache(nbytes: int) -> NDArray[np.uint8]:
    """Zeroed memory, reserved but not yet taken; in huge pages where the system grants them."""
    try:
        memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE)
    except OSError as error:
        raise StorageError(f"cannot reserve {nbytes} bytes for the KV cache: {error.strerror}") from error
    return np.frombuffer(memory, np.uint8)
