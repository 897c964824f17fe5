"""The picture of `kvik eval divergence`: how many predictions lose how much, and where in the window."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from kvik.cli.pictures import BLUE, INK, new_figure, save, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from kvik.cli.eval_divergence import Measured
    from kvik.evaluation.divergence import Divergence

__all__ = ["draw_plot"]


def draw_plot(found: Measured, name: str) -> None:
    """Write it, whole or not at all; the format is the name's ending."""
    d = found.divergence
    figure = new_figure(9.6, 4.4, w_pad=0.1)
    left, right = figure.subplots(1, 2)
    _shares(left, d)
    _positions(right, d)
    tidy((left, right))
    save(
        figure, name,
        f"{d.tokens:,} predictions in windows of {d.window:,} tokens, of {found.text}; the same best token in {d.same_top:.2%}, "
        f"perplexity × {d.perplexity_ratio:.4f}",
        f"{found.model} against {found.reference}",
    )  # fmt: skip


def _shares(axes: Axes, d: Divergence) -> None:
    """The share of predictions that lose so many nats or more. Both axes are logarithmic, where anything is lost."""
    points = [(kl, share) for share, kl in d.kl_above if kl > 0 and math.isfinite(kl)]
    axes.plot([kl for kl, _ in points], [share for _, share in points], color=BLUE, linewidth=2)
    if points:
        axes.set_xscale("log")
        axes.set_yscale("log")
    axes.set_title("share of predictions that lose so much or more", loc="left", fontsize=10, color=INK)
    axes.set_xlabel("KL of a prediction, nats", color=INK)


def _positions(axes: Axes, d: Divergence) -> None:
    """Mean KL over the tokens that came before in the window."""
    places = [one for one in d.by_position if math.isfinite(one.kl)]
    axes.plot(
        [math.sqrt(max(1, one.first) * max(1, one.last)) for one in places], [one.kl for one in places],
        color=BLUE, marker="o", markersize=4, linewidth=2,
    )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_ylim(0)
    axes.set_title("mean KL, nats", loc="left", fontsize=10, color=INK)
    axes.set_xlabel("tokens before it in the window", color=INK)
