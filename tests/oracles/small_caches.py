"""Sequences with tables of their own, without the cache's manager: for tests of executors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvik.ops import CacheView, Executor, Observation, Pass, Sizes
from kvik.ops.pages import ADDRESS_BYTES, CacheLayout, PageFormat


@dataclass
class Space:
    """A pool's addresses, handed out once each."""

    config: Sizes
    used: int = 0

    def take(self, units: int, page: PageFormat, count: int) -> np.ndarray[Any, Any]:
        """Addresses of so many blocks with `units` shares, in an order that is not theirs."""
        steps = units * page.share_bytes(self.config.head_size) // ADDRESS_BYTES
        first, self.used = self.used, self.used + steps * count
        return np.random.default_rng(self.used).permutation(np.arange(count) * steps + first).astype(np.int32)


@dataclass
class Held:
    """One sequence. length: slots in use, evicted ones counted; shifts: by group."""

    layout: CacheLayout
    number: int
    tables: list[np.ndarray[Any, Any]]
    shifts: list[int]
    length: int = 0

    @staticmethod
    def of(space: Space, layout: CacheLayout, number: int, tokens: int, shifts: Sequence[int] | None = None) -> Held:
        """With blocks for so many slots of each table."""
        tables = []
        for units in layout.units:
            for page in (layout.full, layout.packed):
                if page is not None:
                    tables.append(space.take(units, page, -(-tokens // page.tokens)))
        return Held(layout, number, tables, list(shifts or [0] * len(layout.units)))

    @property
    def view(self) -> CacheView:
        each = 1 if self.layout.packed is None else 2
        spans = np.cumsum([0] + [len(t) for t in self.tables]).astype(np.int32)
        shifts = np.repeat(np.array(self.shifts, np.int32), each)
        return CacheView(self.number, np.concatenate(self.tables), spans, shifts, self.length)

    def free(self, table: int, begin: int, end: int) -> None:
        """Forget blocks of a table."""
        self.tables[table][begin:end] = -1


def pass_of(
    chunks: Sequence[tuple[Held, Sequence[int]]],
    rows: Sequence[int] | None = None,
    observations: Sequence[Observation] = (),
) -> Pass:
    """Each sequence's next tokens; it counts them as computed. rows: that need logits; None: all."""
    views = [held.view for held, _ in chunks]
    lengths = [len(tokens) for _, tokens in chunks]
    slots = np.concatenate([held.length + np.arange(len(tokens)) for held, tokens in chunks])
    for held, tokens in chunks:
        held.length += len(tokens)
    fields = {
        "tokens": np.concatenate([np.asarray(tokens) for _, tokens in chunks]), "positions": slots, "slots": slots,
        "spans": np.cumsum([0, *lengths]), "layouts": [v.layout for v in views], "blocks": np.concatenate([v.blocks for v in views]),
        "block_spans": np.cumsum([0, *(n for v in views for n in np.diff(v.block_spans))]),
        "shifts": np.concatenate([v.shifts for v in views]), "logit_rows": np.arange(sum(lengths)) if rows is None else rows,
    }  # fmt: skip
    arrays = {name: np.asarray(x, np.int32) for name, x in fields.items()}
    return Pass(**arrays, observations=tuple(observations))


def run_chunks(
    executor: Executor, held: Held, tokens: Sequence[int], sizes: Sequence[int] = ()
) -> np.ndarray[Any, Any]:
    """Logits of all tokens, computed in chunks of these sizes, then the rest at once."""
    found, at = [], 0
    for size in (*sizes, len(tokens)):
        part = tokens[at : at + size]
        if len(part):
            found.append(executor.run(pass_of([(held, part)])).copy())
        at += len(part)
    return np.concatenate(found)
