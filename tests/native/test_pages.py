"""Pages by themselves: what is packed is what the definition packs, on every instruction set, and reads back as that."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
from native.pages import ISAS, full_of, numbered, packed_of, unit

from kvik import _native
from kvik.ops.pages import PageFormat, is_packed
from kvik.params import KVFormat

FORMATS: tuple[KVFormat, ...] = get_args(KVFormat)
PAIRS = [(k, v) for k in FORMATS for v in FORMATS]


def rows(kind: str, tokens: int, size: int) -> np.ndarray:
    """[tokens, D] of a kind that packing might stumble on."""
    x = np.random.default_rng(len(kind) + size).standard_normal((tokens, size)).astype(np.float32)
    match kind:
        case "zeros":
            x[:] = 0.0
        case "constant":
            x[:] = -1.7
        case "outliers":
            x[:, 3] *= 300.0
            x[tokens // 2] *= 50.0
        case "tiny":
            x *= 1e-7
        case "huge":
            x *= 3e4
        case "some zeros":
            x[:, ::2] = 0.0
            x[::3] = 0.0
    return x


KINDS = ("normal", "zeros", "constant", "outliers", "tiny", "huge", "some zeros")


@pytest.mark.parametrize("formats", PAIRS, ids="-".join)
def test_what_a_row_reads_is_what_the_definition_packs(formats: tuple[KVFormat, KVFormat]) -> None:
    for kind, size, group in zip(KINDS, (64, 80, 16, 128, 256, 48, 64), (64, 32, 16, 128, 16, 64, 32), strict=True):
        k, v = rows(kind, 200, size), rows(kind, 200, size)[::-1].copy()
        memories = []
        for isa in ISAS:
            made = unit(isa, k, v, formats, group, keep=16)
            memories.append(made.memory)
            got_k, got_v = np.empty(size, np.float32), np.empty(size, np.float32)
            want_k, want_v = made.read(199)
            for slot in (0, 15, 16, 77, 127, 199):
                made.cache.read_slot(slot, 199, got_k, got_v)
                assert np.array_equal(got_k, want_k[slot]) and np.array_equal(got_v, want_v[slot]), (kind, isa, slot)
        assert all(np.array_equal(memories[0], m) for m in memories)


@pytest.mark.parametrize("formats", [p for p in PAIRS if any(map(is_packed, p))], ids="-".join)
def test_pages_from_rows_and_from_full_blocks_have_the_same_bytes(formats: tuple[KVFormat, KVFormat]) -> None:
    page = PageFormat(*formats, 64)
    size = 80
    assert _native.page_bytes(numbered(page), size) == page.share_bytes(size)
    k, v = rows("outliers", 100, size), rows("normal", 100, size)
    made = unit(ISAS[0], k, v, formats)
    for isa in ISAS:
        share = np.full(page.share_bytes(size), 0xFF, np.uint8)
        full = made.full
        _native.pack_page(isa, numbered(page), full_of(k[:64], full.k), full_of(v[:64], full.v), share)
        assert np.array_equal(share, made.memory[-len(share) :])


@pytest.mark.parametrize("kv", ["int8", "int4"])
@pytest.mark.parametrize("values", [False, True])
def test_integers_are_within_half_a_step(kv: KVFormat, values: bool) -> None:
    x = rows("outliers", 64, 64)
    axis = 1 if values else 0
    reach = (
        np.abs(x).max(axis, keepdims=True) / 127
        if kv == "int8"
        else np.ptp(np.append(x, x * 0, axis), axis, keepdims=True) / 15
    )
    assert np.all(np.abs(packed_of(x, kv, values) - x) <= (1.1 if kv == "int4" and values else 0.55) * reach)


@pytest.mark.parametrize("kv", ["int8", "int4"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_a_number_leaves_finite_scales(kv: KVFormat, bad: float) -> None:
    page = PageFormat(kv, kv, 16)
    x = rows("normal", 16, 32)
    x[3, 5] = bad
    shares = []
    for isa in ISAS:
        shares.append(np.zeros(page.share_bytes(32), np.uint8))
        _native.pack_page(isa, numbered(page), x, x, shares[-1])
    assert all(np.array_equal(shares[0], s) for s in shares)
    integers = 2 * 16 * 32 // (1 if kv == "int8" else 2)
    scales = shares[0][integers:].view(np.float16)[: 32 + (32 if kv == "int4" else 0) + 16]
    assert np.isfinite(scales).all()


@pytest.mark.parametrize("size", [16, 64, 80, 96, 128, 256])
def test_hadamard(size: int) -> None:
    x = rows("outliers", 3, size)
    width = size & -size
    matrix = np.ones((1, 1))
    while len(matrix) < width:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    want = (x.reshape(3, -1, width) @ (matrix * width**-0.5)).reshape(3, size)
    made = []
    for isa in ISAS:
        y = x.copy()
        _native.hadamard(isa, y)
        made.append(y.copy())
        assert np.abs(y - want).max() < 1e-6 * np.abs(x).max()
        _native.hadamard(isa, y)
        assert np.abs(y - x).max() < 1e-6 * np.abs(x).max()
    assert all(np.array_equal(made[0], y) for y in made)
