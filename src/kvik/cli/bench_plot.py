"""The picture of `kvik bench --no-kv-cache`: time of a token by length, and the speed-up of the cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvik.cli.pictures import BLUE, GREEN, INK, ORANGE, new_figure, save, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from kvik.cli.bench_cache import Length

__all__ = ["draw_plot"]


def draw_plot(found: list[Length], report: dict[str, Any], name: str) -> None:
    """Write it, whole or not at all; the format is the name's ending."""
    figure = new_figure(9.6, 4.4, w_pad=0.1)
    times, factors = figure.subplots(1, 2)
    at = [one.length for one in found]
    _lines(times, at, [
        ([one.cached_ms for one in found], BLUE, "keys and values kept"),
        ([one.recomputed_ms for one in found], ORANGE, "all computed again"),
    ], "ms a new token")  # fmt: skip
    _lines(factors, at, [
        ([one.speedup for one in found], INK, "one token"),
        ([one.answer_speedup for one in found], GREEN, "the answer up to there"),
    ], "times as fast with the cache")  # fmt: skip
    factors.axhline(report["guide_speedup"], color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
    factors.annotate(
        "10×", (at[0], report["guide_speedup"]), (0, 4), textcoords="offset points", color=INK, fontsize=9, va="bottom"
    )
    info, machine = report["model"], report["machine"]
    save(
        figure, name,
        f"{machine['processor']}, {info.threads} threads, weights {info.weights}, kv {info.kv}; "
        f"medians of {report['settings']['repeat']}",
        f"{info.name}: what the KV cache saves depends on the length",
    )  # fmt: skip


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
    axes.set_xlabel("tokens before it", color=INK)
    axes.set_title(what, loc="left", fontsize=10, color=INK)
    tidy([axes], "y")
    axes.legend(frameon=False, fontsize=9, loc="upper left")
