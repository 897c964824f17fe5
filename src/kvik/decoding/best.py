"""The best tokens of rows of logits after their edits: what beams go on with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvik import _native
from kvik.decoding import filters
from kvik.decoding.edits import Edits, edited
from kvik.errors import ParameterError

__all__ = ["Best", "best_rows", "best_rows_by_definition"]


class Best(NamedTuple):
    """Of R rows, falling, ties to the lower id: ids int32 and logprobs float32 [R, count]. The first found [R] of a row
    are tokens; the rest are -1 and -inf."""

    ids: npt.NDArray[np.int32]
    logprobs: npt.NDArray[np.float32]
    found: npt.NDArray[np.int32]


def _nothing(logits: npt.NDArray[np.float32], rows: int, count: int) -> Best:
    filters.check_rows(logits, rows)
    if not 1 <= count <= filters.MAX_VOCABULARY:
        raise ParameterError(f"count must be in [1, {filters.MAX_VOCABULARY}], got {count}")
    return Best(
        np.full((rows, count), -1, np.int32), np.full((rows, count), -np.inf, np.float32), np.zeros(rows, np.int32)
    )


def best_rows(
    logits: npt.NDArray[np.float32],
    edits: Sequence[Edits | None],
    count: int,
    *,
    pool: _native.Pool | None = None,
    isa: str = "",
) -> Best:
    """For each row of logits [R, V], the `count` best tokens of its log-softmax after its edits.

    The edits are done to log-probabilities, which are not normalised again: transformers does so in beam search. NaN or
    +inf in a row raises DataError. pool: whose threads share the rows.
    """
    best = _nothing(logits, len(edits), count)
    if len(edits):
        _native.best_rows(logits, list(edits), best.ids, best.logprobs, best.found, pool, isa)
    for row in np.flatnonzero(best.found < 0).tolist():
        filters.checked(logits[row])
    return best


def best_rows_by_definition(logits: npt.NDArray[np.float32], edits: Sequence[Edits | None], count: int) -> Best:
    """`best_rows` in numpy."""
    best = _nothing(logits, len(edits), count)
    for at, (row, edit) in enumerate(zip(logits, edits, strict=True)):
        scores = edited(filters.log_softmax(filters.checked(row)).astype(np.float32), edit)
        order = np.argsort(-scores, kind="stable")[:count]
        order = order[scores[order] > -np.inf]
        best.found[at] = len(order)
        best.ids[at, : len(order)], best.logprobs[at, : len(order)] = order, scores[order]
    return best
