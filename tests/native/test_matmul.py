"""The packed matrix kernels: every layout, against numpy, and bit for bit between instruction sets."""

from __future__ import annotations

import numpy as np
import pytest
from native.tiny import EXACT, pack, random_matrix
from numpy.typing import NDArray

from kvik import _native
from kvik.weights.ggml_types import TRAITS
from kvik.weights.layouts import Layout, input_rounding
from kvik.weights.packed import PackedTensor

ISAS = _native.isa_available()


def product(isa: str, w: PackedTensor, x: NDArray[np.float32], fine: bool = False) -> NDArray[np.float32]:
    padded = np.zeros((len(x), -(-w.columns // 32) * 32), np.float32)
    padded[:, : w.columns] = x
    out = np.full((len(x), -(-w.rows // 16) * 16), np.nan, np.float32)
    _native.matmul(isa, int(w.layout), w.data, w.rows, w.columns, padded, out, fine)
    assert np.isfinite(out).all()
    return out[:, : w.rows]


def rounded(x: NDArray[np.float32], fine: bool) -> NDArray[np.float64]:
    """Activations as the integer kernels see them: groups of 32, one int8 term or two."""
    k = x.shape[1]
    groups = np.zeros((len(x), -(-k // 32) * 32), np.float32)
    groups[:, :k] = x
    groups = groups.reshape(len(x), -1, 32)
    top = np.abs(groups).max(-1, keepdims=True)
    inverse = np.divide(np.float32(127), top, out=np.zeros_like(top), where=top > 1e-30)
    scaled = groups * inverse
    whole = np.rint(scaled)
    rest = np.clip(np.rint((scaled - whole) * 256), -127, 127) / 256 if fine else 0
    return ((whole + rest).astype(np.float64) * (top / np.float32(127))).reshape(len(x), -1)[:, :k]


def to_bf16(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """Nearest even."""
    bits = x.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & np.uint32(0xFFFF0000)).view(np.float32)


def seen_by(layout: Layout, x: NDArray[np.float32], fine: bool) -> NDArray[np.float64]:
    """The activations that the layout's kernel multiplies."""
    kind = input_rounding(layout)
    if kind == "int8":
        return rounded(x, fine)
    if kind is None:
        return x.astype(np.float64)
    first = to_bf16(x)
    return first.astype(np.float64) + (to_bf16(x - first) if fine else 0)


@pytest.mark.parametrize("fine", [False, True])
@pytest.mark.parametrize("layout", list(Layout))
@pytest.mark.parametrize("isa", ISAS)
def test_product_is_that_of_the_packed_weights(isa: str, layout: Layout, fine: bool) -> None:
    rng = np.random.default_rng(layout)
    for n, k, rows in ((1, 32, 1), (16, 64, 3), (40, 96, 8), (97, 544, 19), (33, 50, 5)):
        block = TRAITS[EXACT[layout]].block_elements if layout in EXACT else 1
        k = -(-k // block) * block
        w = random_matrix(n, k, layout, rng)
        x = rng.standard_normal((rows, k), dtype=np.float32) * np.float32(3)
        seen = seen_by(layout, x, fine)
        want = seen @ w.floats().astype(np.float64).T
        got = product(isa, w, x, fine)
        size = np.abs(seen) @ np.abs(w.floats().astype(np.float64)).T
        assert (np.abs(got - want) <= 2e-6 * size + 1e-6).all()


@pytest.mark.parametrize("layout", list(Layout))
def test_bits_do_not_depend_on_instruction_set_or_other_rows(layout: Layout) -> None:
    rng = np.random.default_rng(7)
    w = random_matrix(70, 512, layout, rng)
    x = rng.standard_normal((23, 512), dtype=np.float32)
    x[3] = 0
    x[5, 40:] *= 1e4
    x[6] *= 1e-39  # subnormal
    for fine in (False, True):
        whole = product(ISAS[0], w, x, fine)
        for isa in ISAS:
            assert np.array_equal(product(isa, w, x, fine), whole), isa
            for rows in (slice(0, 1), slice(4, 6), slice(3, 12), slice(22, 23)):
                assert np.array_equal(product(isa, w, x[rows], fine), whole[rows]), (isa, rows)


def test_a_row_of_zeros_gives_zeros_and_extremes_do_not_overflow() -> None:
    for layout in (Layout.INT8, Layout.INT8_MIN, Layout.INT4_MIN):
        n, k = 16, 1024
        w = pack(np.where(np.arange(n * k).reshape(n, k) % 2, 1, -1).astype(np.float32), layout)
        for isa in ISAS:
            assert (product(isa, w, np.zeros((2, k), np.float32)) == 0).all()
            x = np.full((1, k), 1000, np.float32) * np.where(np.arange(k) % 2, 1, -1).astype(np.float32)
            got = product(isa, w, x, True)
            assert np.allclose(got, 1000 * w.floats().astype(np.float64) @ np.sign(x[0]), rtol=1e-3)


@pytest.mark.parametrize("layout", list(EXACT))
def test_the_largest_quants_do_not_overflow(layout: Layout) -> None:
    """Every bit of every quant set, activations all at the end of int8's range: sums of 16 bits must hold them."""
    w = random_matrix(16, 1024, layout, np.random.default_rng(0))
    groups = 8 if layout.name.endswith("_K") else 1
    units = w.data.copy().reshape(32 // groups, -1)
    units[:, : groups * 64 * int(layout.name[3])] = 255
    w = PackedTensor("w", layout, 16, 1024, False, units.ravel())
    x = np.full((1, 1024), 1000, np.float32)
    x[0, 1::2] = -1000
    for row in (np.abs(x), x):
        want = row.astype(np.float64) @ w.floats().astype(np.float64).T
        size = np.abs(row) @ np.abs(w.floats()).T
        for isa in ISAS:
            assert (np.abs(product(isa, w, row, True) - want) <= 1e-5 * size).all()


def test_shapes_are_checked() -> None:
    w = pack(np.ones((16, 32), np.float32), Layout.INT8)
    with pytest.raises(ValueError, match="do not fit"):
        _native.matmul(
            "auto", int(w.layout), w.data, 32, 32, np.zeros((1, 32), np.float32), np.zeros((1, 32), np.float32), False
        )
    with pytest.raises(ValueError, match="unknown layout"):
        _native.packed_bytes(99, 16, 32)
    with pytest.raises(ValueError, match="no instruction set mmx"):
        _native.matmul(
            "mmx", int(w.layout), w.data, 16, 32, np.zeros((1, 32), np.float32), np.zeros((1, 16), np.float32), False
        )


@pytest.mark.parametrize("layout", [layout for layout in Layout if layout.name.startswith("INT")])
def test_bits_do_not_depend_on_how_many_rows_there_are(layout: Layout) -> None:
    """Every height of a tile of rows, alone and behind whole ones; one row at a time is the twin."""
    rng = np.random.default_rng(8)
    w = random_matrix(40, 512, layout, rng)
    x = rng.standard_normal((50, 512), dtype=np.float32)
    for fine in (False, True):
        want = np.concatenate([product("portable", w, x[i : i + 1], fine) for i in range(len(x))])
        for isa in ISAS:
            for rows in (*range(9, 19), 31, 32, 33, 50):
                assert np.array_equal(product(isa, w, x[:rows], fine), want[:rows]), (isa, rows)
