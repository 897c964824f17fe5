"""Activations against float64, with the same bits on every instruction set."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kvik import _native
from kvik.ops.native_lowering import ACTIVATIONS

X = np.concatenate([
    np.linspace(-100, 100, 100_000, dtype=np.float32), np.linspace(-2, 2, 50_000, dtype=np.float32),
    np.geomspace(1e-30, 1e30, 2_500, dtype=np.float32), -np.geomspace(1e-30, 1e30, 2_500, dtype=np.float32), np.zeros(8, np.float32),
])  # fmt: skip


def computed(activation: str, x: NDArray[np.float32]) -> NDArray[np.float32]:
    padded = np.zeros((1, -(-len(x) // 32) * 32), np.float32)
    padded[0, : len(x)] = x
    results = []
    for isa in _native.isa_available():
        out = np.empty_like(padded)
        _native.activate(isa, ACTIVATIONS[activation], padded, out)
        results.append(out[0, : len(x)])
    for result in results[1:]:
        assert np.array_equal(result, results[0], equal_nan=True)
    return results[0]


def test_gelu_tanh() -> None:
    x = X.astype(np.float64)
    with np.errstate(over="ignore"):
        want = x / (1 + np.exp(-2 * np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    error = np.abs(computed("gelu_tanh", X) - want)
    assert (error <= np.where(x >= -1.5, 4e-7 * np.abs(want), 4e-8) + 1e-37).all()


def test_silu() -> None:
    x = X.astype(np.float64)
    with np.errstate(over="ignore"):
        want = x / (1 + np.exp(-x))
    error = np.abs(computed("silu", X) - want)
    assert (error <= np.where(x >= -80, 4e-7 * np.abs(want), 1e-7) + 1e-37).all()


def test_extremes() -> None:
    x = np.array([np.nan, np.inf, -np.inf, -3e38], np.float32)
    gelu, silu = computed("gelu_tanh", x[1:]), computed("silu", x[1:2])
    assert gelu.tolist() == [np.inf, 0.0, 0.0] and silu.tolist() == [np.inf]
    for activation in ACTIVATIONS:
        assert np.isnan(computed(activation, x[:1])).all()
