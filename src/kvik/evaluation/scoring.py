"""Metrics of samples: which settings each takes, its value with an interval, and what could not be scored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from inspect import Parameter, signature
from types import UnionType
from typing import Any

from kvik.errors import DataError, ParameterError
from kvik.evaluation.metrics import GROUPS, METRICS, Metric, MetricResult, Unscored
from kvik.evaluation.predictions import Sample, SampleFile, need_references
from kvik.evaluation.statistics import LEVEL, RESAMPLES, Interval, bootstrap_mean, bootstrap_sums
from kvik.jsonl import shown
from kvik.params import choose

__all__ = ["NO_INTERVAL", "Scored", "metric_names", "score_samples", "settings_of"]

NO_INTERVAL = {
    "set": "it judges the samples together, and drawing some of them twice would change what it measures",
    "sums": "it kept nothing that could be added up again",
}
"""Why a metric has no interval, by how it is pooled."""

_KINDS: Mapping[type | UnionType, str] = {int: "a whole number", str: "text", str | int: "text or a whole number"}


@dataclass(frozen=True)
class Scored:
    """A metric of some samples.

    Attributes:
        result: as the metric gave it; entry i is of sample i, also where some had no prediction.
        interval: of the value, over drawn samples; None where no_interval says why not.
    """

    metric: str
    result: MetricResult
    interval: Interval | None
    no_interval: str | None


def metric_names(what: str, names: Sequence[str]) -> tuple[str, ...]:
    """The metrics that are named, groups taken apart, each once. what: how messages call them.

    Raises ParameterError naming the nearest for one that is unknown.
    """
    found: list[str] = []
    for given in names:
        name = choose(what, given, (*METRICS, *GROUPS))
        found += GROUPS.get(name, (name,))
    return tuple(dict.fromkeys(found))


def settings_of(metric: Metric) -> dict[str, Parameter]:
    """The settings a metric takes, by name: the keyword-only parameters of its function."""
    parameters = signature(metric.function, eval_str=True).parameters
    return {name: parameter for name, parameter in parameters.items() if parameter.kind is Parameter.KEYWORD_ONLY}


def score_samples(
    name: str,
    samples: SampleFile,
    settings: Mapping[str, Any],
    *,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Scored:
    """One metric of the samples.

    settings: by name, as the metric's function takes them. Raises ParameterError for one it does not take or lacks,
    DataError where samples have no references and the metric needs them.
    """
    metric = METRICS[name]
    there = [sample for sample in samples.samples if sample.missing is None]
    given = _given(name, metric, samples, there, settings)
    if metric.needs_references:
        need_references(samples)
    predictions = [sample.prediction or "" for sample in there]
    if not there:
        result = MetricResult(None, (), (), name)
    elif metric.needs_references:
        result = metric.function(predictions, [list(sample.references or ()) for sample in there], **given)
    else:
        result = metric.function(predictions, **given)
    interval, reason = _interval(metric, result, level, resamples, seed)
    return Scored(name, _spread(samples.samples, result), interval, reason)


def _given(
    name: str, metric: Metric, samples: SampleFile, there: Sequence[Sample], settings: Mapping[str, Any]
) -> dict[str, Any]:
    """The settings, with those that the samples bring themselves."""
    known = settings_of(metric)
    for setting in settings:
        if setting not in known:
            takes = f"it takes {', '.join(known)}" if known else "it takes none"
            raise ParameterError(f"{name} takes no setting {setting!r}; {takes}")
    given = dict(settings)
    for setting in metric.by_sample:
        if setting not in given and any(setting in sample.fields for sample in there):
            given[setting] = [_field(samples, sample, setting, metric.by_sample[setting]) for sample in there]
    for setting, parameter in known.items():
        if parameter.default is Parameter.empty and setting not in given:
            by = ", or a field of each sample" if setting in metric.by_sample else ""
            raise ParameterError(f"{name} needs the setting {setting!r}{by}")
    return given


def _field(samples: SampleFile, sample: Sample, name: str, kind: type | UnionType) -> Any:
    if name not in sample.fields:
        raise DataError(f'line {sample.line}: has no "{name}", which other samples have', path=samples.name)
    value = sample.fields[name]
    if isinstance(value, bool) or not isinstance(value, kind):
        raise DataError(f"line {sample.line}: {name} must be {_KINDS[kind]}, got {shown(value)}", path=samples.name)
    return value


def _interval(
    metric: Metric, result: MetricResult, level: float, resamples: int, seed: int
) -> tuple[Interval | None, str | None]:
    scores = [score for score in result.per_sample if score is not None]
    if result.value is None or not scores:
        return None, "nothing could be scored"
    if metric.pooled == "mean":
        drawn = bootstrap_mean(scores, level=level, resamples=resamples, seed=seed)
        return drawn._replace(value=result.value), None
    if metric.pooled == "set" or result.sums is None:
        return None, NO_INTERVAL[metric.pooled]
    rows = result.sums.counts[[score is not None for score in result.per_sample]]
    sums = bootstrap_sums(rows, result.sums.value, level=level, resamples=resamples, seed=seed)
    return sums.interval._replace(value=result.value), None


def _spread(samples: Sequence[Sample], result: MetricResult) -> MetricResult:
    """The result with an entry for every sample, those without a prediction among them."""
    places = [index for index, sample in enumerate(samples) if sample.missing is None]
    scores: list[float | None] = [None] * len(samples)
    for place, score in zip(places, result.per_sample, strict=True):
        scores[place] = score
    unscored = [Unscored(places[one.index], one.reason) for one in result.unscored]
    unscored += [Unscored(i, sample.missing) for i, sample in enumerate(samples) if sample.missing is not None]
    return replace(
        result,
        per_sample=tuple(scores),
        unscored=tuple(sorted(unscored, key=lambda one: one.index)),
        reasons={places[index]: reason for index, reason in result.reasons.items()},
    )
