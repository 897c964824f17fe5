"""Recording a model's ops as a list of nodes; `native_lowering` turns them into a native program."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from kvik.ops import Activation, Experts, RopeTable

__all__ = ["AttendDetail", "NativeOps", "Node", "NormDetail", "Weight"]


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


class NormDetail(NamedTuple):
    """Of rms_norm and layer_norm."""

    eps: float
    heads: int = 1


class AttendDetail(NamedTuple):
    """Of attend. window 0: none."""

    layer: int
    window: int
    scale: float | None


@dataclass(eq=False)
class Node:
    """A recorded op: a value [T, width] other ops read.

    detail: NormDetail, AttendDetail or Experts; of rope heads and table, of embed its scale, of activate and gate the
    activation.
    """

    op: str
    inputs: tuple[Node, ...]
    width: int
    weight: str = ""
    bias: str | None = None
    detail: Any = None
    readers: list[Node] = field(default_factory=list)


class NativeOps:
    """Records. Values are nodes; nothing is computed. See `kvik.ops.Ops` for what each op means."""

    def __init__(self, weights: Mapping[str, Weight]) -> None:
        self._weights = weights
        self.nodes: list[Node] = []

    def _node(
        self,
        op: str,
        inputs: tuple[Node, ...],
        width: int,
        weight: str = "",
        bias: str | None = None,
        detail: Any = None,
    ) -> Node:
        node = Node(op, inputs, width, weight, bias, detail)
        for value in inputs:
            value.readers.append(node)
        self.nodes.append(node)
        return node

    def embed(self, weight: str, scale: float = 1.0) -> Node:
        return self._node("embed", (), self._weights[weight].columns, weight, detail=scale)

    def embed_positions(self, weight: str) -> Node:
        return self._node("embed_positions", (), self._weights[weight].columns, weight, detail=1.0)

    def rms_norm(self, x: Node, weight: str, eps: float, heads: int = 1) -> Node:
        return self._node("rms_norm", (x,), x.width, weight, detail=NormDetail(eps, heads))

    def layer_norm(self, x: Node, weight: str, bias: str, eps: float) -> Node:
        return self._node("layer_norm", (x,), x.width, weight, bias, NormDetail(eps))

    def linear(self, x: Node, weight: str, bias: str | None = None) -> Node:
        return self._node("linear", (x,), self._weights[weight].rows, weight, bias)

    def rope(self, x: Node, heads: int, table: RopeTable) -> Node:
        return self._node("rope", (x,), x.width, detail=(heads, table))

    def attend(self, q: Node, k: Node, v: Node, layer: int, window: int | None, scale: float | None = None) -> Node:
        return self._node("attend", (q, k, v), q.width, detail=AttendDetail(layer, window or 0, scale))

    def activate(self, x: Node, activation: Activation) -> Node:
        return self._node("activate", (x,), x.width, detail=activation)

    def gate(self, gate: Node, up: Node, activation: Activation) -> Node:
        return self._node("gate", (gate, up), gate.width, detail=activation)

    def experts(self, x: Node, scores: Node, experts: Experts) -> Node:
        return self._node("experts", (x, scores), x.width, detail=experts)

    def add(self, a: Node, b: Node) -> Node:
        return self._node("add", (a, b), a.width)

    def logits(self, x: Node, weight: str) -> None:
        self._node("logits", (x,), self._weights[weight].rows, weight)
