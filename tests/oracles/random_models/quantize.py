"""Rounding to GGUF's types. The `gguf` package lacks the K types' direction; a plain one is written here."""

from __future__ import annotations

from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from oracles.random_models.model import change_matrices

FILE_TYPES = {
    name: Type[name] for name in ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K")
}
BLOCK = 256
Array = np.ndarray[Any, Any]


class Rounding:
    """Rounds matrices to a type, and gives the blocks that a matrix rounded here, or rows of it, was rounded to.

    Quantizing rounded values again need not give the same blocks.
    """

    def __init__(self, file_type: str) -> None:
        self.kind = FILE_TYPES[file_type]
        self._rows: dict[bytes, Array] = {}

    def rounded(self, values: Array) -> Array:
        """The values that a file of this type keeps of these: float32 [..., inputs]."""
        blocks = _quantize(values, self.kind)
        kept = gguf.dequantize(blocks, self.kind).astype(np.float32)
        self._rows.update(zip(_keys(kept), blocks.reshape(-1, blocks.shape[-1]), strict=True))
        return kept

    def blocks(self, values: Array) -> Array:
        """[..., bytes], or the floats themselves, of rows that `rounded` gave."""
        rows = np.stack([self._rows[key] for key in _keys(values)])
        return rows.reshape(*values.shape[:-1], rows.shape[-1])


def quantize_model(model: Any, file_type: str) -> Rounding:
    """Round every matrix in place to what a file of this type holds."""
    rounding = Rounding(file_type)
    change_matrices(model, rounding.rounded)
    return rounding


def _keys(values: Array) -> list[bytes]:
    return [row.tobytes() for row in np.ascontiguousarray(values, np.float32).reshape(-1, values.shape[-1])]


def _quantize(values: Array, kind: Type) -> Array:
    values = np.ascontiguousarray(values, dtype=np.float32)
    if kind not in (Type.Q4_K, Type.Q5_K, Type.Q6_K):
        return gguf.quantize(values, kind)
    blocks = values.reshape(-1, BLOCK)
    made = _q6_k(blocks) if kind == Type.Q6_K else _q45_k(blocks, 4 if kind == Type.Q4_K else 5)
    assert made.shape[1] == gguf.GGML_QUANT_SIZES[kind][1]
    return made.reshape(*values.shape[:-1], -1)


def _q45_k(blocks: Array, bits: int) -> Array:
    """Eight groups of 32: q * d * scale - dmin * minimum, scales and minima of 6 bits."""
    groups = blocks.reshape(len(blocks), 8, 32)
    low = np.minimum(groups.min(-1), 0.0)
    step = (groups.max(-1) - low) / (2**bits - 1)
    d, scales = _six_bits(step)
    dmin, minima = _six_bits(-low)
    step = (d[:, None].astype(np.float32) * scales)[..., None]
    low = (dmin[:, None].astype(np.float32) * minima)[..., None]
    q = np.rint((groups + low) / np.where(step > 0, step, 1.0)).clip(0, 2**bits - 1).astype(np.uint8)
    nibbles = q & 15
    parts = [
        d[:, None].view(np.uint8),
        dmin[:, None].view(np.uint8),
        scales[:, :4] | (scales[:, 4:] >> 4 << 6),
        minima[:, :4] | (minima[:, 4:] >> 4 << 6),
        (scales[:, 4:] & 15) | ((minima[:, 4:] & 15) << 4),
        *([(np.bitwise_or.reduce(q >> 4 << np.arange(8, dtype=np.uint8)[:, None], axis=1))] if bits == 5 else []),
        (nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)).reshape(len(blocks), 128),
    ]
    return np.concatenate(parts, axis=1)


def _six_bits(values: Array) -> tuple[Array, Array]:
    """An f16 factor a block and 6-bit integers a group whose products are near the values."""
    d = (values.max(-1) / 63).astype(np.float16)
    factor = d[:, None].astype(np.float32)
    return d, np.rint(values / np.where(factor > 0, factor, 1.0)).clip(0, 63).astype(np.uint8)


def _q6_k(blocks: Array) -> Array:
    """Sixteen groups of 16: q * d * scale, q of -32 to 31, scales of 8 bits."""
    groups = blocks.reshape(len(blocks), 16, 16)
    step = np.abs(groups).max(-1) / 31
    d = (step.max(-1) / 127).astype(np.float16)
    factor = d[:, None].astype(np.float32)
    scales = np.rint(step / np.where(factor > 0, factor, 1.0)).clip(0, 127).astype(np.int8)
    step = (factor * scales)[..., None]
    q = (np.rint(groups / np.where(step > 0, step, 1.0)).clip(-32, 31) + 32).astype(np.uint8)
    # Each half of 128: its quarters' low bits in nibbles (0 beside 2, 1 beside 3), their high bits in pairs.
    quarters = q.reshape(len(blocks), 2, 4, 32)
    low, high = quarters & 15, quarters >> 4
    low = np.stack((low[:, :, 0] | low[:, :, 2] << 4, low[:, :, 1] | low[:, :, 3] << 4), axis=2)
    high = np.bitwise_or.reduce(high << (2 * np.arange(4, dtype=np.uint8))[:, None], axis=2)
    parts = [low.reshape(-1, 128), high.reshape(-1, 64), scales.view(np.uint8), d[:, None].view(np.uint8)]
    return np.concatenate(parts, axis=1)
