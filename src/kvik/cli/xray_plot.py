"""The picture of `kvik xray --plot`: one position's logits at several temperatures, as bars of its best tokens."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from kvik.cli.xray_html import shown
from kvik.cli.xray_terminal import percent
from kvik.files import atomic_write

if TYPE_CHECKING:
    from kvik.decoding.trace import TokenTrace

__all__ = ["draw_sweep"]

_INK, _GREY, _PALE, _BLUE, _HOT = "#222222", "#666666", "#dddddd", "#0072b2", "#d55e00"
_SHOWN = (0.5, 1.0, 2.0)
_BEST = 6


def draw_sweep(one: TokenTrace, piece: Callable[[int], bytes], model: str, name: str) -> None:
    """Write it, whole or not at all; the format is the name's ending."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    sweeps = [s for s in one.sweep if s.temperature in _SHOWN]
    figure = Figure(figsize=(9.6, 3.1), layout=ConstrainedLayoutEngine(w_pad=0.08))
    panels = figure.subplots(1, len(sweeps), sharey=True)
    labels = [_plain(shown(piece(c.token_id))) for c in one.candidates[:_BEST]] + ["all others"]
    for axes, s in zip(panels, sweeps, strict=True):
        shares = [*s.shares[:_BEST], max(0.0, 1.0 - sum(s.shares[:_BEST]))]
        colours = [_BLUE] * (len(labels) - 1) + ["#b9bec6"]
        for place, c in enumerate(one.candidates[:_BEST]):
            if c.token_id == one.token_id:
                colours[place] = _HOT
        axes.barh(range(len(labels)), shares, 0.72, color=colours)
        for place, share in enumerate(shares):
            axes.text(share + 0.015, place, percent(share), fontsize=8, color=_INK, va="center")
        axes.set_yticks(range(len(labels)), labels)
        axes.set_xlim(0, 1.18)
        axes.set_xticks([0, 0.5, 1])
        axes.set_title(
            f"temperature {s.temperature:g}\nentropy {s.entropy / math.log(2):.1f} bits, nucleus {s.nucleus:,}",
            loc="left", fontsize=9, color=_INK,
        )  # fmt: skip
        axes.grid(axis="x", color=_PALE, linewidth=0.7)
        axes.set_axisbelow(True)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        axes.tick_params(colors=_INK, labelsize=8.5)
    panels[0].invert_yaxis()
    figure.supxlabel(
        f"{model}, one row of logits; orange: the token that was drawn; nucleus: fewest tokens with probability "
        f"{one.nucleus_p:g} together", fontsize=8, color=_GREY, x=0.01, ha="left",
    )  # fmt: skip
    with atomic_write(Path(name)) as file:
        figure.savefig(file, format=Path(name).suffix[1:].lower(), dpi=130)


def _plain(text: str) -> str:
    """A label that matplotlib takes as it is: no formulas, and only what its own font has."""
    return (
        "".join(c if c in "␣⏎" or c.isascii() or c.isalpha() else "?" for c in text)
        .replace("␣", " ")
        .replace("$", r"\$")
        or "?"
    )
