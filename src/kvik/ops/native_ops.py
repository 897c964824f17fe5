"""The native executor: records a model's ops once into a program that native code replays for every pass.

Recording gives a list of nodes; lowering walks it once and fuses what the kernels do together: a norm or gate into the
rounding of the linear that reads it, linears that share an input into one node, an addition into the linear it follows,
rotation into the append to the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from kvik import _native
from kvik.errors import ParameterError
from kvik.ops import Activation, Config, Ops, Pass, RopeTable, StepTimes, fine_activations

__all__ = ["NativeExecutor", "NativeOps"]

NONE, NORM, GATE = 0, 1, 2


class Weight(Protocol):
    """A packed tensor; see `kvik.weights.packed.PackedTensor`."""

    @property
    def layout(self) -> int: ...
    @property
    def rows(self) -> int: ...
    @property
    def columns(self) -> int: ...
    @property
    def data(self) -> NDArray[np.uint8]: ...


@dataclass(eq=False)
class Node:
    """A recorded op: a value other ops read."""

    op: str
    inputs: tuple[Node, ...] = ()
    weight: str = ""
    width: int = 0
    detail: Any = None
    readers: list[Node] = field(default_factory=list)


class NativeOps:
    """Records. Values are nodes; nothing is computed."""

    def __init__(self, weights: Mapping[str, Weight]) -> None:
        self._weights = weights
        self.nodes: list[Node] = []

    def _node(self, op: str, inputs: tuple[Node, ...], width: int, weight: str = "", detail: Any = None) -> Node:
        node = Node(op, inputs, weight, width, detail)
        for value in inputs:
            value.readers.append(node)
        self.nodes.append(node)
        return node

    def embed(self, weight: str) -> Node:
        return self._node("embed", (), self._weights[weight].columns, weight)

    def rms_norm(self, x: Node, weight: str, eps: float) -> Node:
        return self._node("rms_norm", (x,), x.width, weight, eps)

    def linear(self, x: Node, weight: str) -> Node:
        return self._node("linear", (x,), self._weights[weight].rows, weight)

    def rope(self, x: Node, heads: int, table: RopeTable) -> Node:
        return self._node("rope", (x,), x.width, detail=table)

    def attend(self, q: Node, k: Node, v: Node, layer: int, window: int | None) -> Node:
        return self._node("attend", (q, k, v), q.width, detail=(layer, window or 0))

    def gate(self, gate: Node, up: Node, activation: Activation) -> Node:
        if activation != "silu":
            raise ParameterError(f"the native executor has no activation {activation!r}")
        return self._node("gate", (gate, up), gate.width)

    def add(self, a: Node, b: Node) -> Node:
        return self._node("add", (a, b), a.width)

    def logits(self, x: Node, weight: str) -> None:
        self._node("logits", (x,), self._weights[weight].rows, weight)


class Prologue(NamedTuple):
    """What happens to a linear's input first: kind, buffers, norm weight [width padded to 32], eps, width."""

    kind: int
    input: int
    second: int
    weight: NDArray[np.float32] | None
    eps: float
    width: int


class _Lowering:
    """Turns recorded nodes into calls of the native program, giving each value a buffer while it is needed."""

    def __init__(self, program: _native.Program, weights: Mapping[str, Weight]) -> None:
        self._program, self._weights = program, weights
        self._buffers: dict[Node, int] = {}
        self._free: dict[int, list[int]] = {}
        self._unread: dict[Node, int] = {}
        self._done: set[Node] = set()

    def lower(self, nodes: list[Node]) -> None:
        for node in nodes:
            self._unread[node] = len(node.readers)
        for node in nodes:
            if node not in self._done:
                getattr(self, f"_{node.op}")(node)
                self._done.add(node)

    def _new(self, node: Node) -> int:
        spare = self._free.setdefault(node.width, [])
        self._buffers[node] = spare.pop() if spare else self._program.buffer(node.width)
        return self._buffers[node]

    def _read(self, node: Node) -> None:
        """One reader of the value is done; the buffer of a value nobody reads any more serves again."""
        self._unread[node] -= 1
        if self._unread[node] == 0 and node in self._buffers:
            self._free.setdefault(node.width, []).append(self._buffers.pop(node))

    def _matrix(self, name: str) -> tuple[NDArray[np.uint8], int, int, int]:
        w = self._weights[name]
        return w.data, int(w.layout), w.rows, w.columns

    def _embed(self, node: Node) -> None:
        self._program.embed(*self._matrix(node.weight), self._new(node))

    def _rms_norm(self, node: Node) -> None:
        if any(r.op not in ("linear", "logits") for r in node.readers):
            raise ParameterError("the native executor fuses a norm into the linears that read it, and only there")

    def _gate(self, node: Node) -> None:
        if any(r.op != "linear" for r in node.readers):
            raise ParameterError("the native executor fuses a gate into the linear that reads it, and only there")

    def _rope(self, node: Node) -> None:
        if [r.op for r in node.readers] != ["attend"]:
            raise ParameterError("the native executor rotates what goes to attention, and only that")

    def _prologue(self, x: Node) -> Prologue:
        if x.op == "rms_norm":
            return Prologue(NORM, self._buffers[x.inputs[0]], -1, _vector(self._weights[x.weight]), x.detail, x.width)
        if x.op == "gate":
            return Prologue(GATE, self._buffers[x.inputs[0]], self._buffers[x.inputs[1]], None, 0.0, x.width)
        return Prologue(NONE, self._buffers[x], -1, None, 0.0, x.width)

    def _linear(self, node: Node) -> None:
        x = node.inputs[0]
        prologue = self._prologue(x)
        parts = []
        siblings = [r for r in x.readers if r.op == "linear"]
        for sibling in siblings:
            self._done.add(sibling)
            total = sibling.readers[0] if len(sibling.readers) == 1 and sibling.readers[0].op == "add" else None
            other = None if total is None else next((i for i in total.inputs if i is not sibling), None)
            into = False
            if total is not None and other is not None and self._may_add_into(other, x):
                out, into = self._buffers.pop(other), True
                self._buffers[total] = out
                self._done.add(total)
            else:
                out = self._new(sibling)
            parts.append((*self._matrix(sibling.weight), out, into, fine_activations(sibling.weight)))
        self._program.linear(prologue, parts)
        for _ in siblings:
            self._read_through(x)

    def _may_add_into(self, other: Node, x: Node) -> bool:
        """Whether the linear can add onto `other` in place: only the addition is still to read it."""
        return other in self._buffers and self._unread[other] == 1 and x is not other

    def _read_through(self, x: Node) -> None:
        if x.op in ("rms_norm", "gate"):
            self._unread[x] -= 1
            if self._unread[x] == 0:
                self._done.add(x)
                for value in x.inputs:
                    self._read(value)
        else:
            self._read(x)

    def _attend(self, node: Node) -> None:
        q, k, v = node.inputs
        layer, window = node.detail
        if q.op != "rope" or k.op != "rope":
            raise ParameterError("the native executor attends with rotated queries and keys")
        q, k = q.inputs[0], k.inputs[0]
        self._program.rotate_append(self._buffers[q], self._buffers[k], self._buffers[v], layer)
        self._program.attend(self._buffers[q], self._new(node), layer, window)
        for value in (q, k, v):
            self._read(value)

    def _add(self, node: Node) -> None:
        a, b = node.inputs
        self._program.add(self._buffers[a], self._buffers[b], self._new(node))
        self._read(a)
        self._read(b)

    def _logits(self, node: Node) -> None:
        x = node.inputs[0]
        self._program.logits(self._prologue(x), *self._matrix(node.weight), fine_activations(node.weight))
        self._read_through(x)


def _vector(weight: Weight) -> NDArray[np.float32]:
    return weight.data.view(np.float32)


class NativeExecutor:
    """A model as a native program with its cache storage. Implements `kvik.ops.Executor`.

    Args:
        config: the model's sizes.
        forward: its definition, `kvik.models.llama.forward` for the Llama family.
        weights: packed tensors by the definition's names.
        kv: the cache's storage, uint8 [num_blocks * bytes of a block] (see `kvik.cache.layout`).
        kv_format: "f16" or "f32".
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
        isa: str = "auto",
    ) -> None:
        recorder = NativeOps(weights)
        forward(recorder, config)
        tables = {id(n.detail): n.detail for n in recorder.nodes if n.op == "rope"}
        if len(tables) != 1:
            raise ParameterError("the native executor rotates by one table")
        table: RopeTable = next(iter(tables.values()))
        self._program = _native.Program(
            pool, isa, max_rows, config.num_layers, config.num_heads, config.num_kv_heads, config.head_size,
            ("f32", "f16").index(kv_format), kv, num_blocks, np.ascontiguousarray(table.inv_freq), table.factor,
        )  # fmt: skip
        _Lowering(self._program, weights).lower(recorder.nodes)
        self._vocab_size = config.vocab_size
        self._logits = np.empty((1, self._program.logits_width), np.float32)

    @property
    def isa(self) -> str:
        """The instruction set in use."""
        return self._program.isa

    def run(self, work: Pass) -> NDArray[np.float32]:
        rows = len(work.logit_rows)
        if rows > len(self._logits):
            self._logits = np.empty((rows, self._program.logits_width), np.float32)
        self._program.run(*work, self._logits)
        return self._logits[:rows, : self._vocab_size]

    def times(self) -> StepTimes:
        return StepTimes(*self._program.times)
