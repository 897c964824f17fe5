"""What `kvik eval perplexity` prints."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from kvik.cli.output import print_table, write
from kvik.evaluation.bands import BANDS_OF

if TYPE_CHECKING:
    from kvik.cli.eval_perplexity import Measured
    from kvik.evaluation.perplexity import Difference, Perplexity
    from kvik.evaluation.statistics import Interval

__all__ = ["print_report"]


def print_report(found: Sequence[Measured], differences: Sequence[Difference]) -> None:
    """Tables of the models, and of what the others differ from the first by."""
    one = found[0].perplexity
    texts = f"{one.texts:,} {'text' if one.texts == 1 else 'texts'}"
    write(f"{texts}, {one.bytes:,} bytes and {one.words:,} words predicted\n\n")
    rows = [
        ["model", "tokens", "perplexity", "95 % interval", "by byte", "by word", "bits/byte", "nats/token", "±", "band"]
    ]
    rows += [_row(each) for each in found]
    print_table(rows, "<>>>>>>>><")
    for lines in _notes(found):
        write(lines + "\n")
    if differences:
        write(f"\nless {found[0].model}, on the same segments of the texts:\n\n")
        rows = [["model", "bits/byte", "95 % interval", "nats/token", "95 % interval"]]
        for each, gap in zip(found[1:], differences, strict=True):
            rows.append([each.model, *_signed(gap.bits_per_byte), *_signed(gap.nll)])
        print_table(rows, "<>>>>")
        if any(gap.nll is None for gap in differences):
            write("\nWhere tokens differ, only bits per byte can be compared.\n")


def _row(each: Measured) -> list[str]:
    p = each.perplexity
    interval = "-" if p.interval is None else f"{_figure(p.interval.low)} to {_figure(p.interval.high)}"
    return [
        each.model, f"{p.predictions:,}", _figure(p.token_perplexity), interval, _figure(p.byte_perplexity),
        _figure(p.word_perplexity), _figure(p.bits_per_byte), _figure(p.nll), _figure(p.standard_error), each.band,
    ]  # fmt: skip


def _notes(found: Sequence[Measured]) -> list[str]:
    results = [each.perplexity for each in found]
    windows = list(dict.fromkeys(f"{p.window:,} tokens, {p.stride:,} of them new" for p in results))
    notes = [f"\nWindows of {' and '.join(windows)}. The band is the guide's, for {BANDS_OF}."]
    if len({_unpredicted(p) for p in results}) == 1:
        notes += filter(None, [_unpredicted(results[0])])
    else:
        notes += [f"{each.model}: {said}" for each in found if (said := _unpredicted(each.perplexity))]
    if any(p.standard_error is None for p in results):
        notes.append("± and interval need more than one segment of 2,048 bytes.")
    return notes


def _unpredicted(p: Perplexity) -> str:
    without = p.texts_without
    if not without:
        return ""
    return (
        f"{without:,} of {p.texts:,} texts {'has' if without == 1 else 'have'} nothing to predict: empty, or one token."
    )


def _figure(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if value < 1e6 else f"{value:.4g}"


def _signed(gap: Interval | None) -> tuple[str, str]:
    if gap is None:
        return "-", "-"
    return f"{gap.value:+.4f}", f"{gap.low:+.4f} to {gap.high:+.4f}" if math.isfinite(gap.low) else "-"
