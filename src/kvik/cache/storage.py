"""The cache's memory: how many slabs, and the pages behind them, which cost nothing until they are written."""

from __future__ import annotations

import mmap
import os
import sys

import numpy as np
from numpy.typing import NDArray

from kvik.cache.layout import KVLayout
from kvik.errors import ParameterError, StorageError

# Linux's value: Python 3.11 does not name it. Without it a long context's reservation may be refused.
_NO_RESERVE = 0x4000 if sys.platform == "linux" else 0

__all__ = ["allocate_cache", "num_slabs_for"]


def num_slabs_for(layout: KVLayout, context_length: int, max_sequences: int, kv_bytes: int | None) -> int:
    """Slabs of the pool: what kv_bytes holds, else what max_sequences whole contexts need, within the machine's memory.

    That is a quarter of it; for a single context up to half.
    """
    if kv_bytes is None:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        context = layout.slabs_for(layout.sequence_blocks(context_length, context_length))
        one = min(context, memory // 2 // layout.slab_bytes)
        return max(1, one, min(max_sequences * context, memory // 4 // layout.slab_bytes))
    if kv_bytes < layout.slab_bytes:
        raise ParameterError(f"kv_bytes is {kv_bytes}; one slab of blocks of 16 tokens takes {layout.slab_bytes}")
    return kv_bytes // layout.slab_bytes


def allocate_cache(nbytes: int) -> NDArray[np.uint8]:
    """Zeroed memory, reserved but not yet taken; in huge pages where the system grants them."""
    try:
        memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE)
    except OSError as error:
        raise StorageError(f"cannot reserve {nbytes} bytes for the KV cache: {error.strerror}") from error
    return np.frombuffer(memory, np.uint8)
