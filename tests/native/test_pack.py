"""From GGUF's types to native layouts: exact where promised, refused where not finite."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray

from kvik import _native
from kvik.weights.ggml_types import GGMLType, dequantize
from kvik.weights.layouts import Layout, layout_for, parse_weights

TYPES = [GGMLType.F32, GGMLType.F16, GGMLType.BF16, GGMLType.Q4_0, GGMLType.Q4_1, GGMLType.Q8_0]
N, K = 37, 96


def source(kind: GGMLType, seed: int = 0) -> NDArray[np.uint8]:
    values = np.random.default_rng(seed).standard_normal((N, K)).astype(np.float32)
    quantized = gguf.quants.quantize(values, gguf.GGMLQuantizationType(int(kind)))
    return np.ascontiguousarray(quantized).view(np.uint8).ravel()


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
    # scale * (quant - offset) + minimum is fused natively: one rounding instead of two
    assert np.allclose(floats, dequantize(data, kind, (N, K)), rtol=0, atol=1e-6)
    if kind is not GGMLType.Q4_1:
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
    bound = {"f32": 0, "bf16": 2**-8, "int8": 0.6 / 127, "int4": 0.55 * 2 / 15}[weights] * np.abs(true).max()
    assert error <= bound + 1e-7
    wider = weights in ("int8", "int4") and kind in (GGMLType.Q4_0, GGMLType.Q4_1)
    if weights == "f32" or wider or (weights == "int8" and kind is GGMLType.Q8_0):
        assert error == 0.0


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
    for row in (20, 31):
        data[row, : len(raw)] = raw
    for layout in (layout_for("auto", int(kind)), Layout.INT8, Layout.F32):
        assert layout is not None
        assert packed(kind, data.ravel(), layout)[1] == 20


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
        (2, N, K + 32, 0, "do not fit"), (2, N, K - 1, 0, "does not fit its type"), (12, N, K, 0, "cannot be packed"),
        (2, N, K, 5, "divided into heads"), (2, N + 1, K, 0, "do not fit"), (2, -1, K, 0, "does not fit"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            _native.pack(kind, data, n, k, heads, int(Layout.INT4), target, 2)
