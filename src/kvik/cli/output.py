"""What the verbs print with: text for terminals and pipes, JSON, amounts, progress bars, a gentle Ctrl-C."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from rich.progress import Progress as Bars
    from rich.progress import ProgressColumn, TaskID

__all__ = [
    "Interrupt",
    "Progress",
    "WithBars",
    "aligned",
    "amount",
    "note",
    "plain",
    "print_json",
    "print_table",
    "quoted",
    "write",
]

_BAR_DELAY_SECONDS = 0.3  # what takes less needs no bar, and importing rich takes a tenth of a second
_STAGES = {
    "download": "Downloading",
    "unpack": "Unpacking",
    "pack": "Packing weights",
    "load": "Loading",
    "compare": "Comparing",
    "score": "Scoring",
}
# Text of a model could steer the terminal (titles, cursor, colours): control characters become their pictures.
_VISIBLE_CONTROLS = {
    **{code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"},
    **dict.fromkeys(range(0x7F, 0xA0), 0xFFFD),
}


def write(text: str) -> None:
    """Text to stdout at once, as it is into a file or pipe, without control characters on a terminal."""
    if text:
        sys.stdout.write(text.translate(_VISIBLE_CONTROLS) if sys.stdout.isatty() else text)
        sys.stdout.flush()


def note(text: str, *, dim: bool = False) -> None:
    """Something for the person, on stderr. dim: greyed, where that is a terminal."""
    sys.stdout.flush()
    if sys.stderr.isatty():
        text = text.translate(_VISIBLE_CONTROLS)
        if dim and "NO_COLOR" not in os.environ and os.environ.get("TERM", "dumb") != "dumb":
            text = f"\x1b[2m{text}\x1b[0m"
    print(text, file=sys.stderr, flush=True)


def plain(value: Any) -> Any:
    """What JSON can hold of dataclasses, named tuples and containers: fields by name, None for what is not finite."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, tuple) and isinstance(fields := getattr(value, "_fields", None), tuple):
        return {name: plain(item) for name, item in zip(fields, value, strict=True)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in (sorted(value) if isinstance(value, set | frozenset) else value)]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, os.PathLike):
        return os.fsdecode(value)
    return value


def print_json(value: Any, *, line: bool = False) -> None:
    """A JSON value on stdout: in one line, or indented when a person looks and no line is asked for."""
    indent = 2 if sys.stdout.isatty() and not line else None
    text = json.dumps(plain(value), ensure_ascii=False, allow_nan=False, indent=indent)
    write(text + "\n")


def print_table(rows: Iterable[Sequence[str]], align: str) -> None:
    """Rows in columns on stdout; align has "<" or ">" for each column."""
    for line in aligned(rows, align):
        write(line + "\n")


def aligned(rows: Iterable[Sequence[str]], align: str) -> list[str]:
    """Rows in columns, a line each."""
    rows = [list(row) for row in rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(align))]
    return [
        "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(row, align, widths, strict=True)).rstrip()
        for row in rows
    ]


def amount(count: float) -> str:
    """Bytes for people, in powers of 1000: 98 362 432 is "98.4 MB"."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 999.95 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError("unreachable")


def quoted(token: bytes) -> str:
    """A token's text in quotes, line breaks escaped; the bytes in hex where it is no whole UTF-8."""
    try:
        return json.dumps(token.decode(), ensure_ascii=False)
    except UnicodeDecodeError:
        return "<" + token.hex(" ") + ">"


class WithBars:
    """Stops its bars, where it has any, at the end of a `with`."""

    _bars: Bars | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._bars.stop()


class Progress(WithBars):
    """Bars for downloads, packing, loading and comparing on stderr, when it is a terminal and the wait is worth one.

    Call it with a stage, units done and units in all. unit: "bytes", or what else is counted.
    """

    def __init__(self, unit: str = "bytes") -> None:
        self._unit = unit
        self._wanted = sys.stderr.isatty()
        self._since: dict[str, float] = {}
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, stage: str, done: int, total: int) -> None:
        if not self._wanted:
            return
        now = time.monotonic()
        since = self._since.setdefault(stage, now)
        if stage not in self._tasks:
            if now - since < _BAR_DELAY_SECONDS or done >= total:
                return
            self._tasks[stage] = self._open().add_task(_STAGES.get(stage, stage.capitalize()), total=total)
        assert self._bars is not None
        self._bars.update(self._tasks[stage], completed=done, total=total)

    def _open(self) -> Bars:
        if self._bars is None:
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                DownloadColumn,
                MofNCompleteColumn,
                TextColumn,
                TimeRemainingColumn,
                TransferSpeedColumn,
            )
            from rich.progress import Progress as Bars

            amounts: tuple[ProgressColumn, ...] = (DownloadColumn(), TransferSpeedColumn())
            if self._unit != "bytes":
                amounts = (MofNCompleteColumn(), TextColumn(self._unit))
            columns = TextColumn("{task.description}"), BarColumn(), *amounts, TimeRemainingColumn()
            self._bars = Bars(*columns, console=Console(stderr=True), transient=True)
            self._bars.start()
        return self._bars


class Interrupt:
    """Ctrl-C while an answer is written.

    Until `gentle` is set a Ctrl-C is a KeyboardInterrupt, as ever; from then on the first one only sets `pressed`, so
    that the answer ends between two tokens and what was said is kept, and a second one is a KeyboardInterrupt again.
    """

    def __init__(self) -> None:
        self.gentle = False
        self.pressed = False
        self._previous: Any = None

    def __enter__(self) -> Self:
        self._previous = signal.getsignal(signal.SIGINT)
        if self._previous is not signal.SIG_IGN:  # a background job is not to be stopped by a Ctrl-C in the foreground
            signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._previous is not signal.SIG_IGN:
            signal.signal(signal.SIGINT, self._previous or signal.SIG_DFL)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        again, self.pressed = self.pressed, True
        if again or not self.gentle:
            raise KeyboardInterrupt
