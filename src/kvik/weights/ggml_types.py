"""The tensor types of GGUF files: their numbers and the sizes of their blocks.

A block is the smallest unit of a type: so many elements in so many bytes. `kvik.weights.dequantize` says what the bytes
mean. Source: the GGUF specification and `ggml.h` of the ggml project.
"""

from __future__ import annotations

import math
from enum import IntEnum
from typing import NamedTuple

from kvik.errors import DataError

__all__ = ["TRAITS", "GGMLType", "Traits", "tensor_bytes"]


class GGMLType(IntEnum):
    """Type numbers as GGUF stores them. Numbers that ggml has removed (4, 5, 31 to 33, 36 to 38) are unknown here."""

    F32 = 0
    F16 = 1
    Q4_0 = 2
    Q4_1 = 3
    Q5_0 = 6
    Q5_1 = 7
    Q8_0 = 8
    Q8_1 = 9
    Q2_K = 10
    Q3_K = 11
    Q4_K = 12
    Q5_K = 13
    Q6_K = 14
    Q8_K = 15
    IQ2_XXS = 16
    IQ2_XS = 17
    IQ3_XXS = 18
    IQ1_S = 19
    IQ4_NL = 20
    IQ3_S = 21
    IQ2_S = 22
    IQ4_XS = 23
    I8 = 24
    I16 = 25
    I32 = 26
    I64 = 27
    F64 = 28
    IQ1_M = 29
    BF16 = 30
    TQ1_0 = 34
    TQ2_0 = 35
    MXFP4 = 39


class Traits(NamedTuple):
    """Size of a type's block."""

    block_elements: int
    block_bytes: int


TRAITS: dict[GGMLType, Traits] = {
    GGMLType.F32: Traits(1, 4),
    GGMLType.F16: Traits(1, 2),
    GGMLType.Q4_0: Traits(32, 18),
    GGMLType.Q4_1: Traits(32, 20),
    GGMLType.Q5_0: Traits(32, 22),
    GGMLType.Q5_1: Traits(32, 24),
    GGMLType.Q8_0: Traits(32, 34),
    GGMLType.Q8_1: Traits(32, 36),
    GGMLType.Q2_K: Traits(256, 84),
    GGMLType.Q3_K: Traits(256, 110),
    GGMLType.Q4_K: Traits(256, 144),
    GGMLType.Q5_K: Traits(256, 176),
    GGMLType.Q6_K: Traits(256, 210),
    GGMLType.Q8_K: Traits(256, 292),
    GGMLType.IQ2_XXS: Traits(256, 66),
    GGMLType.IQ2_XS: Traits(256, 74),
    GGMLType.IQ3_XXS: Traits(256, 98),
    GGMLType.IQ1_S: Traits(256, 50),
    GGMLType.IQ4_NL: Traits(32, 18),
    GGMLType.IQ3_S: Traits(256, 110),
    GGMLType.IQ2_S: Traits(256, 82),
    GGMLType.IQ4_XS: Traits(256, 136),
    GGMLType.I8: Traits(1, 1),
    GGMLType.I16: Traits(1, 2),
    GGMLType.I32: Traits(1, 4),
    GGMLType.I64: Traits(1, 8),
    GGMLType.F64: Traits(1, 8),
    GGMLType.IQ1_M: Traits(256, 56),
    GGMLType.BF16: Traits(1, 2),
    GGMLType.TQ1_0: Traits(256, 54),
    GGMLType.TQ2_0: Traits(256, 66),
    GGMLType.MXFP4: Traits(32, 17),
}


def tensor_bytes(type: GGMLType, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor. shape is in numpy order; the last dimension must hold whole blocks (DataError otherwise)."""
    block_elements, block_bytes = TRAITS[type]
    if not shape or shape[-1] % block_elements:
        row = shape[-1] if shape else 0
        raise DataError(f"rows of {row} elements do not divide into {type.name} blocks of {block_elements}")
    return math.prod(shape) // block_elements * block_bytes
