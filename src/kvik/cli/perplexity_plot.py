"""The picture of `kvik eval perplexity`: the loss over the position in the window, a line a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kvik.cli.pictures import BLUE, GREEN, INK, ORANGE, PURPLE, new_figure, save, tidy

if TYPE_CHECKING:
    from kvik.cli.eval_perplexity import Measured

__all__ = ["draw_plot"]

_COLOURS, _DASHES = (BLUE, ORANGE, GREEN, PURPLE), ("-", "--", ":", "-.")


def draw_plot(found: Sequence[Measured], name: str) -> None:
    """Write it, whole or not at all; the format is the name's ending."""
    figure = new_figure(7.6, 4.4, w_pad=0.1, h_pad=0.1)
    axes = figure.subplots()
    for index, each in enumerate(found):
        places = each.perplexity.by_position
        axes.plot(
            [(one.first * one.last) ** 0.5 for one in places], [one.nll for one in places],
            color=_COLOURS[index % len(_COLOURS)], linestyle=_DASHES[index // len(_COLOURS) % len(_DASHES)],
            marker="o", markersize=4, linewidth=2, label=each.model,
        )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("tokens before it in the window", color=INK)
    axes.set_ylabel("mean loss of a token, nats", color=INK)
    if len(found) > 1:
        axes.legend(frameon=False, fontsize=9)
    tidy((axes,))
    one = found[0].perplexity
    same = len({each.perplexity.token_digest for each in found}) == 1
    save(
        figure, name,
        f"{one.texts:,} {'text' if one.texts == 1 else 'texts'} of {one.bytes:,} bytes; windows of {one.window:,} tokens, "
        f"{one.stride:,} of them new" + ("" if same else "; the models' tokens differ"),
        f"{found[0].name}: loss by position in the window" if len(found) == 1 else "Loss by position in the window",
    )  # fmt: skip
