"""Keys and values of the torch executor: blocks and packed pages in one tensor of bytes, by address."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvik.errors import ParameterError
from kvik.ops import CacheView, Sizes
from kvik.ops.pages import ADDRESS_BYTES, RECENT, CacheLayout, PageFormat
from kvik.ops.torch_checks import check_layout, within
from kvik.ops.torch_pages import Coded, code_keys, code_values, from_bytes, to_bytes

__all__ = ["Heads", "Places", "Table", "TorchCache"]


class Places(NamedTuple):
    """Where slots [n] lie: in the nth of the pages at these addresses [N], at which token."""

    page: PageFormat
    addresses: Tensor
    nth: Tensor
    token: Tensor


@dataclass(frozen=True)
class Table:
    """Full blocks and packed pages of one group of a sequence, by address. Slots here are those of the table.

    shift: slots that were evicted; length: slots in use.
    """

    layout: CacheLayout
    full: Tensor
    packed: Tensor | None
    shift: int
    length: int

    def is_packed(self, slots: Tensor, readers: Tensor) -> Tensor:
        """Whether the row at a reader's slot reads a slot packed; the two broadcast. See CacheLayout.packed_end."""
        if self.layout.packed is None:
            return torch.zeros_like(slots + readers, dtype=torch.bool)
        each = self.layout.packed.tokens
        return (slots >= self.layout.keep) & (slots < (readers + 1 - RECENT).clamp(min=0) // each * each)

    def groups(self, first: int, last: int) -> Tensor:
        """Groups that rows at slots from first to last are the first to read packed; never those that stay full."""
        if self.layout.packed is None:
            return self.full[:0]
        each = self.layout.packed.tokens
        begin, end = (max(self.layout.packed_end(slot), self.layout.keep) // each for slot in (first - 1, last))
        return torch.arange(begin, end, device=self.full.device)

    def find(self, slots: Tensor, *, packed: bool) -> Places:
        """Slots [n] in full blocks or packed pages. ParameterError where there are none."""
        page, table = self._pages(packed)
        pages, index = torch.unique(slots // page.tokens, return_inverse=True)
        if len(pages) and (int(pages[-1]) >= len(table) or bool((table[pages] < 0).any())):
            raise ParameterError(f"pages {pages.tolist()} of {page} are looked at; the table has {table.tolist()}")
        return Places(page, table[pages], index, slots % page.tokens)

    def there(self, slots: Tensor, *, packed: bool) -> Tensor:
        """Whether there is a full block, or packed page, for each slot [n]."""
        page, table = self._pages(packed)
        return table[slots // page.tokens] >= 0

    def _pages(self, packed: bool) -> tuple[PageFormat, Tensor]:
        if not packed:
            return self.layout.full, self.full
        assert self.layout.packed is not None and self.packed is not None
        return self.layout.packed, self.packed


class Heads(NamedTuple):
    """KV heads of one layer that lie in one group. heads: of the layer, h of them; units: [h] their places in a block."""

    cache: TorchCache
    group: int
    heads: list[int]
    units: Tensor

    def append(self, places: Places, k: Tensor, v: Tensor) -> None:
        """Store k, v [n, h, D] in full blocks, rounded to their formats."""
        keys, values = (x.floats() for x in self._load(places))  # [N, h, 16, D]
        keys[places.nth, :, places.token] = k.float()
        values[places.nth, :, places.token] = v.float()
        page = places.page
        self.store(places, code_keys(keys, page.k), code_values(values, page.v))

    def read(self, places: Places) -> tuple[Tensor, Tensor]:
        """Keys and values [n, h, D] float32."""
        k, v = self.coded(places)
        return k.floats(), v.floats()

    def coded(self, places: Places) -> tuple[Coded, Coded]:
        """Keys and values [n, h, D] as the format holds them."""
        k, v = self._load(places)
        return k.at(places.nth, places.token), v.at(places.nth, places.token)

    def pack(self, table: Table, groups: Tensor) -> None:
        """Pack groups from full blocks."""
        page = table.layout.packed
        if page is None or not len(groups):
            return
        slots = groups[:, None] * page.tokens + torch.arange(page.tokens, device=groups.device)
        k, v = (x.reshape(*slots.shape, *x.shape[1:]) for x in self.read(table.find(slots.flatten(), packed=False)))
        k, v = (x.transpose(1, 2) for x in (k, v))  # [groups, h, tokens, D]
        places = table.find(groups * page.tokens, packed=True)
        self.store(places, code_keys(k, page.k), code_values(v, page.v))

    def _load(self, places: Places) -> tuple[Coded, Coded]:
        """Keys and values [N, h, tokens, D] of whole pages."""
        shares = self.cache.memory[self._addresses(places)].flatten(-2)
        return from_bytes(places.page, self.cache.config.head_size, shares)

    def store(self, places: Places, k: Coded, v: Coded) -> None:
        """Write whole pages [N, h, tokens, D]."""
        addresses = self._addresses(places)
        self.cache.memory[addresses] = to_bytes(places.page, k, v).reshape(*addresses.shape, ADDRESS_BYTES)

    def _addresses(self, places: Places) -> Tensor:
        """Of the heads' shares in pages: [N, h, steps]."""
        steps = places.page.share_bytes(self.cache.config.head_size) // ADDRESS_BYTES
        return _span(places.addresses[:, None] + self.units * steps, steps)


class TorchCache:
    """The pool's bytes, memory [addresses, 64] uint8, and the layouts that passes may name."""

    def __init__(self, config: Sizes, kv_bytes: int, device: torch.device) -> None:
        if kv_bytes < ADDRESS_BYTES:
            raise ParameterError(f"kv_bytes must be at least {ADDRESS_BYTES}, got {kv_bytes}")
        self.memory = torch.zeros(kv_bytes // ADDRESS_BYTES, ADDRESS_BYTES, dtype=torch.uint8, device=device)
        self.config = config
        self.layouts: list[CacheLayout] = []
        self._layers: list[list[list[Heads]]] = []

    def register(self, layout: CacheLayout) -> int:
        if layout not in self.layouts:
            check_layout(layout, self.config)
            counts = [0] * len(layout.units)
            self.layouts.append(layout)
            self._layers.append([self._heads(groups, counts) for groups in layout.group_of])
        return self.layouts.index(layout)

    def _heads(self, groups: tuple[int, ...], counts: list[int]) -> list[Heads]:
        """Of a layer; counts: units that earlier layers have of each group."""
        found = []
        for group in sorted(set(groups)):
            heads = [head for head, of in enumerate(groups) if of == group]
            units = torch.arange(counts[group], counts[group] + len(heads), device=self.memory.device)
            counts[group] += len(heads)
            found.append(Heads(self, group, heads, units))
        return found

    def layer(self, layout: int, layer: int) -> list[Heads]:
        """The KV heads of a layer, those together that share tables."""
        return self._layers[layout][layer]

    def head(self, layout: int, layer: int, head: int) -> Heads:
        """One KV head of a layer."""
        together = next(heads for heads in self.layer(layout, layer) if head in heads.heads)
        at = together.heads.index(head)
        return together._replace(heads=[head], units=together.units[at : at + 1])

    def tables(self, view: CacheView) -> list[Table]:
        """Of each group of a sequence."""
        layout, device = self.layouts[view.layout], self.memory.device
        blocks = [
            torch.tensor(view.blocks[begin:end].tolist(), dtype=torch.int64, device=device)
            for begin, end in zip(view.block_spans[:-1], view.block_spans[1:], strict=True)
        ]
        lengths = [(int(shift), view.num_tokens - int(shift)) for shift in view.shifts]
        if layout.packed is None:
            return [Table(layout, full, None, *length) for full, length in zip(blocks, lengths, strict=True)]
        return [Table(layout, blocks[i], blocks[i + 1], *lengths[i]) for i in range(0, len(blocks), 2)]

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


def _span(addresses: Tensor, steps: int) -> Tensor:
    """The addresses [..., steps] of what begins at addresses [...]."""
    return addresses[..., None] + torch.arange(steps, device=addresses.device)
