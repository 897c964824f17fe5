"""`kvik compare runs`: two runs on the same samples, paired."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvik.cli.options import Json
from kvik.cli.output import print_json, print_table, write
from kvik.errors import ParameterError
from kvik.params import MAX_SEED, choose

if TYPE_CHECKING:
    from kvik.evaluation.run_comparison import Difference, RunComparison
    from kvik.evaluation.runs import Run

__all__ = ["RunsOptions", "runs"]

_TESTS = ("permutation", "bootstrap")
_IDS_NAMED = 5


@dataclass(frozen=True, kw_only=True)
class RunsOptions:
    """What is compared, and how."""

    metric: Annotated[
        str | None,
        typer.Option(
            "--metric", metavar="NAMES", show_default="those that both were scored by in the same way",
            help="Metrics, separated by commas.",
        ),
    ] = None  # fmt: skip
    test: Annotated[
        str, typer.Option("--test", metavar="NAME", help="Where p-values come from: permutation or bootstrap.")
    ] = "permutation"
    margin: Annotated[
        list[str] | None,
        typer.Option(
            "--margin", metavar="X", show_default=False,
            help="How large a difference does not matter, in the metric's scale; METRIC=X for one. May be repeated.",
        ),
    ] = None  # fmt: skip
    level: Annotated[float, typer.Option("--level", metavar="P", help="Of the intervals, between 0 and 1.")] = 0.95
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Of what is drawn.")] = 0
    changed: Annotated[int, typer.Option("--changed", metavar="N", help="Most changed samples shown of each metric.")] = 10

    def check(self) -> None:
        """Raise ParameterError naming the option and its range."""
        choose("--test", self.test, _TESTS)
        if not 0 < self.level < 1:
            raise ParameterError(f"--level must be between 0 and 1, got {self.level}")
        if not 0 <= self.seed <= MAX_SEED:
            raise ParameterError(f"--seed must be in [0, {MAX_SEED}], got {self.seed}")
        if self.changed < 0:
            raise ParameterError(f"--changed must be at least 0, got {self.changed}")

    def metrics(self) -> list[str] | None:
        if self.metric is None:
            return None
        named = [name for name in map(str.strip, self.metric.split(",")) if name]
        if not named:
            raise ParameterError("--metric names none")
        from kvik.evaluation.metrics import GROUPS

        return [member for name in named for member in GROUPS.get(name, (name,))]

    def margins(self, known: tuple[str, ...]) -> dict[str, float]:
        """By metric. One without a name is for all that have none of their own."""
        general: float | None = None
        own: dict[str, float] = {}
        for text in self.margin or ():
            name, equals, value = text.rpartition("=")
            try:
                margin = float(value)
            except ValueError:
                margin = math.nan
            if not 0 <= margin < math.inf or (equals and not name):
                raise ParameterError(f"--margin takes a number of at least 0, or METRIC=X, got {text!r}")
            if name:
                own[choose("--margin", name, known)] = margin
            elif general is not None:
                raise ParameterError("--margin without a metric was given twice")
            else:
                general = margin
        return own if general is None else dict.fromkeys(known, general) | own


def runs(
    a: Annotated[str, typer.Argument(metavar="A", show_default=False, help="A run's folder, or its samples.jsonl.")],
    b: Annotated[str, typer.Argument(metavar="B", show_default=False, help="The other run.")],
    options: RunsOptions,
    json: Json = False,
) -> None:
    """Compare two runs by the scores of the samples they have in common: B minus A, and whether that could be chance.

    \b
    interval    of the mean difference, by drawing the pairs of samples anew
    p           how often chance alone would make as large a difference; of each metric by itself
    verdict     with --margin: equivalent, the whole interval lies within the margin;
                different, it does not, and 0 is outside of it; undecided, more samples would tell

    \b
    Examples:
      kvik compare runs runs/a runs/b
      kvik compare runs runs/f32 runs/int4 --metric token_f1 --margin 0.01
    """
    from kvik.evaluation.run_comparison import compare_runs
    from kvik.evaluation.runs import read_run

    options.check()
    metrics = options.metrics()
    one, other = read_run(a), read_run(b)
    margins = options.margins(tuple(dict.fromkeys((*one.metrics, *other.metrics))))
    test: Any = options.test
    found = compare_runs(one, other, metrics, test=test, margins=margins, level=options.level, seed=options.seed)
    unused = [name for name in margins if name not in {d.metric for d in found.differences}]
    if unused and any("=" in text for text in options.margin or ()):
        _refuse_unused(options, unused)
    if json:
        settings = {"test": options.test, "level": options.level, "seed": options.seed}
        print_json({"a": a, "b": b, **vars(found), "settings": settings, "torn": {"a": one.torn, "b": other.torn}})
    else:
        _show(options, one, other, found)


def _refuse_unused(options: RunsOptions, unused: list[str]) -> None:
    for text in options.margin or ():
        name = text.rpartition("=")[0]
        if name in unused:
            raise ParameterError(f"--margin {text}: {name} is not compared")


def _show(options: RunsOptions, one: Run, other: Run, found: RunComparison) -> None:
    margins = any(d.margin is not None for d in found.differences)
    head = ["metric", "A", "B", "B - A", f"{100 * options.level:g} % interval", "p", *(["verdict"] if margins else ())]
    rows = [head]
    for d in found.differences:
        row = [
            d.metric, f"{d.a:.4f}", f"{d.b:.4f}", f"{d.difference.value:+.4f}",
            f"{d.difference.low:+.4f} to {d.difference.high:+.4f}", p_text(d.p_value),
        ]  # fmt: skip
        rows.append([*row, d.verdict or "-"] if margins else row)
    write(f"A: {one.name}\nB: {other.name}\n\n")
    print_table(rows, "<>>><>" + ("<" if margins else ""))
    write(f"\n{found.pairs} samples in both; {options.test} test, seed {options.seed}.\n")
    for line in _remarks(one, other, found):
        write(line + "\n")
    for d in found.differences:
        _show_changed(d, options.changed)


def p_text(value: float) -> str:
    return f"{value:.4f}" if value >= 0.0001 else "< 0.0001"


def _remarks(one: Run, other: Run, found: RunComparison) -> list[str]:
    """What was left out, and what cannot be told."""
    said = []
    for run in (one, other):
        if run.torn:
            said.append(f"{run.name}: its last line is torn and was left out.")
        if run.manifest is None:
            said.append(f"{run.name} has no manifest: whether both were scored in the same way cannot be told.")
    for name, ids in ((one.name, found.only_a), (other.name, found.only_b)):
        if ids:
            named = ", ".join(map(str, ids[:_IDS_NAMED])) + (", …" if len(ids) > _IDS_NAMED else "")
            said.append(f"Only in {name}: {len(ids)} (id {named}).")
    for name, reason in found.left_out.items():
        said.append(f"{name} {reason}; it is not compared.")
    for d in found.differences:
        if d.unscored:
            said.append(f"{d.metric}: {d.unscored} samples have no score in one run or both; {d.pairs} are compared.")
        if d.corpus:
            said.append(f"{d.metric}: means of the samples' scores, which is not the metric of all samples together.")
        if d.margin is not None:
            said.append(f"{d.metric}: margin {d.margin:g}.")
    return said


def _show_changed(d: Difference, most: int) -> None:
    if not most:
        return
    if not d.changed:
        write(f"\n{d.metric}: no sample changed.\n")
        return
    write(f"\n{d.metric}: {len(d.changed)} of {d.pairs} samples changed")
    write(":\n" if len(d.changed) <= most else f"; the most changed {most}:\n")
    rows = [[str(c.id), f"{c.a:.4f}", f"{c.b:.4f}", f"{c.b - c.a:+.4f}"] for c in d.changed[:most]]
    print_table([["id", "A", "B", "B - A"], *rows], "<>>>")
