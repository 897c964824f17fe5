"""Attention of one sequence's rows over its cached tokens, on PyTorch tensors."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kvik.ops import CacheView, Observation, Pass
from kvik.ops.pages import RECENT
from kvik.ops.torch_cache import Heads, TorchCache
from kvik.ops.torch_pages import hadamard

__all__ = ["SequenceRows", "sequences_of"]

SUM_UNIT = 2**24
"""Of observed probabilities, one."""


class Mask(NamedTuple):
    """Which slots a row sees, of those up to its own: the last `window`, its own included (0: all), and the first `sinks`."""

    window: int
    sinks: int

    def slots(self, rows: Tensor) -> Tensor:
        """Slots [n] that some of the rows at slots [T] sees, ascending."""
        first, last = int(rows.min()), int(rows.max())
        start = max(0, first + 1 - self.window) if self.window else 0
        sinks = torch.arange(min(self.sinks, start), device=rows.device)
        return torch.cat((sinks, torch.arange(start, last + 1, device=rows.device)))

    def sees(self, rows: Tensor, slots: Tensor) -> Tensor:
        """[T, n]: whether the row at a slot sees a slot."""
        rows = rows[:, None]
        near = (slots > rows - self.window) | (slots < self.sinks) if self.window else True
        return (slots <= rows) & near


class Attended(NamedTuple):
    """out: as the queries. slots [n], p [T, h, g, n]: a slot that some rows read packed and some in full is there twice."""

    out: Tensor
    slots: Tensor
    p: Tensor


class SequenceRows(NamedTuple):
    """One sequence in a pass. rows: of the pass; slots: theirs, [T]; view: its tables; far_position: see `attend`."""

    cache: TorchCache
    rows: slice
    slots: Tensor
    view: CacheView
    observations: tuple[Observation, ...]

    @property
    def far_position(self) -> int:
        """The most that a row's position is to the sinks; 0 where there are none."""
        layout = self.cache.layouts[self.view.layout]
        return layout.sinks + layout.window - 1 if layout.sinks else 0

    def attend(self, layer: int, q: Tensor, far_q: Tensor | None, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        """Append k, v [T, H_kv, D], pack what is due, and attend with q [T, H, D], already scaled: [T, H, D].

        far_q: q as sinks are looked at (see `CacheLayout.sinks`); None where there are none.
        """
        layout = self.cache.layouts[self.view.layout]
        mask = Mask(layout.window, layout.sinks) if window is None else Mask(window, 0)
        if layout.rotate:
            q, k, far_q = hadamard(q), hadamard(k), None if far_q is None else hadamard(far_q)
        shape = len(k), k.shape[1], -1, k.shape[2]  # [T, H_kv, query heads a KV head, D]
        q, far_q = q.reshape(shape), None if far_q is None else far_q.reshape(shape)
        out = torch.empty_like(q)
        for heads in self.cache.layer(self.view, layer):
            slots, of = self.slots - heads.shift, heads.heads
            heads.append(slots, k[:, of], v[:, of])
            if mask.window == 0 or mask.window > RECENT:  # rows that see no more read nothing packed
                heads.pack(int(slots[0]), int(slots[-1]))
            found = _attend(heads, slots, q[:, of], None if far_q is None else far_q[:, of], mask)
            out[:, of] = found.out
            self._observe(layer, heads, found)
        return out.flatten(1, 2)

    def _observe(self, layer: int, heads: Heads, found: Attended) -> None:
        for observation in self.observations:
            if observation.sums is None:
                continue
            observed = (self.slots >= observation.first) & (self.slots < observation.end)
            counts = torch.round(found.p[observed] * SUM_UNIT).long().sum((0, 2))  # [h, n]
            sums = counts.new_zeros(len(counts), heads.length).index_add_(1, found.slots, counts)
            observation.sums[layer, heads.heads, : heads.length] += sums.cpu().numpy()

    def observe_queries(self, layer: int, q: Tensor) -> None:
        """q [T, H * D] as it is before rotary embedding."""
        for observation in self.observations:
            if observation.queries is not None:
                observed = (self.slots >= observation.first) & (self.slots < observation.end)
                at = (self.slots[observed] - observation.first).cpu().numpy()
                observation.queries[layer, at] = q[observed].cpu().numpy()


def _attend(heads: Heads, rows: Tensor, q: Tensor, far_q: Tensor | None, mask: Mask) -> Attended:
    """Causal softmax over what rows at slots [T] see: of each slot the packed or the full form, as the row's slot says.

    q, far_q: [T, h, query heads a KV head, D].
    """
    slots = mask.slots(rows)
    sees, packed = mask.sees(rows, slots), heads.is_packed(slots, rows[:, None])
    forms = []
    for form in (False, True):
        seen = sees & (packed == form)
        used = seen.any(0)
        k, v = heads.read(slots[used], packed=form)
        forms.append((slots[used], seen[:, used], k, v))
    columns, seen, keys, values = (
        torch.cat(parts, dim) for parts, dim in zip(zip(*forms, strict=True), (0, 1, 0, 0), strict=True)
    )
    scores = torch.einsum("thgd,nhd->thgn", q, keys)
    if far_q is not None:
        scores = torch.where(columns < mask.sinks, torch.einsum("thgd,nhd->thgn", far_q, keys), scores)
    p = scores.masked_fill(~seen[:, None, None], -torch.inf).softmax(-1)
    return Attended(torch.einsum("thgn,nhd->thgd", p, values), columns, p)


def sequences_of(work: Pass, cache: TorchCache) -> list[SequenceRows]:
    """The pass taken apart: a sequence's rows, tables and observations together."""
    found, table = [], 0
    for s, layout in enumerate(work.layouts.tolist()):
        rows = slice(*work.spans[s : s + 2].tolist())
        end = table + cache.layouts[layout].num_tables
        spans, shifts = work.block_spans[table : end + 1], work.shifts[table:end]
        view = CacheView(layout, work.blocks, spans, shifts, int(work.slots[rows.stop - 1]) + 1)
        slots = torch.tensor(work.slots[rows].tolist(), dtype=torch.int64, device=cache.memory.device)
        found.append(SequenceRows(cache, rows, slots, view, tuple(o for o in work.observations if o.sequence == s)))
        table = end
    return found
