"""How far a batch is, on stderr: a bar on a terminal, else a line every few seconds."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Self

from kvik.cli.output import WithBars, note

if TYPE_CHECKING:
    from rich.progress import TaskID

__all__ = ["BatchProgress", "duration"]

_EVERY_SECONDS, _BAR_EVERY_SECONDS = 5.0, 0.1


def duration(seconds: float) -> str:
    """4000 seconds are "1:06:40"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class BatchProgress(WithBars):
    """Args: total: requests in all, None where that is not known."""

    def __init__(self, total: int | None) -> None:
        self.total = total
        self._begun = self._told = time.monotonic()
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn
            from rich.progress import Progress as Bars

            columns = TextColumn("Answering"), BarColumn(), TextColumn("{task.fields[shown]}", markup=False)
            self._bars = Bars(*columns, console=Console(stderr=True), transient=True, auto_refresh=False)
            self._task = self._bars.add_task("", total=self.total, shown="")
            self._bars.start()
        return self

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._begun

    def say(self, text: str) -> None:
        """A line of its own, above the bar."""
        if self._bars is None:
            note(text)
        else:
            self._bars.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def update(self, done: int, skipped: int, tokens: int) -> None:
        """done: requests that are, `skipped` of them already before; tokens generated."""
        now = time.monotonic()
        if now - self._told < (_EVERY_SECONDS if self._bars is None else _BAR_EVERY_SECONDS):
            return
        self._told = now
        shown = self._shown(done, skipped, tokens)
        if self._bars is None:
            note(shown)
        else:
            assert self._task is not None
            self._bars.update(self._task, completed=done, shown=shown, refresh=True)

    def _shown(self, done: int, skipped: int, tokens: int) -> str:
        seconds = self.seconds
        parts = [f"{done} of {self.total} requests" if self.total is not None else f"{done} requests"]
        parts.append(f"{tokens / seconds:.0f} tokens/s")
        if self.total is not None and done > skipped:
            left = seconds * max(0, self.total - done) / (done - skipped)
            parts.append(f"{duration(left)} left")
        return ", ".join(parts)
