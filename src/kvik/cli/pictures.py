"""What the pictures of several verbs have in common: their formats, colours, axes, and how they are written."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvik.errors import ParameterError
from kvik.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["BLUE", "GREEN", "GREY", "INK", "ORANGE", "PALE", "PURPLE", "check_picture", "new_figure", "save", "tidy"]

FORMATS = (".png", ".svg", ".pdf")
BLUE, ORANGE, GREEN, PURPLE = "#0072b2", "#d55e00", "#009e73", "#a0528f"  # told apart by everyone
INK, GREY, PALE = "#222222", "#666666", "#dddddd"


def check_picture(option: str, name: str) -> None:
    """ParameterError where the option's picture could not be drawn into a file of this name."""
    from importlib.util import find_spec

    if Path(name).suffix.lower() not in FORMATS:
        raise ParameterError(f"{option} writes {', '.join(FORMATS)}, got {name!r}")
    if find_spec("matplotlib") is None:
        raise ParameterError(f'{option} needs matplotlib: pip install "kvik[plots]"')


def new_figure(width: float, height: float, w_pad: float, h_pad: float | None = None) -> Figure:
    """An empty one; sizes, and the space between its parts, in inches."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    return Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=w_pad, h_pad=h_pad))


def tidy(every: Iterable[Axes], grid: Any = "both", size: float = 9) -> None:
    """Pale lines behind the figures, along the axis `grid`; no frame at the top and the right."""
    for axes in every:
        axes.grid(axis=grid, color=PALE, linewidth=0.7)
        axes.set_axisbelow(True)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        axes.tick_params(colors=INK, labelsize=size)


def save(figure: Figure, name: str, below: str, title: str | None = None, dpi: int = 160) -> None:
    """Write it, whole or not at all; the format is the name's ending. below: what was measured, in small print."""
    if title is not None:
        figure.suptitle(title, fontsize=12, color=INK, x=0.01, ha="left")
    figure.supxlabel(below, fontsize=8, color=GREY, x=0.01, ha="left")
    with atomic_write(Path(name)) as file:
        figure.savefig(file, format=Path(name).suffix[1:].lower(), dpi=dpi)
