"""The native executor: records a model's ops once into a program that native code replays for every pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from kvik import _native
from kvik.ops import Config, Ops, Pass, Reduced, StepTimes
from kvik.ops.native_lowering import lower
from kvik.ops.native_recording import NativeOps, Node, Weight
from kvik.ops.reduction import empty_reduced

__all__ = ["NativeExecutor"]

_NOTHING = empty_reduced(0, 0)


class NativeExecutor:
    """A model as a native program with its cache storage. Implements `kvik.ops.Executor`.

    Args:
        config: the model's sizes.
        forward: its definition, `kvik.models.llama.forward` for the Llama family.
        weights: packed tensors by the definition's names.
        kv: the cache's storage, uint8 [num_blocks * bytes of a block of the first group] (see `kvik.cache.layout`).
        kv_format: "f16" or "f32".
        groups: of each layer, the group whose block tables it reads; None: all the first.
        max_rows: most rows of a pass.
        isa: instruction set; "auto" takes KVIK_ISA, else the best one.
    """

    def __init__(
        self,
        config: Config,
        forward: Callable[[Ops[Node], Config], None],
        weights: Mapping[str, Weight],
        *,
        pool: _native.Pool,
        kv: NDArray[np.uint8],
        kv_format: str,
        num_blocks: int,
        max_rows: int,
        groups: Sequence[int] | None = None,
        isa: str = "auto",
    ) -> None:
        recorder = NativeOps(weights)
        forward(recorder, config)
        self._program = _native.Program(
            pool, isa, max_rows, list(groups or [0] * config.num_layers), config.num_heads, config.num_kv_heads, config.head_size,
            ("f32", "f16").index(kv_format), kv, num_blocks,
        )  # fmt: skip
        self.pool: _native.Pool | None = pool
        lower(self._program, config, weights, recorder.nodes)
        self._vocab_size = config.vocab_size
        self._logits = np.empty((1, self._program.logits_width), np.float32)
        self._reduced = _NOTHING

    @property
    def isa(self) -> str:
        """The instruction set in use."""
        return self._program.isa

    @property
    def phases(self) -> int:
        """How often the threads met in the last pass."""
        return self._program.phases

    def run(self, work: Pass) -> NDArray[np.float32]:
        rows = len(work.logit_rows)
        logits = self._room(rows, work.memory)
        self._reduced = empty_reduced(len(work.reduce_rows), work.top) if len(work.reduce_rows) else _NOTHING
        self._program.run(
            work.tokens, work.positions, work.slots, work.spans, work.blocks, work.block_spans, work.logit_rows,
            work.copies, work.reduce_rows, work.targets, logits, *self._reduced,
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
