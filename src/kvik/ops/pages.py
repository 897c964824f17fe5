"""How keys and values lie in memory: formats, pages, and the layout of a sequence's cache as executors see it.

A *page* holds some tokens of some layers and KV heads (its *units*), one share after another; a share has the unit's keys,
then its values, then what their integers mean. *Full* pages, blocks of 16 tokens, hold floating-point numbers; *packed*
pages, groups of `group_size` tokens, hold at least one of keys and values in integers. Blocks are addressed in steps of 64
bytes from the beginning of the pool.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from kvik.params import KVFormat

__all__ = [
    "ADDRESS_BYTES",
    "BLOCK_TOKENS",
    "RECENT",
    "CacheLayout",
    "PageFormat",
    "is_packed",
]

_BITS: dict[KVFormat, int] = {"f32": 32, "f16": 16, "bf16": 16, "int8": 8, "int4": 4}

BLOCK_TOKENS = 16
ADDRESS_BYTES = 64
RECENT = 32
"""A group is read packed by rows at least so many slots behind its last token: more than the longest draft."""


def is_packed(kv: KVFormat) -> bool:
    """Whether the format has integers with scales, by group."""
    return kv in ("int8", "int4")


class PageFormat(NamedTuple):
    """Of one page. tokens: that it holds, a multiple of 16.

    int8: symmetric, scale * q with q in [-127, 127]. int4: q in [0, 15]; keys scale * q + minimum, values
    scale * (q - zero) with zero in [0, 15]. Keys have an f16 scale (and minimum) a channel of the group, values an f16 scale
    (and a byte of zero) a token.
    """

    k: KVFormat
    v: KVFormat
    tokens: int

    def share_bytes(self, head_size: int) -> int:
        """Bytes of one layer and KV head of a page, a multiple of 64: the one formula of the cache's bytes."""
        meaning = {"int8": 2, "int4": 4}.get(self.k, 0) * head_size + {"int8": 2, "int4": 3}.get(
            self.v, 0
        ) * self.tokens
        numbers = self.tokens * head_size * (_BITS[self.k] + _BITS[self.v]) // 8
        return -(-(numbers + meaning) // ADDRESS_BYTES) * ADDRESS_BYTES


@dataclass(frozen=True)
class CacheLayout:
    """Which tables a sequence's cache has and who reads what, for executors.

    A sequence has, for each *group* of (layer, KV head) that evict alike, a table of full blocks and, with a packed format, a
    table of packed pages behind it. A row at slot s of a table (evicted tokens not counted) reads slots from `keep` to
    `packed_end(s)` from packed pages, all others that it sees from full blocks.

    Attributes:
        full: of blocks of 16 tokens.
        packed: of groups of tokens, or None.
        group_of: [L][H_kv] the group whose tables the layer and head lie in; in a page its shares stand by layer, then head.
        keep: first slots that stay in full blocks, a multiple of 16: keep_first and sinks, rounded up; 0 without either.
        rotate: queries and keys go through a Hadamard transform after rotary embedding (packed or not).
        sinks, window: StreamingLLM: a row of a layer without a window of its own sees the first `sinks` slots and its last
            `window` slots, its own included. To the sinks its position is no more than sinks + window - 1. 0, 0: sees all.
    """

    full: PageFormat
    packed: PageFormat | None
    group_of: tuple[tuple[int, ...], ...]
    keep: int = 0
    rotate: bool = False
    sinks: int = 0
    window: int = 0

    @cached_property
    def units(self) -> tuple[int, ...]:
        """(layer, head) pairs of each group."""
        flat = [group for heads in self.group_of for group in heads]
        return tuple(flat.count(group) for group in range(max(flat) + 1))

    @property
    def num_tables(self) -> int:
        """Of a sequence: table g * (1 + packed) is group g's full one, the next its packed one."""
        return len(self.units) * (1 if self.packed is None else 2)

    def packed_end(self, slot: int) -> int:
        """Slots before it (and from `keep` on) a row at `slot` of the table reads packed: whole groups, RECENT slots back."""
        if self.packed is None:
            return 0
        each = self.packed.tokens
        return max(0, slot + 1 - RECENT) // each * each
