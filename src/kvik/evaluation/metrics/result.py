"""What every metric returns, and the one check of what it is given."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from kvik.errors import ParameterError

__all__ = ["MetricResult", "References", "Sums", "Unscored", "check_pairs", "check_texts", "mean_of"]

Floats = NDArray[np.float64]
References = Sequence[str | Sequence[str]]
"""One entry a prediction: a reference, or several."""


@dataclass(frozen=True)
class Unscored:
    """A sample without a score. index: from 0; reason: why, in words."""

    index: int
    reason: str


@dataclass(frozen=True)
class Sums:
    """What a corpus metric adds up over the samples, so that its interval needs no second look at the texts.

    counts: [N, C], a row a sample (zeros for one that is not scored). value: of added rows [R, C] the R values of the
    metric, in its own scale, with the settings it was made with; of all rows added it is MetricResult.value.
    """

    counts: Floats
    value: Callable[[Floats], Floats]


@dataclass(frozen=True)
class MetricResult:
    """What a metric found.

    Attributes:
        value: of all samples together, in the metric's scale; None where nothing could be scored.
        per_sample: one entry a prediction, None where that could not be scored.
        unscored: those, with the reason.
        signature: name, settings and version of the implementation: enough to repeat it.
        parts: what the value is made of, like precision and recall; the mean or corpus figure of each.
        sums: of a corpus metric, whose value is not the mean of per_sample; None for the others.
    """

    value: float | None
    per_sample: tuple[float | None, ...]
    unscored: tuple[Unscored, ...]
    signature: str
    parts: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    sums: Sums | None = field(default=None, repr=False, compare=False)


def mean_of(per_sample: Sequence[float | None]) -> float | None:
    """The mean of the scores that are there; None where there is none."""
    there = [score for score in per_sample if score is not None]
    return math.fsum(there) / len(there) if there else None


def check_texts(predictions: Sequence[str]) -> list[str]:
    """The predictions as a list. Raises ParameterError for one that is no str, and for a str in place of a list."""
    if isinstance(predictions, str) or not isinstance(predictions, Sequence):
        raise ParameterError(f"predictions must be a list of str, got {type(predictions).__name__}")
    for index, text in enumerate(predictions):
        if not isinstance(text, str):
            raise ParameterError(f"prediction {index} must be a str, got {type(text).__name__}")
    return list(predictions)


def check_pairs(predictions: Sequence[str], references: References) -> list[tuple[str, ...]]:
    """The references of each prediction, one or several. What both must be is checked here, for all metrics.

    Raises ParameterError for different numbers of them (both said), for what is no str, for a sample without references.
    """
    check_texts(predictions)
    if isinstance(references, str) or not isinstance(references, Sequence):
        raise ParameterError(f"references must be a list of str or of lists of str, got {type(references).__name__}")
    if len(predictions) != len(references):
        raise ParameterError(f"there are {len(predictions)} predictions and {len(references)} references")
    return [_several(index, given) for index, given in enumerate(references)]


def _several(index: int, given: str | Sequence[str]) -> tuple[str, ...]:
    if isinstance(given, str):
        return (given,)
    if not isinstance(given, Sequence):
        raise ParameterError(f"references of sample {index} must be a str or a list of str, got {type(given).__name__}")
    if not given:
        raise ParameterError(f"sample {index} has no references")
    for text in given:
        if not isinstance(text, str):
            raise ParameterError(f"a reference of sample {index} must be a str, got {type(text).__name__}")
    return tuple(given)
