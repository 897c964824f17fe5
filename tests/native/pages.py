"""Pages and attention over them by plain numpy: what the native kernels of the cache must give, and caches to try them on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvik import _native
from kvik.ops.pages import ADDRESS_BYTES, BLOCK_TOKENS, RECENT, PageFormat, is_packed
from kvik.params import KV_FORMATS, KVFormat

Floats = NDArray[np.float32]
ISAS = _native.isa_available()
MOST = np.float32(65504.0)


def numbered(page: PageFormat) -> tuple[int, int, int]:
    return KV_FORMATS.index(page.k), KV_FORMATS.index(page.v), page.tokens


def full_of(x: Floats, kv: KVFormat) -> Floats:
    """x as the full format holds it."""
    if kv == "bf16":
        bits = x.view(np.uint32).astype(np.uint64)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        return rounded.astype(np.uint32).view(np.float32)
    with np.errstate(over="ignore"):
        return x.astype(np.float16).astype(np.float32) if kv == "f16" else x.copy()


def _f16(x: NDArray[np.floating]) -> Floats:
    return np.clip(x, -MOST, MOST).astype(np.float16).astype(np.float32)


def _steps(x: Floats, scale: Floats) -> Floats:
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        return np.where(scale == 0, np.float32(0), np.rint(x / scale))


def packed_of(x: Floats, kv: KVFormat, values: bool) -> Floats:
    """x [tokens, D] as a page's integers stand for it; full formats as they are."""
    axis = 1 if values else 0
    if kv == "int8":
        scale = _f16(np.abs(x).max(axis, keepdims=True) / np.float32(127))
        return np.clip(_steps(x, scale), -127, 127) * scale
    if kv == "int4" and values:
        low, high = np.minimum(x.min(1, keepdims=True), 0), np.maximum(x.max(1, keepdims=True), 0)
        scale = _f16((high - low) / np.float32(15))
        zero = np.clip(_steps(-low, scale), 0, 15)
        return (np.clip(_steps(x, scale) + zero, 0, 15) - zero) * scale
    if kv == "int4":
        minimum = _f16(x.min(0, keepdims=True))
        scale = _f16((x.max(0, keepdims=True) - minimum) / np.float32(15))
        return np.clip(_steps(x - minimum, scale), 0, 15) * scale + minimum
    return full_of(x, kv)


@dataclass
class Unit:
    """One layer and KV head of a sequence: keys and values [slots, D], and its cache for one instruction set."""

    k: Floats
    v: Floats
    full: PageFormat
    packed: PageFormat | None
    keep: int
    shift: int
    memory: NDArray[np.uint8]
    cache: _native.UnitCache

    def packed_end(self, slot: int) -> int:
        return 0 if self.packed is None else max(0, slot + 1 - RECENT) // self.packed.tokens * self.packed.tokens

    def read(self, reader: int) -> tuple[Floats, Floats]:
        """Keys and values as the row at `reader` reads them."""
        k, v = full_of(self.k, self.full.k), full_of(self.v, self.full.v)
        if self.packed is not None:
            each = self.packed.tokens
            for at in range(0, self.packed_end(reader), each):
                page = slice(at, at + each)
                start = max(at, self.keep)
                if start < at + each:
                    k[start : at + each] = packed_of(full_of(self.k[page], self.full.k), self.packed.k, False)[
                        start - at :
                    ]
                    v[start : at + each] = packed_of(full_of(self.v[page], self.full.v), self.packed.v, True)[
                        start - at :
                    ]
        return k, v


def full_format(k: KVFormat, v: KVFormat) -> PageFormat:
    return PageFormat("f16" if is_packed(k) else k, "f16" if is_packed(v) else v, BLOCK_TOKENS)


def unit(
    isa: str,
    k: Floats,
    v: Floats,
    formats: tuple[KVFormat, KVFormat],
    group: int = 64,
    keep: int = 0,
    shift: int = 0,
    gone: int = 0,
) -> Unit:
    """A cache with these rows appended and every group packed. Blocks lie in a shuffled order, unwritten memory is NaN; full
    blocks that no row from the last on reads, and those before slot `gone`, are taken away."""
    slots, size = k.shape
    full = full_format(*formats)
    packed = PageFormat(*formats, group) if any(map(is_packed, formats)) else None
    steps = full.share_bytes(size) // ADDRESS_BYTES
    count = -(-slots // BLOCK_TOKENS)
    order = np.random.default_rng(5).permutation(count)
    page_steps = packed.share_bytes(size) // ADDRESS_BYTES if packed else 0
    pages = slots // group if packed else 0
    memory = np.full((count * steps + pages * page_steps) * ADDRESS_BYTES + 64, 0xFF, np.uint8)
    aligned = -memory.ctypes.data % 64
    memory = memory[aligned : aligned + (count * steps + pages * page_steps) * ADDRESS_BYTES]
    blocks = (order * steps).astype(np.int32)
    packed_blocks = (count * steps + np.arange(pages)[::-1] * page_steps).astype(np.int32) if packed else None
    made = Unit(k, v, full, packed, keep, shift, memory, None)  # type: ignore[arg-type]
    described = (memory, size, numbered(full))
    numbered_pages = numbered(packed) if packed else None
    whole = _native.UnitCache(isa, *described, blocks, numbered_pages, packed_blocks, shift, keep)
    whole.append(0, k, v)
    for page in range(pages):
        whole.pack_group(page)
    end = made.packed_end(slots - 1)
    for b in range(count):
        at = b * BLOCK_TOKENS
        if (keep <= at and at + BLOCK_TOKENS <= end and gone >= 0) or at + BLOCK_TOKENS <= gone:
            memory[blocks[b] * ADDRESS_BYTES :][: steps * ADDRESS_BYTES] = 0xFF
            blocks[b] = -1
    made.cache = _native.UnitCache(isa, *described, blocks, numbered_pages, packed_blocks, shift, keep)
    return made


def attend(
    made: Unit,
    q: Floats,
    first: int,
    group: int,
    *,
    window: int = 0,
    sink_q: Floats | None = None,
    sinks: int = 0,
    tile: int = 1,
    shares: int = 1,
    sums: NDArray[np.int64] | None = None,
    observed: tuple[int, int] = (0, 0),
) -> Floats:
    """q [rows, group * D] of the rows at slots first, first + 1, … of the table through the kernels."""
    slots = np.arange(first, first + len(q), dtype=np.int32) + np.int32(made.shift)
    out = np.full_like(q, np.nan)
    scale = float(q.shape[1] // group) ** -0.5
    made.cache.attend(q, sink_q, slots, group, window, sinks, scale, tile, shares, out, sums, *observed)
    return out


def defined(
    made: Unit, q: Floats, first: int, group: int, *, window: int = 0, sink_q: Floats | None = None, sinks: int = 0
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The same in float64 from what each row reads: outputs [rows, group, D], probabilities [rows, group, slots]."""
    rows, size = len(q), q.shape[1] // group
    out, p = np.zeros((rows, group, size)), np.zeros((rows, group, len(made.k)))
    for r in range(rows):
        slot = first + r
        k, v = (x[: slot + 1].astype(np.float64) for x in made.read(slot))
        scores = q[r].reshape(group, size).astype(np.float64) @ k.T
        if sinks and sink_q is not None:
            scores[:, :sinks] = (sink_q[r].reshape(group, size).astype(np.float64) @ k.T)[:, :sinks]
        if window:
            scores[:, min(sinks, slot + 1) : max(slot + 1 - window, min(sinks, slot + 1))] = -np.inf
        scores *= size**-0.5
        e = np.exp(scores - scores.max(1, keepdims=True))
        p[r, :, : slot + 1] = e / e.sum(1, keepdims=True)
        out[r] = p[r, :, : slot + 1] @ v
    return out, p
