"""The tree of a beam search: who came from whom, what became an answer, and its picture as SVG."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvik.decoding.beam import BeamStep

__all__ = ["Node", "beam_tree", "path_of", "tree_svg"]

_ROW, _TOP, _GAP, _LEFT = 34, 30, 34, 64
_CHARACTER, _PADDING = 7.4, 16
_MOST_CHARACTERS = 18


@dataclass
class Node:
    """A token of a beam.

    step: from 0; slot: its rank in the step, ended ones after those that go on. before: index of the node it continues, or
    None. total: sum of log-probabilities; score: where it ended. kept: whether an answer, or a beam that was still followed
    at the end, goes through it; best: whether the first answer does.
    """

    step: int
    slot: int
    token_id: int
    before: int | None
    total: float
    score: float | None = None
    kept: bool = False
    best: bool = False


def beam_tree(steps: Sequence[BeamStep], answers: Sequence[Sequence[int]]) -> list[Node]:
    """Every beam of every step, in order. answers: token ids of the answers, best first."""
    nodes: list[Node] = []
    going: list[int | None] = [None]
    for number, step in enumerate(steps):
        slot = 0
        now: list[int | None] = []
        for choice in step.beams:
            nodes.append(Node(number, slot, choice.token_id, _at(going, choice.parent), choice.total))
            now.append(len(nodes) - 1)
            slot += 1
        for end in step.finished:
            nodes.append(Node(number, slot, end.token_id, _at(going, end.parent), end.total, end.score))
            slot += 1
        going = now
    wanted = [tuple(answer) for answer in answers]
    last = {index for index in going if index is not None}
    for index, node in enumerate(nodes):
        if node.score is None and index not in last:
            continue
        ids = tuple(nodes[at].token_id for at in path_of(nodes, index))
        if index in last or ids in wanted:
            for at in path_of(nodes, index):
                nodes[at].kept = True
        if wanted and ids == wanted[0]:
            for at in path_of(nodes, index):
                nodes[at].best = True
    return nodes


def _at(going: Sequence[int | None], parent: int) -> int | None:
    return going[parent] if parent < len(going) else None


def path_of(nodes: Sequence[Node], index: int) -> list[int]:
    """The indexes of a node's beam, from its first token to itself."""
    found: list[int] = []
    at: int | None = index
    while at is not None:
        found.append(at)
        at = nodes[at].before
    return found[::-1]


def tree_svg(nodes: Sequence[Node], label: Callable[[int], str]) -> str:
    """A column a step, the beams of it by rank, best at the top; what became nothing is faded, the answer stands out.

    label: a token's text; it is cut and escaped here.
    """
    names = [_short(label(node.token_id)) for node in nodes]
    columns = max((node.step for node in nodes), default=-1) + 1
    widths = [
        max(_CHARACTER * len(name) + _PADDING for name, node in zip(names, nodes, strict=True) if node.step == step)
        for step in range(columns)
    ]
    lefts = [_LEFT + _GAP + sum(widths[:step]) + _GAP * step for step in range(columns)]
    width = lefts[-1] + widths[-1] + 12 if columns else _LEFT
    height = _TOP + _ROW * (max((node.slot for node in nodes), default=0) + 1) + 4
    boxes = [
        (lefts[n.step], _TOP + _ROW * n.slot, _CHARACTER * len(name) + _PADDING)
        for n, name in zip(nodes, names, strict=True)
    ]
    parts = [
        f'<svg class="tree" role="group" aria-label="Beam search, {columns} steps" width="{width:.0f}" height="{height}" '
        f'viewBox="0 0 {width:.0f} {height}">'
    ]
    parts += [f'<text class="step" x="{left:.1f}" y="16">{step + 1}</text>' for step, left in enumerate(lefts)]
    order = sorted(range(len(nodes)), key=lambda i: (nodes[i].best, nodes[i].kept))  # the answer is drawn last
    for index in order:
        parts.append(_edge(nodes, boxes, index))
    parts.append(f'<g class="root"><rect x="0.5" y="{_TOP}" width="{_LEFT}" height="24" rx="6"/>'
                 f'<text x="{_LEFT / 2 + 0.5}" y="{_TOP + 16}" text-anchor="middle">prompt</text></g>')  # fmt: skip
    for index in order:
        parts.append(_box(nodes[index], names[index], boxes[index], index))
    return "\n".join([*parts, "</svg>"])


def _short(text: str) -> str:
    return text if len(text) <= _MOST_CHARACTERS else text[: _MOST_CHARACTERS - 1] + "…"


def _kind(node: Node) -> str:
    return "best" if node.best else "kept" if node.kept else "lost"


def _edge(nodes: Sequence[Node], boxes: Sequence[tuple[float, float, float]], index: int) -> str:
    before = nodes[index].before
    x0, y0 = (
        (float(_LEFT), _TOP + 12.0)
        if before is None
        else (boxes[before][0] + boxes[before][2], boxes[before][1] + 12.0)
    )
    x1, y1 = boxes[index][0], boxes[index][1] + 12.0
    start = max(x0, x1 - _GAP)  # a short box's line runs straight to the end of its column
    middle = (start + x1) / 2
    return (
        f'<path class="edge {_kind(nodes[index])}" d="M{x0:.1f} {y0:.1f}H{start:.1f}'
        f'C{middle:.1f} {y0:.1f} {middle:.1f} {y1:.1f} {x1:.1f} {y1:.1f}"/>'
    )


def _box(node: Node, name: str, box: tuple[float, float, float], index: int) -> str:
    x, y, width = box
    ended = " ended" if node.score is not None else ""
    told = f"{name}, step {node.step + 1}, sum of log-probabilities {node.total:.2f}"
    if node.score is not None:
        told += f", finished with score {node.score:.3f}"
    return (
        f'<g class="node {_kind(node)}{ended}" data-node="{index}" tabindex="-1" role="img" aria-label="{escape(told)}">'
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="24" rx="6"/>'
        f'<text x="{x + width / 2:.1f}" y="{y + 16.5:.1f}" text-anchor="middle" xml:space="preserve">{escape(name)}</text></g>'
    )
