"""Two runs on the same samples: what changed, and whether that could be chance."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from kvik.errors import DataError
from kvik.evaluation.metrics import METRICS
from kvik.evaluation.predictions import Id
from kvik.evaluation.runs import Run, RunSample
from kvik.evaluation.statistics import (
    LEVEL,
    Equivalence,
    Interval,
    bootstrap_test,
    equivalence,
    paired_bootstrap,
    permutation_test,
)
from kvik.jsonl import shown
from kvik.params import choose

__all__ = ["TESTS", "Change", "Difference", "RunComparison", "Test", "compare_runs"]

Test = Literal["permutation", "bootstrap"]
TESTS = {"permutation": permutation_test, "bootstrap": bootstrap_test}


@dataclass(frozen=True)
class Change:
    """A sample whose score differs. a, b: its scores."""

    id: Id
    a: float
    b: float


@dataclass(frozen=True)
class Difference:
    """One metric of two runs, over the samples that both have scored.

    Attributes:
        pairs: how many those are. unscored: samples of both runs that one of them has no score of.
        a, b: mean score of each run.
        difference: mean of b - a with its interval. p_value: of the test, two-sided.
        verdict: by the margin; None where none was given.
        changed: the samples with another score, most changed first.
        corpus: the metric's own value is not the mean of scores; what is compared is the mean all the same.
    """

    metric: str
    pairs: int
    unscored: int
    a: float
    b: float
    difference: Interval
    p_value: float
    margin: float | None
    verdict: Equivalence | None
    changed: tuple[Change, ...]
    corpus: bool


@dataclass(frozen=True)
class RunComparison:
    """Two runs. pairs: samples in both; only_a, only_b: ids in one alone; left_out: metrics not compared, and why."""

    pairs: int
    only_a: tuple[Id, ...]
    only_b: tuple[Id, ...]
    differences: tuple[Difference, ...]
    left_out: Mapping[str, str]


def compare_runs(
    a: Run, b: Run, metrics: Sequence[str] | None = None, *, test: Test = "permutation",
    margins: Mapping[str, float] | None = None, level: float = LEVEL, seed: int = 0,
) -> RunComparison:  # fmt: skip
    """Compare runs by the scores of the samples that have the same id.

    metrics: None takes those that both have scored alike. margins: by metric, how large a difference does not matter.
    Raises DataError for runs without a common id, with other references for one, or without a metric to compare;
    ParameterError for a metric neither has.
    """
    others = {sample.id: sample for sample in b.samples}
    pairs = [(sample, others[sample.id]) for sample in a.samples if sample.id in others]
    if not pairs:
        raise DataError(f"{a.name} and {b.name} have no sample in common")
    _same_references(a, b, pairs)
    chosen, left_out = _chosen(a, b, metrics)
    ids = {sample.id for sample in a.samples}
    found = []
    for name in chosen:
        scored = [(one, other) for one, other in pairs if _both(name, one, other)]
        if not scored:
            left_out[name] = "no sample has a score in both"
            continue
        found.append(_difference(name, scored, len(pairs), (margins or {}).get(name), test, level, seed))
    if not found:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in left_out.items())
        raise DataError(f"{a.name} and {b.name} have no metric to compare{': ' if reasons else ''}{reasons}")
    return RunComparison(
        len(pairs), tuple(one.id for one in a.samples if one.id not in others),
        tuple(other.id for other in b.samples if other.id not in ids), tuple(found), left_out,
    )  # fmt: skip


def _same_references(a: Run, b: Run, pairs: Sequence[tuple[RunSample, RunSample]]) -> None:
    other = [one.id for one, two in pairs if one.references != two.references]
    if other:
        count = "sample has" if len(other) == 1 else "samples have"
        raise DataError(
            f"{len(other)} {count} other references in {b.name} than in {a.name}, first id {shown(other[0])}: "
            "their scores cannot be compared"
        )


def _chosen(a: Run, b: Run, wanted: Sequence[str] | None) -> tuple[list[str], dict[str, str]]:
    """The metrics to compare; and those of only one run or with other signatures, if nobody asked for them."""
    if wanted is not None:
        known = tuple(dict.fromkeys((*a.metrics, *b.metrics)))
        wanted = list(dict.fromkeys(choose("--metric", name, known) for name in wanted))
    chosen, left_out = [], {}
    for name in dict.fromkeys((*a.metrics, *b.metrics)) if wanted is None else wanted:
        reason = _unlike(a, b, name)
        if reason is None:
            chosen.append(name)
        elif wanted is None:
            left_out[name] = reason
        else:
            raise DataError(f"{name} {reason}")
    return chosen, left_out


def _unlike(a: Run, b: Run, name: str) -> str | None:
    for run in (a, b):
        if name not in run.metrics:
            return f"is not scored in {run.name}"
    if a.manifest is None or b.manifest is None:
        return None
    one, other = a.manifest.metrics.get(name), b.manifest.metrics.get(name)
    return None if one == other else f"was scored in different ways: {one} in {a.name}, {other} in {b.name}"


def _both(name: str, one: RunSample, other: RunSample) -> bool:
    return one.scores.get(name) is not None and other.scores.get(name) is not None


def _difference(
    name: str, scored: Sequence[tuple[RunSample, RunSample]], pairs: int, margin: float | None, test: Test, level: float,
    seed: int,
) -> Difference:  # fmt: skip
    changes = [Change(one.id, one.scores[name] or 0.0, other.scores[name] or 0.0) for one, other in scored]
    a, b = [change.a for change in changes], [change.b for change in changes]
    difference = paired_bootstrap(a, b, level=level, seed=seed)
    changed = sorted((c for c in changes if c.a != c.b), key=lambda c: -abs(c.b - c.a))
    return Difference(
        name, len(scored), pairs - len(scored), math.fsum(a) / len(a), math.fsum(b) / len(b), difference,
        TESTS[test](a, b, seed=seed), margin, None if margin is None else equivalence(difference, margin), tuple(changed),
        name in METRICS and METRICS[name].pooled != "mean",
    )  # fmt: skip
