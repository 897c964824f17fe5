"""What a scorer is told and what it says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from kvik.ops import RopeTable

__all__ = ["Read", "Scoring", "Seen"]


class Read(Protocol):
    """What a next row would read of one layer and KV head, [slots in the table, D]; keys with rotary embedding."""

    def __call__(self, layer: int, head: int, what: Literal["keys", "values"], /) -> NDArray[np.float32]: ...


class Seen(NamedTuple):
    """A sequence at an event.

    tokens: so far, evicted ones counted; position and slot of the next row.
    layers: the L' that evict. held: [L', H_kv] slots of their tables, n the most of any.
    sums: [L', H_kv, n] int64 attention that each slot had from the observed rows and all query heads of the KV head, in
        steps of 2**-24. queries: [L', rows, H, D] float32 of the observed rows, before rotary embedding. Each where it is asked for.
    rope: None where positions are learned. scale: what products of queries and keys are multiplied by.
    """

    tokens: int
    layers: Sequence[int]
    held: NDArray[np.int64]
    sums: NDArray[np.int64] | None
    queries: NDArray[np.float32] | None
    read: Read
    rope: RopeTable | None
    scale: float


class Scoring(NamedTuple):
    """How a policy ranks slots.

    asks: what attention leaves of the observed rows. rows: how many rows before an event are observed; None: all.
    scores: [L', H_kv, n], higher is better; what stands past a table's slots does not matter.
    """

    asks: Literal["sums", "queries", "nothing"]
    rows: Callable[[Any], int | None]
    scores: Callable[[Any, Seen], NDArray[Any]]
