"""From recorded nodes to a native program: one walk that fuses what the kernels do together.

- a norm, activation or gate that only linears (or experts) read joins the rounding of their input; else it is written out
- linears that share an input become one node; an addition joins the linear or the experts it follows
- norms of heads and rotation join the append to the cache, in place
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from kvik import _native
from kvik.errors import ParameterError
from kvik.ops import Experts, RopeTable, Sizes, fine_input
from kvik.ops.native_recording import AttendDetail, Node, NormDetail, Weight

__all__ = ["lower"]

Vector: TypeAlias = NDArray[np.float32]
Matrix: TypeAlias = tuple[NDArray[np.uint8], int, int, int]

# as native/nodes.h and native/kernels.h number them
ROW_OPS = {"copy": 0, "rms_norm": 1, "layer_norm": 2, "activate": 3, "gate": 4, "add": 5}
ACTIVATIONS = {"silu": 0, "gelu_tanh": 1}


class RowOp(NamedTuple):
    """What happens to each row by itself: inputs are buffers, vectors are padded to 32."""

    kind: int
    input: int
    second: int
    weight: Vector | None
    bias: Vector | None
    eps: float
    activation: int
    width: int


class Part(NamedTuple):
    """One matrix of a linear."""

    data: NDArray[np.uint8]
    layout: int
    rows: int
    columns: int
    bias: Vector | None
    out: int
    accumulate: bool
    fine: bool


class Heads(NamedTuple):
    """Queries or keys on their way to attention: the value that is changed in place, and how. table -1: not rotated."""

    source: Node
    norm: Node | None
    table: int


def lower(program: _native.Program, sizes: Sizes, weights: Mapping[str, Weight], nodes: list[Node]) -> None:
    """Write the nodes into the program. ParameterError names an op in a place where the kernels do not have it."""
    _Lowering(program, sizes, weights, nodes).run()


class _Lowering:
    """Gives each value a buffer while it is needed."""

    def __init__(
        self, program: _native.Program, sizes: Sizes, weights: Mapping[str, Weight], nodes: list[Node]
    ) -> None:
        self._program, self._sizes, self._weights, self._nodes = program, sizes, weights, nodes
        self._buffers: dict[Node, int] = {}
        self._free: dict[tuple[int, int], list[int]] = {}  # by width and copies
        self._unread = {node: len(node.readers) for node in nodes}
        self._done: set[Node] = set()
        self._tables: dict[tuple[bytes, float], int] = {}

    def run(self) -> None:
        ops = {
            "embed": self._embed, "embed_positions": self._embed, "rms_norm": self._row, "layer_norm": self._row,
            "activate": self._row, "gate": self._row, "add": self._write, "linear": self._linear, "rope": self._rope,
            "attend": self._attend, "experts": self._experts, "logits": self._logits,
        }  # fmt: skip
        for node in self._nodes:
            if node not in self._done:
                ops[node.op](node)
                self._done.add(node)

    # ---- buffers

    def _take(self, width: int, copies: int = 1) -> int:
        spare = self._free.setdefault((width, copies), [])
        return spare.pop() if spare else self._program.buffer(width, copies)

    def _new(self, node: Node) -> int:
        self._buffers[node] = self._take(node.width)
        return self._buffers[node]

    def _read(self, node: Node) -> None:
        """One reader of the value is done; the buffer of a value nobody reads any more serves again."""
        self._unread[node] -= 1
        if self._unread[node]:
            return
        if node in self._buffers:
            self._free.setdefault((node.width, 1), []).append(self._buffers.pop(node))
        else:  # fused into its readers: its own inputs were read with them
            self._done.add(node)
            for value in node.inputs:
                self._read(value)

    def _target(self, node: Node, written: Collection[int] = ()) -> tuple[int, bool]:
        """Where the value goes, and whether it is added onto what lies there: then the addition is done with it.

        written: buffers that are written at the same time.
        """
        total = node.readers[0] if len(node.readers) == 1 and node.readers[0].op == "add" else None
        other = None if total is None else next(i for i in total.inputs if i is not node)
        # only the addition may still have to read the other summand
        if total is None or other is None or self._buffers.get(other) in (None, *written) or self._unread[other] != 1:
            return self._new(node), False
        self._buffers[total] = self._buffers.pop(other)
        self._done.add(total)
        return self._buffers[total], True

    # ---- weights

    def _matrix(self, name: str) -> Matrix:
        w = self._weights[name]
        return w.data, int(w.layout), w.rows, w.columns

    def _vector(self, name: str | None) -> Vector | None:
        return None if not name else self._weights[name].data.view(np.float32)

    def _part(self, weight: str, bias: str | None, out: int, accumulate: bool = False) -> Part:
        return Part(*self._matrix(weight), self._vector(bias), out, accumulate, fine_input(weight))

    # ---- rows

    def _embed(self, node: Node) -> None:
        self._program.embed(self._matrix(node.weight), node.op == "embed_positions", node.detail, self._new(node))

    def _row(self, node: Node) -> None:
        if node.op == "rms_norm" and node.detail.heads > 1 and not self._of_heads(node):
            raise ParameterError(
                f"rms_norm {node.weight!r}: the native executor norms head by head only where attention's queries or "
                "keys do, with their number of heads"
            )
        if not self._of_heads(node) and not self._fused(node):
            self._write(node)

    def _fused(self, node: Node) -> bool:
        """Whether the op happens on the way into the linears that read it."""
        return node.op in ("rms_norm", "layer_norm", "activate", "gate") and all(
            r.op in ("linear", "logits") or (r.op == "experts" and r.inputs[1] is not node) for r in node.readers
        )

    def _of_heads(self, node: Node) -> bool:
        """Whether a norm is that of attention's query or key heads."""
        if node.op != "rms_norm" or len(node.readers) != 1:
            return False
        reader, value = node.readers[0], node
        if reader.op == "rope" and len(reader.readers) == 1:
            reader, value = reader.readers[0], reader
        if reader.op != "attend" or value is reader.inputs[2]:
            return False
        heads = self._sizes.num_heads if value is reader.inputs[0] else self._sizes.num_kv_heads
        return bool(node.detail.heads == heads)

    def _write(self, node: Node) -> None:
        """The op as a node of its own. It may end in a buffer it has read: rows are read before they are written."""
        op = self._row_op(node)
        for value in node.inputs:
            self._read(value)
        self._program.map(op, self._new(node))

    def _row_op(self, node: Node) -> RowOp:
        inputs = [self._buffers[value] for value in node.inputs]
        eps = node.detail.eps if isinstance(node.detail, NormDetail) else 0.0
        activation = 0
        if node.op in ("activate", "gate"):
            activation = self._activation(node.op, node.detail)
        second = inputs[1] if len(inputs) > 1 else -1
        vectors = self._vector(node.weight), self._vector(node.bias)
        return RowOp(ROW_OPS[node.op], inputs[0], second, *vectors, eps, activation, node.width)

    def _activation(self, op: str, name: str) -> int:
        if name not in ACTIVATIONS:
            raise ParameterError(
                f"{op}: the native executor has no activation {name!r}; it has {', '.join(ACTIVATIONS)}"
            )
        return ACTIVATIONS[name]

    # ---- linears

    def _input(self, x: Node) -> RowOp:
        if x in self._buffers:
            return RowOp(ROW_OPS["copy"], self._buffers[x], -1, None, None, 0.0, 0, x.width)
        return self._row_op(x)

    def _linear(self, node: Node) -> None:
        x = node.inputs[0]
        op = self._input(x)
        siblings = [r for r in x.readers if r.op == "linear"]
        parts: list[Part] = []
        for sibling in siblings:
            self._done.add(sibling)
            target = self._target(sibling, [part.out for part in parts])
            parts.append(self._part(sibling.weight, sibling.bias, *target))
        self._program.linear(op, parts)
        for _ in siblings:
            self._read(x)

    def _logits(self, node: Node) -> None:
        x = node.inputs[0]
        self._program.logits(self._input(x), self._matrix(node.weight), fine_input(node.weight), self._sizes.vocab_size)
        self._read(x)

    def _experts(self, node: Node) -> None:
        (x, scores), e = node.inputs, node.detail
        assert isinstance(e, Experts)
        op, scores_at = self._input(x), self._buffers[scores]
        inner = self._weights[e.down].columns
        # taken before anything is given back: the matrices read their input while they write these
        taken = [(width, self._take(width, e.used)) for width in (inner, inner, x.width)]
        gate, up, down = (
            self._part(name, None, out) for name, (_, out) in zip((e.gate, e.up, e.down), taken, strict=True)
        )
        self._read(x)
        self._read(scores)
        self._program.experts(
            op, scores_at, e.count, e.used, e.normalize, self._activation("experts", e.activation), gate, up, down,
            *self._target(node),
        )  # fmt: skip
        for width, out in taken:
            self._free.setdefault((width, e.used), []).append(out)

    # ---- attention

    def _rope(self, node: Node) -> None:
        if [r.op for r in node.readers] != ["attend"] or node is node.readers[0].inputs[2]:
            raise ParameterError("rope: the native executor rotates attention's queries and keys, and only those")

    def _attend(self, node: Node) -> None:
        detail: AttendDetail = node.detail
        q = self._heads(node.inputs[0], self._sizes.num_heads)
        k = self._heads(node.inputs[1], self._sizes.num_kv_heads)
        v = node.inputs[2]
        if q.table != k.table:
            raise ParameterError("attend: the native executor rotates queries and keys by one table, or neither")
        q_at, k_at, v_at = (self._buffers[value] for value in (q.source, k.source, v))
        self._program.rotate_append(q_at, k_at, v_at, detail.layer, q.table, self._norm(q.norm), self._norm(k.norm))
        self._program.attend(q_at, self._new(node), detail.layer, detail.window, detail.scale)
        for value in (q.source, k.source, v):
            self._read(value)

    def _heads(self, x: Node, heads: int) -> Heads:
        chain, norm, table = [x], None, -1
        if x.op == "rope":
            count, rotations = x.detail
            table = self._table(rotations)
            if count != heads:
                raise ParameterError(f"rope: attention has {heads} heads here, not {count}")
            chain.append(x := x.inputs[0])
        if self._of_heads(x):
            norm = x
            chain.append(x := x.inputs[0])
        if x not in self._buffers or any(len(value.readers) != 1 for value in chain):
            raise ParameterError(
                "attend: the native executor changes queries and keys in place, so nothing else may read them"
            )
        return Heads(x, norm, table)

    def _table(self, table: RopeTable) -> int:
        inv_freq = np.ascontiguousarray(table.inv_freq, np.float64)
        key = (inv_freq.tobytes(), table.factor)
        if key not in self._tables:
            self._tables[key] = self._program.rotations(inv_freq, table.factor)
        return self._tables[key]

    def _norm(self, norm: Node | None) -> tuple[Vector, float] | None:
        if norm is None:
            return None
        weight = self._vector(norm.weight)
        assert weight is not None
        return weight, norm.detail.eps
