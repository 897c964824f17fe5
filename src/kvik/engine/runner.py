"""From scheduled sequences to a pass, and from its logits to the sequences they belong to."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvik.engine.scheduler import Scheduled
from kvik.engine.sequence import Sequence
from kvik.ops import Executor, Pass

__all__ = ["RowLogits", "build_pass", "run_step"]


class RowLogits(NamedTuple):
    """Logits [rows, V] of a sequence's rows; first is the token index of the first. Valid until the next step."""

    sequence: Sequence
    first: int
    logits: NDArray[np.float32]


def build_pass(step: list[Scheduled]) -> Pass:
    """The step as arrays: rows of each sequence one after another, position and slot counted from its start."""
    tokens: list[int] = []
    slots: list[int] = []
    spans, block_spans, logit_rows = [0], [0], []
    for sequence, count in step:
        start, first_row = sequence.num_computed, len(tokens)
        tokens += sequence.tokens[start : start + count]
        slots += range(start, start + count)
        logit_rows += [first_row + r for r in sequence.logit_rows(count)]
        spans.append(len(tokens))
        block_spans.append(block_spans[-1] + len(sequence.table.blocks))
    blocks = step[0].sequence.table.blocks
    if len(step) > 1:
        blocks = np.concatenate([s.sequence.table.blocks for s in step])
    places = np.array(slots, np.int32)  # nothing is evicted yet, so a token's position is its slot
    return Pass(
        np.array(tokens, np.int32), places, places, np.array(spans, np.int32), blocks,
        np.array(block_spans, np.int32), np.array(logit_rows, np.int32),
    )  # fmt: skip


def run_step(executor: Executor, step: list[Scheduled]) -> list[RowLogits]:
    """Compute the step and advance its sequences; logits for those that have rows that need them."""
    logits = executor.run(build_pass(step))
    results, at = [], 0
    for sequence, count in step:
        rows = sequence.logit_rows(count)
        if rows:
            results.append(RowLogits(sequence, sequence.num_computed + rows[0], logits[at : at + len(rows)]))
            at += len(rows)
        sequence.num_computed += count
    return results
