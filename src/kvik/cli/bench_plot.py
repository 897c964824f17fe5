"""The picture of `kvik bench --no-kv-cache`: time of a token by length, and the speed-up of the cache."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvik.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from kvik.cli.bench_cache import Length

__all__ = ["draw_plot"]

_CACHED, _RECOMPUTED, _TOKEN, _ANSWER = "#0072b2", "#d55e00", "#222222", "#009e73"  # told apart by everyone
_INK, _PALE = "#222222", "#dddddd"


def draw_plot(found: list[Length], report: dict[str, Any], name: str) -> None:
    """Write it, whole or not at all; the format is the name's ending."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=(9.6, 4.4), layout=ConstrainedLayoutEngine(w_pad=0.1))
    times, factors = figure.subplots(1, 2)
    at = [one.length for one in found]
    _lines(times, at, [
        ([one.cached_ms for one in found], _CACHED, "keys and values kept"),
        ([one.recomputed_ms for one in found], _RECOMPUTED, "all computed again"),
    ], "ms a new token")  # fmt: skip
    _lines(factors, at, [
        ([one.speedup for one in found], _TOKEN, "one token"),
        ([one.answer_speedup for one in found], _ANSWER, "the answer up to there"),
    ], "times as fast with the cache")  # fmt: skip
    factors.axhline(report["guide_speedup"], color=_INK, linewidth=0.9, linestyle=(0, (4, 3)))
    factors.annotate(
        "10×", (at[0], report["guide_speedup"]), (0, 4), textcoords="offset points", color=_INK, fontsize=9, va="bottom"
    )
    info, machine = report["model"], report["machine"]
    figure.suptitle(
        f"{info.name}: what the KV cache saves depends on the length", fontsize=12, color=_INK, x=0.01, ha="left"
    )
    figure.supxlabel(
        f"{machine['processor']}, {info.threads} threads, weights {info.weights}, kv {info.kv}; "
        f"medians of {report['settings']['repeat']}", fontsize=8, color="#666666", x=0.01, ha="left",
    )  # fmt: skip
    with atomic_write(Path(name)) as file:
        figure.savefig(file, format=Path(name).suffix[1:].lower(), dpi=160)


def _lines(axes: Axes, at: list[int], series: list[tuple[list[float], str, str]], what: str) -> None:
    """Lines over lengths, both axes in powers, each named at its end."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    for values, colour, label in series:
        axes.plot(at, values, color=colour, marker="o", markersize=4, linewidth=2, label=label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(at, [f"{length:,}" for length in at])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, place: f"{value:,g}"))
    axes.set_xlabel("tokens before it", color=_INK)
    axes.set_title(what, loc="left", fontsize=10, color=_INK)
    axes.grid(axis="y", color=_PALE, linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.tick_params(colors=_INK, labelsize=9)
    axes.legend(frameon=False, fontsize=9, loc="upper left")
