"""The one byte formula of the KV cache: the allocator, the planner and the reports all ask here.

Layers that forget alike (same window) are a *group*; a sequence has one block table per group. A block holds 16 tokens of
every layer and KV head of its group: per (layer, head) the keys [D, 16], then the values [16, D]. Memory is *slabs* of
equal bytes, each carved into blocks of one group at a time, so that a block's bytes begin at its id times its bytes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple, Protocol, get_args

from kvik.ops import Sizes
from kvik.params import choose

__all__ = [
    "BLOCK_TOKENS", "KV_FORMATS", "CacheShape", "KVFormat", "KVLayout", "LayerGroup", "blocks_for", "kv_layout",
    "parse_kv",
]  # fmt: skip

BLOCK_TOKENS = 16

KVFormat = Literal["f16", "f32"]
KV_FORMATS: tuple[KVFormat, ...] = get_args(KVFormat)
_ELEMENT_BYTES: dict[KVFormat, int] = {"f16": 2, "f32": 4}
_ALIASES: dict[str, KVFormat] = {"fp16": "f16", "fp32": "f32", "float16": "f16", "float32": "f32"}


def parse_kv(name: str) -> KVFormat:
    """The cache format by its name or alias; ParameterError names the nearest."""
    return choose("kv", name, KV_FORMATS, _ALIASES)


def blocks_for(tokens: int) -> int:
    """Blocks of a group that hold `tokens` tokens."""
    return -(-tokens // BLOCK_TOKENS)


class CacheShape(Sizes, Protocol):
    """What the cache must know of a model's configuration."""

    @property
    def windows(self) -> tuple[int | None, ...]: ...


class LayerGroup(NamedTuple):
    """Layers that forget alike. window: slots a row sees, its own included; 0 sees all."""

    layers: tuple[int, ...]
    window: int

    def first_block(self, slot: int) -> int:
        """The first block that a row at `slot`, or a later one, still sees."""
        return max(0, slot + 1 - self.window) // BLOCK_TOKENS if self.window else 0


@dataclass(frozen=True)
class KVLayout:
    """Bytes of a model's cache in one format."""

    format: KVFormat
    kv_heads: int
    head_size: int
    groups: tuple[LayerGroup, ...]

    @property
    def layers(self) -> int:
        return sum(len(group.layers) for group in self.groups)

    @cached_property
    def layer_bytes(self) -> int:
        """Bytes of one layer of a block."""
        return BLOCK_TOKENS * 2 * self.kv_heads * self.head_size * _ELEMENT_BYTES[self.format]

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's keys and values, all layers."""
        return self.layers * self.layer_bytes // BLOCK_TOKENS

    @cached_property
    def block_bytes(self) -> tuple[int, ...]:
        """Bytes of one block of 16 tokens, by group."""
        return tuple(len(group.layers) * self.layer_bytes for group in self.groups)

    @cached_property
    def slab_bytes(self) -> int:
        """Bytes of a slab: whole blocks of every group."""
        return math.lcm(*(len(group.layers) for group in self.groups)) * self.layer_bytes

    @cached_property
    def slab_blocks(self) -> tuple[int, ...]:
        """Blocks of a slab, by group."""
        return tuple(self.slab_bytes // each for each in self.block_bytes)

    def sequence_blocks(self, tokens: int, chunk: int) -> tuple[int, ...]:
        """Most blocks, by group, that a sequence of `tokens` tokens holds at once, computed at most `chunk` at a time.

        A group with a window gives up what no later row sees; while a chunk is computed its first row's window and the
        whole chunk are there.
        """
        return tuple(
            min(blocks_for(tokens), blocks_for(group.window + chunk) + 1) if group.window else blocks_for(tokens)
            for group in self.groups
        )

    def slabs_for(self, blocks: Sequence[int]) -> int:
        """Slabs that so many blocks of each group take."""
        return sum(-(-count // each) for count, each in zip(blocks, self.slab_blocks, strict=True))

    def held_bytes(self, blocks: Sequence[int]) -> int:
        """Bytes of so many blocks of each group."""
        return sum(count * each for count, each in zip(blocks, self.block_bytes, strict=True))


def kv_layout(shape: CacheShape, kv: KVFormat) -> KVLayout:
    """The layout of a model's cache: a group for each window there is, layers that see all first."""
    by_window: dict[int, list[int]] = {}
    for layer, window in enumerate(shape.windows):
        by_window.setdefault(window or 0, []).append(layer)
    groups = tuple(LayerGroup(tuple(layers), window) for window, layers in sorted(by_window.items()))
    return KVLayout(kv, shape.num_kv_heads, shape.head_size, groups)
