"""Whether a measure of language modelling says anything of a task: its correlation with the task's score over settings.

A setting is a model, a cache policy, a weights format …, for which both were measured. Fang et al. 2024
(arXiv:2410.23771) report over their models a Pearson correlation of about -0.96 between LongPPL and long-context tasks, and
about 0.2 for perplexity; what holds for other models and tasks is what this is for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kvik.errors import DataError, ParameterError
from kvik.evaluation.statistics import LEVEL, RESAMPLES, Interval, pearson, spearman

__all__ = ["LEAST_SETTINGS", "Correlation", "Setting", "correlate"]

LEAST_SETTINGS = 3


@dataclass(frozen=True)
class Setting:
    """name: for people. values: of each column; None where it could not be measured, as LongPPL without key tokens."""

    name: str
    values: Mapping[str, float | None]


@dataclass(frozen=True)
class Correlation:
    """Of one measure with the score.

    Attributes:
        measure, score: the columns.
        settings: that have both. left_out: names of those that lack one.
        pearson: linear correlation in [-1, 1] with its interval by bootstrap over settings. spearman: of the ranks.
        undefined: why there is no correlation, where both are None: one of the columns is constant.
    """

    measure: str
    score: str
    settings: int
    left_out: tuple[str, ...]
    pearson: Interval | None
    spearman: Interval | None
    undefined: str | None


def correlate(
    settings: Sequence[Setting],
    measures: Sequence[str],
    score: str,
    *,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[Correlation, ...]:
    """The correlation of each measure with the score, over the settings that have both.

    level, resamples, seed: of the bootstrap. Raises ParameterError for a column that a setting does not have, DataError for
    fewer than 3 settings with both.
    """
    return tuple(_correlation(settings, measure, score, level, resamples, seed) for measure in measures)


def _correlation(
    settings: Sequence[Setting], measure: str, score: str, level: float, resamples: int, seed: int
) -> Correlation:
    x, y, left_out = [], [], []
    for one in settings:
        for column in (measure, score):
            if column not in one.values:
                raise ParameterError(
                    f"setting {one.name!r} has no {column!r}, only {', '.join(one.values) or 'nothing'}"
                )
        a, b = one.values[measure], one.values[score]
        if a is None or b is None:
            left_out.append(one.name)
            continue
        for column, value in ((measure, a), (score, b)):
            if not math.isfinite(value):
                raise ParameterError(f"{column} of setting {one.name!r} must be finite, got {value}")
        x.append(a)
        y.append(b)
    if len(x) < LEAST_SETTINGS:
        lacking = f"; {', '.join(left_out)} lack one of the two" if left_out else ""
        raise DataError(
            f"a correlation of {measure} with {score} needs at least {LEAST_SETTINGS} settings, got {len(x)}{lacking}"
        )
    constant = next((name for name, values in ((measure, x), (score, y)) if min(values) == max(values)), None)
    if constant is not None:
        reason = f"{constant} is the same in all settings: no correlation is defined"
        return Correlation(measure, score, len(x), tuple(left_out), None, None, reason)
    linear = pearson(x, y, level=level, resamples=resamples, seed=seed)
    ranks = spearman(x, y, level=level, resamples=resamples, seed=seed)
    return Correlation(measure, score, len(x), tuple(left_out), linear, ranks, None)
