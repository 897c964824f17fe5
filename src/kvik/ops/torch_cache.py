"""Keys and values of the torch executor."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from kvik.errors import ParameterError
from kvik.ops import Sizes

__all__ = ["PagedKV"]

KV_TYPES = {"f16": torch.float16, "f32": torch.float32}


class PagedKV:
    """Keys and values of all layers in blocks of `block_tokens` slots, addressed through block tables.

    groups: of each layer, the group whose blocks it lies in. num_blocks: of the first group; all groups share its memory.
    """

    def __init__(
        self,
        config: Sizes,
        kv: str,
        num_blocks: int,
        block_tokens: int,
        device: torch.device,
        groups: Sequence[int] | None = None,
    ) -> None:
        if kv not in KV_TYPES:
            raise ParameterError(f"kv must be 'f16' or 'f32', got {kv!r}")
        self.group_of = list(groups or [0] * config.num_layers)
        sizes = [self.group_of.count(group) for group in range(max(self.group_of) + 1)]
        self._place = [self.group_of[:layer].count(group) for layer, group in enumerate(self.group_of)]
        shape = (2, block_tokens, config.num_kv_heads, config.head_size)
        self.memory = torch.zeros(num_blocks * sizes[0] * math.prod(shape), dtype=KV_TYPES[kv], device=device)
        # by group: [blocks, layers of the group, keys and values, block_tokens, H_kv, D], all over the same memory
        self._groups = [self.memory[: self.memory.numel() // (n * math.prod(shape)) * n * math.prod(shape)]
                        .view(-1, n, *shape) for n in sizes]  # fmt: skip
        self.kv_heads, self.head_size, self.block_tokens = config.num_kv_heads, config.head_size, block_tokens
        self.num_blocks = [len(group) for group in self._groups]

    def copy(self, group: int, source: int, target: int) -> None:
        """Make a block a copy of another."""
        self._groups[group][target] = self._groups[group][source]

    def append(self, layer: int, blocks: Tensor, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Store rows k, v [T, H_kv, D] of one sequence at its slots [T], rounded to the cache's format."""
        block, offset = blocks[slots // self.block_tokens], slots % self.block_tokens
        group, place = self._groups[self.group_of[layer]], self._place[layer]
        group[block, place, 0, offset] = k.to(group.dtype)
        group[block, place, 1, offset] = v.to(group.dtype)

    def gather(self, layer: int, blocks: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Slots 0 to length of one sequence, as float32 keys and values [length, H_kv, D]; zeros where blocks are -1."""
        used = blocks[: -(-length // self.block_tokens)]
        found = self._groups[self.group_of[layer]][used.clamp(min=0), self._place[layer]].float()
        found[used < 0] = 0.0
        k, v = (found[:, which].flatten(0, 1)[:length] for which in (0, 1))
        return k, v
