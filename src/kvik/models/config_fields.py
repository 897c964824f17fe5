"""Look-ups in what a file says about its model: typed, bounded, and named when they fail."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TypeVar

from kvik.errors import DataError

__all__ = ["Fields", "Path", "short"]

Path = str | os.PathLike[str]
Value = TypeVar("Value")


class Fields:
    """A mapping of keys to values of any type. None counts as absent; every failure is a DataError.

    Args:
        values: what the file says.
        path: the file, for messages.
        prefix: put before each key, in look-ups and messages.
        where: put before that in messages.
    """

    def __init__(self, values: Mapping[str, object], path: Path, prefix: str = "", where: str = "") -> None:
        self.path = path
        self._values, self._prefix, self._where = values, prefix, where

    def get(self, key: str) -> object:
        """The value as it is, or None."""
        return self._values.get(self._prefix + key)

    def error(self, key: str, problem: str) -> DataError:
        return DataError(f"{self._where}{self._prefix}{key} {problem}", path=self.path)

    def under(self, prefix: str) -> Fields:
        """The same values, their keys begun by prefix."""
        return Fields(self._values, self.path, self._prefix + prefix, self._where)

    def inside(self, key: str) -> Fields | None:
        """The fields of an object that is itself a value."""
        value = self.get(key)
        if value is not None and not isinstance(value, Mapping):
            raise self.error(key, f"must be an object, got {short(value)}")
        return None if value is None else Fields(value, self.path, where=f"{self._where}{self._prefix}{key}.")

    def with_defaults(self, defaults: Mapping[str, object]) -> Fields:
        """Values of keys that the file lacks. What it sets to null stays null."""
        return Fields({**defaults, **self._values}, self.path, self._prefix, self._where)

    def without(self, *keys: str) -> dict[str, object]:
        """The values that are not null, but for some."""
        return {key: value for key, value in self._values.items() if value is not None and key not in keys}

    def required(self, key: str, value: Value | None) -> Value:
        if value is None:
            raise self.error(key, "is missing")
        return value

    def integer_or_none(self, key: str, low: int, high: int) -> int | None:
        return self._integer(key, self.get(key), low, high)

    def _integer(self, key: str, value: object, low: int, high: int) -> int | None:
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.error(key, f"must be an integer, got {short(value)}")
        if not low <= value <= high:
            raise self.error(key, f"must be in [{low}, {high}], got {short(value)}")
        return value

    def integer(self, key: str, low: int, high: int) -> int:
        return self.required(key, self.integer_or_none(key, low, high))

    def per_layer(self, key: str, high: int) -> int | None:
        """A count that a file may give once or as a list with one entry a layer; the layers must agree."""
        value = self.get(key)
        if isinstance(value, list | tuple):
            if not value or any(entry != value[0] for entry in value):
                raise self.error(key, "differs between layers, which is not supported")
            value = value[0]
        return self._integer(key, value, 1, high)

    def real_or_none(self, key: str, low: float, high: float) -> float | None:
        """A number in (low, high]."""
        value = self.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.error(key, f"must be a number, got {short(value)}")
        if not low < value <= high:  # also false for NaN
            raise self.error(key, f"must be above {low:g} and at most {high:g}, got {short(value)}")
        return float(value)

    def real(self, key: str, low: float, high: float) -> float:
        return self.required(key, self.real_or_none(key, low, high))

    def text_or_none(self, key: str) -> str | None:
        value = self.get(key)
        if value is not None and not isinstance(value, str):
            raise self.error(key, f"must be a string, got {short(value)}")
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(key, f"must be true or false, got {short(value)}")
        return value

    def refuse_unless(self, neutral: Mapping[str, object]) -> None:
        """Refuse keys whose value would change what is computed. A tuple holds several values that would not."""
        for key, expected in neutral.items():
            value = self.get(key)
            if value is not None and value not in (expected if isinstance(expected, tuple) else (expected,)):
                raise self.error(key, f"is {short(value)}, which is not supported")


def short(value: object) -> str:
    """The value as a message shows it, at most 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
