"""The native weight layouts: what each keeps, its bytes, and which one a tensor of a file goes to.

Names end users write (`weights=`) are auto, f32, bf16, int8, int4. The layouts beneath them are those of native/kernels.h.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Literal, get_args

from kvik import _native
from kvik.params import choose

__all__ = ["WEIGHTS", "Layout", "Weights", "input_rounding", "layout_for", "packed_bytes", "parse_weights"]

Weights = Literal["auto", "f32", "bf16", "int8", "int4"]
WEIGHTS: tuple[Weights, ...] = get_args(Weights)
_ALIASES: dict[str, Weights] = {"fp32": "f32", "float32": "f32", "bfloat16": "bf16"}


class Layout(IntEnum):
    """Rows interleaved by 16. Integer layouts have groups of 32 inputs: int8, int5 and int4 a scale (8.5, 5.5 and 4.5 bits
    a weight), with _MIN a scale and a minimum (9, 6 and 5 bits), all f16. _K have the structure of GGUF's K types (4.5,
    5.5 and 6.6 bits)."""

    F32 = 0
    F16 = 1
    BF16 = 2
    INT8 = 3
    INT8_MIN = 4
    INT4 = 5
    INT4_MIN = 6
    INT5 = 7
    INT5_MIN = 8
    INT4_K = 9
    INT5_K = 10
    INT6_K = 11


_Q4_0, _Q4_1, _Q5_1, _Q4_K, _Q5_K = 2, 3, 7, 12, 13
_FOUR_BITS = (_Q4_0, _Q4_1, _Q4_K)
_TABLES = ("embed", "head", "positions")
_CLOSER = {
    ("int8", _Q4_1): Layout.INT8_MIN,
    ("int8", _Q5_1): Layout.INT8_MIN,
    ("int8", _Q4_K): Layout.INT8_MIN,
    ("int8", _Q5_K): Layout.INT8_MIN,
    ("int4", _Q4_0): Layout.INT4,
    ("int4", _Q4_K): Layout.INT4_K,
}  # where another layout of the option's width keeps more of the type
_WANTED = {
    "f32": Layout.F32,
    "bf16": Layout.BF16,
    "int8": Layout.INT8,
    "int4": Layout.INT4_MIN,
}


def parse_weights(name: str) -> Weights:
    """The weights option by its name or alias; ParameterError names the nearest."""
    return choose("weights", name, WEIGHTS, _ALIASES)


def input_rounding(layout: Layout) -> Literal["int8", "bf16"] | None:
    """What the kernels of a layout round a linear's input to; None where it stays f32."""
    if layout >= Layout.INT8:
        return "int8"
    return "bf16" if layout is Layout.BF16 else None


def layout_for(weights: Weights, source_type: int, name: str = "") -> Layout | None:
    """Where a matrix of the GGUF type goes; None when the type cannot be read.

    auto keeps what the file has, without loss. int8 keeps Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0 without loss, int4 Q4_0, Q4_1
    and Q4_K; what else is rounded, packing notes with its largest error. int4 keeps tables
    (`name`: embed, head, positions) at int8, unless the file has them in 4 bits: at 4 they alone cause most of the
    divergence (docs/performance.md).
    """
    exact = _native.exact_layout(source_type)
    if exact is None:
        return None
    if weights == "auto":
        return Layout(exact)
    if weights == "int4" and name in _TABLES and source_type not in _FOUR_BITS:
        weights = "int8"
    return _CLOSER.get((weights, source_type), _WANTED[weights])


def packed_bytes(layout: Layout, rows: int, columns: int) -> int:
    """Bytes of a packed matrix, padding, scales and minimums included."""
    return _native.packed_bytes(int(layout), rows, columns)
