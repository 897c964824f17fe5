"""Stands in for decoding/state.py and best_rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


class DecodingState:
    def __init__(self, params: Any, prompt: Sequence[int], vocab_size: int, words: Any, end_ids: Any, matcher: Any) -> None:
        self.params, self.left = params, params.min_tokens
        self.banned = sorted(end_ids)

    def edits(self) -> Any:
        return self.banned if self.left > 0 else None

    def accept(self, token: int) -> None:
        self.left -= 1

    def fork(self) -> DecodingState:
        other = object.__new__(DecodingState)
        other.__dict__.update(self.__dict__)
        return other


def best_rows(logits: Any, edits: Sequence[Any], count: int) -> Any:
    rows = logits - logits.max(1, keepdims=True)
    rows = rows - np.log(np.exp(rows).sum(1, keepdims=True))
    for row, edit in zip(rows, edits, strict=True):
        if edit:
            row[edit] = -np.inf
    part = np.argpartition(-rows, min(4 * count, rows.shape[1] - 1), axis=1)[:, : 4 * count]
    part.sort(axis=1)
    ids = np.take_along_axis(part, np.argsort(-np.take_along_axis(rows, part, 1), axis=1, kind="stable"), 1)[:, :count]
    values = np.take_along_axis(rows, ids, 1)
    return ids.astype(np.int32), values.astype(np.float32), (values > -np.inf).sum(1).astype(np.int32)
