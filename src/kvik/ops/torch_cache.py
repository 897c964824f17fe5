"""Keys and values of the torch executor: blocks and packed pages in one tensor of bytes, by address."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvik.errors import ParameterError
from kvik.ops import CacheView, Sizes
from kvik.ops.pages import ADDRESS_BYTES, BLOCK_TOKENS, RECENT, CacheLayout, PageFormat
from kvik.ops.torch_checks import check_layout, within
from kvik.ops.torch_pages import Coded, code_keys, code_values, from_bytes, to_bytes

__all__ = ["Heads", "TorchCache", "in_groups"]


class TorchCache:
    """The pool's bytes, memory [addresses, 64] uint8, and the layouts that passes may name."""

    def __init__(self, config: Sizes, kv_bytes: int, device: torch.device) -> None:
        if kv_bytes < ADDRESS_BYTES:
            raise ParameterError(f"kv_bytes must be at least {ADDRESS_BYTES}, got {kv_bytes}")
        self.memory = torch.zeros(kv_bytes // ADDRESS_BYTES, ADDRESS_BYTES, dtype=torch.uint8, device=device)
        self.config = config
        self.layouts: list[CacheLayout] = []
        self._units: list[dict[tuple[int, ...], int]] = []  # by layout, of a layer and head its place in a block

    def register(self, layout: CacheLayout) -> int:
        if layout not in self.layouts:
            check_layout(layout, self.config)
            self.layouts.append(layout)
            counts = [0] * len(layout.units)
            self._units.append({})
            for layer, head in np.ndindex(self.config.num_layers, self.config.num_kv_heads):
                group = layout.group_of[layer][head]
                self._units[-1][layer, head], counts[group] = counts[group], counts[group] + 1
        return self.layouts.index(layout)

    def load(self, addresses: Tensor, page: PageFormat) -> tuple[Coded, Coded]:
        """Keys and values [..., tokens, D] of the shares at addresses [...]."""
        steps = page.share_bytes(self.config.head_size) // ADDRESS_BYTES
        shares = self.memory[_span(addresses, steps)].flatten(-2)
        return from_bytes(page, self.config.head_size, shares)

    def store(self, addresses: Tensor, page: PageFormat, k: Coded, v: Coded) -> None:
        """Put keys and values [..., tokens, D] into the shares at addresses [...], all different."""
        shares = to_bytes(page, k, v)
        shares = shares.reshape(*shares.shape[:-1], -1, ADDRESS_BYTES)
        self.memory[_span(addresses, shares.shape[-2])] = shares

    def copy(self, source: int, target: int, steps: int) -> None:
        """Copy so many steps of 64 bytes from one address to another."""
        self.memory[target : target + steps] = self.memory[source : source + steps].clone()

    def save(self, blocks: NDArray[np.int32], steps: int) -> NDArray[np.uint8]:
        """See `Executor.save`."""
        saved: NDArray[np.uint8] = self.memory[self._lines(blocks, steps)].flatten(1).cpu().numpy()
        return saved

    def restore(self, blocks: NDArray[np.int32], data: NDArray[np.uint8]) -> None:
        """See `Executor.restore`."""
        steps, rest = divmod(data.shape[1], ADDRESS_BYTES)
        if rest or len(data) != len(blocks):
            raise ParameterError(f"restore: {len(blocks)} blocks, data {list(data.shape)}")
        saved = torch.tensor(data, device=self.memory.device)
        self.memory[self._lines(blocks, steps)] = saved.reshape(len(blocks), steps, ADDRESS_BYTES)

    def _lines(self, blocks: NDArray[np.int32], steps: int) -> Tensor:
        within("blocks", blocks, len(self.memory) - steps + 1)
        return _span(torch.tensor(blocks.tolist(), dtype=torch.int64, device=self.memory.device), steps)

    def layer(self, view: CacheView, layer: int) -> list[Heads]:
        """A sequence's KV heads of a layer, those together that share tables."""
        groups = self.layouts[view.layout].group_of[layer]
        return [
            self.heads(view, layer, [head for head, of in enumerate(groups) if of == group])
            for group in sorted(set(groups))
        ]

    def heads(self, view: CacheView, layer: int, heads: list[int]) -> Heads:
        """KV heads of a layer that share tables."""
        layout, device = self.layouts[view.layout], self.memory.device
        units = torch.tensor([self._units[view.layout][layer, head] for head in heads], device=device)
        each = 1 if layout.packed is None else 2
        first = layout.group_of[layer][heads[0]] * each
        full, *packed = (
            torch.tensor(view.blocks[slice(*view.block_spans[t : t + 2])].tolist(), dtype=torch.int64, device=device)
            for t in range(first, first + each)
        )
        shift = int(view.shifts[first])
        return Heads(self, layout, heads, units, full, packed[0] if packed else None, shift, view.num_tokens - shift)


@dataclass(frozen=True)
class Heads:
    """KV heads of one layer and sequence that share tables. Slots here are those of the table.

    heads: of the layer, h of them; units: [h] their places in a block; full, packed: addresses of blocks and pages.
    shift: slots that were evicted; length: slots in use.
    """

    cache: TorchCache
    layout: CacheLayout
    heads: list[int]
    units: Tensor
    full: Tensor
    packed: Tensor | None
    shift: int
    length: int

    def append(self, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Store k, v [T, h, D] in full blocks at slots [T], rounded to their formats."""
        page = self.layout.full
        blocks, index = torch.unique(slots // BLOCK_TOKENS, return_inverse=True)
        addresses = self._addresses(blocks, page)
        keys, values = (x.floats() for x in self.cache.load(addresses, page))  # [blocks, h, 16, D]
        keys[index, :, slots % BLOCK_TOKENS] = k.float()
        values[index, :, slots % BLOCK_TOKENS] = v.float()
        self.cache.store(addresses, page, code_keys(keys, page.k), code_values(values, page.v))

    def pack(self, first: int, last: int) -> None:
        """Pack, from full blocks, the groups that rows at slots from first to last are the first to read packed."""
        page, groups = self.layout.packed, self.groups(first, last)
        if page is None or not len(groups):
            return
        slots = groups[:, None] * page.tokens + torch.arange(page.tokens, device=groups.device)
        k, v = (in_groups(x, page.tokens) for x in self.read(slots.flatten(), packed=False))
        self.store_groups(groups, code_keys(k, page.k), code_values(v, page.v))

    def groups(self, first: int, last: int) -> Tensor:
        """Groups that rows at slots from first to last are the first to read packed; never those that stay full."""
        if self.layout.packed is None:
            return self.full[:0]
        each = self.layout.packed.tokens
        begin, end = (self.layout.packed_end(slot) // each for slot in (first - 1, last))
        return torch.arange(
            max(begin, self.layout.keep // each), max(end, self.layout.keep // each), device=self.full.device
        )

    def store_groups(self, groups: Tensor, k: Coded, v: Coded) -> None:
        """Write packed pages [n] from keys and values [n, h, tokens, D]."""
        assert self.layout.packed is not None
        self.cache.store(self._addresses(groups, self.layout.packed), self.layout.packed, k, v)

    def is_packed(self, slots: Tensor, readers: Tensor) -> Tensor:
        """Whether the row at a reader's slot reads a slot packed; the two broadcast. See CacheLayout.packed_end."""
        if self.layout.packed is None:
            return torch.zeros_like(slots + readers, dtype=torch.bool)
        each = self.layout.packed.tokens
        return (slots >= self.layout.keep) & (slots < (readers + 1 - RECENT).clamp(min=0) // each * each)

    def read(self, slots: Tensor, *, packed: bool) -> tuple[Tensor, Tensor]:
        """Keys and values [n, h, D] float32 of slots [n], all from packed pages or all from full blocks."""
        k, v = self.coded(slots, packed=packed)
        return k.floats(), v.floats()

    def coded(self, slots: Tensor, *, packed: bool) -> tuple[Coded, Coded]:
        """The same as the format holds them."""
        page = self.layout.packed if packed and self.layout.packed is not None else self.layout.full
        pages, index = torch.unique(slots // page.tokens, return_inverse=True)
        k, v = self.cache.load(self._addresses(pages, page), page)
        return k.at(index, slots % page.tokens), v.at(index, slots % page.tokens)

    def there(self, slots: Tensor, *, packed: bool) -> Tensor:
        """Whether there is a page for each slot [n]."""
        page, table = (self.layout.packed, self.packed) if packed else (self.layout.full, self.full)
        return (
            torch.zeros_like(slots, dtype=torch.bool)
            if page is None or table is None
            else table[slots // page.tokens] >= 0
        )

    def _addresses(self, pages: Tensor, page: PageFormat) -> Tensor:
        """Of the heads' shares in full or packed pages [n] of the tables: [n, h]. ParameterError where one is not there."""
        table = self.full if page is self.layout.full else self.packed
        assert table is not None
        if len(pages) and (int(pages.max()) >= len(table) or bool((table[pages] < 0).any())):
            raise ParameterError(f"pages {pages.tolist()} of {page} are looked at; the table has {table.tolist()}")
        steps = page.share_bytes(self.cache.config.head_size) // ADDRESS_BYTES
        return table[pages][:, None] + self.units * steps


def in_groups(x: Tensor, tokens: int) -> Tensor:
    """[n * tokens, h, D] as packed pages have it: [n, h, tokens, D]."""
    return x.reshape(-1, tokens, *x.shape[1:]).transpose(1, 2)


def _span(addresses: Tensor, steps: int) -> Tensor:
    """The addresses [..., steps] of what begins at addresses [...]."""
    return addresses[..., None] + torch.arange(steps, device=addresses.device)
