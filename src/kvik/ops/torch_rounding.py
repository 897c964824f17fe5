"""How linears round their inputs, on PyTorch tensors: the definition of what the native kernels do."""

from __future__ import annotations

import torch
from torch import Tensor

from kvik.ops import Rounding

__all__ = ["round_input", "round_to_bf16", "round_to_int8"]

INT8_GROUP = 32
NOISE = 1e-30


def round_input(x: Tensor, rounding: Rounding) -> Tensor:
    """x [T, K] as the kernels of a layout with this rounding see it."""
    return (round_to_int8 if rounding.kind == "int8" else round_to_bf16)(x, fine=rounding.fine)


def round_to_int8(x: Tensor, *, fine: bool = False) -> Tensor:
    """In each 32 consecutive inputs, integers times one scale.

    scale = max|x| / 127; the integers, x * (127 / max|x|) rounded half to even, lie in [-127, 127]; a group whose
    maximum is at most 1e-30 becomes zero. fine: a second integer in [-127, 127] counts 256ths of the scale that the
    first leaves. The last group is as short as K leaves it.
    """
    padded = torch.nn.functional.pad(x, (0, -x.shape[-1] % INT8_GROUP))
    grouped = padded.reshape(*x.shape[:-1], padded.shape[-1] // INT8_GROUP, INT8_GROUP)
    largest = grouped.abs().amax(-1, keepdim=True)
    scaled = grouped * torch.where(largest > NOISE, 127.0 / largest, 0.0)
    integers, scale = torch.round(scaled), largest / 127.0
    if fine:
        rest = torch.round((scaled - integers) * 256.0).clamp(-127.0, 127.0)
        integers, scale = integers * 256.0 + rest, scale / 256.0
    return (integers * scale).reshape(padded.shape)[..., : x.shape[-1]]


def round_to_bf16(x: Tensor, *, fine: bool = False) -> Tensor:
    """Each input to the nearest bf16, half to even; fine: and what that leaves to a second bf16."""
    first = x.bfloat16().float()
    return first + (x - first).bfloat16().float() if fine else first
