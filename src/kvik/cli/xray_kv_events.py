"""What evictions did to the tokens of a text: each event's records, in which slots are told, as states of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvik.params import H2O, TOVA, Policy, Scorer, SnapKV, StreamingLLM

if TYPE_CHECKING:
    from kvik.engine.moving import EvictionRecord

__all__ = ["EARLIER", "FIRST", "GIVEN_UP", "KEPT", "LAST", "Event", "events_of", "streamed"]

EARLIER, GIVEN_UP, KEPT, FIRST, LAST = range(5)
"""States of a token in a layer and head: given up at an earlier event, or at this one; kept for its score; kept whatever
its score, as one of the first or of the last."""

_STEP = 2.0**-24  # attention is counted in these
_ATTENTION = (H2O, SnapKV, TOVA)


class Event(NamedTuple):
    """Of one event; T tokens were computed, L' layers evict.

    states: [L', H_kv, T] uint8. ranks: [L', H_kv, T] of the tokens that compete, by score, 1 the best; 0: none. scores:
    [L', H_kv, T] float32, NaN where a token was gone or there is none. attention: whether scores are probabilities
    of attention, summed.
    """

    num_tokens: int
    layers: tuple[int, ...]
    states: NDArray[np.uint8]
    ranks: NDArray[np.int32]
    scores: NDArray[np.float32]
    attention: bool

    @property
    def counts(self) -> NDArray[np.int64]:
        """[L', H_kv] tokens kept."""
        found: NDArray[np.int64] = (self.states >= KEPT).sum(2)
        return found

    @property
    def keepers(self) -> NDArray[np.int64]:
        """[T] layers and heads that keep each token."""
        found: NDArray[np.int64] = (self.states >= KEPT).sum((0, 1))
        return found

    @property
    def pairs(self) -> int:
        """Layers and heads."""
        return int(self.states.shape[0] * self.states.shape[1])

    @property
    def attention_kept(self) -> float | None:
        """Of the competing tokens' attention the share that the kept ones had; None where scores are something else."""
        if not self.attention:
            return None
        competing = self.ranks > 0
        whole = float(self.scores[competing].sum(dtype=np.float64))
        return (
            float(self.scores[competing & (self.states == KEPT)].sum(dtype=np.float64)) / whole if whole > 0 else None
        )


def events_of(records: Sequence[EvictionRecord], policy: Scorer) -> list[Event]:
    """The records of one sequence, in order."""
    tables: list[list[NDArray[np.int32]]] = []  # of each layer and head the token in each slot
    found, seen = [], 0
    for record in records:
        added = np.arange(seen, record.num_tokens, dtype=np.int32)
        heads = record.held.shape[1]
        if not tables:
            tables = [[np.empty(0, np.int32)] * heads for _ in record.layers]
        tables = [[np.concatenate([slots, added]) for slots in row] for row in tables]
        event = _event(record, tables, isinstance(policy, _ATTENTION))
        found.append(event)
        tables = [
            [slots[record.kept[layer, head, : record.counts[layer, head]]] for head, slots in enumerate(row)]
            for layer, row in zip(record.layers, tables, strict=True)
        ]
        seen = record.num_tokens
    return found


def _event(record: EvictionRecord, tables: Sequence[Sequence[NDArray[np.int32]]], attention: bool) -> Event:
    shape = (*record.held.shape, record.num_tokens)
    states, ranks = np.full(shape, EARLIER, np.uint8), np.zeros(shape, np.int32)
    scores = np.full(shape, np.nan, np.float32)
    first, last = record.protected
    for place, layer in enumerate(record.layers):
        for head, tokens in enumerate(tables[place]):
            count = len(tokens)
            kept = np.zeros(count, np.bool_)
            kept[record.kept[layer, head, : record.counts[layer, head]]] = True
            state = np.where(kept, KEPT, GIVEN_UP).astype(np.uint8)
            state[max(0, count - last) :], state[:first] = LAST, FIRST
            state[~kept] = GIVEN_UP
            own = record.scores[place, head, :count] * (_STEP if attention else 1.0)
            states[place, head, tokens], scores[place, head, tokens] = state, own
            competing = np.flatnonzero((np.arange(count) >= first) & (np.arange(count) < count - last))
            order = competing[np.argsort(own[competing], kind="stable")[::-1]]  # of equal ones the later is better
            ranks[place, head, tokens[order]] = np.arange(1, len(order) + 1)
    return Event(record.num_tokens, record.layers, states, ranks, scores, attention)


def streamed(policy: StreamingLLM, layers: Sequence[int], heads: int, num_tokens: int) -> Event:
    """What StreamingLLM holds after so many tokens: it is a mask, alike for all layers and heads that evict."""
    state = np.full(num_tokens, GIVEN_UP, np.uint8)
    state[max(0, num_tokens - policy.window) :] = LAST
    state[: policy.sinks] = FIRST
    shape = (len(layers), heads, num_tokens)
    nothing = np.full(shape, np.nan, np.float32)
    states = np.broadcast_to(state, shape).copy()
    return Event(num_tokens, tuple(layers), states, np.zeros(shape, np.int32), nothing, False)


def name_of(policy: Policy) -> str:
    """What its scores are, in a few words; empty where it has none."""
    return {
        "SnapKV": "attention from the last rows, the most of its neighbours", "H2O": "attention from all rows so far",
        "TOVA": "attention from the last row, all heads of the layer", "KeyDiff": "how unlike the mean key its key is",
        "ExpectedAttention": "attention expected from rows to come, times the value's length",
    }.get(type(policy).__name__, "")  # fmt: skip
