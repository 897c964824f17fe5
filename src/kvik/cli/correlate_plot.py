"""The picture of `kvik eval correlate`: the score over each measure, a point a setting."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kvik.cli.pictures import BLUE, INK, new_figure, save, tidy

if TYPE_CHECKING:
    from kvik.evaluation.correlate import Correlation, Setting

__all__ = ["draw_plot"]


def draw_plot(settings: Sequence[Setting], found: Sequence[Correlation], name: str) -> None:
    """Write it, whole or not at all; the format is the name's ending."""
    figure = new_figure(4.8 * len(found), 4.4, w_pad=0.1)
    every = figure.subplots(1, len(found), squeeze=False)[0]
    for axes, one in zip(every, found, strict=True):
        for setting in settings:
            x, y = setting.values[one.measure], setting.values[one.score]
            if x is None or y is None:
                continue
            axes.plot([x], [y], "o", color=BLUE, markersize=7)
            axes.annotate(setting.name, (x, y), (6, 3), textcoords="offset points", fontsize=8, color=INK)
        axes.margins(0.16, 0.12)
        axes.set_xlabel(one.measure, color=INK)
        axes.set_ylabel(one.score, color=INK)
        said = one.undefined
        if one.pearson is not None and one.spearman is not None:
            said = f"Pearson {one.pearson.value:.2f}, Spearman {one.spearman.value:.2f}"
        axes.set_title(said or "", loc="left", fontsize=9, color=INK)
    tidy(every)
    save(figure, name, f"{len(settings)} settings", f"{found[0].score}: what foretells it")
