"""One sequence on its way: its tokens, its place in the cache, its text so far; and the group its request makes of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvik.cache.eviction import Evictor
from kvik.cache.parking import Parked
from kvik.cache.prefix import BlockKey
from kvik.cache.sequence_cache import SequenceCache, held_together
from kvik.decoding.sampler import Drawn, DrawRequest, Sampler
from kvik.decoding.state import DecodingState
from kvik.decoding.trace import TokenTrace, trace_token
from kvik.engine.request import (
    Choice,
    Chunk,
    FinishReason,
    Request,
    RequestStats,
    TokenLogprobs,
    Usage,
)
from kvik.text.detokenize import Detokenizer
from kvik.text.stop import StopChecker

__all__ = ["Generating", "Group", "Sequence", "Timeline"]


@dataclass(eq=False)
class Sequence:
    """A sequence has `tokens` it should have computed and `num_computed` it has; a step lets them catch up.

    layout: the executor's number of the layout of its cache. evictor: None where tokens are never given up at events.
    """

    tokens: list[int]
    cache: SequenceCache
    num_computed: int = 0
    keys: list[BlockKey] = field(default_factory=list)  # of its first full blocks
    layout: int = field(default=0, kw_only=True)
    evictor: Evictor | None = field(default=None, kw_only=True)

    @property
    def pending(self) -> int:
        """Tokens still to be computed."""
        return len(self.tokens) - self.num_computed

    def logit_rows(self, count: int) -> range:
        """Which of the next `count` rows need logits."""
        return range(count - 1, count) if count == self.pending else range(0)

    @property
    def cacheable(self) -> int:
        """Tokens at the start whose rows need no logits: the cache may have them already."""
        return len(self.tokens) - 1

    @property
    def ready(self) -> bool:
        """Whether its next tokens may be computed now."""
        return True

    def reduced_rows(self, count: int) -> range:
        """Which of the next `count` rows' logits are only reduced."""
        return range(0)

    def score_cost(self, count: int) -> int:
        """What the next `count` tokens of a text that is scored take of `scoring.SCORE_COST`."""
        return 0

    def within(self, cost: int) -> int:
        """Most of the next tokens whose `score_cost` is no more than that."""
        return self.pending

    @property
    def event_due(self) -> bool:
        """Whether tokens must be given up before the next row."""
        evictor, at = self.evictor, self.num_computed
        return evictor is not None and at > 0 and evictor.next_event(at) == at and self.pending > 0

    def before_event(self, count: int) -> int:
        """How many of the next `count` tokens come before the next event."""
        event = None if self.evictor is None else self.evictor.next_event(self.num_computed)
        return count if event is None else min(count, event - self.num_computed)

    def share(self, lead: Sequence, num_tokens: int) -> None:
        """Hold the first `num_tokens` slots of the lead's cache too, and be computed as far."""
        self.cache = lead.cache.fork(num_tokens)
        self.num_computed, self.keys = num_tokens, lead.keys[: self.cache.num_full]
        self.layout, self.evictor = lead.layout, None if lead.evictor is None else lead.evictor.fork()

    def restart(self) -> None:
        """Give the cache back; everything is computed again."""
        self.cache.free()
        self.num_computed = 0
        if self.evictor is not None:
            self.evictor.restart()


@dataclass(eq=False)
class Timeline:
    """When things happened to a request, on the clock of time.perf_counter."""

    arrived: float
    started: float | None = None
    first_token: float | None = None
    last_token: float | None = None
    gaps: list[float] = field(default_factory=list)
    cached_tokens: int = 0
    preemptions: int = 0

    def token(self, now: float) -> None:
        """A token is out, or one of each sample."""
        if self.last_token is None:
            self.first_token = now
        elif now != self.last_token:
            self.gaps.append(now - self.last_token)
        self.last_token = now

    def stats(self, now: float) -> RequestStats:
        started = now if self.started is None else self.started
        first = now if self.first_token is None else self.first_token
        return RequestStats(
            queue=started - self.arrived, prefill=first - started, decode=now - first,
            first_token=None if self.first_token is None else self.first_token - self.arrived,
            inter_token=tuple(self.gaps), cached_tokens=self.cached_tokens, preemptions=self.preemptions,
        )  # fmt: skip


@dataclass(eq=False)
class Group:
    """The sequences of one request, scheduled, preempted and cancelled together.

    The samples of a prompt share it: the first computes it, the others fork its cache. sequences: those that have not
    ended, the first leads. root: the key before those of first blocks; None without an index. shared_tokens: what all have in common.
    peak_bytes, peak_unshared: most bytes its blocks took, and would have taken without sharing, as far as noted.
    parked: where its blocks lie while it waits with what it has computed. copying: blocks, by size, that an event after so
    many tokens takes for what a sequence keeps.
    """

    sequences: list[Any]
    shared_tokens: int
    root: BlockKey | None
    times: Timeline
    error: Exception | None = None
    peak_bytes: int = 0
    peak_unshared: int = 0
    lost_alone: int = 0  # how often it gave up its blocks with nobody beside it
    parked: Parked | None = None
    copying: Callable[[int], Counter[int]] | None = None

    def __post_init__(self) -> None:
        self.samples = tuple(self.sequences)  # all of them, ended ones too

    @property
    def done(self) -> bool:
        return not self.sequences

    @property
    def width(self) -> int:
        """Sequences that it may have at once."""
        return len(self.sequences)

    @property
    def evicts(self) -> bool:
        """Whether its sequences give tokens up at events."""
        return self.sequences[0].evictor is not None

    @property
    def lasting(self) -> bool:
        """Whether what it holds is moved, not computed again: tokens are gone, or it may be longer than any context."""
        if self.sequences[0].cache.layout.executor.window:
            return True
        return any(sequence.cache.evicted_at for sequence in self.sequences)

    @property
    def forked(self) -> bool:
        """Whether its sequences went their own ways."""
        return all(sequence.num_computed for sequence in self.sequences[1:])

    def restart(self) -> None:
        """Give all blocks back; everything is computed again."""
        for sequence in self.sequences:
            sequence.restart()

    def fork_ready(self) -> None:
        """Where the first sequence has computed what all share, the others take it over."""
        lead = self.sequences[0]
        if lead.num_computed < self.shared_tokens:
            return
        for other in self.sequences[1:]:
            if not other.num_computed:
                other.share(lead, self.shared_tokens)

    def held_bytes(self) -> int:
        """Bytes of the blocks the sequences hold, shared ones counted once."""
        return held_together([sequence.cache for sequence in self.sequences])

    def note_bytes(self, besides: SequenceCache | None = None) -> int:
        """`held_bytes`, which may be the most so far; besides: a cache that takes the place of one."""
        if besides is None:
            held = self.held_bytes()
        else:
            held = held_together([*(sequence.cache for sequence in self.sequences), besides])
        self.peak_bytes = max(self.peak_bytes, held)
        unshared = sum(sequence.cache.held_bytes for sequence in self.sequences)
        self.peak_unshared = max(self.peak_unshared, unshared + (0 if besides is None else besides.held_bytes))
        return held


@dataclass(eq=False)
class Generating(Sequence):
    """A sequence that goes on with tokens drawn from its logits."""

    request: Request = field(kw_only=True)
    index: int = field(kw_only=True)
    sampler: Sampler = field(kw_only=True)
    state: DecodingState = field(kw_only=True)
    detokenizer: Detokenizer = field(kw_only=True)
    stop: StopChecker = field(kw_only=True)
    end_ids: frozenset[int] = field(kw_only=True)
    most_tokens_held: int = field(kw_only=True)  # of context and pool, the smaller
    emit: Callable[[Chunk], None] = field(kw_only=True)
    text: list[str] = field(default_factory=list)
    cumulative_logprob: float = 0.0
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    traces: list[TokenTrace] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    usage: Usage | None = None  # of the request, set before its last sample ends
    stats: RequestStats | None = None

    def __post_init__(self) -> None:
        params = self.request.params
        ends = frozenset(params.stop_token_ids)
        self._ends = ends if params.ignore_eos else ends | self.end_ids
        room = self.most_tokens_held - len(self.request.prompt)
        most = room if params.max_tokens is None else min(room, params.max_tokens)
        self._length = len(self.request.prompt) + most

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - len(self.request.prompt)

    def draw_request(self) -> DrawRequest:
        return self.sampler.request(len(self.tokens), self.state)

    def trace(self, logits: NDArray[np.float32], request: DrawRequest, drawn: Drawn) -> None:
        """Note what the token was drawn from, logits [V]; before `outcome`, while the request's edits hold."""
        if drawn.token_id is not None:
            self.traces.append(trace_token(logits, request, drawn.token_id))

    def outcome(self, drawn: Drawn) -> FinishReason | None:
        """Append the drawn token; what ends the sample with it, except a stop string."""
        token = drawn.token_id
        if token is None:
            return "no_token"
        self.tokens.append(token)
        self.state.accept(token)
        self.cumulative_logprob += drawn.logprob
        if self.request.params.logprobs is not None:
            self.logprobs.append(TokenLogprobs(token, drawn.logprob, drawn.top))
        if token in self._ends or self.state.complete:
            return "stop"
        return "length" if len(self.tokens) >= self._length else None

    def readable(self, drawn: Drawn, reason: FinishReason | None) -> tuple[str, FinishReason | None]:
        """The text that becomes readable with the token, and the reason where it ends the sample."""
        if drawn.token_id is None or drawn.token_id in self._ends:
            return self._rest("", reason or "stop")
        emitted, matched = self.stop.add(self.detokenizer.add((drawn.token_id,)))
        if matched is not None:
            return emitted, "stop"
        return (emitted, None) if reason is None else self._rest(emitted, reason)

    def _rest(self, text: str, reason: FinishReason) -> tuple[str, FinishReason]:
        """What was held back as a possible stop string or character comes out at the end."""
        emitted, matched = self.stop.add(self.detokenizer.finish())
        rest = "" if matched is not None else self.stop.finish()
        return text + emitted + rest, "stop" if matched is not None else reason

    def end(self, reason: FinishReason) -> None:
        """End the sample between two tokens; what was held back comes out, unless it may be what failed."""
        text, reason = ("", reason) if reason == "error" else self._rest("", reason)
        self.say(text, (), reason)

    def say(self, text: str, tokens: tuple[int, ...], reason: FinishReason | None) -> None:
        """Hand a piece out."""
        self.text.append(text)
        self.finish_reason = reason
        noted = tuple(self.logprobs[-len(tokens) :]) if self.logprobs and tokens else None
        self.emit(Chunk(self.index, text, tokens, noted, reason, self.usage, self.stats))

    def choice(self) -> Choice:
        """The finished sample."""
        assert self.finish_reason is not None
        logprobs = tuple(self.logprobs) if self.request.params.logprobs is not None else None
        token_ids = tuple(self.tokens[len(self.request.prompt) :])
        return Choice(
            self.index, "".join(self.text), token_ids, self.finish_reason, self.cumulative_logprob, logprobs,
            trace=tuple(self.traces) if self.request.params.trace else None,
        )  # fmt: skip
