"""Keys and values of the torch executor."""

from __future__ import annotations

import torch
from torch import Tensor

from kvik.errors import ParameterError
from kvik.ops import Sizes

__all__ = ["PagedKV"]

KV_TYPES = {"f16": torch.float16, "f32": torch.float32}


class PagedKV:
    """Keys and values of all layers in blocks of `block_tokens` slots, addressed through block tables."""

    def __init__(self, config: Sizes, kv: str, num_blocks: int, block_tokens: int, device: torch.device) -> None:
        if kv not in KV_TYPES:
            raise ParameterError(f"kv must be 'f16' or 'f32', got {kv!r}")
        shape = (config.num_layers, num_blocks, block_tokens, config.num_kv_heads, config.head_size)
        self.keys = torch.zeros(shape, dtype=KV_TYPES[kv], device=device)
        self.values = torch.zeros(shape, dtype=KV_TYPES[kv], device=device)
        self.num_blocks, self.block_tokens = num_blocks, block_tokens

    def append(self, layer: int, blocks: Tensor, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Store rows k, v [T, H_kv, D] of one sequence at its slots [T], rounded to the cache's format."""
        block, offset = blocks[slots // self.block_tokens], slots % self.block_tokens
        self.keys[layer, block, offset] = k.to(self.keys.dtype)
        self.values[layer, block, offset] = v.to(self.values.dtype)

    def gather(self, layer: int, blocks: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Slots 0 to length of one sequence, as float32 keys and values [length, H_kv, D]."""
        used = blocks[: -(-length // self.block_tokens)]
        k = self.keys[layer, used].flatten(0, 1)[:length]
        v = self.values[layer, used].flatten(0, 1)[:length]
        return k.float(), v.float()
