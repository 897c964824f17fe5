"""The native executor: records a model's ops once into a program that native code replays for every pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from kvik import _native
from kvik.ops import CacheView, Config, Ops, Pass, Reduced, StepTimes
from kvik.ops.native_lowering import lower
from kvik.ops.native_recording import NativeOps, Node, Weight
from kvik.ops.pages import ADDRESS_BYTES, CacheLayout, PageFormat
from kvik.ops.reduction import empty_reduced
from kvik.params import KV_FORMATS

__all__ = ["NativeExecutor"]

_NOTHING = empty_reduced(0, 0)


class NativeExecutor:
    """A model as a native program with its cache storage. Implements `kvik.ops.Executor`.

    Args:
        config: the model's sizes.
        forward: its definition, `kvik.models.llama.forward` for the Llama family.
        weights: packed tensors by the definition's names.
        kv: the pool of blocks, uint8.
        max_rows: most rows of a pass.
        isa: instruction set; "auto" takes KVIK_ISA, else the best one.

    Every method raises ValueError for what does not fit the model, the pool or the layout.
    """

    def __init__(
        self,
        config: Config,
        forward: Callable[[Ops[Node], Config], None],
        weights: Mapping[str, Weight],
        *,
        pool: _native.Pool,
        kv: NDArray[np.uint8],
        max_rows: int,
        isa: str = "auto",
    ) -> None:
        recorder = NativeOps(weights)
        forward(recorder, config)
        self._program = _native.Program(
            pool, isa, max_rows, config.num_layers, config.num_heads, config.num_kv_heads, config.head_size, kv
        )
        self.pool: _native.Pool | None = pool
        lower(self._program, config, weights, recorder.nodes)
        self._vocab_size = config.vocab_size
        self._logits = np.empty((1, self._program.logits_width), np.float32)
        self._reduced = _NOTHING
        self._layouts: dict[CacheLayout, int] = {}
        self._head_size = config.head_size

    @property
    def isa(self) -> str:
        """The instruction set in use."""
        return self._program.isa

    @property
    def phases(self) -> int:
        """How often the threads met in the last pass."""
        return self._program.phases

    def register(self, layout: CacheLayout) -> int:
        if layout not in self._layouts:
            packed = None if layout.packed is None else _numbers(layout.packed)
            groups = [group for heads in layout.group_of for group in heads]
            self._layouts[layout] = self._program.register(
                _numbers(layout.full), packed, groups, layout.keep, layout.rotate, layout.sinks, layout.window
            )
        return self._layouts[layout]

    def evict(self, source: CacheView, target: CacheView, kept: NDArray[np.int32], counts: NDArray[np.int32]) -> None:
        self._program.evict(source, target, kept, counts)

    def read(self, view: CacheView, layer: int, head: int, what: Literal["keys", "values"]) -> NDArray[np.float32]:
        """See `kvik.ops.Executor`; zeros where no later row looks and the blocks are gone."""
        found = np.empty((self._program.slots(view, layer, head), self._head_size), np.float32)
        self._program.read(view, layer, head, what == "keys", found)
        return found

    def save(self, blocks: NDArray[np.int32], steps: int) -> NDArray[np.uint8]:
        data = np.empty((len(blocks), steps * ADDRESS_BYTES), np.uint8)
        self._program.save(blocks, steps, data)
        return data

    def restore(self, blocks: NDArray[np.int32], data: NDArray[np.uint8]) -> None:
        self._program.restore(blocks, data.shape[1] // ADDRESS_BYTES, data)

    def run(self, work: Pass) -> NDArray[np.float32]:
        rows = len(work.logit_rows)
        logits = self._room(rows, work.memory)
        self._reduced = empty_reduced(len(work.reduce_rows), work.top) if len(work.reduce_rows) else _NOTHING
        self._program.run(
            work.tokens, work.positions, work.slots, work.spans, work.layouts, work.blocks, work.block_spans, work.shifts,
            work.logit_rows, work.copies, work.reduce_rows, work.targets, logits, *self._reduced, work.observations,
        )  # fmt: skip
        return logits[:rows, : self._vocab_size]

    def _room(self, rows: int, offered: NDArray[np.float32] | None) -> NDArray[np.float32]:
        """Where the logits go: what is offered, where rows of the head fit it exactly."""
        if offered is not None and len(offered) >= rows and offered.shape[1] == self._program.logits_width:
            return offered
        if rows > len(self._logits):
            self._logits = np.empty((rows, self._program.logits_width), np.float32)
        return self._logits

    def reduced(self) -> Reduced:
        return self._reduced

    def times(self) -> StepTimes:
        return StepTimes(*self._program.times)


def _numbers(page: PageFormat) -> tuple[int, int, int]:
    """Formats as the native core numbers them, and tokens."""
    return KV_FORMATS.index(page.k), KV_FORMATS.index(page.v), page.tokens
