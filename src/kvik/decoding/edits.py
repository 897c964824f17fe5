"""What is done to one row of logits before temperature, as plain data; `edited` does it, in the declared order."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvik.decoding import penalties

__all__ = ["Edits", "edit_stages", "edited"]

Ids = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]


class Edits(NamedTuple):
    """Of one row; None where nothing of a kind is to be done. The order of the fields is the order of work.

    Ids are int32 in [0, V), each at most once in a list. The arrays may be views of what a `DecodingState` goes on
    changing: they hold until its next `accept` or `restore`.

    bias_ids, biases [N]: logit_bias. banned: min_tokens and bad_words. mask: uint32 [ceil(V / 32)], a bit set is a token
    allowed. seen: what repetition_penalty looks at, and the penalty. counted, counts [N] int32: the answer's tokens and
    how often it has them, for presence and frequency. dry_ids, dry_penalties [N]. repeated: what would complete an
    n-gram again.
    """

    bias_ids: Ids | None = None
    biases: Floats | None = None
    banned: Ids | None = None
    mask: npt.NDArray[np.uint32] | None = None
    seen: Ids | None = None
    repetition: float = 1.0
    counted: Ids | None = None
    counts: Ids | None = None
    presence: float = 0.0
    frequency: float = 0.0
    dry_ids: Ids | None = None
    dry_penalties: Floats | None = None
    repeated: Ids | None = None


def edit_stages(row: Floats, edits: Edits | None) -> Iterator[tuple[str, Floats]]:
    """Name and row [V] after each kind of edit that is there, in order; names are those of the parameters."""
    if edits is None:
        return
    if edits.bias_ids is not None and edits.biases is not None:
        yield "logit_bias", (row := penalties.with_bias(row, edits.bias_ids, edits.biases))
    if edits.banned is not None:
        yield "banned", (row := penalties.ban(row, edits.banned))
    if edits.mask is not None:
        yield "grammar", (row := penalties.mask(row, edits.mask))
    if edits.seen is not None:
        yield "repetition_penalty", (row := penalties.repetition(row, edits.seen, edits.repetition))
    if edits.counted is not None and edits.counts is not None:
        if edits.presence:
            yield "presence_penalty", (row := penalties.presence(row, edits.counted, edits.presence))
        if edits.frequency:
            yield "frequency_penalty", (row := penalties.frequency(row, edits.counted, edits.counts, edits.frequency))
    if edits.dry_ids is not None and edits.dry_penalties is not None:
        yield "dry", (row := penalties.subtract(row, edits.dry_ids, edits.dry_penalties))
    if edits.repeated is not None:
        yield "no_repeat_ngram_size", (row := penalties.no_repeat_ngram(row, edits.repeated))


def edited(row: Floats, edits: Edits | None) -> Floats:
    """The row [V] after all its edits."""
    for _, after in edit_stages(row, edits):
        row = after
    return row
