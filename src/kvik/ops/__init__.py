"""The op vocabulary: the dozen words in which a model file says what is computed in which order.

Two executors speak it. `torch_ops.TorchOps` runs each op at once on tensors and is its definition;
`native_recording.NativeOps` records the ops once, for a program that native code replays for every pass.

Shapes: T tokens of the pass, H query heads, H_kv key/value heads, D head size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from kvik import _native
from kvik.ops.pages import CacheLayout

__all__ = [
    "Activation", "CacheView", "Config", "Executor", "Experts", "Observation", "Ops", "Pass", "Reduced", "RopeTable",
    "Rounding", "Sizes", "StepTimes", "fine_input",
]  # fmt: skip

Activation = Literal["silu", "gelu_tanh"]
Value = TypeVar("Value")


_NO_COPIES = np.empty((0, 3), np.int32)
_NO_ROWS = np.empty(0, np.int32)


class Observation(NamedTuple):
    """What attention leaves of some rows of a sequence for the eviction policy, in memory that is the sequence's.

    sequence: index in the pass. Rows at slots [first, end) of it are observed; those that the pass does not have are not.
    sums: [L, H_kv, at least the slots of the table] int64, to which is added by slot in the table, over these rows and the
    query heads of the KV head, round(2**24 * probability): integers, so that neither chunks nor threads change the sum.
    queries: [L, end - first, H * D] float32, each row as it is before rotary embedding (after its norm).
    """

    sequence: int
    first: int
    end: int
    sums: NDArray[np.int64] | None = None
    queries: NDArray[np.float32] | None = None


class Pass(NamedTuple):
    """One forward pass of one model: plain data, whatever mixture of prompts and single tokens it holds.

    Rows of one sequence are consecutive, in order of slot. A token's *position* drives rotary embedding; its *slot*, the
    number of tokens before it, drives attention and memory: in a table of which some slots were evicted it lies
    at slot - shift, and sees the slots of the table up to there (within the window).

    A sequence has the tables of its layout (`CacheLayout.num_tables`), one after another; -1 stands where no row of the pass
    looks any more. `copies` are made in order, before anything is computed.
    """

    tokens: NDArray[np.int32]  # [T]
    positions: NDArray[np.int32]  # [T]
    slots: NDArray[np.int32]  # [T]
    spans: NDArray[np.int32]  # [S + 1] rows of sequence s: spans[s] to spans[s + 1]
    layouts: NDArray[np.int32]  # [S] of each sequence, as `Executor.register` numbers them
    blocks: NDArray[np.int32]  # addresses of blocks, in steps of 64 bytes: sequence by sequence, table by table
    block_spans: NDArray[np.int32]  # [N + 1] of the N tables of all sequences: blocks of table i
    shifts: NDArray[np.int32]  # [N] slots that were evicted from the table
    logit_rows: NDArray[np.int32]  # [R] rows that need logits, ascending
    copies: NDArray[np.int32] = _NO_COPIES  # [C, 3] address to copy from, address to copy to, steps of 64 bytes
    reduce_rows: NDArray[np.int32] = _NO_ROWS  # [R'] rows whose logits are only reduced, ascending
    targets: NDArray[np.int32] = _NO_ROWS  # [R'] the token of each whose logit is wanted
    top: int = 0  # of how many best tokens of each of these rows
    memory: NDArray[np.float32] | None = None  # [at least R, V] where the logits may be left; else they lie elsewhere
    observations: tuple[Observation, ...] = ()


class CacheView(NamedTuple):
    """One sequence's cache outside a pass. blocks, block_spans, shifts as in `Pass`, of its tables only."""

    layout: int
    blocks: NDArray[np.int32]
    block_spans: NDArray[np.int32]  # [tables + 1]
    shifts: NDArray[np.int32]  # [tables]
    num_tokens: int  # slots in use, evicted ones counted: table i has num_tokens - shifts[i]


class Reduced(NamedTuple):
    """What is left of R' rows of logits that were reduced: [R', V] of them never exist.

    logsumexp: the logarithm of the sum of e^logit over the vocabulary; NaN where a logit is NaN or +infinity, or all are
    -infinity. target_logits: of `Pass.targets`. top_ids, top_logits: the best tokens, falling, ties to the lower id.
    """

    logsumexp: NDArray[np.float64]  # [R']
    target_logits: NDArray[np.float32]  # [R']
    top_ids: NDArray[np.int32]  # [R', top]
    top_logits: NDArray[np.float32]  # [R', top]

    def rows(self, begin: int, count: int, top: int) -> Reduced:
        """Those of some of the rows, with no more than so many best tokens."""
        part = slice(begin, begin + count)
        return Reduced(
            self.logsumexp[part], self.target_logits[part], self.top_ids[part, :top], self.top_logits[part, :top]
        )

    def put(self, begin: int, others: Reduced) -> None:
        """Copy the figures of others over those of the rows from `begin` on."""
        part = slice(begin, begin + len(others.logsumexp))
        self.logsumexp[part], self.target_logits[part] = others.logsumexp, others.target_logits
        self.top_ids[part], self.top_logits[part] = others.top_ids, others.top_logits


class StepTimes(NamedTuple):
    """Seconds of the last pass by kind of work, as the executor measured them."""

    matrices: float
    attention: float
    rest: float


@dataclass(frozen=True)
class RopeTable:
    """Rotary frequencies after scaling.

    inv_freq: [D / 2] float64; dimensions i and i + D / 2 rotate by position * inv_freq[i].
    factor: multiplies cosine and sine (YaRN's attention factor; 1 otherwise).
    """

    inv_freq: NDArray[np.float64]
    factor: float = 1.0


@dataclass(frozen=True)
class Experts:
    """A layer's expert feed-forward networks, E of them, each matrix stacked by rows.

    gate, up: names of weights [E * F, width]; rows e * F to (e + 1) * F are expert e's.
    down: name of the weight [E * width, F].
    count: E, the experts; used: how many each row goes through.
    normalize: the used experts' probabilities are divided by their sum.
    activation: on the gate.
    """

    gate: str
    up: str
    down: str
    count: int
    used: int
    normalize: bool
    activation: Activation


class Rounding(NamedTuple):
    """How a linear rounds its input: to groups of int8 or to bf16, in one term (about 7 or 8 bits) or finely in two."""

    kind: Literal["int8", "bf16"]
    fine: bool


def fine_input(weight: str) -> bool:
    """Whether the input of the linear with this weight is rounded in two terms, where its layout rounds at all.

    The logits and what the cache keeps (keys, values) carry 53 % of the divergence that one int8 term causes in the
    default model, at 11 % of a layer's products (docs/performance.md).
    """
    return weight in ("embed", "head") or weight.endswith((".k", ".v"))


class Ops(Protocol[Value]):
    """What a model file may say. Weights are named as in the model's tensor list."""

    def embed(self, weight: str, scale: float = 1.0) -> Value:
        """Rows of the embedding table [V, width] for the pass's tokens, times scale: [T, width]."""
        ...

    def embed_positions(self, weight: str) -> Value:
        """Rows of the learned table [context, width] for the pass's positions: [T, width]."""
        ...

    def rms_norm(self, x: Value, weight: str, eps: float, heads: int = 1) -> Value:
        """x / sqrt(mean(x^2) + eps) * weight, over each of `heads` equal parts of the last axis (Zhang & Sennrich 2019).

        weight [width / heads] serves every head.
        """
        ...

    def layer_norm(self, x: Value, weight: str, bias: str, eps: float) -> Value:
        """(x - mean(x)) / sqrt(var(x) + eps) * weight + bias, over the last axis (Ba et al. 2016)."""
        ...

    def linear(self, x: Value, weight: str, bias: str | None = None) -> Value:
        """x @ weight.T (+ bias) for weight [N, K]: [T, K] to [T, N]."""
        ...

    def rope(self, x: Value, heads: int, table: RopeTable) -> Value:
        """Rotate each of the heads of x [T, heads * D] by its row's position, halves paired (Su et al. 2021)."""
        ...

    def attend(self, q: Value, k: Value, v: Value, layer: int, window: int | None, scale: float | None = None) -> Value:
        """Append k, v [T, H_kv * D] to the layer's cache, then causal softmax(scale * q k) v: [T, H * D].

        With a window of w, a row sees the last w slots, its own included. scale: 1 / sqrt(D) where it is None.
        """
        ...

    def activate(self, x: Value, activation: Activation) -> Value:
        """activation(x), element by element."""
        ...

    def gate(self, gate: Value, up: Value, activation: Activation) -> Value:
        """activation(gate) * up (Shazeer 2020)."""
        ...

    def experts(self, x: Value, scores: Value, experts: Experts) -> Value:
        """Each row through the `used` experts of its best scores (Shazeer et al. 2017; Jiang et al. 2024).

        x [T, width]; scores [T, E]: p = softmax(scores) over all E, the best kept, ties to the lower expert. The sum of
        p_e * down_e(activation(gate_e(x)) * up_e(x)) in descending order of p: [T, width]. Experts no row uses are not
        computed.
        """
        ...

    def add(self, a: Value, b: Value) -> Value:
        """a + b."""
        ...

    def logits(self, x: Value, weight: str) -> None:
        """The pass's logits: x @ weight.T for the rows that need them: [R, V], and of `reduce_rows` what is left of them."""
        ...


class Sizes(Protocol):
    """What executors and cache must know of a model's configuration."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def num_layers(self) -> int: ...
    @property
    def num_heads(self) -> int: ...
    @property
    def num_kv_heads(self) -> int: ...
    @property
    def head_size(self) -> int: ...


Config = TypeVar("Config", bound=Sizes)


class Executor(Protocol):
    """A model with its weights and cache storage, ready to compute passes."""

    @property
    def isa(self) -> str | None:
        """The instruction set in use, where the executor chooses one."""
        ...

    @property
    def pool(self) -> _native.Pool | None:
        """Threads that stand idle between passes, for what follows one on the processor."""
        ...

    def register(self, layout: CacheLayout) -> int:
        """The number by which passes name the layout; the same for an equal one. ValueError where it has no kernels for it."""
        ...

    def evict(self, source: CacheView, target: CacheView, kept: NDArray[np.int32], counts: NDArray[np.int32]) -> None:
        """Copy the kept slots of each layer and KV head of the source to slots 0, 1, … of the target, whose blocks are others.

        kept: [L, H_kv, most] slots of the source's table, ascending; counts: [L, H_kv] how many of them, as many as the
        target's table has, or -1 where source and target have the same blocks and nothing is done. Numbers of equal format
        are copied (values packed, too), others rounded again; whole groups up to
        packed_end of the last slot are packed.
        """
        ...

    def read(self, view: CacheView, layer: int, head: int, what: Literal["keys", "values"]) -> NDArray[np.float32]:
        """Of one layer and KV head what a next row would read, [slots in the table, D]; keys with rotary embedding, without
        the layout's `rotate`.
        """
        ...

    def save(self, blocks: NDArray[np.int32], steps: int) -> NDArray[np.uint8]:
        """Bytes [N, steps * 64] of blocks by address, a copy."""
        ...

    def restore(self, blocks: NDArray[np.int32], data: NDArray[np.uint8]) -> None:
        """Put saved bytes into other blocks of the same size."""
        ...

    def run(self, work: Pass) -> NDArray[np.float32]:
        """Compute the pass, append its keys and values, return logits [R, V] (valid until the next call)."""
        ...

    def reduced(self) -> Reduced:
        """What is left of the last pass's `reduce_rows` (valid until the next `run`)."""
        ...

    def times(self) -> StepTimes:
        """Where the last pass's time went."""
        ...
