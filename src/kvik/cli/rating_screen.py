"""What a rater sees and types: two answers in frames, one key for each judgement."""

from __future__ import annotations

import os
import shutil
import sys
import unicodedata
from itertools import zip_longest
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from kvik.cli.input import STDIN
from kvik.cli.output import visible, write
from kvik.errors import DataError

if TYPE_CHECKING:
    from kvik.evaluation.ratings import Item

__all__ = ["KEYS", "LEGEND", "Keys", "show_item", "wrapped"]

KEYS = "12=sbq"
LEGEND = "1 or 2 is better, = equal, s skip, b back, q quit: "

_SIDE_BY_SIDE = 100  # columns from which the answers stand beside each other
_END_OF_TEXT = "\x04"  # Ctrl-D
# Marks that turn the direction of writing could swap the answers on the screen.
_TURNING = dict.fromkeys((*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x2028, 0x2029), 0xFFFD)


def show_item(item: Item, first_is_a: bool, place: str, before: str | None) -> None:
    """The prompt and both answers. place: "3 of 40"; before: what was answered last time, where that was asked before.

    Every line of a model's text stands in a frame, so that no text can look like another answer.
    """
    width = max(20, shutil.get_terminal_size().columns)
    write(f"\n── {place} " + "─" * max(0, width - len(place) - 4) + "\n")
    if item.prompt is not None:
        for line in wrapped(item.prompt, width - 2):
            write(f"  {line}\n")
        write("\n")
    first, second = (item.a, item.b) if first_is_a else (item.b, item.a)
    if width >= _SIDE_BY_SIDE and not _right_to_left(first + second):
        _beside(first, second, (width - 3) // 2)
    else:
        for number, text in ((1, first), (2, second)):
            write(f"[{number}]\n")
            for line in wrapped(text, width - 2):
                write(f"│ {line}".rstrip() + "\n")
            write("\n")
    if before is not None:
        write(f"(it was {before})\n")


def _beside(first: str, second: str, column: int) -> None:
    from rich.cells import set_cell_size

    write(f"{'[1]':{column}} [2]\n")
    for left, right in zip_longest(wrapped(first, column - 3), wrapped(second, column - 3), fillvalue=None):
        shown = "" if left is None else f"│ {left}"
        write(f"{set_cell_size(shown, column)} {'' if right is None else f'│ {right}'}".rstrip() + "\n")
    write("\n")


def _right_to_left(text: str) -> bool:
    """Whether a terminal may turn lines of it around."""
    return any(unicodedata.bidirectional(character) in ("R", "AL") for character in text)


def wrapped(text: str, width: int) -> list[str]:
    """The text in lines of at most `width` cells, broken at spaces where there are some; at least one line."""
    from rich.cells import cell_len, chop_cells

    lines: list[str] = []
    for paragraph in visible(text).translate(_TURNING).expandtabs(4).split("\n"):
        line = ""
        for word in paragraph.split(" "):
            longer = f"{line} {word}" if line else word
            if cell_len(longer) <= width:
                line = longer
                continue
            if line:
                lines.append(line)
            *whole, line = chop_cells(word, width) or [""]
            lines += whole
        lines.append(line)
    return lines


class Keys:
    """Judgements as they come, one of KEYS each: keys at a terminal (no Enter), lines of standard input else.

    Where the input ends it is "q". At a terminal other keys are said and passed over; another line raises DataError.
    """

    def __init__(self) -> None:
        self._terminal = sys.stdin.fileno() if sys.stdin is not None and sys.stdin.isatty() else None
        self._before: Any = None
        self._pending: list[str] = []
        self._lines = 0

    def __enter__(self) -> Self:
        if self._terminal is not None:
            import termios
            import tty

            self._before = termios.tcgetattr(self._terminal)
            tty.setcbreak(self._terminal, termios.TCSADRAIN)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._terminal is not None:
            import termios

            termios.tcsetattr(self._terminal, termios.TCSADRAIN, self._before)

    def next(self) -> str:
        key = self._line() if self._terminal is None else self._typed(self._terminal)
        write(f"{key}\n")
        return key

    def _line(self) -> str:
        data = sys.stdin.buffer.readline() if sys.stdin is not None else b""
        self._lines += 1
        text = data.decode("utf-8", "replace").strip()
        if not data:
            return "q"
        if len(text) != 1 or text not in KEYS:
            raise DataError(f"line {self._lines}: must be one of {' '.join(KEYS)}, got {text[:20]!r}", path=STDIN)
        return text

    def _typed(self, terminal: int) -> str:
        while True:
            if not self._pending:
                text = os.read(terminal, 64).decode("utf-8", "replace").lower()
                # An arrow, or another key that sends several characters at once, begins with an escape.
                self._pending = ["?"] if text.startswith("\x1b") else list(text or _END_OF_TEXT)
            key = self._pending.pop(0)
            if key == _END_OF_TEXT:
                return "q"
            if key in KEYS:
                return key
            write(f"\nthe keys are {' '.join(KEYS)}: ")
