"""Attempts at problems, one a line, as problems: what pass@k is counted over."""

from __future__ import annotations

from dataclasses import replace

from kvik.errors import DataError
from kvik.evaluation.predictions import Id, Sample, SampleFile
from kvik.jsonl import shown

__all__ = ["ATTEMPTS", "by_problem"]

ATTEMPTS = ("passed", "n")
"""Of which a line for pass@k has one: an attempt with "problem" and "passed", or a problem with its numbers "n" and "c"."""


def by_problem(samples: SampleFile) -> SampleFile:
    """A sample a problem, with fields n and c, in the order in which problems come first; its id is the problem.

    Samples that have "n" and no "passed" are problems already and stay as they are. Raises DataError naming the line for one
    without "problem" or "passed" among others that have them, for a field of a wrong type, and for more passed than there are.
    """
    if not any("passed" in sample.fields for sample in samples.samples):
        for sample in samples.samples:
            n, c = sample.fields.get("n"), sample.fields.get("c")
            if isinstance(n, int) and isinstance(c, int) and not (n >= 1 and 0 <= c <= n):
                raise DataError(
                    f"line {sample.line}: n must be at least 1 and c in [0, n], got n {n} and c {c}", path=samples.name
                )
        return samples
    first: dict[Id, Sample] = {}
    counts: dict[Id, tuple[int, int]] = {}
    for sample in samples.samples:
        try:
            problem, passed = _attempt(sample)
        except DataError as error:
            raise DataError(f"line {sample.line}: {error}", path=samples.name) from None
        first.setdefault(problem, sample)
        n, c = counts.get(problem, (0, 0))
        counts[problem] = (n + 1, c + passed)
    problems = []
    for problem, one in first.items():
        n, c = counts[problem]
        problems.append(Sample(problem, one.line, None, None, one.references, one.prompt, {"n": n, "c": c}, True))
    return replace(samples, samples=tuple(problems))


def _attempt(sample: Sample) -> tuple[Id, bool]:
    problem, passed = sample.fields.get("problem"), sample.fields.get("passed")
    if problem is None:
        raise DataError('has "passed" and no "problem"' if passed is not None else 'has no "problem"')
    if isinstance(problem, bool) or not isinstance(problem, str | int):
        raise DataError(f"problem must be text or a whole number, got {shown(problem)}")
    if passed is None:
        raise DataError('has no "passed", which other lines have')
    if not isinstance(passed, bool):
        raise DataError(f"passed must be true or false, got {shown(passed)}")
    return problem, passed
