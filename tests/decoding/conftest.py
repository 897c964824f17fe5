"""Rows of logits of the kinds that samplers go wrong on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from kvik.decoding import Edits
from kvik.params import SamplingParams

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


FIELDS: dict[str, tuple[float, tuple[Any, ...]]] = {  # how often a field is there, and its values
    "top_p": (0.4, (0.0, 0.1, 0.25, 0.5, 0.7, 0.9, 0.95, 0.999, 0.9999999, 1.0)),
    "min_p": (0.3, (1e-300, 1e-6, 0.01, 0.05, 0.5, 1.0)),
    "typical_p": (0.3, (1e-9, 0.1, 0.5, 0.9, 0.999)),
    "epsilon_cutoff": (0.2, (1e-9, 1e-4, 0.01, 0.3, 0.9)),
    "eta_cutoff": (0.2, (1e-9, 1e-4, 0.01, 0.3, 0.9)),
    "top_n_sigma": (0.2, (0.1, 1.0, 2.0, 50.0)),
}


def random_params(rng: np.random.Generator, size: int) -> SamplingParams:
    """Any mixture of filters."""
    options: dict[str, Any] = {"temperature": float(rng.choice([0, 1e-30, 0.1, 0.7, 1, 1, 1.5, 50, 1e300]))}
    if rng.random() < 0.4:
        choices = [1, 2, 5, 50, size, size + 1, max(1, size // 2), max(size - 1, 1), 2000, 2**31 - 1]
        options["top_k"] = int(rng.choice(choices))
    options |= {name: float(rng.choice(values)) for name, (often, values) in FIELDS.items() if rng.random() < often}
    if rng.random() < 0.3:
        options |= {
            "xtc_probability": float(rng.choice([0.5, 1])),
            "xtc_threshold": float(rng.choice([0, 0.01, 0.1, 0.5])),
        }
    options |= {"logprobs": rng.choice([None, 0, 1, 5, 1000]), "logprobs_mode": str(rng.choice(["raw", "processed"]))}
    return SamplingParams(**options)


def random_edits(rng: np.random.Generator, size: int) -> Edits | None:
    """Any mixture of edits of a row, few and many, small and enormous."""
    if rng.random() < 0.4:
        return None

    def ids() -> np.ndarray:
        return rng.permutation(size)[: int(rng.choice([1, 2, 5, 50, 600, size]))].astype(np.int32)

    made = Edits()
    if rng.random() < 0.3:
        bias = ids()
        made = made._replace(bias_ids=bias, biases=(rng.normal(size=len(bias)) * 50).astype(np.float32))
    if rng.random() < 0.3:
        made = made._replace(banned=ids())
    if rng.random() < 0.3:
        made = made._replace(mask=rng.integers(0, 2**32, (size + 31) // 32, dtype=np.uint64).astype(np.uint32))
    if rng.random() < 0.4:
        made = made._replace(seen=ids(), repetition=float(rng.choice([0.01, 0.5, 1.1, 1.3, 10])))
    if rng.random() < 0.4:
        counted = ids()
        counts = rng.integers(1, 9, len(counted)).astype(np.int32)
        presence, frequency = float(rng.choice([0, 0.5, -1])), float(rng.choice([0, 0.3, -2]))
        made = made._replace(counted=counted, counts=counts, presence=presence, frequency=frequency)
    if rng.random() < 0.3:
        repeats = ids()
        penalties = (10 ** rng.uniform(-2, 38, len(repeats))).astype(np.float32)
        made = made._replace(dry_ids=repeats, dry_penalties=penalties)
    if rng.random() < 0.3:
        made = made._replace(repeated=ids())
    return made
