"""Eviction of one sequence: when, what is observed for it, and which slots stay."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvik.cache.eviction import expected_attention, h2o, keydiff, snapkv, tova
from kvik.cache.eviction.allocation import layer_budgets, most_of_a_head, select
from kvik.cache.eviction.scoring import Read, Scoring, Seen
from kvik.cache.layout import CacheShape
from kvik.errors import KvikError, ParameterError
from kvik.ops import Observation, RopeTable
from kvik.params import H2O, TOVA, CacheParams, ExpectedAttention, KeyDiff, Scorer, SnapKV, policy_name

__all__ = ["Evictor", "Kept"]

SCORINGS: dict[type[Scorer], Scoring] = {
    H2O: h2o.SCORING,
    SnapKV: snapkv.SCORING,
    TOVA: tova.SCORING,
    KeyDiff: keydiff.SCORING,
    ExpectedAttention: expected_attention.SCORING,
}


class Kept(NamedTuple):
    """What stays at an event.

    kept: [L, H_kv, most] int32 slots of the tables, ascending; -1 past the counts.
    counts: [L, H_kv] int32 how many; -1 for layers with a window of their own, which are left alone.
    """

    kept: NDArray[np.int32]
    counts: NDArray[np.int32]


class Evictor:
    """The state of a sequence whose policy ranks slots.

    A chunk of rows never crosses an event. Before each chunk `observation` says which of its rows attention reports on; when
    as many tokens are computed as `next_event` says, `choose`, and `evicted` once the cache has done so. After `evicted` a
    sequence cannot be computed again from its beginning.
    """

    def __init__(
        self, params: CacheParams, shape: CacheShape, prompt_tokens: int | None, rope: RopeTable | None, scale: float
    ) -> None:
        """As `of`, which asks first whether there is anything to do."""
        assert params.scorer is not None
        self.params, self.policy, self.prompt_tokens = params, params.scorer, prompt_tokens
        self._scoring = SCORINGS[type(self.policy)]
        self._shape, self._rope, self._scale = shape, rope, scale
        self._last = 0  # tokens at the last event
        self._evicted = Fraction(0)  # slots that went, mean of all tables
        self._next = self.policy.event(prompt_tokens, 1)
        self._counts: NDArray[np.int64] | None = None  # [L', H_kv] kept at the last event; never written to
        self._sums: NDArray[np.int64] | None = None  # [L, H_kv, slots of the table, or room for more]
        self._queries: tuple[int, NDArray[np.float32]] | None = None  # slot of the first row; [L, rows, H * D]
        self.layers = tuple(layer for layer, window in enumerate(shape.windows) if not window)

    @classmethod
    def of(
        cls,
        params: CacheParams,
        shape: CacheShape,
        prompt_tokens: int | None,
        rope: RopeTable | None,
        scale: float | None = None,
    ) -> Evictor | None:
        """That of a new sequence; None where its policy ranks no slots (none, StreamingLLM).

        prompt_tokens: None where there is no prompt, as in a text that is scored: events are then at `at` or at the multiples
        of `every`. rope: of layers without a window; None: learned positions. scale: what products of queries and
        keys are multiplied by; None: 1 / sqrt(D). ParameterError where all layers have windows.
        """
        if params.scorer is None:
            return None
        if all(shape.windows):
            raise ParameterError(
                f"{policy_name(params.scorer)} has nothing to evict: every layer has a window of its own"
            )
        return cls(params, shape, prompt_tokens, rope, 1 / math.sqrt(shape.head_size) if scale is None else scale)

    @property
    def has_evicted(self) -> bool:
        """Whether an event has happened."""
        return self._counts is not None

    def next_event(self, num_computed: int) -> int | None:
        """Tokens at the first event that has not happened, at least `num_computed`; None: there is none.

        It is due when so many are computed, before the row at that slot is.
        """
        if self._next is None or num_computed <= self._next:
            return self._next
        return self.policy.event(self.prompt_tokens, num_computed, self._evicted)

    def hits_allowed(self, tokens: int) -> int:
        """Of so many first tokens how many may come from other sequences: no observed row, and none past an event."""
        event = self.next_event(0)
        return tokens if event is None else min(tokens, self._first_observed(event))

    def observation(self, first: int, count: int, sequence: int = 0) -> Observation | None:
        """What to ask of attention for rows at slots [first, first + count), which no event parts; None: nothing.

        sequence: its index in the pass. Its memory stays the evictor's, which adds up over chunks.
        """
        event = self.next_event(first)
        if event is None or self._scoring.asks == "nothing":
            return None
        begin = self._first_observed(event)
        if first + count <= begin:
            return None
        if first + count > event:
            raise KvikError(f"rows [{first}, {first + count}) cross the eviction at {event}")
        if self._scoring.asks == "queries":
            return Observation(sequence, begin, event, queries=self._queries_of(begin, event))
        return Observation(sequence, begin, event, sums=self._sums_of(first + count, event))

    def scores(self, num_tokens: int, read: Read) -> NDArray[Any]:
        """By what `choose` ranks the slots of the layers that evict, protected ones apart: [L', H_kv, n]."""
        if self.next_event(num_tokens) != num_tokens:
            raise KvikError(f"no eviction is due at {num_tokens} tokens")
        return self._scoring.scores(self.policy, self._seen(num_tokens, read))

    def choose(self, num_tokens: int, read: Read) -> Kept:
        """Which slots stay at the event that is due after `num_tokens`. read: of the sequence's cache (`Executor.read`)."""
        if self.next_event(num_tokens) != num_tokens:
            raise KvikError(f"no eviction is due at {num_tokens} tokens")
        seen = self._seen(num_tokens, read)
        budgets = layer_budgets(self.policy, self.params.layers, num_tokens, seen.held)
        scores = self._scoring.scores(self.policy, seen)
        chosen = select(
            scores, seen.held, budgets, self.policy.protected(self.policy.kept(num_tokens)), self.params.heads
        )
        return self._whole(chosen)

    def evicted(self, kept: Kept) -> None:
        """The event has happened: slots are now those of the new tables."""
        event = self._next
        assert event is not None
        self._sums = self._carried(kept) if self._scoring.rows(self.policy) is None else None
        self._counts, self._last = kept.counts[list(self.layers)].astype(np.int64), event
        self._evicted = event - Fraction(int(self._counts.sum()), self._counts.size)
        self._next = self.policy.event(self.prompt_tokens, event + 1, self._evicted)
        if self._next is None:  # nothing is observed any more
            self._sums = self._queries = None

    def fork(self) -> Evictor:
        """One in the same state."""
        other = Evictor(self.params, self._shape, self.prompt_tokens, self._rope, self._scale)
        other._last, other._evicted, other._next = self._last, self._evicted, self._next
        other._counts = self._counts
        other._sums = None if self._sums is None else self._sums.copy()
        other._queries = None if self._queries is None else (self._queries[0], self._queries[1].copy())
        return other

    def restart(self) -> None:
        """Nothing is computed yet."""
        self._last, self._evicted = 0, Fraction(0)
        self._counts = self._sums = self._queries = None
        self._next = self.policy.event(self.prompt_tokens, 1)

    def most_kept(self, prompt: int | None, tokens: int) -> int:
        """Most slots that a layer and KV head keeps at any event of a sequence of `tokens` tokens; without one, all."""
        return most_of_a_head(self.params, self._shape, len(self.layers), prompt, tokens)

    def held(self, tokens: int) -> NDArray[np.int64]:
        """[L', H_kv] slots of the tables after so many tokens, if nothing is evicted in between."""
        if self._counts is None:
            return np.full((len(self.layers), self._shape.num_kv_heads), tokens, np.int64)
        return self._counts + (tokens - self._last)

    def _room(self, tokens: int) -> int:
        """Most slots of any table after so many tokens: those of layers with windows count them all."""
        return tokens if len(self.layers) < self._shape.num_layers else int(self.held(tokens).max())

    def _first_observed(self, event: int) -> int:
        """The first row that is observed for the event, were all computed."""
        if self._scoring.asks == "nothing":
            return event
        rows = self._scoring.rows(self.policy)
        return self._last if rows is None else max(0, event - rows)

    def _sums_of(self, end: int, event: int) -> NDArray[np.int64]:
        """The sums, with room for the rows before `end`; made larger by doubling, up to what the event needs."""
        need, most = self._room(end), self._room(event)
        if self._sums is None or self._sums.shape[2] < need:
            old = self._sums
            size = min(most, max(need, 256, 0 if old is None else 2 * old.shape[2]))
            self._sums = np.zeros((self._shape.num_layers, self._shape.num_kv_heads, size), np.int64)
            if old is not None:
                self._sums[:, :, : old.shape[2]] = old
        return self._sums

    def _queries_of(self, begin: int, event: int) -> NDArray[np.float32]:
        """Memory of the queries of rows [begin, event); rows that the last event had, too, are there already."""
        if self._queries is None or self._queries[0] != begin or self._queries[1].shape[1] != event - begin:
            width = self._shape.num_heads * self._shape.head_size
            memory = np.zeros((self._shape.num_layers, event - begin, width), np.float32)
            if self._queries is not None:
                had, old = self._queries
                if (common := had + old.shape[1] - begin) > 0:
                    memory[:, :common] = old[:, -common:]
            self._queries = begin, memory
        return self._queries[1]

    def _seen(self, tokens: int, read: Read) -> Seen:
        held, layers = self.held(tokens), list(self.layers)
        sums = queries = None
        if self._scoring.asks == "sums":
            sums = self._sums_of(tokens, tokens)[layers, :, : int(held.max())]
        elif self._scoring.asks == "queries":
            rows = self._queries_of(self._first_observed(tokens), tokens)[layers]
            queries = rows.reshape(len(layers), rows.shape[1], self._shape.num_heads, self._shape.head_size)
        return Seen(tokens, self.layers, held, sums, queries, read, self._rope, self._scale)

    def _whole(self, chosen: NDArray[np.bool_]) -> Kept:
        """Of the chosen slots [L', H_kv, n]."""
        shape, layers = (self._shape.num_layers, self._shape.num_kv_heads), list(self.layers)
        counts = np.full(shape, -1, np.int32)
        counts[layers] = chosen.sum(2)
        kept = np.full((*shape, int(counts.max())), -1, np.int32)
        for place, layer in enumerate(layers):
            for head in range(shape[1]):
                kept[layer, head, : counts[layer, head]] = np.flatnonzero(chosen[place, head])
        return Kept(kept, counts)

    def _carried(self, kept: Kept) -> NDArray[np.int64] | None:
        """The sums of the slots that were kept."""
        if self._sums is None:
            return None
        found = np.take_along_axis(self._sums, np.maximum(kept.kept, 0).astype(np.int64), 2)
        found[kept.kept < 0] = 0
        return found
