"""Sequences that are scored: nothing is drawn, each given token's log-probability is noted, or its row handed out."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from kvik.decoding.sampler import TokenLogprob
from kvik.engine.request import LogitRows, ScoreRequest, ScoreResult
from kvik.engine.sequence import Sequence
from kvik.errors import DataError

__all__ = ["Reading", "Scored", "Scoring"]


@dataclass(eq=False)
class Scored(Sequence):
    """A sequence each of whose rows from the one before token `request.first` on needs logits, once.

    next_row: token index of the first row that is still wanted; it stays where the sequence has to begin again.
    """

    request: ScoreRequest = field(kw_only=True)
    vocab_size: int = field(kw_only=True)
    next_row: int = field(init=False)

    def __post_init__(self) -> None:
        self.next_row = self.request.first - 1

    @property
    def unscored(self) -> int:
        """Rows that are still wanted."""
        return max(0, len(self.tokens) - self.next_row)

    @property
    def cacheable(self) -> int:
        return self.next_row

    def logit_rows(self, count: int) -> range:
        return range(min(count, max(0, self.next_row - self.num_computed)), count)

    def score_rows(self, count: int) -> int:
        return len(self.logit_rows(count))

    def within(self, rows: int) -> int:
        return max(0, self.next_row - self.num_computed) + rows

    def note(self, first: int, logits: NDArray[np.float32]) -> None:
        """Rows of logits from token index `first` on, which is next_row."""
        assert first == self.next_row
        self._note(first, logits)
        self.next_row += len(logits)

    def _note(self, first: int, logits: NDArray[np.float32]) -> None:
        raise NotImplementedError


@dataclass(eq=False)
class Scoring(Scored):
    """Notes each row's figures, and the row itself where the request keeps logits."""

    def __post_init__(self) -> None:
        super().__post_init__()
        request = self.request
        count = len(request.token_ids) - request.first
        self._logprobs, self._logsumexp = np.empty(count, np.float64), np.empty(count, np.float64)
        self._logits = None if request.reduce else np.empty((count + 1, self.vocab_size), np.float32)
        self._top: list[tuple[TokenLogprob, ...]] = [()] * count

    def _note(self, first: int, logits: NDArray[np.float32]) -> None:
        """DataError where a row is not finite."""
        place = first + 1 - self.request.first
        if self._logits is not None:
            self._logits[place : place + len(logits)] = logits
        targets = np.array(self.request.token_ids[first + 1 : first + 1 + len(logits)], np.int64)
        rows = logits[: len(targets)]
        if not len(rows):
            return
        top = rows.max(axis=1)
        total = top + np.log(np.exp(rows - top[:, None]).sum(axis=1, dtype=np.float64))
        if not np.isfinite(total).all():
            raise DataError(f"the logits after token {first + int(np.isfinite(total).argmin())} are not finite")
        chosen = rows[np.arange(len(rows)), targets].astype(np.float64)
        self._logsumexp[place : place + len(rows)] = total
        self._logprobs[place : place + len(rows)] = chosen - total
        if self.request.top:
            for at, row in enumerate(rows):
                self._top[place + at] = _best(row, self.request.top, float(total[at]))

    def result(self) -> ScoreResult:
        """All log-probabilities; valid once the sequence is computed."""
        request = self.request
        top = tuple(self._top) if request.top else ()
        return ScoreResult(request.token_ids, request.first, self._logprobs, self._logsumexp, top, self._logits)


@dataclass(eq=False)
class Reading(Scored):
    """Hands its rows of logits out, as many as a step makes; while they are read it is not computed further."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._rows: NDArray[np.float32] = np.empty((0, self.vocab_size), np.float32)
        self._unread: LogitRows | None = None
        self._read = True

    @property
    def ready(self) -> bool:
        return self._read

    def _note(self, first: int, logits: NDArray[np.float32]) -> None:
        if len(self._rows) < len(logits):
            self._rows = np.empty_like(logits)
        rows = self._rows[: len(logits)]
        rows[:] = logits
        self._unread, self._read = LogitRows(first + 1, rows), False

    def take(self) -> LogitRows | None:
        """The rows that wait, if any; they are valid until `go_on`."""
        rows, self._unread = self._unread, None
        return rows

    def go_on(self) -> None:
        """What was taken is read."""
        self._read = self._unread is None


def _best(row: NDArray[np.float32], count: int, total: float) -> tuple[TokenLogprob, ...]:
    """The `count` best tokens of a row of logits, falling, ties to the lower id. total: logarithm of the sum of e^row."""
    count = min(count, len(row))
    least = np.partition(row, len(row) - count)[len(row) - count]
    known = np.flatnonzero(row >= least)
    order = known[np.argsort(-row[known], kind="stable")][:count]
    return tuple(TokenLogprob(token, float(row[token]) - total) for token in order.tolist())
