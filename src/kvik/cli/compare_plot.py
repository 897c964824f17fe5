"""The picture of `kvik compare decoding`: variety against likelihood and speed; figures over the values of a sweep."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvik.cli.pictures import BLUE, GREEN, INK, ORANGE, PURPLE, new_figure, save, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from kvik.evaluation.compare import Measured

__all__ = ["draw_plot"]


def draw_plot(found: list[Measured], report: dict[str, Any], name: str) -> None:
    """Write it, whole or not at all; the format is the name's ending. A row for the strategies, one for each sweep."""
    named, swept = split(found)
    rows = ([("", named)] if named else []) + list(swept.items())
    figure = new_figure(9.6, 4.2 * len(rows) + 0.4, w_pad=0.1, h_pad=0.1)
    grid = figure.subplots(len(rows), 2, squeeze=False)
    for (field, points), (left, right) in zip(rows, grid, strict=True):
        if field:
            _sweep(left, right, field, points)
        else:
            _trade(left, points)
            _speed(right, points)
        tidy((left, right))
    info, machine, settings = report["model"], report["machine"], report["settings"]
    save(
        figure, name,
        f"{machine['processor']}, {info.threads} threads, weights {info.weights}, kv {info.cache.text}; {settings['repeat']} runs of at "
        f"most {settings['max_tokens']} tokens",
        f"{info.name}: decoding strategies, measured",
    )  # fmt: skip


def split(found: list[Measured]) -> tuple[list[Measured], dict[str, list[Measured]]]:
    """Named strategies, and by field the points of its sweep."""
    named = [one for one in found if "=" not in one.name]
    swept: dict[str, list[Measured]] = {}
    for one in found:
        field, sign, _ = one.name.partition("=")
        if sign:
            swept.setdefault(field, []).append(one)
    return named, swept


def _trade(axes: Axes, points: list[Measured]) -> None:
    """Each strategy where its answers are: how varied, and how probable to the model."""
    known = [
        (one.mean_logprob, one.distinct_2, one.name)
        for one in points
        if one.distinct_2 is not None and one.mean_logprob is not None
    ]
    axes.set_title("probable or varied", loc="left", fontsize=10, color=INK)
    axes.set_xlabel("distinct pairs of words among the answers", color=INK)
    axes.set_ylabel("mean log-probability of a token", color=INK)
    if not known:
        return
    axes.plot([x for _, x, _ in known], [y for y, _, _ in known], "o", color=BLUE, markersize=7)
    axes.margins(0.16, 0.12)
    taken: list[tuple[float, float]] = []
    for y, x, name in sorted(known, reverse=True):
        right = x < 0.6
        crowd = sum(abs(x - x0) < 0.12 and abs(y - y0) < 0.12 for x0, y0 in taken)
        taken.append((x, y))
        axes.annotate(
            name, (x, y), (8 if right else -8, 3 - 11 * crowd), textcoords="offset points", fontsize=9, color=INK,
            ha="left" if right else "right",
        )  # fmt: skip


def _speed(axes: Axes, points: list[Measured]) -> None:
    """Bars of tokens per second, with the least and the most of the runs."""
    at = range(len(points))
    speeds = [one.tokens_per_second for one in points]
    below = [one.tokens_per_second - one.slowest for one in points]
    above = [one.fastest - one.tokens_per_second for one in points]
    axes.barh(
        at, speeds, 0.62, color=BLUE, xerr=[below, above], error_kw={"ecolor": INK, "elinewidth": 1, "capsize": 2}
    )
    axes.set_yticks(at, [one.name for one in points])
    axes.invert_yaxis()
    axes.set_title("tokens of the answer per second", loc="left", fontsize=10, color=INK)
    axes.set_xlim(0)


def _sweep(left: Axes, right: Axes, field: str, points: list[Measured]) -> None:
    """Shares over the value at the left, log-probability at the right."""
    at = [float(one.name.partition("=")[2]) for one in points]
    for values, colour, label in (
        ([one.distinct_2 for one in points], BLUE, "distinct pairs"),
        ([one.self_bleu for one in points], ORANGE, "self-BLEU"),
        ([one.repetition for one in points], GREEN, "repeated"),
        ([one.determinism for one in points], PURPLE, "same"),
    ):
        known = [(x, y) for x, y in zip(at, values, strict=True) if y is not None]
        if known:
            left.plot(*zip(*known, strict=True), color=colour, marker="o", markersize=4, linewidth=2, label=label)
    left.set_ylim(-0.03, 1.03)
    left.set_title(f"by {field}", loc="left", fontsize=10, color=INK)
    left.legend(frameon=False, fontsize=9)
    known = [(x, one.mean_logprob) for x, one in zip(at, points, strict=True) if one.mean_logprob is not None]
    if known:
        right.plot(*zip(*known, strict=True), color=INK, marker="o", markersize=4, linewidth=2)
    right.set_title("mean log-probability of a token", loc="left", fontsize=10, color=INK)
    for axes in (left, right):
        axes.set_xlabel(field, color=INK)
