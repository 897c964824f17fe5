"""From a step's work to a pass, and from its logits to the rows they belong to."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvik.engine.scheduler import Step
from kvik.engine.scoring import Reading, Scoring
from kvik.engine.sequence import Group, Sequence
from kvik.ops import Executor, Observation, Pass, Reduced

__all__ = ["RowLogits", "StepResult", "build_pass", "run_step"]


class RowLogits(NamedTuple):
    """Rows of the step's logits, or of its reduced ones, that belong to a sequence: first_row to first_row + count.

    first: token index of the first. group: the sequence's.
    """

    sequence: Sequence
    group: Group
    first: int
    first_row: int
    count: int  # type: ignore[assignment]  # hides tuple.count


class StepResult(NamedTuple):
    """What a step computed, valid until the next one: logits [R, V] and what is left of reduced rows, and whose they are."""

    logits: NDArray[np.float32]
    rows: list[RowLogits]
    reduced: Reduced
    reduced_rows: list[RowLogits]


def build_pass(step: Step) -> Pass:
    """The step as arrays: rows of each sequence one after another, position and slot counted from its start."""
    tokens: list[int] = []
    slots: list[int] = []
    spans, logit_rows, top = [0], [], 0
    reduce_rows: list[int] = []
    targets: list[int] = []
    layouts: list[int] = []
    blocks: list[NDArray[np.int32]] = []
    lengths: list[int] = []
    shifts: list[int] = []
    for sequence, count, _ in step.work:
        start, first_row = sequence.num_computed, len(tokens)
        if count == 1:
            tokens.append(sequence.tokens[start])
            slots.append(start)
        else:
            tokens += sequence.tokens[start : start + count]
            slots += range(start, start + count)
        logit_rows += [first_row + r for r in sequence.logit_rows(count)]
        if isinstance(sequence, Scoring) and (reduced := sequence.reduced_rows(count)):
            reduce_rows += [first_row + r for r in reduced]
            targets += sequence.targets(reduced)
            top = max(top, sequence.top)
        spans.append(len(tokens))
        arrays = sequence.cache.arrays
        blocks.append(arrays.blocks)
        lengths += arrays.lengths
        shifts += arrays.shifts
        layouts.append(sequence.layout)
    places = np.array(slots, np.int32)  # evicted or not, a token's position is the number of tokens before it
    block_spans = np.zeros(len(lengths) + 1, np.int32)
    np.cumsum(lengths, out=block_spans[1:])
    return Pass(
        np.array(tokens, np.int32), places, places, np.array(spans, np.int32),
        np.array(layouts, np.int32), blocks[0] if len(blocks) == 1 else np.concatenate(blocks), block_spans,
        np.array(shifts, np.int32), np.array(logit_rows, np.int32), np.array(step.copies, np.int32).reshape(-1, 3),
        np.array(reduce_rows, np.int32), np.array(targets, np.int32), top, _memory(step), _observations(step),
    )  # fmt: skip


def _observations(step: Step) -> tuple[Observation, ...]:
    """What policies want to know of the step's rows."""
    found = []
    for place, (sequence, count, _) in enumerate(step.work):
        if sequence.evictor is not None:
            watched = sequence.evictor.observation(sequence.num_computed, count)
            if watched is not None:
                found.append(watched._replace(sequence=place))
    return tuple(found)


def _memory(step: Step) -> NDArray[np.float32] | None:
    """A reader's own, where all rows of logits are its."""
    asking = [sequence for sequence, count, _ in step.work if sequence.logit_rows(count)]
    return asking[0].memory if len(asking) == 1 and isinstance(asking[0], Reading) else None


def run_step(executor: Executor, step: Step) -> StepResult:
    """Compute the step."""
    logits = executor.run(build_pass(step))
    rows = _rows(step, lambda sequence, count: sequence.logit_rows(count))
    reduced = executor.reduced()
    reduced_rows = _rows(step, lambda sequence, count: sequence.reduced_rows(count)) if len(reduced.logsumexp) else []
    return StepResult(logits, rows, reduced, reduced_rows)


def _rows(step: Step, wanted: Callable[[Sequence, int], range]) -> list[RowLogits]:
    rows, at = [], 0
    for sequence, count, group in step.work:
        own = wanted(sequence, count)
        if own:
            rows.append(RowLogits(sequence, group, sequence.num_computed + own.start, at, len(own)))
            at += len(own)
    return rows
