"""Reads the JSON files of a hub folder with bounds, and says where in them something is wrong."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kvik.errors import DataError
from kvik.files import open_regular

__all__ = ["Node", "read_json", "read_text"]


class Node:
    """A value in a JSON file, with its place.

    Attributes:
        value: what JSON says; None also where there is nothing.
        place: its way from the top, such as `model.merges[17]`.
    """

    def __init__(self, value: Any, place: str, path: Path) -> None:
        self.value, self.place, self.path = value, place, path

    def __getitem__(self, key: str) -> Node:
        """The value under a key of an object. Raises DataError when this is none."""
        place = f"{self.place}.{key}" if self.place else key
        return Node(self.object().get(key), place, self.path)

    def __iter__(self) -> Iterator[Node]:
        """The entries of a list; of nothing, none."""
        if self.value is not None and not isinstance(self.value, list):
            raise self.error("not a list")
        for index, value in enumerate(self.value or ()):
            yield Node(value, f"{self.place}[{index}]", self.path)

    def error(self, what: str) -> DataError:
        """The exception to raise: place, value and what is wrong with it."""
        shown = f"{self.value!r:.60}"
        return DataError(f"{self.place or 'the top'} is {shown}: {what}", path=self.path)

    def object(self) -> dict[str, Any]:
        if not isinstance(self.value, dict):
            raise self.error("not an object")
        return self.value

    def text(self) -> str:
        """A string of valid Unicode."""
        if not isinstance(self.value, str):
            raise self.error("not a string")
        try:
            self.value.encode()
        except UnicodeEncodeError:
            raise self.error("no valid Unicode") from None
        return self.value

    def flag(self, default: bool | None = None) -> bool:
        value = default if self.value is None else self.value
        if not isinstance(value, bool):
            raise self.error("not true or false")
        return value

    def number(self, below: int) -> int:
        """An integer in [0, below)."""
        if type(self.value) is not int or not 0 <= self.value < below:
            raise self.error(f"not an integer from 0 to {below - 1}")
        return self.value

    def kind(self) -> str:
        """The `type` of an object."""
        return self["type"].text()


def read_text(path: Path, most: int) -> str | None:
    """A file of at most `most` bytes, or None where there is none. Raises DataError for what is no UTF-8 file."""
    if not os.path.lexists(path):
        return None
    with open(open_regular(path), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise DataError(f"has {size} bytes; at most {most} are read", path=path)
        try:
            return file.read(most).decode()
        except OSError as error:
            raise DataError(f"cannot be read: {error.strerror}", path=path) from error
        except UnicodeDecodeError as error:
            raise DataError(f"is not UTF-8: {error.reason}", path=path, offset=error.start) from None


def read_json(path: Path, most: int) -> Node | None:
    """An object in a JSON file of at most `most` bytes, or None where there is no file. Raises DataError."""
    source = read_text(path, most)
    if source is None:
        return None
    if source.startswith("\ufeff"):
        message = "begins with a byte order mark, which JSON must not have; save it without one"
        raise DataError(message, path=path, offset=0)
    try:
        value = json.loads(source, object_pairs_hook=_object)
    except RecursionError:
        raise DataError("nests too deeply", path=path) from None
    except (json.JSONDecodeError, _Twice) as error:
        raise DataError(f"is not JSON: {error}", path=path) from None
    except ValueError:  # the one that is left: Python makes no integer of so many digits
        raise DataError(f"a number in it has over {sys.get_int_max_str_digits()} digits", path=path) from None
    node = Node(value, "", path)
    node.object()
    return node


class _Twice(ValueError):
    """A key that an object has more than once."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise _Twice(f"the key {twice!r:.60} stands twice in one object")
    return made
