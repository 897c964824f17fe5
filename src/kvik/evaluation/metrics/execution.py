"""Metrics of programs that were run: pass@k of their tests, and equality of their results with the reference's.

No program is run here: whether it passed is given, or `run` runs it. SQL queries are run, on a database they only read.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from kvik.errors import ParameterError
from kvik.evaluation.metrics.result import MetricResult, References, Unscored, check_pairs, mean_of, signature
from kvik.evaluation.metrics.sql import QueryError, QueryLimits, has_order, open_database, run_query, same_rows
from kvik.params.checks import integer

__all__ = ["Outcome", "Run", "execution_accuracy", "pass_at_k", "pass_rates"]


def pass_at_k(n: int, c: int, k: int) -> float:
    """The probability that one of k samples passes, drawn without return from n of which c passed.

    1 - C(n - c, k) / C(n, k), in [0, 1]: the unbiased estimator of pass@k of Chen et al. 2021, arXiv:2107.03374, equation
    1. Raises ParameterError for k > n and c > n, with both numbers.
    """
    integer("n", n, 1)
    integer("c", c, 0)
    integer("k", k, 1)
    if c > n:
        raise ParameterError(f"c must be at most n: {c} of {n} samples passed")
    if k > n:
        raise ParameterError(f"k must be at most n: pass@{k} needs {k} samples, there are {n}")
    if n - c < k:
        return 1.0
    few, many = sorted((c, k))  # C(n - c, k) / C(n, k) is symmetric in c and k
    all_fail = 1.0
    for i in range(few):
        all_fail *= (n - many - i) / (n - i)
        if all_fail == 0:
            break
    return 1.0 - all_fail


def pass_rates(
    predictions: Sequence[object],
    references: object = None,
    *,
    n: Sequence[int],
    c: Sequence[int],
    k: int | Sequence[int] = 1,
) -> MetricResult:
    """pass@k over problems: the mean of `pass_at_k`, in [0, 1]. Chen et al. 2021, arXiv:2107.03374.

    predictions: one entry a problem, only counted; references: not looked at. n: samples of each problem; c: how many of
    them passed. k: one or several; value and per_sample are of the first, parts has "pass@K" of each. All are over the same
    problems: one with fewer samples than the largest k is unscored, and where all have fewer, k is a ParameterError.
    """
    ks = (k,) if isinstance(k, int) else tuple(k)
    if not ks:
        raise ParameterError("k must name at least one number, got none")
    for one in ks:
        integer("k", one, 1)
    counts = _counts(len(predictions), n, c)
    largest, most = max(ks), max(n, default=0)
    if counts and largest > most:
        raise ParameterError(
            f"k must be at most n: pass@{largest} needs {largest} samples a problem, the most is {most}"
        )
    unscored = tuple(
        Unscored(index, f"has {made} samples, pass@{largest} needs {largest}")
        for index, (made, _) in enumerate(counts)
        if made < largest
    )
    scores = {
        one: tuple(None if made < largest else pass_at_k(made, passed, one) for made, passed in counts) for one in ks
    }
    parts = {f"pass@{one}": mean for one in ks if (mean := mean_of(scores[one])) is not None}
    signed = signature("pass_at_k", k=",".join(map(str, ks)), estimator="unbiased")
    return MetricResult(mean_of(scores[ks[0]]), scores[ks[0]], unscored, signed, parts)


def _counts(problems: int, n: Sequence[int], c: Sequence[int]) -> list[tuple[int, int]]:
    if not problems == len(n) == len(c):
        raise ParameterError(f"there are {problems} problems, {len(n)} of n and {len(c)} of c")
    for index, (made, passed) in enumerate(zip(n, c, strict=True)):
        integer(f"n of problem {index}", made, 1)
        integer(f"c of problem {index}", passed, 0)
        if passed > made:
            raise ParameterError(f"c of problem {index} must be at most n: {passed} of {made} samples passed")
    return list(zip(n, c, strict=True))


@dataclass(frozen=True)
class Outcome:
    """What running a program gave: its result, compared by ==, or the error that left it without one."""

    result: object = None
    error: str | None = None


Run = Callable[[str], Outcome]
Judge = Callable[[int, str, str], tuple[bool | None, str | None]]
"""(sample, prediction, reference) -> whether the results are the same, None where the reference has none; and why not."""


def execution_accuracy(
    predictions: Sequence[str],
    references: References,
    *,
    database: str | Path | Sequence[str | Path] | None = None,
    seconds: float | None = None,
    run: Run | None = None,
) -> MetricResult:
    """Share of predictions whose result is that of a reference, in [0, 1].

    With `database`, a SQLite file or one a sample, both are SQL queries, run as sql.py says, each at most `seconds` (10
    where None is given), 100,000 rows, 64 MiB. Results are equal as in Zhong, Yu and Klein 2020, "Semantic evaluation for text-to-SQL with distilled test suites",
    arXiv:2010.02840: the same rows as often, in the same order where the reference's query orders them. Unlike theirs,
    columns must come in the same order (as in BIRD, Li et al. 2023, arXiv:2305.03111, which compares sets of rows), an ORDER
    BY counts only where it orders the result itself, and queries run as they are written.
    With `run`, both are programs and `run` gives the outcome of each. With neither, both are outputs of programs already
    run, equal as text but for white space at the ends of lines and of the text.

    A prediction that fails scores 0; `reasons` has why. Of several references one that agrees is enough. Where none agrees
    and one of them fails, the sample is unscored.
    """
    samples = check_pairs(predictions, references)
    if database is not None and run is not None:
        raise ParameterError("database and run exclude each other: queries are run on the database")
    if seconds is not None and database is None:
        raise ParameterError("seconds are a query's: they need a database")
    limits = QueryLimits() if seconds is None else QueryLimits(seconds)
    scores: list[float | None] = []
    unscored: list[Unscored] = []
    reasons: dict[int, str] = {}
    with _judge(database, run, limits, len(samples)) as (judge, how):
        for index, (prediction, golds) in enumerate(zip(predictions, samples, strict=True)):
            score, reason = _judged(judge, index, prediction, golds)
            scores.append(score)
            if score is None:
                unscored.append(Unscored(index, reason or ""))
            elif reason is not None:
                reasons[index] = reason
    signed = signature("execution_accuracy", **how)
    return MetricResult(mean_of(scores), tuple(scores), tuple(unscored), signed, reasons=reasons)


def _judged(judge: Judge, index: int, prediction: str, golds: tuple[str, ...]) -> tuple[float | None, str | None]:
    """1, 0 or None for one sample, and the reason of what is not 1 where there is one."""
    failed, reason = None, None
    for gold in golds:
        same, why = judge(index, prediction, gold)
        if same:
            return 1.0, None
        if same is None:
            failed = why
        else:
            reason = why
    return (0.0, reason) if failed is None else (None, failed)


@contextmanager
def _judge(
    database: str | Path | Sequence[str | Path] | None,
    run: Run | None,
    limits: QueryLimits,
    count: int,
) -> Iterator[tuple[Judge, dict[str, object]]]:
    """How samples are judged, and what the signature says of it."""
    if database is not None:
        paths = [Path(database)] * count if isinstance(database, str | Path) else [Path(path) for path in database]
        if len(paths) != count:
            raise ParameterError(f"there are {count} predictions and {len(paths)} databases")
        with ExitStack() as stack:
            connections = {path: stack.enter_context(open_database(path)) for path in dict.fromkeys(paths)}
            how = {
                "sqlite": sqlite3.sqlite_version,
                "seconds": f"{limits.seconds:g}",
                "rows": limits.rows,
                "bytes": limits.bytes,
            }
            yield _by_query([connections[path] for path in paths], limits), how
    elif run is not None:
        yield _by_run(run), {"run": "given"}
    else:
        yield _by_output, {"outputs": "given"}


def _by_query(connections: Sequence[sqlite3.Connection], limits: QueryLimits) -> Judge:
    def judge(index: int, prediction: str, gold: str) -> tuple[bool | None, str | None]:
        try:
            expected = run_query(connections[index], gold, limits)
        except QueryError as error:
            return None, f"the reference's query fails: {error}"
        try:
            found = run_query(connections[index], prediction, limits)
        except QueryError as error:
            return False, f"the query fails: {error}"
        return same_rows(expected, found, ordered=has_order(gold)), None

    return judge


def _by_run(run: Run) -> Judge:
    def judge(index: int, prediction: str, gold: str) -> tuple[bool | None, str | None]:
        expected = run(gold)
        if expected.error is not None:
            return None, f"the reference fails: {expected.error}"
        found = run(prediction)
        if found.error is not None:
            return False, f"the program fails: {found.error}"
        return bool(found.result == expected.result), None

    return judge


def _by_output(index: int, prediction: str, gold: str) -> tuple[bool | None, str | None]:
    return _lines(prediction) == _lines(gold), None


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]
