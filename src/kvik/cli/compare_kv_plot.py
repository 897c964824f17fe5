"""The picture of `kvik compare kv`: what each cache saves against how far it moves predictions, and how fast it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kvik.cli.pictures import BLUE, GREY, INK, ORANGE, new_figure, save, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from kvik.evaluation.compare_kv import CacheMeasured

__all__ = ["draw_plot"]


def draw_plot(found: Sequence[CacheMeasured], report: Mapping[str, Any], name: str) -> None:
    """Write it, whole or not at all; the format is the name's ending. A row for each cache, the full one first."""
    figure = new_figure(11.5, 1.9 + 0.42 * len(found), w_pad=0.1, h_pad=0.1)
    size, moved, speed = figure.subplots(1, 3, sharey=True, width_ratios=(1, 1.15, 1))
    full, at = found[0], list(range(len(found)))
    names = [f"full, {one.cache.kv}" if one is full else _short(one.name) for one in found]
    colours = [GREY if one is full else BLUE if one.cache.policy is None else ORANGE for one in found]
    shares = [one.kv_bytes_now / full.kv_bytes_now if full.kv_bytes_now else 1.0 for one in found]
    _bars(size, "bytes at the end, of the full cache's", at, shares, colours, [f"{share:.3f}" for share in shares])
    kls = [0.0 if one.moved is None else one.moved.kl_mean for one in found]
    told = ["" if one.moved is None else f"{one.moved.kl_mean:.4f}, {one.moved.same_top:.1%}" for one in found]
    _bars(moved, "KL in nats; same best token", at, kls, colours, told)
    speeds = [one.tokens_per_second or 0.0 for one in found]
    _bars(speed, "tokens of the answer per second", at, speeds, colours, [f"{value:.0f}" for value in speeds])
    size.set_yticks(at, names)
    size.invert_yaxis()
    tidy((size, moved, speed), grid="x")
    info, machine, settings = report["model"], report["machine"], report["settings"]
    save(
        figure, name,
        f"{machine['processor']}, {info.threads} threads, weights {info.weights}; {settings['prompt_tokens']} prompt tokens, "
        f"{settings['repeat']} runs of at most {settings['max_tokens']} tokens",
        f"{info.name}: KV caches, measured on one prompt",
    )  # fmt: skip


def _bars(
    axes: Axes, title: str, at: Sequence[int], values: Sequence[float], colours: Sequence[str], told: Sequence[str]
) -> None:
    axes.barh(at, values, 0.62, color=colours)
    most = max(values) or 1.0
    for place, value, text in zip(at, values, told, strict=True):
        axes.text(value + most * 0.02, place, text, va="center", fontsize=8.5, color=INK)
    axes.set_xlim(0, most * 1.38)
    axes.set_title(title, loc="left", fontsize=10, color=INK)


def _short(name: str) -> str:
    """A policy's fields in a second line, where they make the name long."""
    head, colon, fields = name.partition(":")
    return f"{head}\n{fields}" if colon and len(name) > 24 else name
