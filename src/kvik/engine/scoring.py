"""Sequences that are scored: nothing is drawn, each given token's log-probability is noted, or its row handed out."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from kvik._native import Pool
from kvik.decoding.sampler import TokenLogprob
from kvik.engine.request import LogitRows, ScoreRequest, ScoreResult
from kvik.engine.sequence import Sequence
from kvik.errors import DataError
from kvik.ops import Reduced
from kvik.ops.reduction import empty_reduced, reduce_logits

__all__ = ["READ_ROWS", "SCORE_COST", "Reading", "Scored", "Scoring"]

READ_ROWS = 64
"""Rows of logits that exist at once where a text's are kept or read."""

ROW_COST = 1024
SCORE_COST = READ_ROWS * ROW_COST
"""What scoring may leave to be kept in a step, whatever the length and number of texts: a row of logits that is kept costs
1,024, a best token that is noted 1, what is only reduced nothing."""


@dataclass(eq=False)
class Scored(Sequence):
    """A sequence whose rows from the one before token `request.first` on are wanted, each once.

    next_row: token index of the first row that is still wanted; it stays where the sequence has to begin again.
    """

    request: ScoreRequest = field(kw_only=True)
    vocab_size: int = field(kw_only=True)
    next_row: int = field(init=False)

    def __post_init__(self) -> None:
        self.next_row = self.request.first - 1

    @property
    def reduces(self) -> bool:
        """Whether its rows are only reduced."""
        return False

    @property
    def unscored(self) -> int:
        """Rows that are still wanted."""
        return max(0, len(self.tokens) - self.next_row)

    @property
    def cacheable(self) -> int:
        return self.next_row

    def _rows(self, count: int) -> range:
        return range(min(count, max(0, self.next_row - self.num_computed)), count)

    def logit_rows(self, count: int) -> range:
        return range(0) if self.reduces else self._rows(count)

    def reduced_rows(self, count: int) -> range:
        return self._rows(count) if self.reduces else range(0)

    @property
    def _cost(self) -> int:
        return self.request.top if self.reduces else ROW_COST

    def score_cost(self, count: int) -> int:
        return self._cost * len(self._rows(count))

    def within(self, cost: int) -> int:
        return max(0, self.next_row - self.num_computed) + cost // self._cost if self._cost else self.pending

    def note(self, first: int, logits: NDArray[np.float32], pool: Pool | None) -> None:
        """Rows of logits from token index `first` on, which is next_row."""
        raise NotImplementedError

    def _went_on(self, first: int, rows: int) -> None:
        assert first == self.next_row
        self.next_row += rows


@dataclass(eq=False)
class Scoring(Scored):
    """Notes each row's figures, and the row itself where the request keeps logits."""

    def __post_init__(self) -> None:
        super().__post_init__()
        request = self.request
        count = len(request.token_ids) - request.first
        self.top = min(request.top, self.vocab_size)
        self._figures = empty_reduced(count, self.top)
        self._logits = None if request.reduce else np.empty((count + 1, self.vocab_size), np.float32)

    @property
    def reduces(self) -> bool:
        return self.request.reduce

    def targets(self, rows: range) -> tuple[int, ...]:
        """What follows these of the next rows."""
        start = self.num_computed + 1
        return self.request.token_ids[start + rows.start : start + rows.stop]

    def note(self, first: int, logits: NDArray[np.float32], pool: Pool | None) -> None:
        assert self._logits is not None
        place = first + 1 - self.request.first
        self._logits[place : place + len(logits)] = logits
        targets = np.array(self.request.token_ids[first + 1 : first + 1 + len(logits)], np.int32)
        self._note(first, reduce_logits(logits[: len(targets)], targets, self.top, pool))
        self._went_on(first, len(logits))

    def note_reduced(self, first: int, figures: Reduced) -> None:
        """Figures of the rows from token index `first` on, which is next_row. DataError where a row is not finite."""
        self._note(first, figures)
        self._went_on(first, len(figures.logsumexp))

    def _note(self, first: int, figures: Reduced) -> None:
        good = np.isfinite(figures.logsumexp)
        if not good.all():
            raise DataError(f"the logits after token {first + int(good.argmin())} are not finite")
        self._figures.put(first + 1 - self.request.first, figures)

    def result(self) -> ScoreResult:
        """All log-probabilities; valid once the sequence is computed."""
        request, found = self.request, self._figures
        logprobs = found.target_logits.astype(np.float64) - found.logsumexp
        return ScoreResult(request.token_ids, request.first, logprobs, found.logsumexp, self._best(), self._logits)

    def _best(self) -> tuple[tuple[TokenLogprob, ...], ...]:
        if not self.request.top:
            return ()
        found = self._figures
        logprobs = found.top_logits.astype(np.float64) - found.logsumexp[:, None]
        return tuple(
            tuple(map(TokenLogprob, ids, each))
            for ids, each in zip(found.top_ids.tolist(), logprobs.tolist(), strict=True)
        )


@dataclass(eq=False)
class Reading(Scored):
    """Hands its rows of logits out, as many as a step makes; while they are read it is not computed further."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._memory: NDArray[np.float32] | None = None
        self._unread: LogitRows | None = None
        self._read = True

    @property
    def ready(self) -> bool:
        return self._read

    @property
    def memory(self) -> NDArray[np.float32]:
        """Of the rows that are read, as many as a step makes."""
        if self._memory is None:
            self._memory = np.empty((READ_ROWS, self.vocab_size), np.float32)
        return self._memory

    def note(self, first: int, logits: NDArray[np.float32], pool: Pool | None) -> None:
        rows = self.memory[: len(logits)]
        if not np.may_share_memory(rows, logits):
            rows[:] = logits
        self._unread, self._read = LogitRows(first + 1, rows), False
        self._went_on(first, len(logits))

    def take(self) -> LogitRows | None:
        """The rows that wait, if any; they are valid until `go_on`."""
        rows, self._unread = self._unread, None
        return rows

    def go_on(self) -> None:
        """What was taken is read."""
        self._read = self._unread is None
