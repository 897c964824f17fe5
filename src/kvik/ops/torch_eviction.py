"""What happens to a cache between passes, on PyTorch tensors: reading it, and moving what a policy keeps."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvik.errors import ParameterError
from kvik.ops import CacheView
from kvik.ops.torch_cache import Heads, TorchCache, in_groups
from kvik.ops.torch_pages import Coded, code_keys, code_values, hadamard

__all__ = ["evict", "read"]


def read(
    cache: TorchCache, view: CacheView, layer: int, head: int, what: Literal["keys", "values"]
) -> NDArray[np.float32]:
    """See `Executor.read`: as the last row sees them; 0 where blocks are gone."""
    heads = cache.heads(view, layer, [head])
    slots = torch.arange(heads.length, device=cache.memory.device)
    out = torch.zeros(heads.length, cache.config.head_size, device=cache.memory.device)
    packed = _packed(heads, slots)
    for form in (False, True):
        at = slots[packed == form]
        at = at[heads.there(at, packed=form)]
        k, v = heads.read(at, packed=form)
        out[at] = (k if what == "keys" else v)[:, 0]
    if what == "keys" and heads.layout.rotate:
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
        old, new = (cache.heads(view, layer, [head]) for view in (source, target))
        slots = torch.tensor(
            kept[layer, head, : counts[layer, head]].tolist(), dtype=torch.int64, device=cache.memory.device
        )
        if len(slots) != new.length or not len(slots):
            raise ParameterError(f"evict: {len(slots)} kept slots of layer {layer}, head {head}, for {new.length}")
        if int(slots[0]) < 0 or int(slots[-1]) >= old.length or bool((slots.diff() < 1).any()):
            raise ParameterError(f"evict: kept slots must rise within [0, {old.length}), got {slots.tolist()}")
        _move(old, new, slots)


def _move(old: Heads, new: Heads, kept: Tensor) -> None:
    """Slots of one table and KV head to slots 0, 1, … of another."""
    slots, from_packed = torch.arange(len(kept), device=kept.device), _packed(old, kept)
    k, v = (torch.empty(len(kept), 1, old.cache.config.head_size, device=kept.device) for _ in range(2))
    for form in (False, True):
        k[from_packed == form], v[from_packed == form] = old.read(kept[from_packed == form], packed=form)
    full = ~_packed(new, slots)
    new.append(slots[full], k[full], v[full])
    groups, page = new.groups(0, len(kept) - 1), new.layout.packed
    if page is None or not len(groups):
        return
    part = slice(int(groups[0]) * page.tokens, (int(groups[-1]) + 1) * page.tokens)
    keys, values = (in_groups(x[part], page.tokens) for x in (k, v))
    coded = code_values(values, page.v)
    if old.layout.packed is not None and old.layout.packed.v == page.v:  # integers stay what they are
        stay = from_packed[part]
        coded = _with(coded, stay, old.coded(kept[part][stay], packed=True)[1])
    new.store_groups(groups, code_keys(keys, page.k), coded)


def _packed(heads: Heads, slots: Tensor) -> Tensor:
    """Whether the last row reads each slot packed."""
    return heads.is_packed(slots, torch.tensor(heads.length - 1, device=slots.device))


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
