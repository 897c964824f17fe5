"""The one loop: schedule, compute, draw, hand out. Everything that asks a model for anything goes through `step`."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import numpy as np
from numpy.typing import NDArray

from kvik.cache.blocks import BlockPool, BlockTable
from kvik.cache.layout import BLOCK_TOKENS, KVLayout
from kvik.decoding.sampler import Sampler, sample_rows
from kvik.engine.request import Chunk, Request, ScoreRequest, ScoreResult, Usage
from kvik.engine.runner import RowLogits, run_step
from kvik.engine.scheduler import Scheduled, Scheduler
from kvik.engine.sequence import Generating, Scoring, Sequence
from kvik.errors import DataError, ParameterError
from kvik.ops import Executor
from kvik.params import SamplingParams
from kvik.text.detokenize import Detokenizer
from kvik.text.stop import StopChecker
from kvik.text.tokenizer import Tokenizer

__all__ = ["Engine", "EngineStats", "Score"]

SCORE_ROWS = 64
"""Rows of logits a scoring step builds at most: 64 x V floats, whatever the text's length."""


@dataclass
class EngineStats:
    """Totals since the engine began (or `reset`). Seconds by where a step's time goes; python is what remains."""

    steps: int = 0
    tokens: int = 0
    matrices: float = 0.0
    attention: float = 0.0
    rest: float = 0.0
    python: float = 0.0

    def reset(self) -> None:
        """Count from zero again."""
        self.steps = self.tokens = 0
        self.matrices = self.attention = self.rest = self.python = 0.0


class Score:
    """A score request under way: fills as its sequence is computed."""

    def __init__(self, request: ScoreRequest, vocab_size: int) -> None:
        self.request = request
        count = len(request.token_ids)
        self.logprobs = np.empty(count - 1, np.float64)
        self.logits = np.empty((count, vocab_size), np.float32) if request.return_logits else None

    def note(self, first: int, logits: NDArray[np.float32]) -> None:
        """Rows of logits from token index `first` on. DataError where one is not finite."""
        if self.logits is not None:
            self.logits[first : first + len(logits)] = logits
        targets = np.array(self.request.token_ids[first + 1 : first + 1 + len(logits)], np.int64)
        rows = logits[: len(targets)]
        if len(rows):
            top = rows.max(axis=1)
            total = np.log(np.exp(rows - top[:, None]).sum(axis=1, dtype=np.float64))
            if not np.isfinite(total).all():
                raise DataError(f"the logits after token {first + int(np.isfinite(total).argmin())} are not finite")
            chosen = rows[np.arange(len(rows)), targets].astype(np.float64)
            self.logprobs[first : first + len(rows)] = chosen - top - total

    def result(self) -> ScoreResult:
        """All log-probabilities; valid once the sequence is computed."""
        return ScoreResult(self.request.token_ids, self.logprobs, self.logits)


class Engine:
    """Requests in, chunks out.

    Args:
        executor: the model.
        tokenizer: its text side.
        layout: bytes of its cache; num_blocks of them.
        vocab_size, context_length: of the model.
        path: the model's, for messages.
    """

    def __init__(
        self,
        executor: Executor,
        tokenizer: Tokenizer,
        layout: KVLayout,
        num_blocks: int,
        *,
        vocab_size: int,
        context_length: int,
        max_batch_tokens: int,
        path: Path | None = None,
    ) -> None:
        self.path = path
        self.executor, self.tokenizer, self.layout = executor, tokenizer, layout
        self.vocab_size, self.context_length = vocab_size, context_length
        self.scheduler = Scheduler(BlockPool(num_blocks), max_batch_tokens)
        self.stats = EngineStats()
        self._scores: dict[Sequence, Score] = {}
        self._turn = threading.RLock()  # callers of several threads take turns, a step at a time

    def request(self, prompt: tuple[int, ...], params: SamplingParams) -> Request:
        """Check a prompt against the model and the cache. ParameterError says what does not fit, with both numbers."""
        self._check_ids(prompt, "the prompt")
        room = self.context_length - len(prompt)
        if room < 1:
            raise ParameterError(
                f"the prompt has {len(prompt)} tokens; the context holds {self.context_length}, one of them generated"
            )
        if params.min_tokens > room:
            raise ParameterError(f"min_tokens is {params.min_tokens}; after the prompt the context holds {room}")
        # Without max_tokens an answer ends where the context or the pool does.
        self._check_fits(len(prompt) + (1 if params.max_tokens is None else min(room, params.max_tokens)))
        outside = [token for token in params.stop_token_ids if token >= self.vocab_size]
        if outside:
            raise ParameterError(f"stop_token_ids must be in [0, {self.vocab_size - 1}], got {outside[0]}")
        seed = params.seed if params.seed is not None else secrets.randbits(64)
        return Request(prompt, params, seed)

    def _check_ids(self, ids: tuple[int, ...], what: str) -> None:
        if not ids:
            raise ParameterError(f"{what} is empty: it needs at least one token")
        for place, token in enumerate(ids):
            if not 0 <= token < self.vocab_size:
                raise ParameterError(
                    f"{what} has token id {token} at index {place}, outside [0, {self.vocab_size - 1}]"
                )

    def _check_fits(self, tokens: int) -> None:
        need = self.layout.blocks_for(tokens) * self.layout.block_bytes
        have = self.scheduler.pool.num_blocks * self.layout.block_bytes
        if need > have:
            raise ParameterError(
                f"{tokens} tokens need {need} bytes of KV cache and kv_bytes allows {have}; "
                "lower max_tokens or raise kv_bytes"
            )

    def add(self, request: Request, index: int, emit: Callable[[Chunk], None]) -> Generating:
        """Queue one sample of a request. emit gets its chunks, from inside `step`."""
        ends = self.tokenizer.eos_ids
        pool = self.scheduler.pool.num_blocks * BLOCK_TOKENS
        sequence = Generating(
            list(request.prompt), BlockTable(self.scheduler.pool), request=request, index=index,
            sampler=Sampler(self.vocab_size, request.params, request.seed, index, ends),
            detokenizer=Detokenizer(self.tokenizer, after=request.prompt[-1]), stop=StopChecker(request.params.stop),
            end_ids=ends, most_tokens_held=min(self.context_length, pool), emit=emit,
        )  # fmt: skip
        with self._turn:
            self.scheduler.add(sequence)
        return sequence

    def score_request(self, token_ids: tuple[int, ...], return_logits: bool = False) -> ScoreRequest:
        """Check a text to be scored, as `request` does a prompt."""
        self._check_ids(token_ids, "the text to score")
        if len(token_ids) > self.context_length:
            raise ParameterError(
                f"the text to score has {len(token_ids)} tokens; the context holds {self.context_length}"
            )
        self._check_fits(len(token_ids))
        return ScoreRequest(token_ids, return_logits)

    def add_score(self, request: ScoreRequest) -> Scoring:
        """Queue a text to be scored; `score_result` has the result when its sequence is computed."""
        sequence = Scoring(
            list(request.token_ids), BlockTable(self.scheduler.pool), request=request, most_rows=SCORE_ROWS
        )
        with self._turn:
            self._scores[sequence] = Score(request, self.vocab_size)
            self.scheduler.add(sequence)
        return sequence

    def score_result(self, sequence: Scoring) -> ScoreResult:
        """The finished result of a scoring sequence; it is forgotten here."""
        return self._scores.pop(sequence).result()

    def cancel(self, sequence: Sequence) -> None:
        """End a sequence early and free its blocks."""
        with self._turn:
            self.scheduler.end(sequence)
            self._scores.pop(sequence, None)
            if isinstance(sequence, Generating) and sequence.finish_reason is None:
                sequence.finish("cancelled")

    def usage(self, sequence: Generating) -> Usage:
        """What a sequence has taken so far; asked before its blocks are freed."""
        held = len(sequence.table.blocks) * self.layout.block_bytes
        prompt = len(sequence.request.prompt)
        return Usage(prompt, sequence.num_generated, 0, held, held, sequence.table.num_tokens)

    def step(self) -> bool:
        """One step of the loop. False when there was nothing to do. What fails ends the step's sequences, cancelled."""
        with self._turn:
            return self._step()

    def _step(self) -> bool:
        begun = perf_counter()
        step = self.scheduler.schedule()
        if not step:
            return False
        try:
            self._compute(step)
        except BaseException:  # Ctrl-C among them: what is between two tokens now could neither go on nor end
            for sequence, _ in step:
                self.cancel(sequence)
            raise
        self._count(sum(s.tokens for s in step), perf_counter() - begun)
        return True

    def _compute(self, step: list[Scheduled]) -> None:
        computed = run_step(self.executor, step)
        try:
            self._use(computed)
        except DataError as error:  # knows the token, not the model
            f16 = ', or its keys and values overflow the KV cache\'s f16 (kv="f32" holds them)'
            reason = "the model's weights are damaged" + (f16 if self.layout.format == "f16" else "")
            raise DataError(f"{error}: {reason}", path=self.path) from None

    def _use(self, computed: list[RowLogits]) -> None:
        """Draw from and note logits. DataError where some are not finite."""
        self._draw([r for r in computed if isinstance(r.sequence, Generating)])
        for row in computed:
            if isinstance(row.sequence, Scoring):
                self._scores[row.sequence].note(row.first, row.logits)
                if row.sequence.pending == 0:
                    self.scheduler.end(row.sequence)

    def _draw(self, rows: list[RowLogits]) -> None:
        if not rows:
            return
        generating = [r.sequence for r in rows if isinstance(r.sequence, Generating)]
        logits = rows[0].logits if len(rows) == 1 else np.concatenate([r.logits for r in rows])
        for sequence, drawn in zip(
            generating, sample_rows(logits, [s.draw_request() for s in generating]), strict=True
        ):
            sequence.take(drawn)
            if sequence.finish_reason is not None:
                sequence.usage = self.usage(sequence)
                self.scheduler.end(sequence)

    def _count(self, tokens: int, seconds: float) -> None:
        matrices, attention, rest = self.executor.times()
        stats = self.stats
        stats.steps += 1
        stats.tokens += tokens
        stats.matrices += matrices
        stats.attention += attention
        stats.rest += rest
        stats.python += max(0.0, seconds - matrices - attention - rest)
