"""Bounds of one rendering of a chat template."""

from __future__ import annotations

import time
from typing import TypeVar

from jinja2.runtime import Undefined

__all__ = ["Meter", "Refused"]

MAX_DEPTH = 64
_BITS = 64

_Value = TypeVar("_Value")


class Refused(Exception):
    """The template exceeds a bound or does what templates may not."""


class Meter:
    """The bounds of one rendering.

    Args:
        seconds: wall-clock time from now.
        largest: most characters and elements of one value, counted through all that it contains.
        total: most characters and elements of all values made.
    """

    def __init__(self, seconds: float, largest: int, total: int) -> None:
        self.seconds, self.largest, self.left = seconds, largest, total
        self._deadline = time.monotonic() + seconds
        # By identity; values are kept so that no identity is used twice. Templates cannot change a list or dict.
        self._known: dict[int, tuple[object, int, int]] = {}

    def tick(self) -> None:
        if time.monotonic() > self._deadline:
            raise Refused(f"takes longer than {self.seconds:g} s")

    def fits(self, size: int) -> None:
        """Refuse a value of this size before it is made."""
        if size > self.largest:
            raise Refused(f"makes a value of more than {self.largest} characters")

    def made(self, value: _Value) -> _Value:
        """Account for a value that was just made."""
        self.tick()
        self.fits(self.size(value))
        # What a list or dict contains was accounted for when it was made.
        self.left -= len(value) + 1 if isinstance(value, str | list | tuple | dict) else 1
        if self.left < 0:
            raise Refused("makes too many values")
        return value

    def size(self, value: object) -> int:
        return self._measure(value)[0]

    def depth(self, value: object) -> int:
        return self._measure(value)[1]

    def _measure(self, value: object) -> tuple[int, int]:
        if isinstance(value, str):
            return len(value) + 1, 0
        if isinstance(value, int):
            if value.bit_length() > _BITS:
                raise Refused(f"makes an integer of more than {_BITS} bits")
            return 1, 0
        if value is None or isinstance(value, float | Undefined):
            return 1, 0
        if isinstance(value, range):
            return len(value) + 1, 1
        if not isinstance(value, list | tuple | dict):
            raise Refused(f"uses a {type(value).__name__} as a value")
        known = self._known.get(id(value))
        if known is not None:
            return known[1], known[2]
        size, depth = 1 + len(value), 0
        inside = [*value.keys(), *value.values()] if isinstance(value, dict) else value
        for entry in inside:
            entry_size, entry_depth = self._measure(entry)
            size, depth = size + entry_size, max(depth, entry_depth)
        if depth >= MAX_DEPTH:
            raise Refused(f"nests values more than {MAX_DEPTH} deep")
        self._known[id(value)] = (value, size, depth + 1)
        return size, depth + 1
