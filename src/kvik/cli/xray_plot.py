"""The picture of `kvik xray --plot`: one position's logits at several temperatures, as bars of its best tokens."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from kvik.cli.pictures import BLUE, INK, ORANGE, new_figure, save, tidy
from kvik.cli.xray_html import shown
from kvik.cli.xray_terminal import percent

if TYPE_CHECKING:
    from kvik.decoding.trace import TokenTrace

__all__ = ["draw_sweep"]

_SHOWN = (0.5, 1.0, 2.0)
_BEST = 6


def draw_sweep(one: TokenTrace, piece: Callable[[int], bytes], model: str, name: str) -> None:
    """Write it, whole or not at all; the format is the name's ending."""
    sweeps = [s for s in one.sweep if s.temperature in _SHOWN]
    figure = new_figure(9.6, 3.1, w_pad=0.08)
    panels = figure.subplots(1, len(sweeps), sharey=True)
    labels = [_plain(shown(piece(c.token_id))) for c in one.candidates[:_BEST]] + ["all others"]
    for axes, s in zip(panels, sweeps, strict=True):
        shares = [*s.shares[:_BEST], max(0.0, 1.0 - sum(s.shares[:_BEST]))]
        colours = [BLUE] * (len(labels) - 1) + ["#b9bec6"]
        for place, c in enumerate(one.candidates[:_BEST]):
            if c.token_id == one.token_id:
                colours[place] = ORANGE
        axes.barh(range(len(labels)), shares, 0.72, color=colours)
        for place, share in enumerate(shares):
            axes.text(share + 0.015, place, percent(share), fontsize=8, color=INK, va="center")
        axes.set_yticks(range(len(labels)), labels)
        axes.set_xlim(0, 1.18)
        axes.set_xticks([0, 0.5, 1])
        axes.set_title(
            f"temperature {s.temperature:g}\nentropy {s.entropy / math.log(2):.1f} bits, nucleus {s.nucleus:,}",
            loc="left", fontsize=9, color=INK,
        )  # fmt: skip
    tidy(panels, "x", 8.5)
    panels[0].invert_yaxis()
    save(
        figure, name,
        f"{model}, one row of logits; orange: the token that was drawn; nucleus: fewest tokens with probability "
        f"{one.nucleus_p:g} together", dpi=130,
    )  # fmt: skip


def _plain(text: str) -> str:
    """A label that matplotlib takes as it is: no formulas, and only what its own font has."""
    return (
        "".join(c if c in "␣⏎" or c.isascii() or c.isalpha() else "?" for c in text)
        .replace("␣", " ")
        .replace("$", r"\$")
        or "?"
    )
