"""What `kvik eval divergence` prints."""

from __future__ import annotations

import json
import textwrap
from typing import TYPE_CHECKING

from kvik.cli.output import print_table, write

if TYPE_CHECKING:
    from kvik.cli.eval_divergence import Measured
    from kvik.evaluation.divergence import Flip
    from kvik.evaluation.statistics import Interval

__all__ = ["print_report"]

_SHOWN = 5
_CONTEXT = 32  # characters


def print_report(found: Measured) -> None:
    """The figures, each with what it means, and the predictions that changed most."""
    d = found.divergence
    same = "; the two are one and the same" if found.model == found.reference else ""
    what = (
        f"{found.model} against {found.reference}{same}: {d.tokens:,} predictions in windows of {d.window:,} tokens, "
        f"{d.stride:,} of them new, of {found.text}:"
    )
    write(textwrap.fill(what, 80, break_long_words=False, break_on_hyphens=False) + "\n\n")
    times = "time" if d.num_flipped == 1 else "times"
    rows = [
        ["", "", "95 % interval", ""],
        ["KL, mean", _nats(d.kl_mean), _interval(d.kl_interval), "nats a prediction loses; 0 is the same distribution"],
        ["KL, median", _nats(d.kl_median), "", "half of the predictions lose less"],
        ["KL, 99 %", _nats(d.kl_p99), "", "99 of 100 predictions lose less"],
        ["KL, largest", _nats(d.kl_max), "", "the prediction that loses most"],
        ["same best", f"{d.same_top:.2%}".replace("%", " %"), "", f"the most probable token changes {d.num_flipped:,} {times}"],
        [
            "perplexity", f"{d.perplexity_ratio:.4f}", _interval(d.ratio_interval, 4),
            f"{d.perplexity:.4g} of {d.reference_perplexity:.4g}; 1 is the same",
        ],
    ]  # fmt: skip
    print_table(rows, "<>><")
    if d.kl_interval is None:
        write("\nIntervals need more than one window, and no KL that is infinite.\n")
    if d.flipped:
        _print_flips(d.flipped[:_SHOWN], d.num_flipped)


def _print_flips(flips: tuple[Flip, ...], count: int) -> None:
    of = f"the {len(flips)} of the largest KL of {count:,}" if count > len(flips) else "all of them"
    write(f"\nWhere the most probable token changed, {of}:\n\n")
    rows = [["KL", "text", "byte", "after", "reference", "model", "came"]]
    for flip in flips:
        tokens = (_quoted(token.text) for token in (flip.reference, flip.model, flip.came))
        context = _quoted("…" + flip.context[-_CONTEXT:] if len(flip.context) > _CONTEXT else flip.context)
        rows.append([f"{flip.kl:.4f}", str(flip.text), f"{flip.offset:,}", context, *tokens])
    print_table(rows, ">>>>>>>")


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _nats(value: float) -> str:
    return f"{value:.6f}"


def _interval(found: Interval | None, digits: int = 6) -> str:
    return "-" if found is None else f"{found.low:.{digits}f} to {found.high:.{digits}f}"
