"""The native weight layouts: what each keeps, its bytes, and which one a tensor of a file goes to.

Names end users write (`weights=`) are auto, f32, bf16, int8, int4. The layouts beneath them are those of native/kernels.h.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Literal, get_args

from kvik import _native
from kvik.params import choose

__all__ = ["WEIGHTS", "Layout", "Weights", "is_integer", "layout_for", "packed_bytes", "parse_weights"]

Weights = Literal["auto", "f32", "bf16", "int8", "int4"]
WEIGHTS: tuple[Weights, ...] = get_args(Weights)
_ALIASES: dict[str, Weights] = {"fp32": "f32", "float32": "f32", "bfloat16": "bf16"}


class Layout(IntEnum):
    """Rows interleaved by 16. Integer layouts have groups of 32 inputs: int8 and int4 a scale (8.5 and 4.5 bits a weight),
    int8_min and int4_min a scale and a minimum (9 and 5 bits), both f16."""

    F32 = 0
    F16 = 1
    BF16 = 2
    INT8 = 3
    INT8_MIN = 4
    INT4 = 5
    INT4_MIN = 6


_Q4_0, _Q4_1 = 2, 3
_WANTED = {
    "f32": Layout.F32,
    "bf16": Layout.BF16,
    "int8": Layout.INT8,
    "int4": Layout.INT4_MIN,
}


def parse_weights(name: str) -> Weights:
    """The weights option by its name or alias; ParameterError names the nearest."""
    return choose("weights", name, WEIGHTS, _ALIASES)


def is_integer(layout: Layout) -> bool:
    """Whether activations are rounded to integers against this layout."""
    return layout >= Layout.INT8


def layout_for(weights: Weights, source_type: int) -> Layout | None:
    """Where a matrix of the GGUF type goes; None when the type cannot be read.

    auto keeps what the file has, without loss. An integer type goes to a wider integer layout without loss too.
    """
    exact = _native.exact_layout(source_type)
    if exact is None:
        return None
    if weights == "auto":
        return Layout(exact)
    if weights == "int8" and source_type == _Q4_1:
        return Layout.INT8_MIN
    if weights == "int4" and source_type == _Q4_0:
        return Layout.INT4
    return _WANTED[weights]


def packed_bytes(layout: Layout, rows: int, columns: int) -> int:
    """Bytes of a packed matrix, padding, scales and minimums included."""
    return _native.packed_bytes(int(layout), rows, columns)
