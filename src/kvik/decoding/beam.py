"""Beam search without a model: which beams go on, which answers are finished, and when it ends.

It is that of transformers' `generate` (5.23, GenerationMixin._beam_search): the same candidates, in float32 as there, so that
sequences and scores are the same; ties go to the earlier beam and then to the lower token id. In groups it is algorithm 1
of Vijayakumar et al. 2018 (arXiv:1610.02424) with their Hamming diversity, each group a search of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvik.decoding.best import Best
from kvik.decoding.sampler import TokenLogprob
from kvik.params import BeamParams

__all__ = ["BeamChoice", "BeamEnd", "BeamSearch", "BeamStep", "Chosen", "Hypothesis", "Node"]

Ends = Callable[[int, int], bool]
"""Whether beam `int` ends with token `int`, by an end-of-text or stop token or a stop string."""


@dataclass(eq=False, slots=True)
class Node:
    """A beam, as its last token and the beam before that.

    logprob: of the token, after everything that edits it. total: what the search has added up, in float32; diversity
    penalties are in it. top: the best tokens at its place, where they are asked for.
    """

    before: Node | None = field(repr=False)
    token: int
    logprob: float
    total: float
    top: tuple[TokenLogprob, ...] = ()

    def path(self) -> list[Node]:
        """The nodes from the first token on."""
        found: list[Node] = []
        node: Node | None = self
        while node is not None and node.before is not None:
            found.append(node)
            node = node.before
        return found[::-1]


ROOT = Node(None, -1, 0.0, 0.0)
"""The beam without a token."""


class Chosen(NamedTuple):
    """A beam that goes on. parent: which of the beams before it continues."""

    parent: int
    node: Node


class Hypothesis(NamedTuple):
    """A finished answer. score: total / length ** length_penalty; ended: by a token or stop string, else by the length.

    stranded: nothing could follow, which counts only where nothing is finished.
    """

    node: Node
    score: float
    ended: bool
    stranded: bool = False


class BeamChoice(NamedTuple):
    """A beam after a step: which of the beams before it continues (0 in the first step), with which token.

    total: its cumulative log-probability.
    """

    parent: int
    token_id: int
    total: float


class BeamEnd(NamedTuple):
    """An answer that a step finished. score: total / length ** length_penalty."""

    parent: int
    token_id: int
    total: float
    score: float


class BeamStep(NamedTuple):
    """A step of the search as `kvik xray --beams` draws it: the beams that go on, best first by group, and what ended."""

    beams: tuple[BeamChoice, ...]
    finished: tuple[BeamEnd, ...]


class _Group:
    """A search of `size` beams. finished: the best answers so far, best first, at most size."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.beams = [ROOT]
        self.finished: list[Hypothesis] = []

    def finish(self, found: Hypothesis) -> None:
        self.finished.append(found)
        self.finished.sort(key=lambda one: -one.score)  # stable: of equals the earlier
        del self.finished[self.size :]


class BeamSearch:
    """The search over the answers to one prompt.

    Args:
        params: what is searched and when it ends.
        most_tokens: of an answer, at least 1; an unfinished one ends there.
        num_ends: token ids that end an answer. So many more candidates are looked at, that beams are left to go on.

    Attributes:
        wanted: candidates that `step` needs of each beam.
        num_tokens: of every beam.
        steps: what happened, where params.trace asks for it.
    """

    def __init__(self, params: BeamParams, most_tokens: int, num_ends: int) -> None:
        self._params, self._most_tokens = params, most_tokens
        groups = params.num_beam_groups
        size = params.num_beams // groups
        self._kept = max(2, 1 + num_ends) * size
        self._diversity = np.float32(params.diversity_penalty)
        # Penalties push back at most one token for each beam of earlier groups.
        self.wanted = self._kept + (params.num_beams - size if params.diversity_penalty else 0)
        self._groups = [_Group(size) for _ in range(groups)]
        self.num_tokens = 0
        self.steps: list[BeamStep] = []

    @property
    def beams(self) -> list[Node]:
        """Those that go on, group by group, best first; in the beginning each group has the empty one."""
        return [node for group in self._groups for node in group.beams]

    @property
    def done(self) -> bool:
        return not any(group.beams for group in self._groups)

    def step(self, found: Best, ends: Ends) -> list[Chosen]:
        """Take each beam's candidates, a row each in the order of `beams`; the beams that go on."""
        self.num_tokens += 1
        chosen: list[Chosen] = []
        ended: list[BeamEnd] = []
        taken: dict[int, int] = {}  # tokens of earlier groups' beams in this step, how often
        at = 0
        for group in self._groups:
            rows = slice(at, at + len(group.beams))
            if group.beams:
                values = self._totals(group, found, rows, taken)
                mine = self._choose(group, found, rows, values, ends, ended, bool(taken))
                group.beams = [] if self._is_done(group, mine) else [one.node for one in mine]
                chosen += mine if group.beams else ()
                if self._diversity:
                    for one in mine:
                        taken[one.node.token] = taken.get(one.node.token, 0) + 1
            at = rows.stop
        if self._params.trace:
            beams = tuple(BeamChoice(one.parent, one.node.token, one.node.total) for one in chosen)
            self.steps.append(BeamStep(beams, tuple(ended)))
        return chosen

    def _totals(self, group: _Group, found: Best, rows: slice, taken: dict[int, int]) -> NDArray[np.float32]:
        """What each candidate adds up to [beams, C]; -inf where there is none."""
        logprobs = found.logprobs[rows]
        count = found.found[rows]
        if taken:
            logprobs = logprobs.copy()
            for token, times in taken.items():
                logprobs[found.ids[rows] == token] -= self._diversity * np.float32(times)
        totals: NDArray[np.float32] = logprobs + np.array([node.total for node in group.beams], np.float32)[:, None]
        if int(count.min()) < totals.shape[1]:
            totals[np.arange(totals.shape[1]) >= count[:, None]] = -np.inf
        return totals

    def _choose(
        self, group: _Group, found: Best, rows: slice, totals: NDArray[np.float32], ends: Ends,
        ended: list[BeamEnd], reordered: bool,
    ) -> list[Chosen]:  # fmt: skip
        """The best candidates go on, or are finished; only those among the first `size` can be finished."""
        ids, logprobs, values = found.ids[rows].ravel(), found.logprobs[rows].ravel(), totals.ravel()
        each = totals.shape[1]
        if reordered:  # rows are no longer in order
            order = np.lexsort((ids, np.arange(len(ids)) // each, -values))
        else:
            order = np.argsort(-values, kind="stable")
        last, going = self.num_tokens >= self._most_tokens, list[Chosen]()
        for rank, place in enumerate(order[: self._kept].tolist()):
            total = float(values[place])
            if total == -np.inf or (rank >= group.size and len(going) == group.size):
                break
            parent, token = rows.start + place // each, int(ids[place])
            node = Node(group.beams[place // each], token, float(logprobs[place]), total, self._top(found, parent))
            stops = ends(parent, token)
            if stops or last:
                if rank < group.size:
                    score = self.score(node, self.num_tokens)
                    group.finish(Hypothesis(node, score, stops))
                    ended.append(BeamEnd(parent, token, total, score))
            elif len(going) < group.size:
                going.append(Chosen(parent, node))
        return going

    def _top(self, found: Best, row: int) -> tuple[TokenLogprob, ...]:
        """The best tokens after a beam, as many as are asked for."""
        count = min(self._params.logprobs or 0, int(found.found[row]))
        if not count:
            return ()
        pairs = zip(found.ids[row, :count].tolist(), found.logprobs[row, :count].tolist(), strict=True)
        return tuple(TokenLogprob(token, logprob) for token, logprob in pairs)

    def score(self, node: Node, length: int) -> float:
        """total / length ** length_penalty. The length is that of the answer, a token that ends it included."""
        return float(node.total / float(length) ** self._params.length_penalty)

    def _is_done(self, group: _Group, going: list[Chosen]) -> bool:
        """Whether the group's search ends with its `finished`."""
        if not going:
            if not group.finished:
                group.finished = [self._stranded(node) for node in group.beams]
            return True
        if len(group.finished) < group.size:
            return False
        stopping = self._params.early_stopping
        if stopping is True:
            return True
        # What the best beam may still reach: at its present length, or ("never") at the best of all lengths.
        longest = stopping == "never" and self._params.length_penalty > 0
        length = self._most_tokens if longest else self.num_tokens
        return self.score(going[0].node, length) <= group.finished[-1].score

    def _stranded(self, node: Node) -> Hypothesis:
        return Hypothesis(node, self.score(node, max(1, self.num_tokens - 1)), ended=False, stranded=True)

    def best(self) -> list[Hypothesis]:
        """The answers, best first, up to num_return_sequences: fewer where fewer could be finished."""
        found = [one for group in self._groups for one in group.finished]
        return self._first([one for one in found if not one.stranded]) or self._first(found)[:1]

    def best_so_far(self) -> list[Hypothesis]:
        """What is finished, and then the best beams as far as they are."""
        length = max(1, self.num_tokens)
        going = [Hypothesis(node, self.score(node, length), ended=False) for node in self.beams]
        finished = self._first([one for group in self._groups for one in group.finished])
        return (finished + self._first(going))[: self._params.num_return_sequences]

    def _first(self, found: Sequence[Hypothesis]) -> list[Hypothesis]:
        return sorted(found, key=lambda one: -one.score)[: self._params.num_return_sequences]
