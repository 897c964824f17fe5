"""Attention of one sequence's rows over its cached tokens, on PyTorch tensors."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from kvik.ops import CacheView, Observation, Pass
from kvik.ops.pages import RECENT, CacheLayout
from kvik.ops.torch_cache import Heads, Places, Table, TorchCache
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
        first, last = int(rows[0]), int(rows[-1])
        start = max(0, first + 1 - self.window) if self.window else 0
        sinks = torch.arange(min(self.sinks, start), device=rows.device)
        return torch.cat((sinks, torch.arange(start, last + 1, device=rows.device)))

    def sees(self, rows: Tensor, slots: Tensor) -> Tensor:
        """[T, n]: whether the row at a slot sees a slot."""
        rows = rows[:, None]
        near = (slots > rows - self.window) | (slots < self.sinks) if self.window else True
        return (slots <= rows) & near


class Columns(NamedTuple):
    """What some row sees: slots [n], each with the row that sees it [T, n]. A slot that some rows read packed and some in full
    is there twice. places: of the full ones, then of the packed ones, where there are any.
    """

    slots: Tensor
    seen: Tensor
    places: list[Places]


class Plan(NamedTuple):
    """Of rows on one group's table: their own places, groups to pack, and what they look at then."""

    own: Places
    groups: Tensor
    columns: Columns


@dataclass
class SequenceRows:
    """One sequence in a pass. rows: of the pass; slots: theirs, [T]; number: of the layout."""

    cache: TorchCache
    number: int
    rows: slice
    slots: Tensor
    tables: list[Table]
    observations: list[Observation]
    _plans: dict[tuple[int, Mask], Plan] = field(default_factory=dict)

    @property
    def layout(self) -> CacheLayout:
        return self.cache.layouts[self.number]

    def attend(self, layer: int, q: Tensor, far_q: Tensor | None, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        """Append k, v [T, H_kv, D], pack what is due, and attend with q [T, H, D], already scaled: [T, H, D].

        far_q: q as sinks are looked at (see `CacheLayout.sinks`); None where there are none.
        """
        mask = Mask(self.layout.window, self.layout.sinks) if window is None else Mask(window, 0)
        if self.layout.rotate:
            q, k, far_q = hadamard(q), hadamard(k), None if far_q is None else hadamard(far_q)
        shape = len(k), k.shape[1], -1, k.shape[2]  # [T, H_kv, query heads a KV head, D]
        q, far_q = q.reshape(shape), None if far_q is None else far_q.reshape(shape)
        out = torch.empty_like(q)
        for heads in self.cache.layer(self.number, layer):
            of, plan = heads.heads, self._plan(heads.group, mask)
            heads.append(plan.own, k[:, of], v[:, of])
            heads.pack(self.tables[heads.group], plan.groups)
            p, out[:, of] = _attend(heads, plan.columns, q[:, of], None if far_q is None else far_q[:, of], mask.sinks)
            self._observe(layer, heads, plan.columns, p)
        return out.flatten(1, 2)

    def _plan(self, group: int, mask: Mask) -> Plan:
        """The same for all layers whose heads lie in the group and see as much."""
        if (group, mask) not in self._plans:
            table = self.tables[group]
            slots = self.slots - table.shift
            groups = table.groups(int(slots[0]), int(slots[-1]))
            if 0 < mask.window <= RECENT:  # who sees no more reads nothing packed
                groups = groups[:0]
            self._plans[group, mask] = Plan(table.find(slots, packed=False), groups, _columns(table, slots, mask))
        return self._plans[group, mask]

    def _observe(self, layer: int, heads: Heads, columns: Columns, p: Tensor) -> None:
        """p: [T, h, query heads a KV head, n]."""
        for observation in self.observations:
            if observation.sums is not None:
                counts = torch.round(p[self._observed(observation)] * SUM_UNIT).long().sum((0, 2))  # [h, n]
                length = self.tables[heads.group].length
                sums = counts.new_zeros(len(counts), length).index_add_(1, columns.slots, counts)
                observation.sums[layer, heads.heads, :length] += sums.cpu().numpy()

    def observe_queries(self, layer: int, q: Tensor) -> None:
        """q [T, H * D] as it is before rotary embedding."""
        for observation in self.observations:
            if observation.queries is not None:
                observed = self._observed(observation)
                at = (self.slots[observed] - observation.first).cpu().numpy()
                observation.queries[layer, at] = q[observed].cpu().numpy()

    def _observed(self, observation: Observation) -> Tensor:
        return (self.slots >= observation.first) & (self.slots < observation.end)


def _columns(table: Table, rows: Tensor, mask: Mask) -> Columns:
    """What rows at slots [T] of the table look at: of each slot the packed or the full form, as the row's slot says."""
    slots = mask.slots(rows)
    sees, packed = mask.sees(rows, slots), table.is_packed(slots, rows[:, None])
    columns, seen, places = [], [], []
    for form in (False, True):
        looks = sees & (packed == form)
        used = looks.any(0)
        if bool(used.any()):
            columns.append(slots[used])
            seen.append(looks[:, used])
            places.append(table.find(slots[used], packed=form))
    return Columns(torch.cat(columns), torch.cat(seen, 1), places)


def _attend(heads: Heads, columns: Columns, q: Tensor, far_q: Tensor | None, sinks: int) -> tuple[Tensor, Tensor]:
    """Softmax over the columns that each row sees. q, far_q: [T, h, query heads a KV head, D].

    Probabilities [T, h, query heads a KV head, n] and the sum they give, as q.
    """
    keys, values = (torch.cat(x) for x in zip(*map(heads.read, columns.places), strict=True))  # [n, h, D]
    scores = torch.einsum("thgd,nhd->thgn", q, keys)
    if far_q is not None:
        scores = torch.where(columns.slots < sinks, torch.einsum("thgd,nhd->thgn", far_q, keys), scores)
    p = scores.masked_fill(~columns.seen[:, None, None], -torch.inf).softmax(-1)
    return p, torch.einsum("thgn,nhd->thgd", p, values)


def sequences_of(work: Pass, cache: TorchCache) -> list[SequenceRows]:
    """The pass taken apart: a sequence's rows, tables and observations together."""
    found, table = [], 0
    for s, number in enumerate(work.layouts.tolist()):
        rows = slice(*work.spans[s : s + 2].tolist())
        end = table + cache.layouts[number].num_tables
        spans, shifts = work.block_spans[table : end + 1], work.shifts[table:end]
        tables = cache.tables(CacheView(number, work.blocks, spans, shifts, int(work.slots[rows.stop - 1]) + 1))
        slots = torch.tensor(work.slots[rows].tolist(), dtype=torch.int64, device=cache.memory.device)
        observations = [observation for observation in work.observations if observation.sequence == s]
        found.append(SequenceRows(cache, number, rows, slots, tables, observations))
        table = end
    return found
