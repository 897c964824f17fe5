"""What the bytes of a tensor mean, type by type: the slow, plain definition.

`dequantize` is what every native layout is tested against; its own oracle is the `gguf` package. A block is the
smallest unit of a type: so many elements in so many bytes, little-endian. Source of the layouts: the GGUF
specification and `ggml-common.h` of the ggml project.

=====  ===================================================================  ==========================
type   bytes of a block, in order                                           element i
=====  ===================================================================  ==========================
Q4_0   f16 scale d, 16 bytes q                                              d * (q4[i] - 8)
Q4_1   f16 scale d, f16 minimum m, 16 bytes q                               d * q4[i] + m
Q5_0   f16 scale d, 32 bits h, 16 bytes q                                   d * (q5[i] - 16)
Q5_1   f16 scale d, f16 minimum m, 32 bits h, 16 bytes q                    d * q5[i] + m
Q8_0   f16 scale d, 32 int8 q                                               d * q[i]
Q4_K   f16 d, f16 m, 12 bytes of 6-bit steps, 8 groups q of 32              d * s[g] * q4 - m * t[g]
Q5_K   f16 d, f16 m, 12 bytes of 6-bit steps, 32 bytes h, 8 groups q of 32  d * s[g] * q5 - m * t[g]
Q6_K   128 bytes low nibbles, 64 bytes upper bits, 16 int8 s, f16 d         d * s[i / 16] * (q6[i] - 32)
=====  ===================================================================  ==========================

q4[i] is the low nibble of byte i for i < 16, the high nibble of byte i - 16 from there on; q5[i] has bit i of h above it.
In the K types a block has 256 elements in groups g of 32, two of which share 32 bytes: low nibbles, then high. Bit g of
byte i of h belongs to element i of group g. Products and sums are in float32, each rounded once, from the left.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvik.errors import DataError
from kvik.weights.ggml_types import TRAITS, GGMLType, tensor_bytes

__all__ = ["SUPPORTED", "NonFinite", "dequantize", "first_nonfinite"]

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]

_CHUNK_BYTES = 1 << 20  # working memory of the passes below stays a few times this, whatever the tensor's size


def _f32(blocks: Bytes) -> Floats:
    return blocks.view("<f4").astype(np.float32, copy=False)


def _f16(blocks: Bytes) -> Floats:
    return blocks.view("<f2").astype(np.float32)


def _bf16(blocks: Bytes) -> Floats:
    return (blocks.view("<u2").astype(np.uint32) << np.uint32(16)).view(np.float32)


def _nibbles(packed: Bytes) -> Floats:
    return np.concatenate([packed & np.uint8(15), packed >> np.uint8(4)], axis=1).astype(np.float32)


def _q4_0(blocks: Bytes) -> Floats:
    return _f16(blocks[:, :2]) * (_nibbles(blocks[:, 2:]) - np.float32(8))


def _q4_1(blocks: Bytes) -> Floats:
    return _f16(blocks[:, :2]) * _nibbles(blocks[:, 4:]) + _f16(blocks[:, 2:4])


def _q8_0(blocks: Bytes) -> Floats:
    return _f16(blocks[:, :2]) * blocks[:, 2:].view(np.int8).astype(np.float32)


def _fifth_bits(packed: Bytes) -> Floats:
    return np.unpackbits(packed, axis=1, bitorder="little").astype(np.float32) * np.float32(16)


def _q5_0(blocks: Bytes) -> Floats:
    return _f16(blocks[:, :2]) * (_nibbles(blocks[:, 6:]) + _fifth_bits(blocks[:, 2:6]) - np.float32(16))


def _q5_1(blocks: Bytes) -> Floats:
    quants = _nibbles(blocks[:, 8:]) + _fifth_bits(blocks[:, 4:8])
    return _f16(blocks[:, :2]) * quants + _f16(blocks[:, 2:4])


def _steps(packed: Bytes) -> tuple[Floats, Floats]:
    """12 bytes as 8 scales and 8 minimums of 6 bits: four whole, of four the low nibbles here, the upper bits there."""
    first, second, last = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = np.concatenate([first & 63, (last & 15) | (first >> 6) << 4], axis=1)
    minimums = np.concatenate([second & 63, (last >> 4) | (second >> 6) << 4], axis=1)
    return scales.astype(np.float32), minimums.astype(np.float32)


def _group_pairs(packed: Bytes) -> NDArray[np.uint8]:
    """[blocks, 8, 32] nibbles: of each 32 bytes the low ones, then the high ones."""
    pairs = packed.reshape(len(packed), 4, 1, 32)
    return np.concatenate([pairs & np.uint8(15), pairs >> np.uint8(4)], axis=2).reshape(len(packed), 8, 32)


def _k_groups(head: Bytes, quants: NDArray[np.uint8]) -> Floats:
    scales, minimums = _steps(np.ascontiguousarray(head[:, 4:16]))
    scales, minimums = _f16(head[:, :2]) * scales, _f16(head[:, 2:4]) * minimums
    weights: Floats = scales[:, :, None] * quants.astype(np.float32) - minimums[:, :, None]
    return weights


def _q4_k(blocks: Bytes) -> Floats:
    return _k_groups(blocks[:, :16], _group_pairs(blocks[:, 16:]))


def _q5_k(blocks: Bytes) -> Floats:
    high = blocks[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None] & np.uint8(1)
    return _k_groups(blocks[:, :16], _group_pairs(blocks[:, 48:]) | high << np.uint8(4))


def _q6_k(blocks: Bytes) -> Floats:
    low = blocks[:, :128].reshape(-1, 2, 1, 64)
    nibbles = np.concatenate([low & np.uint8(15), low >> np.uint8(4)], axis=2).reshape(-1, 2, 4, 32)
    upper = blocks[:, 128:192].reshape(-1, 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8)[:, None] & np.uint8(3)
    quants = (nibbles | upper << np.uint8(4)).reshape(-1, 16, 16).astype(np.float32) - np.float32(32)
    scales = _f16(blocks[:, 208:]) * blocks[:, 192:208].view(np.int8).astype(np.float32)
    weights: Floats = scales[:, :, None] * quants
    return weights


_DECODE: dict[GGMLType, Callable[[Bytes], Floats]] = {
    GGMLType.F32: _f32,
    GGMLType.F16: _f16,
    GGMLType.BF16: _bf16,
    GGMLType.Q4_0: _q4_0,
    GGMLType.Q4_1: _q4_1,
    GGMLType.Q5_0: _q5_0,
    GGMLType.Q5_1: _q5_1,
    GGMLType.Q8_0: _q8_0,
    GGMLType.Q4_K: _q4_k,
    GGMLType.Q5_K: _q5_k,
    GGMLType.Q6_K: _q6_k,
}

SUPPORTED = frozenset(_DECODE)
"""Types whose tensors Kvik reads; the others of `GGMLType` are listed and refused by name."""


class _Scales(NamedTuple):
    """The f16 numbers of a block: what they are, and the byte at which they begin."""

    names: tuple[Literal["scale", "minimum"], ...]
    at: int = 0


_SCALES: dict[GGMLType, _Scales] = {
    GGMLType.Q4_0: _Scales(("scale",)),
    GGMLType.Q4_1: _Scales(("scale", "minimum")),
    GGMLType.Q5_0: _Scales(("scale",)),
    GGMLType.Q5_1: _Scales(("scale", "minimum")),
    GGMLType.Q8_0: _Scales(("scale",)),
    GGMLType.Q4_K: _Scales(("scale", "minimum")),
    GGMLType.Q5_K: _Scales(("scale", "minimum")),
    GGMLType.Q6_K: _Scales(("scale",), 208),
}


def _blocks(data: Bytes, type: GGMLType) -> Bytes:
    """View of the bytes as [blocks, block_bytes]."""
    if type not in SUPPORTED:
        known = ", ".join(t.name for t in sorted(SUPPORTED))
        raise DataError(f"type {GGMLType(type).name} is not supported; supported: {known}")
    block_bytes = TRAITS[type].block_bytes
    if data.dtype != np.uint8 or data.ndim != 1 or data.size % block_bytes:
        raise DataError(f"{type.name} needs whole blocks of {block_bytes} bytes, got {data.dtype}{list(data.shape)}")
    return np.ascontiguousarray(data).reshape(-1, block_bytes)


def dequantize(data: NDArray[Any], type: GGMLType, shape: tuple[int, ...]) -> Floats:
    """The float32 values of a tensor: the definition, in plain numpy.

    data: uint8 [bytes], exactly the tensor's. shape: numpy order, the last dimension contiguous. Returns float32 of
    that shape, a copy. Raises DataError for a type outside `SUPPORTED` and for a number of bytes that is not shape's.
    NaN and infinities pass through: see `first_nonfinite`.
    """
    blocks = _blocks(data, type)
    if tensor_bytes(type, shape) != data.size:
        raise DataError(f"{type.name} of shape {list(shape)} needs {tensor_bytes(type, shape)} bytes, got {data.size}")
    out = np.empty((len(blocks), TRAITS[type].block_elements), np.float32)
    step = max(1, _CHUNK_BYTES // TRAITS[type].block_bytes)
    with np.errstate(all="ignore"):  # a hostile scale may be NaN or infinite: finding that is first_nonfinite's work
        for start in range(0, len(blocks), step):
            part = blocks[start : start + step]
            out[start : start + step] = _DECODE[type](part).reshape(len(part), -1)
    return out.reshape(shape)


class NonFinite(NamedTuple):
    """The first number of a tensor that is NaN or infinite."""

    what: Literal["weight", "scale", "minimum"]
    value: float
    element: int
    """Index of the element in the flattened tensor; of a scale or minimum, the first element of its block."""
    offset: int
    """Byte of the tensor's data at which the number stands."""


def first_nonfinite(data: NDArray[Any], type: GGMLType) -> NonFinite | None:
    """Find NaN or infinity among the weights (float types) or the scales and minimums (quantized types).

    data: uint8 [bytes] of whole blocks. Returns the first one in the order of the bytes, None when all are finite.
    Finite scales give finite weights: |d| <= 65504, steps and quants <= 128 stay far inside float32. The slow twin of the native
    check.
    """
    blocks = _blocks(data, type)
    block_elements, block_bytes = TRAITS[type]
    names, at = _SCALES.get(type, (("weight",), 0))
    number_bytes = 2 if type in _SCALES else block_bytes
    decode = _f16 if type in _SCALES else _DECODE[type]
    step = max(1, _CHUNK_BYTES // block_bytes)
    for start in range(0, len(blocks), step):
        part = blocks[start : start + step, at : at + number_bytes * len(names)]
        values = decode(np.ascontiguousarray(part).reshape(-1))
        bad = np.flatnonzero(~np.isfinite(values))
        if bad.size:
            block, which = divmod(int(bad[0]), len(names))
            what: Any = names[which]
            offset = (start + block) * block_bytes + at + which * number_bytes
            return NonFinite(what, float(values[bad[0]]), (start + block) * block_elements, offset)
    return None
