"""`kvik eval correlate`: whether perplexity or LongPPL says anything of a task's score, over several settings."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvik.cli.input import STDIN, read_text
from kvik.cli.options import Json
from kvik.cli.output import print_json, print_table, write
from kvik.cli.pictures import check_picture
from kvik.errors import DataError, ParameterError
from kvik.jsonl import parse_object, read_lines, shown
from kvik.params import choose

if TYPE_CHECKING:
    from kvik.evaluation.correlate import Correlation, Setting
    from kvik.evaluation.statistics import Interval

__all__ = ["correlate"]


@dataclass(frozen=True, kw_only=True)
class CorrelateOptions:
    """Which columns."""

    setting: Annotated[str, typer.Option("--setting", metavar="NAME", help="The column with the settings' names.")] = (
        "setting"
    )
    measures: Annotated[
        str, typer.Option("--measures", metavar="NAME[,NAME…]", help="Columns of numbers that may foretell the score.")
    ] = "perplexity,longppl"
    score: Annotated[str, typer.Option("--score", metavar="NAME", help="The column with the task's score.")] = "score"
    plot: Annotated[
        str | None,
        typer.Option(
            "--plot", metavar="FILE", show_default=False,
            help="Draw the score over each measure into a .png, .svg or .pdf (extra kvik\\[plots]).",
        ),
    ] = None  # fmt: skip

    def names(self) -> list[str]:
        """The measures. Raises ParameterError naming the option."""
        found = [name.strip() for name in self.measures.split(",")]
        if not all(found) or len(set(found)) < len(found):
            raise ParameterError(f"--measures takes different names separated by commas, got {self.measures!r}")
        if self.score in found:
            raise ParameterError(f"--score and --measures are both {self.score!r}")
        if self.plot is not None:
            check_picture("--plot", self.plot)
        return found


def correlate(
    file: Annotated[
        str,
        typer.Argument(
            metavar="FILE", show_default=False,
            help="A setting a line: JSON objects, or CSV with a header where the name ends in .csv; - is standard input.",
        ),
    ],
    options: CorrelateOptions,
    json: Json = False,
) -> None:  # fmt: skip
    """Relate perplexity and LongPPL to a task's score over several settings: models, formats, cache policies.

    A line has the setting's name, the measures and the score: {"setting": "int4", "perplexity": 14.1, "longppl": 9.2,
    "score": 0.61}. Null, or an empty cell of CSV, is what could not be measured: that setting is left out, and it is said.

    Pearson is the linear correlation, Spearman that of the ranks, both in [-1, 1]; intervals are at 95 %, by drawing
    settings anew: of a few settings they say little. A good measure of loss is near -1 where a high score is good.

    The figures in Kvik's guide, about 0.2 for perplexity and -0.96 for LongPPL, are those of the paper (Fang et al. 2024)
    over its own models and long-context tasks; yours are what is measured here.

    \b
    Examples:
      kvik eval correlate settings.jsonl
      kvik eval correlate settings.csv --score ruler --measures perplexity,longppl,kl --plot ruler.png
    """
    measures = options.names()
    settings = _read(file, options.setting, measures, options.score)
    from kvik.evaluation.correlate import correlate as measure

    found = measure(settings, measures, options.score)
    if options.plot is not None:
        from kvik.cli.correlate_plot import draw_plot

        draw_plot(settings, found, options.plot)
    if json:
        print_json({"correlations": found, "settings": settings})
    else:
        _print(found)


def _read(name: str, setting: str, measures: list[str], score: str) -> list[Setting]:
    """The file's settings. Raises DataError naming the line."""
    from kvik.evaluation.correlate import Setting

    source = STDIN if name == "-" else name
    cells = Path(name).suffix.lower() == ".csv"
    rows = (_csv_rows if cells else _json_rows)(read_text(name), source)
    found: list[Setting] = []
    lines: dict[str, int] = {}
    for number, row in rows:
        try:
            label = _column(row, setting)
            if not isinstance(label, str) or not label:
                raise DataError(f"needs a name as {setting!r}, got {shown(label)}")
            if label in lines:
                raise DataError(f"has the setting {shown(label)} of line {lines[label]} again")
            found.append(Setting(label, {column: _number(row, column, cells=cells) for column in (*measures, score)}))
        except DataError as error:
            raise DataError(f"line {number} {error}", path=source) from None
        lines[label] = number
    return found


def _json_rows(text: str, name: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for number, data in read_lines(io.BytesIO(text.encode())):
        try:
            yield number, parse_object(data)
        except DataError as error:
            raise DataError(f"line {number} {error}", path=name) from None


def _csv_rows(text: str, name: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Rows by the header's names; empty cells are None."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = [column.strip() for column in next(reader, [])]
        for cells in reader:
            if not cells:
                continue
            if len(cells) != len(header):
                raise DataError(f"line {reader.line_num} has {len(cells)} cells, the header {len(header)}", path=name)
            yield reader.line_num, {name: cell.strip() or None for name, cell in zip(header, cells, strict=True)}
    except csv.Error as error:
        raise DataError(f"line {reader.line_num} is not CSV: {error}", path=name) from None


def _column(row: Mapping[str, Any], name: str) -> Any:
    try:
        return row[choose("a column", name, tuple(row))]
    except ParameterError as error:
        raise DataError(f"has no {name!r}: {error}") from None


def _number(row: Mapping[str, Any], name: str, *, cells: bool) -> float | None:
    """cells: numbers are text."""
    value = _column(row, name)
    if value is None:
        return None
    try:
        if isinstance(value, bool) or isinstance(value, str) != cells:
            raise ValueError
        number = float(value)
    except (ValueError, TypeError, OverflowError):
        raise DataError(f"needs a number as {name!r}, got {shown(value)}") from None
    if not math.isfinite(number):
        raise DataError(f"needs a finite number as {name!r}, got {shown(value)}")
    return number


def _print(found: tuple[Correlation, ...]) -> None:
    rows = [["measure", "settings", "Pearson", "95 % interval", "Spearman", "95 % interval"]]
    for one in found:
        rows.append([one.measure, str(one.settings), *_figures(one.pearson), *_figures(one.spearman)])
    write(f"with {found[0].score}:\n\n")
    print_table(rows, "<>>>>>")
    for one in found:
        if one.undefined is not None:
            write(f"\n{one.undefined}\n")
        if one.left_out:
            write(f"\n{one.measure}: left out, as one of the two was not measured: {', '.join(one.left_out)}\n")


def _figures(interval: Interval | None) -> tuple[str, str]:
    if interval is None:
        return "-", "-"
    return f"{interval.value:.4f}", f"{interval.low:.4f} to {interval.high:.4f}"
