"""The one byte formula of the KV cache: the allocator, the planner and the reports all ask here.

A block holds 16 tokens of every layer and KV head of a group: per (layer, head) the keys [D, 16], then the values [16, D].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from kvik.ops import Sizes
from kvik.params import choose

__all__ = ["BLOCK_TOKENS", "KV_FORMATS", "KVFormat", "KVLayout", "kv_layout", "parse_kv"]

BLOCK_TOKENS = 16

KVFormat = Literal["f16", "f32"]
KV_FORMATS: tuple[KVFormat, ...] = get_args(KVFormat)
_ELEMENT_BYTES: dict[KVFormat, int] = {"f16": 2, "f32": 4}
_ALIASES: dict[str, KVFormat] = {"fp16": "f16", "fp32": "f32", "float16": "f16", "float32": "f32"}


def parse_kv(name: str) -> KVFormat:
    """The cache format by its name or alias; ParameterError names the nearest."""
    return choose("kv", name, KV_FORMATS, _ALIASES)


@dataclass(frozen=True)
class KVLayout:
    """Bytes of a model's cache in one format."""

    format: KVFormat
    layers: int
    kv_heads: int
    head_size: int

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's keys and values, all layers."""
        return 2 * self.layers * self.kv_heads * self.head_size * _ELEMENT_BYTES[self.format]

    @property
    def block_bytes(self) -> int:
        """Bytes of one block of 16 tokens."""
        return BLOCK_TOKENS * self.token_bytes

    def blocks_for(self, tokens: int) -> int:
        """Blocks that hold `tokens` tokens."""
        return -(-tokens // BLOCK_TOKENS)


def kv_layout(shape: Sizes, kv: KVFormat) -> KVLayout:
    """The layout of a model's cache."""
    return KVLayout(kv, shape.num_layers, shape.num_kv_heads, shape.head_size)
