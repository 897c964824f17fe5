"""The one loop: schedule, compute, draw, hand out. Everything that asks a model for anything goes through `step`."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from time import perf_counter
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from kvik.cache.blocks import BlockPool
from kvik.cache.prefix import PrefixIndex
from kvik.cache.sequence_cache import SequenceCache
from kvik.cache.storage import PoolSize
from kvik.decoding.sampler import Drawn, DrawRequest, Sampler, sample_rows
from kvik.engine.admission import Admission, Model, scored_prompt
from kvik.engine.beams import Beam, BeamGroup, beam_group, take_candidates
from kvik.engine.moving import Mover
from kvik.engine.request import Chunk, FinishReason, Request, ScoreRequest, Usage
from kvik.engine.runner import RowLogits, StepResult, run_step
from kvik.engine.scheduler import Scheduler, Step
from kvik.engine.scoring import Reading, Scored, Scoring
from kvik.engine.sequence import Generating, Group, Timeline
from kvik.engine.stats import EngineStats, StepStats
from kvik.errors import DataError, TryAgainError
from kvik.ops import Executor
from kvik.params import AnyParams, BeamParams, CacheParams, EngineParams
from kvik.text.detokenize import Detokenizer
from kvik.text.stop import StopChecker

__all__ = ["Engine"]


class Engine:
    """Requests in, chunks out.

    Several threads may call it: each call waits for the step under way.

    Args:
        executor: computes passes.
        model: its sizes and its text side.
        cache: how keys and values are kept of requests that do not say.
        size: of the pool, the executor's storage.
        params: the machine's share.
    """

    def __init__(
        self, executor: Executor, model: Model, cache: CacheParams, size: PoolSize, params: EngineParams
    ) -> None:
        self.executor, self.model, self.params = executor, model, params
        index = PrefixIndex(model.identity.encode()) if params.prefix_sharing else None
        pool = BlockPool(size.num_slabs, size.slab_bytes, index)
        self.scheduler = Scheduler(pool, params.max_batch_tokens, params.max_sequences, Mover(executor, pool))
        self.stats = EngineStats()
        self.on_step: Callable[[StepStats], None] | None = None
        self._turn = threading.RLock()
        self.admission = Admission(model, cache, size, params)

    # ---- requests

    def request(
        self, prompt: tuple[int, ...], params: AnyParams, salt: str = "", cache: CacheParams | None = None
    ) -> Request:
        """A checked request; see `Admission.request`. cache: None is the engine's."""
        return self.admission.request(prompt, params, salt, cache)

    def score_request(
        self, token_ids: tuple[int, ...], *, reduce: bool = True, top: int = 0, first: int = 1, salt: str = "",
        cache: CacheParams | None = None,
    ) -> ScoreRequest:  # fmt: skip
        """A checked text to score; see `Admission.score_request`. cache: None is the engine's."""
        return self.admission.score_request(token_ids, reduce=reduce, top=top, first=first, salt=salt, cache=cache)

    def add(self, request: Request, emit: Callable[[Chunk], None]) -> Group:
        """Queue a request. emit gets its chunks, from inside `step`. TryAgainError where too many wait already."""
        tokenizer, params = self.model.tokenizer, request.params
        most = self.admission.most_tokens(request.cache, len(request.prompt), params.num_sequences)
        state = self.admission.decoding_state(request)
        if isinstance(params, BeamParams):
            group = beam_group(request, params, state, self._cache(request.cache), tokenizer, most, emit)
            return self._queue(self._prepared(group, request, len(request.prompt)))
        states = [state, *(state.fork() for _ in range(params.n - 1))]
        samples = [
            Generating(
                list(request.prompt), self._cache(request.cache), request=request, index=index,
                sampler=Sampler(self.model.vocab_size, params, request.seed, index), state=states[index],
                detokenizer=Detokenizer(tokenizer, after=request.prompt[-1]), stop=StopChecker(params.stop),
                end_ids=tokenizer.eos_ids, most_tokens_held=most, emit=emit,
            )
            for index in range(params.n)
        ]  # fmt: skip
        return self._queue(self._group(samples, request, len(request.prompt)))

    def add_score(self, request: ScoreRequest) -> Group:
        """Queue a text to be scored; its one sequence, a `Scoring`, has the result when the group is done."""
        ids, cache = request.token_ids, self._cache(request.cache)
        if request.reduce:
            ids = ids[:-1]  # nothing follows the last one
        return self._scored(Scoring(list(ids), cache, request=request, vocab_size=self.model.vocab_size))

    def add_reading(self, request: ScoreRequest) -> Group:
        """Queue a text whose rows of logits are read as they come; its one sequence is a `Reading`."""
        ids, cache = list(request.token_ids[:-1]), self._cache(request.cache)
        return self._scored(Reading(ids, cache, request=request, vocab_size=self.model.vocab_size))

    def _scored(self, sequence: Scoring | Reading) -> Group:
        group = self._group([sequence], sequence.request, scored_prompt(sequence.request.first))
        if sequence.unscored:
            return self._queue(group)
        group.sequences = []  # no row is asked for
        with self._turn:
            self.stats.requests += 1
            self.stats.finished += 1
        return group

    def _cache(self, cache: CacheParams) -> SequenceCache:
        return SequenceCache(self.scheduler.pool, self.admission.layout(cache))

    def _group(
        self, sequences: list[Generating] | list[Scoring | Reading], request: Request | ScoreRequest, prompt: int | None
    ) -> Group:
        group = Group(list(sequences), len(sequences[0].tokens), None, Timeline(perf_counter()))
        return self._prepared(group, request, prompt)

    def _prepared(self, group: Group, request: Request | ScoreRequest, prompt: int | None) -> Group:
        """What the group's cache asks for: the root of its blocks' keys, its layout's number, who evicts.

        prompt: tokens after which it does first, where the policy does not say.
        """
        layout, index = self.admission.layout(request.cache), self.scheduler.pool.index
        group.root = None if index is None else index.root(request.salt, layout.name)
        with self._turn:
            number = self.scheduler.mover.numbers.of(layout)
        for sequence in group.sequences:
            sequence.layout = number
        group.sequences[0].evictor = self.admission.evictor(request.cache, prompt)
        if group.evicts:
            group.copying = self.admission.room(request.cache, prompt).copying
        return group

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
        left, now = list(group.sequences), perf_counter()
        try:
            held = group.note_bytes()
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
        for group, error in step.failed:
            self._fail(group, error)
        if not step.work:
            return bool(step.failed)
        for _, _, group in step.work:
            if group.times.started is None:
                group.times.started = begun
        try:
            result = run_step(self.executor, step)
            self.scheduler.commit(step)
            self._note(result)
            generated = self._use(result.logits, result.rows)
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
            if isinstance(row.sequence, Beam | Scored):
                continue
            drawing.append((row.group, row.sequence, row.first_row))  # type: ignore[arg-type]
            for other in row.group.sequences[1:]:  # samples draw their first token from the first one's logits
                if row.sequence is row.group.sequences[0] and len(other.tokens) == row.group.shared_tokens:
                    drawing.append((row.group, other, row.first_row))
        if drawing:
            self._draw(logits, drawing)
        return len(drawing) + (self._search(logits, searching) if searching else 0)

    def _note(self, result: StepResult) -> None:
        """Give scored texts their rows."""
        for row in result.rows:
            if isinstance(row.sequence, Scored):
                logits = result.logits[row.first_row : row.first_row + row.count]
                self._scored_rows(row, partial(row.sequence.note, row.first, logits, self.executor.pool))
        for row in result.reduced_rows:
            assert isinstance(row.sequence, Scoring)
            own = result.reduced.rows(row.first_row, row.count, row.sequence.top)
            self._scored_rows(row, partial(row.sequence.note_reduced, row.first, own))

    def _scored_rows(self, row: RowLogits, note: Callable[[], None]) -> None:
        try:
            note()
        except Exception as error:  # of this text: the others go on
            self._fail(row.group, self._damaged(row.group, error) if isinstance(error, DataError) else error)
            return
        if row.sequence.pending == 0:
            self.stats.finished += 1
            self.scheduler.end(row.group)

    def _search(self, logits: NDArray[np.float32], rows: list[RowLogits]) -> int:
        """Beam searches go a step on where all rows are there; tokens they took."""
        now, count = perf_counter(), 0
        for group, failed in take_candidates(logits, rows, self.executor.pool).items():
            if failed is not None:
                self._fail(group, self._damaged(group, failed) if isinstance(failed, DataError) else failed)
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
        kept = group.sequences[0].cache.tokens_kept
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
                self._fail(group, self._damaged(group, outcome))
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
        """The draws of those that go on; a grammar that is too costly, or fails in any other way, ends its request."""
        asked: list[tuple[tuple[Group, Generating, int], DrawRequest]] = []
        for one in drawing:
            try:
                if not one[0].done:
                    asked.append((one, one[1].draw_request()))
            except Exception as error:  # of this request: the others go on
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
        sequence.usage = self._usage(group, sequence.request, generated, held, sequence.cache.tokens_kept)

    def _usage(self, group: Group, request: Request, generated: int, held: int, kept: float) -> Usage:
        return Usage(
            len(request.prompt), generated, group.times.cached_tokens, held, group.peak_bytes, kept, group.peak_unshared
        )

    def _damaged(self, group: Group, error: DataError) -> DataError:
        """The error of a row of logits, which knows the token, with the model's file and what may be wrong."""
        full = group.sequences[0].cache.layout.executor.full
        f16 = ', or its keys and values overflow the KV cache\'s f16 (kv="f32" holds them)' if "f16" in full[:2] else ""
        return DataError(f"{error}: the model's weights are damaged{f16}", path=self.model.path)

    def _count(self, step: Step, generated: int, begun: float) -> None:
        pool, running = self.scheduler.pool, self.scheduler.running
        unshared = unused = 0
        for group in running:
            for sequence in group.sequences:
                cache = sequence.cache
                unshared += cache.num_held
                unused += cache.unused_slots
        matrices, attention, rest = self.executor.times()
        seconds = perf_counter() - begun
        stats = StepStats(
            step.tokens, step.prompt_tokens, generated, self.scheduler.num_running, len(self.scheduler.waiting),
            step.prefix_query_tokens, step.prefix_hit_tokens, step.preemptions, len(step.copies), pool.num_held, unshared, unused,
            matrices, attention, rest, max(0.0, seconds - matrices - attention - rest),
            step.evictions, step.evicted_tokens, step.parked, step.restored,
        )  # fmt: skip
        self.stats.add(stats)
        if self.on_step is not None:
            self.on_step(stats)
