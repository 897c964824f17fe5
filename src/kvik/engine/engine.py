"""The one loop: schedule, compute, draw, hand out. Everything that asks a model for anything goes through `step`."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from kvik.cache.blocks import BlockPool
from kvik.cache.layout import BLOCK_TOKENS, KVLayout
from kvik.cache.prefix import BlockKey, PrefixIndex
from kvik.cache.sequence_cache import SequenceCache
from kvik.decoding.grammar import Grammars
from kvik.decoding.sampler import Drawn, DrawRequest, Sampler, sample_rows
from kvik.decoding.state import DecodingState, Words
from kvik.engine.beams import Beam, BeamGroup, beam_group, take_candidates
from kvik.engine.request import Chunk, FinishReason, Request, ScoreRequest, Usage
from kvik.engine.runner import RowLogits, run_step
from kvik.engine.scheduler import Scheduler, Step
from kvik.engine.sequence import Generating, Group, Scoring, Timeline
from kvik.engine.stats import EngineStats, StepStats
from kvik.errors import DataError, KvikError, ParameterError, TryAgainError
from kvik.ops import Executor
from kvik.params import BeamParams, EngineParams, SamplingParams
from kvik.text.detokenize import Detokenizer
from kvik.text.stop import StopChecker
from kvik.text.tokenizer import Tokenizer
from kvik.text.words import bad_word_ids, breaker_ids

__all__ = ["Engine", "Model"]

MOST_BREAKERS = 16  # lists of dry_breakers that an engine remembers


@dataclass(frozen=True)
class Model:
    """What the engine knows of a model beside its executor. identity: what decides the bytes of a cached block."""

    tokenizer: Tokenizer
    vocab_size: int
    context_length: int
    path: Path | None = None
    identity: str = ""


class Engine:
    """Requests in, chunks out.

    Several threads may call it: each call waits for the step under way.

    Args:
        executor: computes passes.
        model: its sizes and its text side.
        layout: bytes of its cache; num_slabs of them.
        params: the machine's share.
    """

    def __init__(
        self, executor: Executor, model: Model, layout: KVLayout, num_slabs: int, params: EngineParams
    ) -> None:
        self.executor, self.model, self.layout, self.params = executor, model, layout, params
        index = PrefixIndex(f"{model.identity} {layout}".encode()) if params.prefix_sharing else None
        pool = BlockPool(num_slabs, layout.slab_blocks, index)
        self.scheduler = Scheduler(pool, params.max_batch_tokens, params.max_sequences)
        self.stats = EngineStats()
        self.on_step: Callable[[StepStats], None] | None = None
        self._turn = threading.RLock()
        self._breakers: dict[tuple[str, ...], tuple[tuple[int, ...], ...]] = {}
        self.grammars = Grammars(model.tokenizer, model.vocab_size)

    # ---- requests

    def request(self, prompt: tuple[int, ...], params: SamplingParams | BeamParams, salt: str = "") -> Request:
        """Check a prompt against the model and the cache. ParameterError says what does not fit, with both numbers."""
        context = self.model.context_length
        self._check_ids(prompt, "the prompt")
        room = context - len(prompt)
        if room < 1:
            raise ParameterError(
                f"the prompt has {len(prompt)} tokens; the context holds {context}, one of them generated"
            )
        if params.min_tokens > room:
            raise ParameterError(f"min_tokens is {params.min_tokens}; after the prompt the context holds {room}")
        name, count = ("num_beams" if isinstance(params, BeamParams) else "n"), params.num_sequences
        if count > self.params.max_sequences:
            raise ParameterError(f"{name} is {count}; max_sequences allows {self.params.max_sequences} at once")
        # Without max_tokens an answer ends where the context or the pool does.
        self._check_fits(len(prompt), 1 if params.max_tokens is None else min(room, params.max_tokens), params)
        outside = [token for token in params.stop_token_ids if token >= self.model.vocab_size]
        if outside:
            raise ParameterError(f"stop_token_ids must be in [0, {self.model.vocab_size - 1}], got {outside[0]}")
        if params.grammar is not None:
            self.grammars.compile(params.grammar)
        if isinstance(params, BeamParams):
            return Request(prompt, params, 0, salt)
        self._check_words(params)
        seed = params.seed if params.seed is not None else secrets.randbits(64)
        return Request(prompt, params, seed, salt)

    def _check_words(self, params: SamplingParams) -> None:
        """Refuse what names tokens that the model does not have."""
        last = self.model.vocab_size - 1
        outside = [token for token, _ in params.logit_bias if token > last]  # type: ignore[misc] # pairs by now
        if outside:
            raise ParameterError(f"logit_bias has token ids outside [0, {last}]: {', '.join(map(str, outside))}")
        for word in params.bad_words:
            ids = bad_word_ids(self.model.tokenizer, word)
            if not ids or any(token > last for sequence in ids for token in sequence):
                raise ParameterError(f"bad_words has {word!r}, which the model's vocabulary cannot write")

    def decoding_state(self, prompt: Sequence[int], params: SamplingParams | BeamParams) -> DecodingState:
        """What a sequence of a checked request begins with."""
        words = Words()
        if isinstance(params, SamplingParams):
            bad = [ids for word in params.bad_words for ids in bad_word_ids(self.model.tokenizer, word)]
            words = Words(tuple(bad), self._breaker_ids(params.dry_breakers) if params.dry_multiplier else ())
        ends, matcher = self.model.tokenizer.eos_ids, None
        if params.grammar is not None:
            matcher = self.grammars.compile(params.grammar).matcher(prompt[-1], ends.union(params.stop_token_ids))
        return DecodingState(params, prompt, self.model.vocab_size, end_ids=ends, words=words, matcher=matcher)

    def _breaker_ids(self, breakers: tuple[str, ...]) -> tuple[tuple[int, ...], ...]:
        """Remembered for the last few lists of breakers: finding them looks at the whole vocabulary."""
        found = self._breakers.pop(breakers, None) or breaker_ids(self.model.tokenizer, breakers)
        self._breakers[breakers] = found
        if len(self._breakers) > MOST_BREAKERS:
            del self._breakers[next(iter(self._breakers))]
        return found

    def score_request(
        self, token_ids: tuple[int, ...], return_logits: bool = False, top: int = 0, salt: str = ""
    ) -> ScoreRequest:
        """Check a text to be scored, as `request` does a prompt."""
        self._check_ids(token_ids, "the text to score")
        if len(token_ids) > self.model.context_length:
            raise ParameterError(
                f"the text to score has {len(token_ids)} tokens; the context holds {self.model.context_length}"
            )
        self._check_fits(len(token_ids), 0, None)
        return ScoreRequest(token_ids, return_logits, top, salt)

    def _check_ids(self, ids: tuple[int, ...], what: str) -> None:
        if not ids:
            raise ParameterError(f"{what} is empty: it needs at least one token")
        for place, token in enumerate(ids):
            if not 0 <= token < self.model.vocab_size:
                last = self.model.vocab_size - 1
                raise ParameterError(f"{what} has token id {token} at index {place}, outside [0, {last}]")

    def _slabs(self, prompt: int, answer: int, n: int) -> int:
        """Most slabs that n samples or beams of a prompt hold at once: what they share, and the rest n times."""
        whole = self.layout.sequence_blocks(prompt + answer, self.params.max_batch_tokens)
        groups = self.layout.groups
        shared = prompt // BLOCK_TOKENS if len(groups) == 1 and not groups[0].window else 0
        return self.layout.slabs_for([shared + n * (blocks - shared) for blocks in whole])

    def _check_fits(self, prompt: int, answer: int, params: SamplingParams | BeamParams | None) -> None:
        n = 1 if params is None else params.num_sequences
        slabs = self._slabs(prompt, answer, n)
        have = self.scheduler.pool.num_slabs
        if slabs > have:
            samples = f" of {n} {'beams' if isinstance(params, BeamParams) else 'samples'}" if n > 1 else ""
            raise ParameterError(
                f"{prompt + answer} tokens{samples} need {slabs * self.layout.slab_bytes} bytes of KV cache and kv_bytes "
                f"allows {have * self.layout.slab_bytes}; lower max_tokens or raise kv_bytes"
            )

    def _most_tokens(self, prompt: int, n: int) -> int:
        """Tokens a sample can have, by the context and the pool."""
        low, high = prompt + 1, self.model.context_length
        if self._slabs(prompt, high - prompt, n) <= self.scheduler.pool.num_slabs:
            return high
        while low < high:  # the largest that fits; `request` has made sure of the first
            middle = (low + high + 1) // 2
            fits = self._slabs(prompt, middle - prompt, n) <= self.scheduler.pool.num_slabs
            low, high = (middle, high) if fits else (low, middle - 1)
        return low

    def add(self, request: Request, emit: Callable[[Chunk], None]) -> Group:
        """Queue a request. emit gets its chunks, from inside `step`. TryAgainError where too many wait already."""
        tokenizer, params = self.model.tokenizer, request.params
        most = self._most_tokens(len(request.prompt), params.num_sequences)
        state = self.decoding_state(request.prompt, params)
        if isinstance(params, BeamParams):
            root = self._root(request.salt)
            return self._queue(beam_group(request, params, state, self._cache(), root, tokenizer, most, emit))
        samples = [
            Generating(
                list(request.prompt), self._cache(), request=request, index=index,
                sampler=Sampler(self.model.vocab_size, params, request.seed, index), state=state.fork(),
                detokenizer=Detokenizer(tokenizer, after=request.prompt[-1]), stop=StopChecker(params.stop),
                end_ids=tokenizer.eos_ids, most_tokens_held=most, emit=emit,
            )
            for index in range(params.n)
        ]  # fmt: skip
        return self._queue(self._group(samples, len(request.prompt), request.salt))

    def add_score(self, request: ScoreRequest) -> Group:
        """Queue a text to be scored; its one sequence, a `Scoring`, has the result when the group is done."""
        sequence = Scoring(list(request.token_ids), self._cache(), request=request, vocab_size=self.model.vocab_size)
        return self._queue(self._group([sequence], len(request.token_ids), request.salt))

    def _cache(self) -> SequenceCache:
        return SequenceCache(self.scheduler.pool, self.layout)

    def _root(self, salt: str) -> BlockKey | None:
        index = self.scheduler.pool.index
        return None if index is None else index.root(salt)

    def _group(self, sequences: list[Generating] | list[Scoring], shared: int, salt: str) -> Group:
        return Group(list(sequences), shared, self._root(salt), Timeline(perf_counter()))

    def _queue(self, group: Group) -> Group:
        with self._turn:
            if not self.has_room:
                raise TryAgainError(f"{len(self.scheduler.waiting)} requests wait already, max_waiting allows no more")
            self.scheduler.add(group)
            self.stats.requests += 1
        return group

    @property
    def has_room(self) -> bool:
        """Whether a further request would be queued: max_waiting beside those that the next step may let run."""
        return self.has_room_for(0)

    def has_room_for(self, others: int) -> bool:
        """`has_room`, once so many others are queued."""
        free = self.params.max_sequences - self.scheduler.num_running
        return len(self.scheduler.waiting) + others < self.params.max_waiting + max(0, free)

    @property
    def has_work(self) -> bool:
        return bool(self.scheduler.running or self.scheduler.waiting)

    def cancel(self, group: Group) -> None:
        """End a request early and free its blocks; samples under way say "cancelled"."""
        with self._turn:
            if not group.done:
                self.stats.cancelled += 1
                self._end(group, "cancelled")

    def _end(self, group: Group, reason: Literal["cancelled", "error"]) -> None:
        """End what is left of a request between two tokens."""
        left, held = list(group.sequences), group.note_bytes()
        now = perf_counter()
        try:
            if isinstance(group, BeamGroup):
                self._conclude(group, held, now, reason)
            for place, sequence in enumerate(left):
                if isinstance(sequence, Generating):
                    if place == len(left) - 1:
                        self._settle(group, sequence, held, now)
                    sequence.end(reason)
        finally:
            self.scheduler.end(group)

    def _fail(self, group: Group, error: Exception) -> None:
        """End a request that cannot go on; others are not concerned."""
        if not group.done:
            group.error = error
            self.stats.failed += 1
            self._end(group, "error")

    # ---- the loop

    def step(self) -> bool:
        """One step of the loop. False when there was nothing to do. What fails ends the requests it concerns."""
        with self._turn:
            return self._step()

    def _step(self) -> bool:
        begun = perf_counter()
        step = self.scheduler.schedule()
        for group in step.hopeless:
            self._fail(group, KvikError(f"the pool of {self.scheduler.pool.num_slabs} slabs cannot hold this request"))
        if not step.work:
            return bool(step.hopeless)
        for _, _, group in step.work:
            if group.times.started is None:
                group.times.started = begun
        try:
            logits, rows = run_step(self.executor, step)
            self.scheduler.commit(step)
            generated = self._use(logits, rows)
        except Exception as error:
            for _, _, group in step.work:
                self._fail(group, error)
            return True
        except BaseException:  # Ctrl-C: what is between two tokens now could neither go on nor end
            for _, _, group in step.work:
                self.cancel(group)
            raise
        self._count(step, generated, begun)
        return True

    def _use(self, logits: NDArray[np.float32], rows: list[RowLogits]) -> int:
        """Draw from and note logits; tokens drawn."""
        drawing: list[tuple[Group, Generating, int]] = []
        searching = [row for row in rows if isinstance(row.sequence, Beam)]
        for row in rows:
            if isinstance(row.sequence, Beam):
                continue
            if isinstance(row.sequence, Scoring):
                self._note(row, logits)
                continue
            drawing.append((row.group, row.sequence, row.first_row))  # type: ignore[arg-type]
            for other in row.group.sequences[1:]:  # samples draw their first token from the first one's logits
                if row.sequence is row.group.sequences[0] and len(other.tokens) == row.group.shared_tokens:
                    drawing.append((row.group, other, row.first_row))
        if drawing:
            self._draw(logits, drawing)
        return len(drawing) + (self._search(logits, searching) if searching else 0)

    def _note(self, row: RowLogits, logits: NDArray[np.float32]) -> None:
        sequence = row.sequence
        assert isinstance(sequence, Scoring)
        try:
            sequence.note(row.first, logits[row.first_row : row.first_row + row.count])
        except Exception as error:
            self._fail(row.group, self._damaged(error) if isinstance(error, DataError) else error)
            return
        if sequence.pending == 0:
            self.stats.finished += 1
            self.scheduler.end(row.group)

    def _search(self, logits: NDArray[np.float32], rows: list[RowLogits]) -> int:
        """Beam searches go a step on where all rows are there; tokens they took."""
        now, count = perf_counter(), 0
        for group, failed in take_candidates(logits, rows, self.executor.pool).items():
            if failed is not None:
                self._fail(group, self._damaged(failed) if isinstance(failed, DataError) else failed)
                continue
            try:
                count += self._advance(group, now)
            except Exception as error:  # of this request's text: the others go on
                self._fail(group, error)
        return count

    def _advance(self, group: BeamGroup, now: float) -> int:
        held, before = group.note_bytes(), group.search.num_tokens
        count = group.advance()
        if group.search.num_tokens > before:
            group.times.token(now)
        if group.search.done:
            self._conclude(group, held, now, None)
            self.stats.finished += 1
            self.scheduler.end(group)
        return count

    def _conclude(self, group: BeamGroup, held: int, now: float, cut: FinishReason | None) -> None:
        """Hand the answers of a search out; its blocks are freed after that."""
        group.conclude(cut)
        kept = group.sequences[0].cache.num_tokens
        group.say(self._usage(group, group.request, group.num_generated, held, kept), group.times.stats(now))

    def _draw(self, logits: NDArray[np.float32], drawing: list[tuple[Group, Generating, int]]) -> None:
        drawing, requests = self._requests(drawing)
        wanted = [row for _, _, row in drawing]
        chosen = logits if wanted == list(range(len(logits))) else logits[wanted]
        drawn: list[Drawn | DataError]
        try:
            drawn = [*sample_rows(chosen, requests, pool=self.executor.pool, in_place=True)]
        except DataError:  # some row is not finite: the others go on
            drawn = []
            for place, request in enumerate(requests):
                try:
                    drawn += sample_rows(chosen[place : place + 1], [request])
                except DataError as error:
                    drawn.append(error)
        now = perf_counter()
        for place, ((group, sequence, _), outcome) in enumerate(zip(drawing, drawn, strict=True)):
            if isinstance(outcome, DataError):
                self._fail(group, self._damaged(outcome))
            elif not group.done:
                group.times.token(now)
                try:
                    if sequence.request.params.trace:
                        sequence.trace(chosen[place], requests[place], outcome)
                    self._take(group, sequence, outcome, now)
                except Exception as error:  # of this request's text: the others go on
                    self._fail(group, error)

    def _requests(
        self, drawing: list[tuple[Group, Generating, int]]
    ) -> tuple[list[tuple[Group, Generating, int]], list[DrawRequest]]:
        """The draws of those that go on; a grammar that turns out too costly ends its request."""
        asked: list[tuple[tuple[Group, Generating, int], DrawRequest]] = []
        for one in drawing:
            try:
                if not one[0].done:
                    asked.append((one, one[1].draw_request()))
            except ParameterError as error:
                self._fail(one[0], error)
        asked = [pair for pair in asked if not pair[0][0].done]
        return [one for one, _ in asked], [request for _, request in asked]

    def _take(self, group: Group, sequence: Generating, drawn: Drawn, now: float) -> None:
        text, reason = sequence.readable(drawn, sequence.outcome(drawn))
        tokens = () if drawn.token_id is None else (drawn.token_id,)
        if reason is None:
            sequence.say(text, tokens, None)
            return
        held = group.note_bytes()
        if len(group.sequences) == 1:
            self.stats.finished += 1
            self._settle(group, sequence, held, now)
        sequence.say(text, tokens, reason)
        self.scheduler.end_sequence(group, sequence)

    def _settle(self, group: Group, sequence: Generating, held: int, now: float) -> None:
        """The last sample knows what its request took; asked for before its blocks are freed."""
        sequence.stats = group.times.stats(now)
        generated = sum(sample.num_generated for sample in group.samples)
        sequence.usage = self._usage(group, sequence.request, generated, held, sequence.cache.num_tokens)

    def _usage(self, group: Group, request: Request, generated: int, held: int, kept: int) -> Usage:
        return Usage(
            len(request.prompt), generated, group.times.cached_tokens, held, group.peak_bytes, kept, group.peak_unshared
        )

    def _damaged(self, error: DataError) -> DataError:
        """The error of a row of logits, which knows the token, with the model's file and what may be wrong."""
        f16 = ', or its keys and values overflow the KV cache\'s f16 (kv="f32" holds them)'
        reason = "the model's weights are damaged" + (f16 if self.layout.format == "f16" else "")
        return DataError(f"{error}: {reason}", path=self.model.path)

    def _count(self, step: Step, generated: int, begun: float) -> None:
        pool, running = self.scheduler.pool, self.scheduler.running
        unshared = unused = 0
        for group in running:
            for sequence in group.sequences:
                cache = sequence.cache
                unshared += cache.num_held
                unused += cache.unused_slots * len(cache.tables)
        matrices, attention, rest = self.executor.times()
        seconds = perf_counter() - begun
        stats = StepStats(
            step.tokens, step.prompt_tokens, generated, self.scheduler.num_running, len(self.scheduler.waiting),
            step.prefix_query_tokens, step.prefix_hit_tokens, step.preemptions, len(step.copies), pool.num_held, unshared, unused,
            matrices, attention, rest, max(0.0, seconds - matrices - attention - rest),
        )  # fmt: skip
        self.stats.add(stats)
        if self.on_step is not None:
            self.on_step(stats)
