"""From GGUF's types to native layouts: exact where promised, refused where not finite."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from weights.gguf_files import random_bytes

from kvik import _native
from kvik.weights.dequantize import SUPPORTED, dequantize
from kvik.weights.ggml_types import TRAITS, GGMLType
from kvik.weights.layouts import Layout, layout_for, parse_weights

TYPES = sorted(SUPPORTED)
N, K = 37, 512


def source(kind: GGMLType, seed: int = 0) -> NDArray[np.uint8]:
    return np.frombuffer(random_bytes(kind, (N, K), np.random.default_rng(seed)), np.uint8)


def packed(kind: int, data: NDArray[np.uint8], layout: Layout, heads: int = 0, n: int = N, k: int = K):
    target = np.full(_native.packed_bytes(int(layout), n, k), 0xAA, np.uint8)
    bad, error = _native.pack(int(kind), data, n, k, heads, int(layout), target, 2)
    floats = np.empty((n, -(-k // 32) * 32), np.float32)
    _native.unpack(int(layout), target, k, floats)
    return floats[:, :k], bad, error


@pytest.mark.parametrize("kind", TYPES)
def test_auto_loses_nothing(kind: GGMLType) -> None:
    data = source(kind)
    layout = layout_for("auto", int(kind))
    assert layout is not None
    floats, bad, error = packed(kind, data, layout)
    assert (bad, error) == (-1, 0.0)
    # The product of scale and quant is exact, so fusing it with the minimum rounds as often as the definition does.
    assert np.array_equal(floats, dequantize(data, kind, (N, K)))


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("weights", ["f32", "bf16", "int8", "int4"])
def test_other_layouts_report_their_largest_error(kind: GGMLType, weights: str) -> None:
    data = source(kind, 1)
    layout = layout_for(parse_weights(weights), int(kind))
    assert layout is not None
    floats, bad, error = packed(kind, data, layout)
    true = dequantize(data, kind, (N, K))
    assert bad == -1
    assert np.abs(floats.astype(np.float64) - true).max() == pytest.approx(error, abs=1e-6)
    groups = true.reshape(N, -1, 32)
    top, span = np.abs(groups).max(-1).max(), np.ptp(groups, -1).max()
    bound = {"f32": 0, "bf16": 2**-8 * top, "int8": 0.6 / 127 * top, "int4": 0.75 / 15 * span}[weights]
    assert error <= bound + 1e-7
    exact = {"int4": ("Q4_0", "Q4_1", "Q4_K"), "int8": ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")}.get(weights, ())
    if weights == "f32" or kind.name in exact:
        assert error == 0.0


def test_four_bits_lose_less_than_nearest_of_the_range() -> None:
    """The search for scale and minimum against the plain one: minimum and 15 steps to the maximum."""
    values = np.random.default_rng(3).standard_normal((64, 256)).astype(np.float32)
    values[0] = 0.0
    values[1] = 7.25
    values[2, :31] = 1e-3
    floats, bad, _ = packed(GGMLType.F32, values.view(np.uint8).ravel(), Layout.INT4_MIN, 0, 64, 256)
    groups = values.reshape(-1, 32).astype(np.float64)
    low = groups.min(1, keepdims=True).astype(np.float16).astype(np.float64)
    scale = ((groups.max(1, keepdims=True) - low) / 15).astype(np.float16).astype(np.float64)
    inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale > 0)
    nearest = np.clip(np.rint((groups - low) * inverse), 0, 15) * scale + low
    ours, plain = ((x.reshape(-1, 32) - groups) ** 2 for x in (floats.astype(np.float64), nearest))
    assert bad == -1
    assert (ours.sum(1) <= plain.sum(1) * (1 + 1e-5)).all()
    assert ours.sum() < 0.9 * plain.sum()


def test_rows_of_permuted_heads_come_back_in_order() -> None:
    values = np.random.default_rng(2).standard_normal((64, 32)).astype(np.float32)
    heads, half = 4, 8
    # what GGUF holds of such a matrix: within a head, row i of the first half beside row i of the second
    stored = values.reshape(heads, 2, half, 32).swapaxes(1, 2).reshape(64, 32)
    data = np.ascontiguousarray(stored).view(np.uint8).ravel()
    floats, _, _ = packed(GGMLType.F32, data, Layout.F32, heads, 64, 32)
    assert np.array_equal(floats, values)


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", TYPES)
def test_the_first_row_that_is_not_finite_is_named(kind: GGMLType, poison: float) -> None:
    data = source(kind).reshape(N, -1).copy()
    half = np.float16(poison).view(np.uint16)
    word = {GGMLType.F32: np.float32(poison).tobytes(), GGMLType.BF16: np.float32(poison).tobytes()[2:]}
    raw = np.frombuffer(word.get(kind, half.tobytes()), np.uint8)
    at = 208 if kind is GGMLType.Q6_K else 0
    for row in (20, 31):
        data[row, at : at + len(raw)] = raw
    for layout in (layout_for("auto", int(kind)), Layout.INT8, Layout.F32):
        assert layout is not None
        assert packed(kind, data.ravel(), layout)[1] == 20


@pytest.mark.parametrize("kind", [k for k in TYPES if TRAITS[k].block_elements > 1])
def test_a_scale_of_zero_is_a_group_of_zeros(kind: GGMLType) -> None:
    data = source(kind).reshape(N, -1).copy()
    at = 208 if kind is GGMLType.Q6_K else 0
    data[5, at : at + 2] = 0
    true = dequantize(data.ravel(), kind, (N, K))
    for layout in (layout_for("auto", int(kind)), Layout.INT8, Layout.INT4_MIN, Layout.F32):
        assert layout is not None
        floats, bad, error = packed(kind, data.ravel(), layout)
        assert bad == -1 and np.isfinite(floats).all()
        assert np.abs(floats - true).max() <= error + 1e-6


def test_scales_out_of_range_are_refused() -> None:
    data = np.full((N, K), 1e30, np.float32)
    data[::2] = -1e30
    assert packed(GGMLType.F32, data.view(np.uint8).ravel(), Layout.INT8)[1] == 0
    assert packed(GGMLType.F32, data.view(np.uint8).ravel(), Layout.INT4_MIN)[1] == 0
    assert packed(GGMLType.F32, data.view(np.uint8).ravel(), Layout.BF16)[1] == -1


def test_sizes_are_checked() -> None:
    data = source(GGMLType.Q4_0)
    target = np.empty(_native.packed_bytes(int(Layout.INT4), N, K), np.uint8)
    for kind, n, k, heads, message in (
        (2, N, K + 32, 0, "do not fit"), (2, N, K - 1, 0, "does not fit its type"), (11, N, K, 0, "cannot be packed"),
        (2, N, K, 5, "divided into heads"), (2, N + 1, K, 0, "do not fit"), (2, -1, K, 0, "does not fit"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            _native.pack(kind, data, n, k, heads, int(Layout.INT4), target, 2)


def test_int4_keeps_tables_at_eight_bits_unless_the_file_has_four() -> None:
    for kind in SUPPORTED:
        layout = layout_for("int4", int(kind), "head")
        four = kind in (GGMLType.Q4_0, GGMLType.Q4_1, GGMLType.Q4_K)
        assert layout is (layout_for("int4", int(kind)) if four else layout_for("int8", int(kind)))
    assert layout_for("int4", int(GGMLType.BF16), "layers.0.q") is Layout.INT4_MIN
