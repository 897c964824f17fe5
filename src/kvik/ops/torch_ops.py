"""The definition of every op, on PyTorch tensors: plain float32, one op at a time.

The oracle of the native executor, and the path that runs on a GPU. Needs the extra `torch`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from time import perf_counter
from typing import Generic, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvik.errors import ParameterError
from kvik.ops import Activation, CacheView, Config, Experts, Ops, Pass, Reduced, RopeTable, Rounding, StepTimes
from kvik.ops.pages import CacheLayout
from kvik.ops.reduction import empty_reduced
from kvik.ops.torch_attention import SequenceRows, sequences_of
from kvik.ops.torch_cache import TorchCache
from kvik.ops.torch_checks import check_pass, within
from kvik.ops.torch_eviction import evict, read
from kvik.ops.torch_rounding import round_input

__all__ = ["TorchExecutor", "TorchOps"]

Work = Literal["matrices", "attention", "rest"]

REDUCE_ROWS = 64
"""Rows whose logits exist at once where they are only reduced."""


class Rotated(NamedTuple):
    """What rotary embedding returned, of what [T, heads * D], by which table."""

    value: Tensor
    x: Tensor
    table: RopeTable


class TorchOps:
    """Runs the ops of one pass at once. See `kvik.ops.Ops` for what each means."""

    def __init__(
        self, work: Pass, weights: Mapping[str, Tensor], rounding: Mapping[str, Rounding], cache: TorchCache
    ) -> None:
        self._weights, self._rounding, self._cache = weights, rounding, cache
        self._device = cache.memory.device
        self._work = work
        self._tokens, self._positions, self._slots = (self._index(x) for x in work[:3])
        self._sequences = sequences_of(work, cache)
        self._rotated: list[Rotated] = []
        self._logit_rows = self._index(work.logit_rows)
        self._reduce_rows, self._targets = self._index(work.reduce_rows), self._index(work.targets)
        self.result: Tensor | None = None
        self.reduced = empty_reduced(len(work.reduce_rows), work.top)
        self.seconds: dict[Work, float] = {"matrices": 0.0, "attention": 0.0, "rest": 0.0}

    def embed(self, weight: str, scale: float = 1.0) -> Tensor:
        with self._timed("rest"):
            return self._weights[weight][self._tokens] * scale

    def embed_positions(self, weight: str) -> Tensor:
        table = self._weights[weight]
        within("positions", self._work.positions, len(table))
        with self._timed("rest"):
            return table[self._positions]

    def rms_norm(self, x: Tensor, weight: str, eps: float, heads: int = 1) -> Tensor:
        with self._timed("rest"):
            x = x.reshape(len(x), heads, -1)
            return (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * self._weights[weight]).flatten(1)

    def layer_norm(self, x: Tensor, weight: str, bias: str, eps: float) -> Tensor:
        with self._timed("rest"):
            x = x - x.mean(-1, keepdim=True)
            x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
            return x * self._weights[weight] + self._weights[bias]

    def linear(self, x: Tensor, weight: str, bias: str | None = None) -> Tensor:
        with self._timed("matrices"):
            product = self._product(x, weight)
            return product if bias is None else product + self._weights[bias]

    def rope(self, x: Tensor, heads: int, table: RopeTable) -> Tensor:
        with self._timed("rest"):
            value = _rotate(x, heads, table, self._positions)
            self._rotated.append(Rotated(value, x, table))
            return value

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, layer: int, window: int | None, scale: float | None = None
    ) -> Tensor:
        with self._timed("attention"):
            size = self._cache.config.head_size
            scale = size**-0.5 if scale is None else scale
            rotated = next((r for r in self._rotated if r.value is q), None)
            self._rotated.clear()
            out = torch.empty_like(q)
            for sequence in self._sequences:
                rows = sequence.rows
                sequence.observe_queries(layer, (q if rotated is None else rotated.x)[rows])
                far = None
                if window is None and sequence.far_position:
                    far = self._far(rotated, sequence).reshape(len(sequence.slots), -1, size) * scale
                near, keys, values = (x[rows].reshape(len(sequence.slots), -1, size) for x in (q, k, v))
                out[rows] = sequence.attend(layer, near * scale, far, keys, values, window).flatten(1)
            return out

    def _far(self, q: Rotated | None, sequence: SequenceRows) -> Tensor:
        """The sequence's queries [T, H * D] as sinks are looked at: rotated by a position within the cache."""
        if q is None:
            raise ParameterError("sinks need queries with rotary embedding; this model has none")
        positions = self._positions[sequence.rows].clamp(max=sequence.far_position)
        return _rotate(q.x[sequence.rows], q.x.shape[1] // self._cache.config.head_size, q.table, positions)

    def activate(self, x: Tensor, activation: Activation) -> Tensor:
        with self._timed("rest"):
            return _activated(x, activation)

    def gate(self, gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
        with self._timed("rest"):
            return _activated(gate, activation) * up

    def experts(self, x: Tensor, scores: Tensor, experts: Experts) -> Tensor:
        with self._timed("matrices"):
            # A stable sort leaves equal probabilities in the order of their experts.
            p, chosen = scores.softmax(-1).sort(dim=-1, descending=True, stable=True)
            p, chosen = p[:, : experts.used], chosen[:, : experts.used]
            if experts.normalize:
                p = p / p.sum(-1, keepdim=True)
            outputs = x.new_empty(*chosen.shape, x.shape[-1])  # [T, used, width]
            for expert in sorted(set(chosen.flatten().tolist())):
                rows, ranks = torch.nonzero(chosen == expert, as_tuple=True)
                outputs[rows, ranks] = self._expert(x[rows], expert, experts)
            total: Tensor = p[:, :1] * outputs[:, 0]
            for rank in range(1, experts.used):
                total = total + p[:, rank : rank + 1] * outputs[:, rank]
            return total

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        with self._timed("rest"):
            return a + b

    def logits(self, x: Tensor, weight: str) -> None:
        self.result = self.linear(x[self._logit_rows], weight)
        for start in range(0, len(self._reduce_rows), REDUCE_ROWS):
            part = slice(start, start + REDUCE_ROWS)
            self._reduce(self.linear(x[self._reduce_rows[part]], weight), part)

    def _reduce(self, logits: Tensor, part: slice) -> None:
        """Rows of logits to the figures of `part`."""
        with self._timed("rest"):
            found = self.reduced
            wide = logits.double()
            total = wide.logsumexp(-1).masked_fill(~((wide < torch.inf).all(-1)), torch.nan)  # NaN compares false
            found.logsumexp[part] = total.masked_fill(total == -torch.inf, torch.nan).cpu().numpy()
            found.target_logits[part] = logits.gather(-1, self._targets[part, None])[:, 0].cpu().numpy()
            if self._work.top:
                best, ids = logits.sort(dim=-1, descending=True, stable=True)
                found.top_ids[part] = ids[:, : self._work.top].cpu().numpy()
                found.top_logits[part] = best[:, : self._work.top].cpu().numpy()

    def _product(self, x: Tensor, weight: str, part: int = 0, parts: int = 1) -> Tensor:
        """x @ the weight's rows, or those of one of `parts` equal parts; the input as the weight's layout sees it."""
        if (rounding := self._rounding.get(weight)) is not None:
            x = round_input(x, rounding)
        return x @ self._weights[weight].chunk(parts)[part].T

    def _expert(self, x: Tensor, expert: int, experts: Experts) -> Tensor:
        gate, up = (self._product(x, weight, expert, experts.count) for weight in (experts.gate, experts.up))
        return self._product(_activated(gate, experts.activation) * up, experts.down, expert, experts.count)

    def _index(self, values: NDArray[np.int32]) -> Tensor:
        return torch.tensor(values.tolist(), dtype=torch.int64, device=self._device)

    @contextmanager
    def _timed(self, work: Work) -> Iterator[None]:
        start = perf_counter()
        yield
        if self._device.type == "cuda":  # its kernels run behind the call
            torch.cuda.synchronize(self._device)
        self.seconds[work] += perf_counter() - start


def _activated(x: Tensor, activation: Activation) -> Tensor:
    if activation == "silu":
        return torch.nn.functional.silu(x)
    if activation == "gelu_tanh":
        return torch.nn.functional.gelu(x, approximate="tanh")
    raise ParameterError(f"the torch executor has no activation {activation!r}")


def _rotate(x: Tensor, heads: int, table: RopeTable, positions: Tensor) -> Tensor:
    """x [T, heads * D] rotated by positions [T]; see `Ops.rope`."""
    inv_freq = torch.tensor(table.inv_freq, device=x.device)
    angles = positions[:, None].double() * inv_freq  # [T, D / 2]; float64 keeps far positions exact
    cos, sin = ((f(angles) * table.factor).float()[:, None] for f in (torch.cos, torch.sin))
    first, second = x.reshape(len(x), heads, -1).chunk(2, dim=-1)  # [T, heads, D / 2] each
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).flatten(1)


class TorchExecutor(Generic[Config]):
    """A model on PyTorch with paged KV storage. Implements `kvik.ops.Executor`.

    Args:
        config: the model's sizes.
        forward: its definition, `kvik.models.llama.forward` for the Llama family.
        weights: float32 arrays by the definition's names; copied to the device.
        rounding: by weight, how its inputs are rounded before the product; the others are not.
        kv_bytes: the cache's storage.
        device: "cpu" or "cuda".
    """

    def __init__(
        self,
        config: Config,
        forward: Callable[[Ops[Tensor], Config], None],
        weights: Mapping[str, NDArray[np.float32]],
        *,
        rounding: Mapping[str, Rounding] | None = None,
        kv_bytes: int,
        device: str = "cpu",
    ) -> None:
        _check_rounding(weights, rounding or {})
        place = torch.device(device)
        self._config, self._forward = config, forward
        self._weights = {name: torch.tensor(w, dtype=torch.float32, device=place) for name, w in weights.items()}
        self._rounding = dict(rounding or {})
        self.cache = TorchCache(config, kv_bytes, place)
        self._times = StepTimes(0.0, 0.0, 0.0)
        self._reduced = empty_reduced(0, 0)

    @property
    def isa(self) -> None:
        """PyTorch chooses for itself."""
        return None

    @property
    def pool(self) -> None:
        """PyTorch's threads are its own."""
        return None

    def register(self, layout: CacheLayout) -> int:
        """See `Executor.register`. ParameterError names what the layout has that this model's cache cannot have."""
        return self.cache.register(layout)

    def evict(self, source: CacheView, target: CacheView, kept: NDArray[np.int32], counts: NDArray[np.int32]) -> None:
        with torch.inference_mode():
            evict(self.cache, source, target, kept, counts)

    def read(self, view: CacheView, layer: int, head: int, what: Literal["keys", "values"]) -> NDArray[np.float32]:
        with torch.inference_mode():
            return read(self.cache, view, layer, head, what)

    def save(self, blocks: NDArray[np.int32], steps: int) -> NDArray[np.uint8]:
        return self.cache.save(blocks, steps)

    def restore(self, blocks: NDArray[np.int32], data: NDArray[np.uint8]) -> None:
        self.cache.restore(blocks, data)

    def run(self, work: Pass) -> NDArray[np.float32]:
        """Compute the pass. Raises ParameterError for a pass whose tokens, slots, spans or blocks do not fit."""
        check_pass(work, self._config, self.cache.layouts, len(self.cache.memory))
        with torch.inference_mode():
            for copy in work.copies.tolist():
                self.cache.copy(*copy)
            ops = TorchOps(work, self._weights, self._rounding, self.cache)
            self._forward(ops, self._config)
        if ops.result is None:
            raise ParameterError("the model's definition computes no logits")
        self._times, self._reduced = StepTimes(**ops.seconds), ops.reduced
        logits: NDArray[np.float32] = ops.result.cpu().numpy()
        return logits

    def reduced(self) -> Reduced:
        return self._reduced

    def times(self) -> StepTimes:
        return self._times


def _check_rounding(weights: Mapping[str, NDArray[np.float32]], rounding: Mapping[str, Rounding]) -> None:
    for name in rounding:
        if name not in weights:
            raise ParameterError(f"rounding must name weights, got {name!r}")
