"""What happens to a cache between passes, on PyTorch tensors: reading it, and moving what a policy keeps."""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvik.errors import ParameterError
from kvik.ops import CacheView
from kvik.ops.torch_cache import Heads, Table, TorchCache
from kvik.ops.torch_pages import Coded, code_keys, code_values, hadamard

__all__ = ["evict", "read"]


def read(
    cache: TorchCache, view: CacheView, layer: int, head: int, what: Literal["keys", "values"]
) -> NDArray[np.float32]:
    """See `Executor.read`: as the last row sees them; 0 where blocks are gone."""
    held = Held.of(cache, view, layer, head)
    slots = torch.arange(held.table.length, device=cache.memory.device)
    out = torch.zeros(len(slots), cache.config.head_size, device=cache.memory.device)
    for form in (False, True):
        at = slots[held.packed(slots) == form]
        if len(at):
            at = at[held.table.there(at, packed=form)]
            k, v = held.heads.read(held.table.find(at, packed=form))
            out[at] = (k if what == "keys" else v)[:, 0]
    if what == "keys" and held.table.layout.rotate:
        out = hadamard(out)
    found: NDArray[np.float32] = out.cpu().numpy()
    return found


def evict(
    cache: TorchCache, source: CacheView, target: CacheView, kept: NDArray[np.int32], counts: NDArray[np.int32]
) -> None:
    """See `Executor.evict`. ParameterError where kept slots do not fit the source, or their number the target."""
    if cache.layouts[source.layout].rotate != cache.layouts[target.layout].rotate:
        raise ParameterError("evict: source and target rotate alike, or neither does")
    for layer, head in np.argwhere(counts >= 0).tolist():
        old, new = (Held.of(cache, view, layer, head) for view in (source, target))
        slots = torch.tensor(
            kept[layer, head, : counts[layer, head]].tolist(), dtype=torch.int64, device=cache.memory.device
        )
        if len(slots) != new.table.length or not len(slots):
            raise ParameterError(
                f"evict: {len(slots)} kept slots of layer {layer}, head {head}, for {new.table.length}"
            )
        if int(slots[0]) < 0 or int(slots[-1]) >= old.table.length or bool((slots.diff() < 1).any()):
            raise ParameterError(f"evict: kept slots must rise within [0, {old.table.length}), got {slots.tolist()}")
        _move(old, new, slots)


class Held(NamedTuple):
    """One KV head of one layer of a sequence."""

    heads: Heads
    table: Table

    @staticmethod
    def of(cache: TorchCache, view: CacheView, layer: int, head: int) -> Held:
        heads = cache.head(view.layout, layer, head)
        return Held(heads, cache.tables(view)[heads.group])

    def packed(self, slots: Tensor) -> Tensor:
        """Whether the last row reads each slot packed."""
        return self.table.is_packed(slots, torch.tensor(self.table.length - 1, device=slots.device))


def _move(old: Held, new: Held, kept: Tensor) -> None:
    """Slots of one table and KV head to slots 0, 1, … of another."""
    k, v = (torch.empty(len(kept), 1, old.heads.cache.config.head_size, device=kept.device) for _ in range(2))
    was_packed = old.packed(kept)
    for form in (False, True):
        at = was_packed == form
        if bool(at.any()):
            k[at], v[at] = old.heads.read(old.table.find(kept[at], packed=form))
    slots = torch.arange(len(kept), device=kept.device)
    full = slots[~new.packed(slots)]
    new.heads.append(new.table.find(full, packed=False), k[full], v[full])
    page, groups = new.table.layout.packed, new.table.groups(0, len(kept) - 1)
    if page is None or not len(groups):
        return
    part = slice(int(groups[0]) * page.tokens, (int(groups[-1]) + 1) * page.tokens)
    # [groups * tokens, 1, D] to [groups, 1, tokens, D]
    keys, values = (x[part].reshape(len(groups), 1, page.tokens, -1) for x in (k, v))
    coded, stay = code_values(values, page.v), was_packed[part]
    if old.table.layout.packed is not None and old.table.layout.packed.v == page.v and bool(stay.any()):
        # integers stay what they are
        coded = _with(coded, stay, old.heads.coded(old.table.find(kept[part][stay], packed=True))[1])
    new.heads.store(new.table.find(groups * page.tokens, packed=True), code_keys(keys, page.k), coded)


def _with(values: Coded, where: Tensor, others: Coded) -> Coded:
    """Values [groups, 1, tokens, D] with those of the tokens `where` [groups * tokens] replaced by others [n, 1, D]."""

    def replaced(x: Tensor, other: Tensor | None) -> Tensor:
        assert other is not None  # the formats are equal
        x = x.clone(memory_format=torch.contiguous_format)
        x.view(len(where), -1)[where] = other[:, 0, : x.shape[-1]]
        return x

    meaning = zip(values[1:], others[1:], strict=True)
    return Coded(
        replaced(values.numbers, others.numbers), *(None if x is None else replaced(x, other) for x, other in meaning)
    )
