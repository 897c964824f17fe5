"""Which sequences a step computes, and how many tokens of each. Knows blocks and counts, no model.

First come, first served: a step goes through the running requests, oldest first, then admits waiting ones while tokens,
sequences and blocks allow; the first that does not fit holds up those behind it, so that none starves. When blocks run out
the youngest request gives up its blocks and waits again, in front; what it had computed is computed again, with the same
bits (recomputation of Kwon et al. 2023, section 4.5), or, where tokens were evicted, its blocks are parked outside the pool.

Tokens are evicted at fixed positions: no chunk crosses one, and the next row after it finds the others gone.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from kvik.cache.blocks import BlockPool
from kvik.cache.eviction import Kept
from kvik.cache.layout import BLOCK_TOKENS, blocks_for
from kvik.cache.prefix import block_keys
from kvik.cache.sequence_cache import BlockCopy
from kvik.engine.moving import Mover
from kvik.engine.scoring import SCORE_COST
from kvik.engine.sequence import Group, Sequence
from kvik.errors import KvikError

__all__ = ["Scheduled", "Scheduler", "Step", "prompt_tokens_beside"]

MOST_LOST_ALONE = 8
"""Times that a request may give up its blocks with nobody beside it: scattered prefix hits can make it do so."""


def prompt_tokens_beside(decoding: int) -> int:
    """Prompt tokens of a step at most beside so many sequences that wait for their next token.

    A step with them takes three to four times one without, so that is how far apart tokens come while prompts do (time
    between tokens against time to the first one; docs/performance.md).
    """
    return 3 * (decoding + 8)


class Scheduled(NamedTuple):
    """The next `tokens` tokens of a sequence, starting at its `num_computed`."""

    sequence: Sequence
    tokens: int
    group: Group


@dataclass
class Step:
    """A step's work; block tables have room for it. copies come first, in order.

    evictions, evicted_tokens, parked, restored: as in `StepStats`. failed: requests that cannot go on, and why.
    """

    work: list[Scheduled] = field(default_factory=list)
    copies: list[BlockCopy] = field(default_factory=list)
    tokens: int = 0
    prompt_tokens: int = 0
    score_cost: int = 0
    prefix_query_tokens: int = 0
    prefix_hit_tokens: int = 0
    preemptions: int = 0
    evictions: int = 0
    evicted_tokens: float = 0.0
    parked: int = 0
    restored: int = 0
    failed: list[tuple[Group, Exception]] = field(default_factory=list)


class Scheduler:
    """Running and waiting requests over a pool of blocks.

    Args:
        pool: of blocks.
        max_batch_tokens: of a step.
        max_sequences: that run at once.
        mover: of blocks between two passes.
    """

    def __init__(self, pool: BlockPool, max_batch_tokens: int, max_sequences: int, mover: Mover) -> None:
        self.pool, self.mover = pool, mover
        self.max_batch_tokens, self.max_sequences = max_batch_tokens, max_sequences
        self.waiting: deque[Group] = deque()
        self.running: list[Group] = []
        # who did not fit: into how many slabs, beside how many blocks and sequences
        self._refused: tuple[Group, tuple[int, int, int]] | None = None

    @property
    def num_running(self) -> int:
        """Sequences that run, with those that beam searches may still branch into."""
        return sum(group.width for group in self.running)

    def add(self, group: Group) -> None:
        """Queue a request. The engine has made sure that it fits the pool."""
        self.waiting.append(group)

    def schedule(self) -> Step:
        """The step's work. Without any when nothing is left to do, or all that is left is being read."""
        step = Step()
        self._fill(step)
        if not step.work and not step.failed and any(_ready(group) for group in (*self.running, *self.waiting)):
            self._make_way(step)
            self._fill(step)
            if not step.work and not step.failed:
                raise KvikError(f"the pool of {self.pool.num_slabs} slabs cannot hold a request it has accepted")
        return step

    def _fill(self, step: Step) -> None:
        decoding = sum(s.pending == 1 and s.ready for group in self.running for s in group.sequences)
        prompts = min(prompt_tokens_beside(decoding) if decoding else self.max_batch_tokens, self.max_batch_tokens)
        at = 0
        while at < len(self.running):
            self._advance(self.running[at], step, prompts)
            at += 1
        free = self.max_sequences - self.num_running
        while self.waiting and step.tokens < self.max_batch_tokens and step.prompt_tokens < prompts:
            group = self.waiting[0]
            free -= group.width
            # One that was preempted this moment comes back only where nothing else is left, into a pool all its own.
            if free < 0 or (step.preemptions and self.running) or not self._admit(group, step):
                break
            self._advance(group, step, prompts)
            if not step.work:
                break

    def _make_way(self, step: Step) -> None:
        """What waits for its reader goes behind what could go on: that reader may wait for it."""
        for group in [group for group in self.running if not _ready(group)]:
            self._give_up_blocks(group, step, group.lasting)
        self.waiting = deque(sorted(self.waiting, key=lambda group: not _ready(group)))

    def _advance(self, group: Group, step: Step, prompts: int) -> None:
        """The group's next tokens into the step, as far as its budget goes."""
        if group.evicts and not self._evict(group, step):
            return
        mark = (len(step.work), len(step.copies), step.tokens, step.prompt_tokens)
        for place, sequence in enumerate(group.sequences):
            if place and not sequence.num_computed:  # waits for the first to compute what they share
                continue
            if not sequence.ready:
                continue
            count = min(sequence.pending, self.max_batch_tokens - step.tokens)
            is_prompt = sequence.pending > 1
            if is_prompt:
                count = min(count, prompts - step.prompt_tokens)
            count = min(count, sequence.within(SCORE_COST - step.score_cost))
            if sequence.evictor is not None:
                count = sequence.before_event(count)
                if not place and not group.forked:  # the others must find the scores of what they share
                    count = min(count, group.shared_tokens - sequence.num_computed)
            if count <= 0:
                continue
            while not sequence.cache.can_append(count):
                victim = self.running[-1]
                if victim is group:
                    self._undo(group, step, *mark)
                self._preempt(victim, step)
                if victim is group:
                    return
            sequence.cache.append(count, step.copies)
            step.work.append(Scheduled(sequence, count, group))
            step.tokens += count
            step.prompt_tokens += count if is_prompt else 0
            step.score_cost += sequence.score_cost(count)

    def _undo(self, group: Group, step: Step, work: int, copies: int, tokens: int, prompt_tokens: int) -> None:
        """The group's part of the step does not happen. What it holds stays whole where that is to be moved."""
        if group.lasting:
            self.mover.copy(step.copies[copies:])
            for sequence, _, _ in step.work[work:]:
                sequence.cache.truncate(sequence.num_computed)
        step.score_cost -= sum(sequence.score_cost(count) for sequence, count, _ in step.work[work:])
        del step.work[work:], step.copies[copies:]
        step.tokens, step.prompt_tokens = tokens, prompt_tokens

    def _evict(self, group: Group, step: Step) -> bool:
        """Sequences whose next row comes after an event give tokens up. False where the group had to give way, or fails.

        Those that hold the very same blocks (samples, beams that were one) go on sharing what they keep.
        """
        due = [sequence for sequence in group.sequences if sequence.event_due and sequence.ready]
        while due:
            lead = due[0]
            alike = [one for one in due if one is lead or _same_blocks(one, lead)]
            due = [one for one in due if one not in alike]
            try:
                kept = self.mover.choose(lead)
                while not lead.cache.can_evict(kept.counts):
                    victim = self.running[-1]
                    self._preempt(victim, step, lasting=victim is group)
                    if victim is group:
                        return False
                step.evicted_tokens += self._evict_alike(group, alike, kept)
            except Exception as error:  # of this request: the others go on
                step.failed.append((group, error))
                return False
            step.evictions += len(alike)
        return True

    def _evict_alike(self, group: Group, alike: list[Sequence], kept: Kept) -> float:
        """Sequences with the same blocks go on with what is kept of them; tokens they give up, all together."""
        before = alike[0].cache.tokens_kept
        fresh = self.mover.evict(alike[0], kept)
        group.note_bytes(fresh)
        for sequence in alike[1:]:
            self.mover.take(sequence, fresh.fork(sequence.num_computed), kept)
        self.mover.take(alike[0], fresh, kept)
        return (before - fresh.tokens_kept) * len(alike)

    def _admit(self, group: Group, step: Step) -> bool:
        """Let the first waiting request run if its blocks are there, and one more for every running sequence."""
        free, held, running = state = (self.pool.num_free_slabs, self.pool.num_held, self.num_running)
        if self.running and self._refused is not None and self._refused[0] is group:
            then = self._refused[1]
            if (free, running) == (then[0], then[2]) and held >= then[1]:
                return False
        if not (self._begin(group, step) if group.parked is None else self._restore(group, step)):
            self._refused = (group, state)
            return False
        self.waiting.popleft()
        self.running.append(group)
        return True

    def _begin(self, group: Group, step: Step) -> bool:
        """A request with nothing computed takes over what the cache has. False where others must go on first."""
        lead = group.sequences[0]
        hit = self._claim_prefix(lead, group)
        if not self._has_blocks(group, hit):
            lead.cache.free()
            if self.running:
                return False
            hit = 0  # what it could have shared lies scattered over slabs that it needs; by itself it fits
        lead.num_computed = hit
        if self.pool.index is not None:
            step.prefix_query_tokens += lead.cacheable + 1
        step.prefix_hit_tokens += hit
        if not group.times.preemptions:
            group.times.cached_tokens = hit
        group.fork_ready()
        return True

    def _restore(self, group: Group, step: Step) -> bool:
        """A parked request's blocks come back. False where others must go on first."""
        assert group.parked is not None
        if self.running:
            needs = Counter(group.parked.needs) + _next_blocks([*self.running, group]) + _event_blocks(group)
            if not self.pool.can_take(needs):
                return False
        self.mover.restore(group)
        step.restored += 1
        return True

    def _has_blocks(self, group: Group, hit: int) -> bool:
        """Whether the pool has what the group's tokens take, and one block more for every other running sequence."""
        lead, *others = group.sequences
        needs = lead.cache.most_to_append(lead.pending - hit, self.max_batch_tokens)
        for other in others:
            most = other.cache.most_to_append(other.pending, self.max_batch_tokens)
            own = max(1, blocks_for(len(other.tokens)) - group.shared_tokens // BLOCK_TOKENS)
            needs = [need + min(own, each) for need, each in zip(needs, most, strict=True)]
        coming = group.width - len(group.sequences)
        layout = lead.cache.layout
        taken = layout.by_size(need + coming for need in needs) + _next_blocks(self.running) + _event_blocks(group)
        return self.pool.can_take(taken)

    def _claim_prefix(self, sequence: Sequence, group: Group) -> int:
        """Tokens the cache has already. Those from the first row whose logits are asked for on are always computed."""
        if self.pool.index is None or group.root is None:
            return 0
        tokens = sequence.cacheable
        if len(group.sequences) > 1 and (sequence.cache.forgets or group.evicts):
            tokens = min(tokens, group.shared_tokens)  # the others must find windows and scores where they fork
        if sequence.evictor is not None:
            tokens = sequence.evictor.hits_allowed(tokens)
        count = tokens // BLOCK_TOKENS
        block_keys(self.pool.index, group.root, sequence.tokens, sequence.keys, count)
        return sequence.cache.claim_prefix(sequence.keys[:count])

    def commit(self, step: Step) -> None:
        """The step's tokens are computed: samples fork, full blocks can be found, unseen ones are freed."""
        index = self.pool.index
        for sequence, count, group in step.work:
            sequence.num_computed += count
            if len(group.sequences) > 1:
                group.fork_ready()
            cache = sequence.cache
            if index is not None and group.root is not None and (full := cache.unregistered):
                block_keys(index, group.root, sequence.tokens, sequence.keys, full)
                cache.register(sequence.keys[:full])
            if cache.forgets:
                group.note_bytes()
                cache.free_unseen()

    def _preempt(self, group: Group, step: Step, lasting: bool = False) -> None:
        """lasting: it keeps what it has computed in any case."""
        if len(self.running) == 1:
            group.lost_alone += 1
        self._give_up_blocks(group, step, lasting or group.lasting)
        if group.lost_alone > MOST_LOST_ALONE:  # a defect of what `Engine.request` accepts; nobody may wait for it
            message = f"the pool of {self.pool.num_slabs} slabs cannot hold this request"
            step.failed.append((group, KvikError(message)))

    def _give_up_blocks(self, group: Group, step: Step, lasting: bool) -> None:
        """The group waits again, in front: to be computed again, or with its blocks outside the pool."""
        group.note_bytes()
        if lasting:
            self.mover.park(group)
            step.parked += 1
        else:
            group.restart()
        group.times.preemptions += 1
        step.preemptions += 1
        self.running.remove(group)
        self.waiting.appendleft(group)

    def end(self, group: Group) -> None:
        """Forget a request, finished or cancelled, and free its blocks."""
        if self._refused is not None and self._refused[0] is group:
            self._refused = None
        if group in self.running:
            self.running.remove(group)
        elif group in self.waiting:
            self.waiting.remove(group)
        for sequence in group.sequences:
            sequence.cache.free()
        group.sequences, group.parked = [], None

    def end_sequence(self, group: Group, sequence: Sequence) -> None:
        """One of a request's sequences has ended."""
        group.sequences.remove(sequence)
        sequence.cache.free()
        if not group.sequences:
            self.end(group)

    def check_integrity(self) -> None:
        """Raise KvikError unless every block is free, kept, or held by exactly the tables that list it."""
        sequences = [s for group in (*self.running, *self.waiting) for s in group.sequences]
        self.pool.check_integrity([s.cache.held() for s in sequences])


def _next_blocks(groups: Iterable[Group]) -> Counter[int]:
    """A block more in each table of every sequence, by size."""
    found = Counter[int]()
    for group in groups:
        tables = group.sequences[0].cache.layout.tables
        for table in tables:
            found[table.steps] += group.width
    return found


def _event_blocks(group: Group) -> Counter[int]:
    """What the next event takes for what sequences keep, by size: of those that hold the same it is taken once."""
    if group.copying is None:
        return Counter()
    count = sum(sequence.event_due for sequence in group.sequences) if group.parked is not None else 1
    each = group.copying(max(len(sequence.tokens) for sequence in group.sequences))
    return Counter({size: blocks * count for size, blocks in each.items()})


def _same_blocks(one: Sequence, other: Sequence) -> bool:
    """Whether two sequences hold the very same, and so were one until now."""
    if one is other:
        return True
    mine, its = one.cache.arrays, other.cache.arrays
    return (
        one.num_computed == other.num_computed and mine[1:] == its[1:] and bool(np.array_equal(mine.blocks, its.blocks))
    )


def _ready(group: Group) -> bool:
    """Whether its next tokens may be computed: nobody still reads what the last ones made."""
    return all(sequence.ready for sequence in group.sequences)
