"""`kvik xray` on a terminal: the text coloured by probability, a line a token, one token in detail, the beams."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from kvik.cli.output import print_table, quoted, write
from kvik.cli.xray_html import MOST_BITS, surprise
from kvik.cli.xray_tree import path_of

if TYPE_CHECKING:
    from kvik.cli.xray_tree import Node
    from kvik.decoding.trace import TokenTrace

__all__ = ["colours", "print_beams", "print_detail", "print_text", "print_tokens"]

# From certain to 0.4 % and less: backgrounds of the 256-colour palette with the ink that is read on them.
_SCALE = ((None, None), (223, 16), (222, 16), (215, 16), (208, 16), (202, 16), (160, 231))
_BLOCKS = " ▏▎▍▌▋▊▉█"
_BAR = 28
_MOST_ROWS = 12
Piece = Callable[[int], bytes]


def colours() -> bool:
    """Whether standard output takes colours."""
    return sys.stdout.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM", "dumb") != "dumb"


def print_text(traces: Sequence[TokenTrace], text: Callable[[Sequence[int]], str]) -> None:
    """The answer; with colours by the surprise of each token, and what they mean.

    text: of tokens together, so that characters that several tokens make are whole.
    """
    if not colours():
        write(text([one.token_id for one in traces]) + "\n")
        return
    group: list[TokenTrace] = []
    for one in traces:
        group.append(one)
        piece = text([each.token_id for each in group])
        if "\ufffd" in piece and len(group) < 4:  # the beginning of a character
            continue
        _coloured(piece, max(surprise(each.probability) for each in group))
        group = []
    if group:
        _coloured(text([each.token_id for each in group]), max(surprise(each.probability) for each in group))
    write("\n\n")
    for level, name in ((1, " 50 % "), (2, " 25 % "), (3, " 10 % "), (4, " 5 % "), (5, " 1 % "), (6, " 0.4 % ")):
        sys.stdout.write(_painted(name, level))
    write(" probability by the model\n")


def _level(bits: float) -> int:
    return min(len(_SCALE) - 1, int(bits * len(_SCALE) / MOST_BITS))


def _coloured(text: str, bits: float) -> None:
    for place, line in enumerate(text.split("\n")):
        if place:
            write("\n")
        begin, end = _escape(_level(bits))
        sys.stdout.write(begin)
        write(line)  # control characters become visible there
        sys.stdout.write(end)


def _escape(level: int) -> tuple[str, str]:
    background, ink = _SCALE[level]
    return ("", "") if background is None else (f"\x1b[48;5;{background};38;5;{ink}m", "\x1b[0m")


def _painted(text: str, level: int) -> str:
    begin, end = _escape(level)
    return begin + text + end


def print_tokens(traces: Sequence[TokenTrace], piece: Piece) -> None:
    """A line a token."""
    if not traces:
        return
    p = traces[0].nucleus_p
    rows = [["", "token", "prob.", "rank", "entropy", f"nucleus {p:g}", "left", "drawn at", "removed by"]]
    for number, one in enumerate(traces, 1):
        removed = ", ".join(f"{s.name} {s.removed}" for s in one.stages[1:] if s.removed)
        rows.append([
            str(number), quoted(piece(one.token_id)), percent(one.probability), str(one.rank),
            f"{one.entropy / math.log(2):.2f}", str(one.nucleus), str(one.stages[-1].kept), percent(one.drawn_probability),
            removed or "-",
        ])  # fmt: skip
    print_table(rows, "><>>>>>><")


def percent(p: float) -> str:
    value = 100 * p
    return f"{value:.1f} %" if value >= 10 else f"{value:.2f} %" if value >= 0.01 else f"{value:.0e} %"


def _bar(share: float, width: int = _BAR) -> str:
    eighths = round(8 * width * share)
    return ("█" * (eighths // 8) + (_BLOCKS[eighths % 8] if eighths % 8 else "")).ljust(width)


def print_detail(one: TokenTrace, number: int, piece: Piece) -> None:
    """One token: what each stage did, the best tokens before and after, and the temperature sweep."""
    write(f"token {number}, {quoted(piece(one.token_id))}: rank {one.rank}, {percent(one.probability)}\n\n")
    rows = [["stage", "left", "removed", "with probability"]]
    rows += [[s.name, str(s.kept), str(s.removed), percent(s.mass) if s.removed else "-"] for s in one.stages]
    print_table(rows, "<>>>")
    write("\n")
    rows = [["", "token", "model", "", "after all", "removed by"]]
    for c in one.candidates[:_MOST_ROWS]:
        mark = ">" if c.token_id == one.token_id else ""
        after = percent(c.shares[-1]) if c.removed_by is None else "-"
        rows.append(
            [mark, quoted(piece(c.token_id)), _bar(c.shares[0]), percent(c.shares[0]), after, c.removed_by or ""]
        )
    print_table(rows, "<<<>><")
    best = one.candidates[:4]
    write("\nthe same logits at other temperatures\n")
    rows = [["", *(quoted(piece(c.token_id)) for c in best), "entropy", "nucleus", quoted(piece(best[0].token_id))]]
    for s in one.sweep:
        rows.append([
            f"{s.temperature:g}", *(percent(x) for x in s.shares[: len(best)]), f"{s.entropy / math.log(2):.2f}",
            str(s.nucleus), _bar(s.shares[0], 20),
        ])  # fmt: skip
    print_table(rows, ">" + ">" * len(best) + ">><")


def print_beams(tree: Sequence[Node], piece: Piece, beams: int) -> None:
    """A line for each beam that is in an answer or was still followed, and how many were given up at each step."""
    if not tree:
        return
    leaves = [i for i, n in enumerate(tree) if n.kept and not any(o.before == i and o.kept for o in tree)]
    leaves.sort(key=lambda i: (not tree[i].best, -tree[i].total))
    write(f"\n{beams} beams, {tree[-1].step + 1} steps\n")
    rows = [["", "sum of log-probabilities", "score", "beam"]]
    for i in leaves:
        node = tree[i]
        text = b"".join(piece(tree[at].token_id) for at in path_of(tree, i))
        score = "-" if node.score is None else f"{node.score:.3f}"
        rows.append(["*" if node.best else "", f"{node.total:.2f}", score, quoted(text)])
    print_table(rows, "<>><")
    lost = sum(not node.kept for node in tree)
    write(f"* is the answer; {lost} of {len(tree)} tokens were given up\n")
