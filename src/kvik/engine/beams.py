"""A beam search on the engine's path: its beams are the sequences of a group, computed together in every step.

The prompt is computed once. In each step every beam has one token to be computed; once all have the candidates of their
last rows the search moves on: beams that are continued twice fork their cache, which copies a block only where it is
written to, and those that nobody continues give theirs back.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Sequences
from contextlib import suppress
from dataclasses import dataclass, field
from time import perf_counter

import numpy as np
from numpy.typing import NDArray

from kvik._native import Pool
from kvik.cache.sequence_cache import SequenceCache
from kvik.decoding.beam import BeamSearch, Chosen, Hypothesis
from kvik.decoding.best import Best, best_rows
from kvik.decoding.state import DecodingState, Edits
from kvik.engine.request import Choice, Chunk, FinishReason, Request, RequestStats, TokenLogprobs, Usage
from kvik.engine.runner import RowLogits
from kvik.engine.sequence import Group, Sequence, Timeline
from kvik.errors import DataError
from kvik.params import BeamParams
from kvik.text.detokenize import Detokenizer
from kvik.text.stop import StopChecker
from kvik.text.tokenizer import Tokenizer

__all__ = ["Beam", "BeamAnswer", "BeamGroup", "beam_group", "take_candidates"]


@dataclass(eq=False)
class Reading:
    """The text of a beam as far as it matters for stop strings."""

    detokenizer: Detokenizer
    stop: StopChecker

    def fork(self) -> Reading:
        return Reading(self.detokenizer.fork(), self.stop.fork())

    def stops(self, token: int) -> bool:
        """Take a token; whether a stop string is complete."""
        return self.stop.add(self.detokenizer.add((token,))).matched is not None


@dataclass(eq=False)
class Beam(Sequence):
    """A sequence that a search follows. found: the candidates after its last token; None until that is computed.

    reading: None without stop strings.
    """

    state: DecodingState = field(kw_only=True)
    reading: Reading | None = field(kw_only=True, default=None)
    found: Best | None = field(kw_only=True, default=None)

    def restart(self) -> None:
        super().restart()
        self.found = None

    def fork(self) -> Beam:
        """Another that begins alike and is computed as far."""
        state, reading = self.state.fork(), None if self.reading is None else self.reading.fork()
        evictor = None if self.evictor is None else self.evictor.fork()
        cache = self.cache.fork(self.num_computed)  # last: if anything above raises, it holds no blocks
        return Beam(
            self.tokens.copy(), cache, self.num_computed, self.keys.copy(), layout=self.layout, evictor=evictor,
            state=state, reading=reading,
        )  # fmt: skip

    def append(self, token: int) -> None:
        self.tokens.append(token)
        self.state.accept(token)
        if self.reading is not None:
            self.reading.stops(token)
        self.found = None


@dataclass(eq=False)
class BeamAnswer:
    """One of the answers that a search gives, as a sample is of a request's."""

    index: int
    text: str
    hypothesis: Hypothesis
    finish_reason: FinishReason
    most_tokens_held: int
    logprobs: tuple[TokenLogprobs, ...] | None
    usage: Usage | None = None
    stats: RequestStats | None = None

    def choice(self) -> Choice:
        path = self.hypothesis.node.path()
        return Choice(
            self.index, self.text, tuple(node.token for node in path), self.finish_reason,
            float(sum(node.logprob for node in path)), self.logprobs, self.hypothesis.score,
        )  # fmt: skip


@dataclass(eq=False)
class BeamGroup(Group):
    """The beams of one request; in the beginning one sequence, which computes the prompt.

    most_tokens_held: of context and pool, the smaller. end_ids: tokens that end an answer. samples: the answers, once
    they are known.
    """

    request: Request = field(kw_only=True)
    params: BeamParams = field(kw_only=True)
    search: BeamSearch = field(kw_only=True)
    tokenizer: Tokenizer = field(kw_only=True)
    end_ids: frozenset[int] = field(kw_only=True)
    most_tokens_held: int = field(kw_only=True)
    emit: Callable[[Chunk], None] = field(kw_only=True)
    _together: Best | None = field(default=None, init=False)
    _common: int = field(default=0, init=False)  # leading blocks that are the same in all tables

    @property
    def width(self) -> int:
        return self.params.num_beams

    @property
    def wanted(self) -> int:
        """Candidates of a row that the search and `logprobs` need."""
        return max(self.search.wanted, self.params.logprobs or 0)

    def restart(self) -> None:
        """Also: what all beams begin with is computed once again, not only the prompt."""
        super().restart()
        self._common = 0
        lead, *others = (sequence.tokens for sequence in self.sequences)
        length = len(lead) - 1  # beams of different groups may be alike, and each needs a row
        for tokens in others:
            length = min(length, next((i for i, (a, b) in enumerate(zip(lead, tokens, strict=True)) if a != b), length))
        if others:
            self.shared_tokens = length

    def held_bytes(self) -> int:
        """As `Group.held_bytes`, fast where all beams are equally far: looks at blocks only from where they differ on."""
        caches: list[SequenceCache] = [sequence.cache for sequence in self.sequences]
        lead, *others = caches
        if (
            not others or any(cache.num_tokens != lead.num_tokens for cache in others) or lead.evicted_at
            or lead.layout.executor.packed is not None or lead.layout.executor.window
        ):  # fmt: skip
            return super().held_bytes()
        first = [cache.tables[0].blocks for cache in caches]
        place, full = self._common, lead.num_full  # a full block is not written to again
        while place < full and all(blocks[place] == first[0][place] for blocks in first):
            place += 1
        self._common = place
        held = []
        for tables in zip(*(cache.tables for cache in caches), strict=True):
            begin = max(place, tables[0].first)
            own = {block for table in tables for block in table.blocks[begin:].tolist()}
            held.append(begin - tables[0].first + len(own))
        return lead.bytes_of_counts(held)

    # ---- the search

    def note(self, beams: Sequences[Beam], found: Best) -> None:
        """What may follow some of the beams. Others' rows may have more candidates than are wanted here."""
        most = self.wanted
        if found.ids.shape[1] > most:
            found = Best(found.ids[:, :most], found.logprobs[:, :most], np.minimum(found.found, most))
        if len(beams) == len(self.sequences):
            self._together = found
            return
        for place, beam in enumerate(beams):
            beam.found = _rows(found, slice(place, place + 1))

    def advance(self) -> int:
        """Where every beam has its candidates, a step of the search; tokens it took: of the beams that go on, or the last."""
        beams: list[Beam] = self.sequences
        together, self._together = self._together, None
        if together is None:
            found = [beam.found for beam in beams if beam.found is not None]
            if len(found) < len(beams):
                return 0
            ids, logprobs, counts = zip(*found, strict=True)
            together = Best(np.concatenate(ids), np.concatenate(logprobs), np.concatenate(counts))
        if not self.search.num_tokens:  # the prompt's candidates are those of every group's first beam
            count = len(self.search.beams)
            beams, together = beams * count, _rows(together, [0] * count)
        chosen = self.search.step(together, lambda beam, token: self._ends(beams[beam], token))
        if chosen:
            self._follow(beams, chosen)
        return len(chosen) or 1

    def _ends(self, beam: Beam, token: int) -> bool:
        return token in self.end_ids or (beam.reading is not None and beam.reading.fork().stops(token))

    def _follow(self, beams: list[Beam], chosen: Sequences[Chosen]) -> None:
        """The chosen beams take the place of those before: the first heir of each as itself, others as forks of it.

        The group owns a fork from the first moment on, so that its blocks are freed whatever raises before the end.
        """
        before: list[Beam] = list(self.sequences)
        kept: set[Beam] = set()
        heirs: list[Beam] = []
        for one in chosen:
            heir = beams[one.parent]
            if heir in kept:
                heir = heir.fork()
                self.sequences.append(heir)
            heirs.append(heir)
            kept.add(heir)
        for beam in before:
            if beam not in kept:
                beam.cache.free()
        for beam, one in zip(heirs, chosen, strict=True):
            beam.append(one.node.token)
        self.sequences = heirs

    # ---- the answers

    def conclude(self, cut: FinishReason | None) -> None:
        """Read the answers. cut: what ended the search, where that was not the search itself."""
        if cut == "error":
            self.samples = ()
            return
        found = self.search.best() if cut is None else self.search.best_so_far()
        self.samples = tuple(self._answer(index, one, cut) for index, one in enumerate(found))

    def _answer(self, index: int, found: Hypothesis, cut: FinishReason | None) -> BeamAnswer:
        path = found.node.path()
        text, stopped = self._read([node.token for node in path])
        reason: FinishReason = "stop" if stopped or found.ended else "no_token" if found.stranded else "length"
        noted = None
        if self.params.logprobs is not None:
            noted = tuple(TokenLogprobs(node.token, node.logprob, node.top) for node in path)
        return BeamAnswer(index, text, found, cut or reason, self.most_tokens_held, noted)

    def _read(self, tokens: list[int]) -> tuple[str, bool]:
        """Text up to a stop string or the token that ends it, and whether it has a stop string."""
        if tokens and tokens[-1] in self.end_ids:
            tokens = tokens[:-1]
        detokenizer = Detokenizer(self.tokenizer, after=self.request.prompt[-1])
        stop = StopChecker(self.params.stop)
        text, matched = stop.add(detokenizer.add(tokens) + detokenizer.finish())
        return text + stop.finish(), matched is not None

    @property
    def num_generated(self) -> int:
        """Tokens of the answers."""
        return sum(len(answer.hypothesis.node.path()) for answer in self.samples)

    def say(self, usage: Usage, stats: RequestStats) -> None:
        """Hand the answers out, or that there are none."""
        if not self.samples:
            self.emit(Chunk(0, "", (), None, "error", usage, stats))
            return
        self.samples[-1].usage, self.samples[-1].stats = usage, stats
        for answer in self.samples:
            tokens = tuple(node.token for node in answer.hypothesis.node.path())
            self.emit(Chunk(answer.index, answer.text, tokens, answer.logprobs or None, answer.finish_reason,
                            answer.usage, answer.stats))  # fmt: skip


def beam_group(
    request: Request, params: BeamParams, state: DecodingState, cache: SequenceCache, tokenizer: Tokenizer,
    most_tokens: int, emit: Callable[[Chunk], None],
) -> BeamGroup:  # fmt: skip
    """A request's search before its first step. state: the prompt's; most_tokens: that a sequence may have."""
    prompt = request.prompt
    ends = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else tokenizer.eos_ids)
    room = most_tokens - len(prompt)
    most = room if params.max_tokens is None else min(room, params.max_tokens)
    reading = Reading(Detokenizer(tokenizer, after=prompt[-1]), StopChecker(params.stop)) if params.stop else None
    return BeamGroup(
        [Beam(list(prompt), cache, state=state, reading=reading)], len(prompt), None, Timeline(perf_counter()),
        request=request, params=params, search=BeamSearch(params, most, len(ends)), tokenizer=tokenizer, end_ids=ends,
        most_tokens_held=most_tokens, emit=emit,
    )  # fmt: skip


def _rows(best: Best, rows: slice | list[int]) -> Best:
    return Best(best.ids[rows], best.logprobs[rows], best.found[rows])


def take_candidates(
    logits: NDArray[np.float32], rows: Sequences[RowLogits], pool: Pool | None
) -> dict[BeamGroup, Exception | None]:
    """Give the beams of these rows their candidates. Of each group what it fails with, or None: a row that is not finite, a
    grammar that is too costly or fails in any other way.

    pool: whose threads share the rows.
    """
    by_group: dict[BeamGroup, list[Beam]] = {}
    for row in rows:  # those of a group are together
        assert isinstance(row.sequence, Beam) and isinstance(row.group, BeamGroup)
        by_group.setdefault(row.group, []).append(row.sequence)
    failed: dict[BeamGroup, Exception | None] = dict.fromkeys(by_group)
    edits: list[Edits | None] = []
    for group, beams in by_group.items():
        try:
            edits += [beam.state.edits() for beam in beams]  # all of them or none
        except Exception as error:  # of this request: the others go on
            failed[group] = error
            edits += [None] * len(beams)
    chosen = logits if len(rows) == len(logits) else logits[[row.first_row for row in rows]]
    count = min(max(group.wanted for group in by_group), logits.shape[1])
    best: Best | None = None
    with suppress(DataError):  # some row is not finite: the others go on
        best = best_rows(chosen, edits, count, pool=pool)
    at = 0
    for group, beams in by_group.items():
        part = slice(at, at + len(beams))
        at = part.stop
        if failed[group] is not None:
            continue
        try:
            found = best_rows(chosen[part], edits[part], count) if best is None else _rows(best, part)
            group.note(beams, found)
        except DataError as error:
            failed[group] = DataError(f"position {len(beams[0].tokens)}: {error}")
    return failed
