"""Finds stop strings in text that comes in pieces."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import NamedTuple

from kvik.errors import ParameterError

__all__ = ["StopChecker", "Stopped"]


class Stopped(NamedTuple):
    """Text that may be shown now, and the stop string that ended it, if one did."""

    emitted: str
    matched: str | None


class StopChecker:
    """Ends a text before the first stop string in it.

    The text ends at the first character that completes a stop string; of several completed there the longest counts. So
    the result does not depend on how the text is cut into pieces. What may still become a stop string is held back.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        """`stop`: strings that are not empty; none of them means the text passes unchanged."""
        if isinstance(stop, str) or not all(isinstance(text, str) and text for text in stop):
            raise ParameterError(f"stop takes a list of strings that are not empty, got {stop!r}")
        # Longest first, so that the first completed at a character is the one that counts.
        self._stops = sorted(set(stop), key=len, reverse=True)
        self._fallbacks = [_fallback(text) for text in self._stops]
        self._lengths = [0] * len(self._stops)  # of each stop string, how much of it the text ends with
        self._held = ""
        self._matched: str | None = None

    def fork(self) -> StopChecker:
        """Another at the same place of the same text."""
        other = copy(self)
        other._lengths = self._lengths.copy()
        return other

    def add(self, text: str) -> Stopped:
        """Take further text. After a match nothing more is emitted and the match is repeated."""
        if self._matched is not None:
            return Stopped("", self._matched)
        if not self._stops:
            return Stopped(text, None)
        known = self._held + text
        for at, char in enumerate(text, len(self._held)):
            for index, stop in enumerate(self._stops):
                length, fallback = self._lengths[index], self._fallbacks[index]
                while length and stop[length] != char:
                    length = fallback[length - 1]
                if stop[length] == char:
                    length += 1
                if length == len(stop):
                    self._matched, self._held = stop, ""
                    return Stopped(known[: at + 1 - length], stop)
                self._lengths[index] = length
        split = len(known) - max(self._lengths)
        self._held = known[split:]
        return Stopped(known[:split], None)

    def finish(self) -> str:
        """The text held back, now that nothing follows it."""
        held, self._held = self._held, ""
        self._lengths = [0] * len(self._stops)
        return held


def _fallback(text: str) -> list[int]:
    """For each prefix of text, the length of its longest proper prefix that is also its suffix (Knuth–Morris–Pratt)."""
    lengths = [0] * len(text)
    length = 0
    for at in range(1, len(text)):
        while length and text[at] != text[length]:
            length = lengths[length - 1]
        if text[at] == text[length]:
            length += 1
        lengths[at] = length
    return lengths
