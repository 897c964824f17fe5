"""Rows of logits of the kinds that samplers go wrong on."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest

Row = npt.NDArray[np.float32]
MakeRow = Callable[[np.random.Generator, int, str], Row]

KINDS = ("normal", "peaked", "flat", "ties", "equal", "holes", "huge")


def _row(rng: np.random.Generator, size: int, kind: str) -> Row:
    row = rng.normal(size=size) * 3.0
    if kind == "peaked":  # as a language model's: a few high, a long tail
        row = rng.normal(size=size) - np.log(rng.random(size)) - 10.0
        row[rng.permutation(size)[:30]] += np.linspace(18, 4, 30)[:size]
    elif kind == "flat":
        row *= 0.2
    elif kind == "ties":
        row = np.round(row)
    elif kind == "equal":
        row[:] = np.where(rng.random(size) < 0.5, 0.0, -0.0)
    elif kind == "holes":
        row[rng.random(size) < rng.choice([0.1, 0.9, 0.999])] = -np.inf
    elif kind == "huge":
        row *= 1e37
    return row.astype(np.float32)


@pytest.fixture(scope="session")
def make_row() -> MakeRow:
    return _row


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)
