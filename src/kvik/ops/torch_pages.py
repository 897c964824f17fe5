"""Keys and values as formats hold them, on PyTorch tensors: what the native kernels' packing and reading mean.

Integers per channel of a group for keys and per token for values, as KIVI has them (Liu et al. 2024).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from kvik.ops.pages import PageFormat
from kvik.params import KVFormat

__all__ = ["Coded", "code_keys", "code_values", "from_bytes", "hadamard", "to_bytes"]

FULL = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
STEPS = 15
"""Between the least and the greatest number of int4."""


class Coded(NamedTuple):
    """Keys or values [..., tokens, D] in a format. scale, minimum, zero broadcast: of keys [..., 1, D], of values
    [..., tokens, 1]; None where the format has none.

    numbers: in the full format's own type; int8: in [-127, 127]; int4: uint8 in [0, 15].
    """

    numbers: Tensor
    scale: Tensor | None = None
    minimum: Tensor | None = None
    zero: Tensor | None = None

    def floats(self) -> Tensor:
        """What they stand for, float32: scale * (numbers - zero) + minimum."""
        x = self.numbers.float()
        if self.zero is not None:
            x = x - self.zero.float()
        if self.scale is not None:
            x = x * self.scale.float()
        return x if self.minimum is None else x + self.minimum.float()

    def at(self, page: Tensor, token: Tensor) -> Coded:
        """Of pages [N, h, tokens, D], tokens [n] of pages [n]: everything as [n, h, D]."""
        return self.map(lambda x: x.expand(self.numbers.shape)[page, :, token])

    def map(self, change: Callable[[Tensor], Tensor]) -> Coded:
        """Of everything that is there, what `change` makes of it."""
        numbers, *meaning = self
        return Coded(change(numbers), *(None if x is None else change(x) for x in meaning))


def code_keys(x: Tensor, kv: KVFormat) -> Coded:
    """Keys [..., tokens, D] of a group: integers have a scale (and minimum) a channel."""
    if kv == "int8":
        return _symmetric(x, x.abs().amax(-2, keepdim=True))
    if kv == "int4":
        minimum = _half(x.amin(-2, keepdim=True))
        above = x - minimum.float()
        scale = _half(above.amax(-2, keepdim=True) / STEPS)
        return Coded(_steps(above, scale).clamp(0, STEPS).to(torch.uint8), scale, minimum=minimum)
    return Coded(x.to(FULL[kv]))


def code_values(x: Tensor, kv: KVFormat) -> Coded:
    """Values [..., tokens, D]: integers have a scale (and the integer that means 0) a token."""
    if kv == "int8":
        return _symmetric(x, x.abs().amax(-1, keepdim=True))
    if kv == "int4":
        low, high = x.amin(-1, keepdim=True).clamp(max=0.0), x.amax(-1, keepdim=True).clamp(min=0.0)
        scale = _half((high - low) / STEPS)
        zero = _steps(-low, scale).clamp(0, STEPS)
        numbers = (_steps(x, scale) + zero).clamp(0, STEPS)
        return Coded(numbers.to(torch.uint8), scale, zero=zero.to(torch.uint8))
    return Coded(x.to(FULL[kv]))


def _symmetric(x: Tensor, largest: Tensor) -> Coded:
    scale = _half(largest / 127.0)
    return Coded(_steps(x, scale).clamp(-127, 127).to(torch.int8), scale)


def _half(x: Tensor) -> Tensor:
    """The nearest f16 that is finite."""
    most = torch.finfo(torch.float16).max
    return x.clamp(-most, most).half()


def _steps(x: Tensor, scale: Tensor) -> Tensor:
    """x / scale to the nearest integer, half to even; 0 where the scale is 0."""
    wide = scale.float()
    return torch.where(wide == 0.0, 0.0, torch.round(x / wide))


def to_bytes(page: PageFormat, k: Coded, v: Coded) -> Tensor:
    """Shares [..., share_bytes] of pages with these keys and values [..., tokens, D] in the page's formats.

    Keys, then values, token by token (int4: two channels a byte, the lower in the low bits), then keys' scales and minimums
    [D], values' scales and zeros [tokens]. The native executor arranges the same bytes otherwise.
    """
    size = k.numbers.shape[-1]
    numbers = [_halves(x.numbers) if kv == "int4" else x.numbers for x, kv in ((k, page.k), (v, page.v))]
    meaning = [x for x in (k.scale, k.minimum, v.scale, v.zero) if x is not None]
    shares = torch.cat([_bytes(x) for x in (*numbers, *meaning)], -1)
    return torch.nn.functional.pad(shares, (0, page.share_bytes(size) - shares.shape[-1]))


def from_bytes(page: PageFormat, head_size: int, shares: Tensor) -> tuple[Coded, Coded]:
    """The keys and values [..., tokens, D] of shares [..., share_bytes], the inverse of `to_bytes`."""
    at = 0

    def take(rows: int, columns: int, kind: torch.dtype) -> Tensor:
        nonlocal at
        count = rows * columns * kind.itemsize
        piece = shares[..., at : at + count].contiguous().view(kind)
        at += count
        return piece.reshape(*shares.shape[:-1], rows, columns)

    def numbers(kv: KVFormat) -> Tensor:
        if kv == "int4":
            both = take(page.tokens, head_size // 2, torch.uint8)
            return torch.stack((both & 15, both >> 4), -1).flatten(-2)
        return take(page.tokens, head_size, torch.int8 if kv == "int8" else FULL[kv])

    k, v = numbers(page.k), numbers(page.v)
    scale_k = take(1, head_size, torch.float16) if page.k in ("int8", "int4") else None
    minimum = take(1, head_size, torch.float16) if page.k == "int4" else None
    scale_v = take(page.tokens, 1, torch.float16) if page.v in ("int8", "int4") else None
    zero = take(page.tokens, 1, torch.uint8) if page.v == "int4" else None
    return Coded(k, scale_k, minimum=minimum), Coded(v, scale_v, zero=zero)


def _halves(x: Tensor) -> Tensor:
    """Integers in [0, 15], two channels a byte."""
    return x[..., 0::2] | x[..., 1::2] << 4


def _bytes(x: Tensor) -> Tensor:
    return x.flatten(-2).contiguous().view(torch.uint8)


def hadamard(x: Tensor) -> Tensor:
    """x [..., D] through the normalized Walsh-Hadamard transform, its own inverse, of each block as wide as the largest
    power of two that divides D (QuaRot, Ashkboos et al. 2024).
    """
    width = x.shape[-1] & -x.shape[-1]
    signs = torch.ones(1, 1, dtype=x.dtype, device=x.device)
    while len(signs) < width:
        signs = torch.cat((torch.cat((signs, signs), 1), torch.cat((signs, -signs), 1)))
    blocks: Tensor = x.reshape(*x.shape[:-1], -1, width) @ signs * width**-0.5
    return blocks.reshape(x.shape)
