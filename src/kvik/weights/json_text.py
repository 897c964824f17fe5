"""JSON from strangers: read piece by piece where it may be large, in one go where it must be small.

`Scanner` walks over mapped bytes and makes objects only of what its caller asks for, so that a hostile header costs no
more memory than an honest one. `read_json_object` is for configuration files. Grammar: RFC 8259.
"""

from __future__ import annotations

import codecs
import json
import mmap
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from kvik.errors import DataError
from kvik.weights.tensor_file import map_file

__all__ = ["MAX_DEPTH", "Scanner", "read_json_object"]

MAX_DEPTH = 32
MAX_STRING_BYTES = 1 << 20
MAX_NUMBER_BYTES = 4300  # of more digits Python makes no integer
_UTF8_STEP = 1 << 16

_SPACE = re.compile(rb"[ \t\n\r]*+")
# a string, up to 4096 parts at a time so that the matcher's own stack stays small
_STRING_PARTS = re.compile(rb'(?:[^"\\\x00-\x1f]{1,4096}+|\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4})){1,4096}+')
# Python writes NaN and Infinity into JSON, and configurations of the hub have them
_SCALAR = re.compile(rb"-?(?:0|[1-9][0-9]*+)(?:\.[0-9]++)?(?:[eE][+-]?[0-9]++)?|true|false|null|NaN|-?Infinity")
_OBJECT = re.compile(rb"\{[^{}]{0,4096}+\}")


class Scanner:
    """A position in the JSON text that bytes `begin` to `end` of a mapped file hold, which is checked to be UTF-8.

    Every failure is a DataError with the file and the byte.
    """

    def __init__(self, source: mmap.mmap, path: Path, begin: int, end: int, what: str) -> None:
        """what: how messages call the text."""
        self.source, self.path, self.position, self.end, self.what = source, path, begin, end, what
        if source[begin : min(begin + 3, end)] == codecs.BOM_UTF8:
            self.fail(f"{what} begins with a byte order mark, which JSON must not have; save it without one")
        decoder = codecs.getincrementaldecoder("utf-8")()
        for at in range(begin, end, _UTF8_STEP):
            piece = source[at : min(at + _UTF8_STEP, end)]
            held = len(decoder.getstate()[0])
            try:
                decoder.decode(piece, at + len(piece) == end)
            except UnicodeDecodeError as error:
                self.fail(f"{what} is not UTF-8: {error.reason}", at - held + error.start)

    def fail(self, message: str, at: int | None = None, tensor: str | None = None) -> NoReturn:
        offset = self.position if at is None else at
        raise DataError(message, path=self.path, tensor=tensor, offset=offset)

    def next(self) -> bytes:
        """The next character that is no space, not yet consumed; b"" at the end."""
        found = _SPACE.match(self.source, self.position, self.end)
        self.position = found.end() if found else self.position
        return self.source[self.position : min(self.position + 1, self.end)]

    def take(self, character: bytes) -> None:
        found = self.next()
        if found != character:
            shown = repr(found.decode("latin-1")) if found else "its end"
            self.fail(f"{self.what} is not JSON: {shown} where {character.decode()!r} belongs")
        self.position += 1

    def members(self) -> Iterator[tuple[str, int]]:
        """The keys of an object, each with its byte; after each the caller consumes the value."""
        self.take(b"{")
        if self.next() == b"}":
            self.position += 1
            return
        while True:
            self.next()
            at = self.position
            key = self.string()
            self.take(b":")
            yield key, at
            if self.next() != b",":
                self.take(b"}")
                return
            self.position += 1

    def string(self) -> str:
        self.next()
        begin = self.position
        self.skip_string()
        if self.position - begin > MAX_STRING_BYTES:
            self.fail(f"a string of {self.what} has over {MAX_STRING_BYTES} bytes", begin)
        text: str = json.loads(self.source[begin : self.position].decode())
        try:
            text.encode()
        except UnicodeEncodeError:
            self.fail(f"a string of {self.what} has half a surrogate pair", begin)
        return text

    def skip_string(self) -> None:
        self.take(b'"')
        while found := _STRING_PARTS.match(self.source, self.position, self.end):
            self.position = found.end()
        if self.source[self.position : min(self.position + 1, self.end)] != b'"':
            self.fail(f"{self.what} is not JSON: a string does not end, or holds what must be escaped")
        self.position += 1

    def small_object(self) -> dict[str, Any]:
        """An object without objects in it, at most 4 KiB of text. Its keys are distinct."""
        self.next()
        found = _OBJECT.match(self.source, self.position, self.end)
        if found is None:
            begin = self.position
            self.skip_value()  # what is no JSON at all is called that, with its byte
            self.fail(f"{self.what}: an object of at most 4096 bytes, without objects in it, belongs here", begin)
        text = found.group().decode()
        try:
            value = json.loads(text, object_pairs_hook=_distinct)
        except json.JSONDecodeError as error:
            self.fail(f"{self.what} is not JSON: {error.msg}", self.position + len(text[: error.pos].encode()))
        except (ValueError, RecursionError) as error:
            self.fail(f"{self.what} is not JSON: {_reason(error)}")
        self.position = found.end()
        assert isinstance(value, dict)  # it is between braces
        return value

    def skip_value(self, depth: int = MAX_DEPTH) -> None:
        """Step over a value of any kind, nested at most `depth` deep."""
        first = self.next()
        if first in (b"{", b"[") and depth == 0:
            self.fail(f"{self.what} is nested deeper than {MAX_DEPTH}")
        if first == b"{":
            for _ in self.members():
                self.skip_value(depth - 1)
        elif first == b"[":
            self._skip_array(depth)
        elif first == b'"':
            self.skip_string()
        else:
            found = _SCALAR.match(self.source, self.position, self.end)
            if found is None:
                self.fail(f"{self.what} is not JSON: no value begins here")
            if found.end() - found.start() > MAX_NUMBER_BYTES:
                self.fail(f"a number of {self.what} has over {MAX_NUMBER_BYTES} digits")
            self.position = found.end()

    def _skip_array(self, depth: int) -> None:
        self.take(b"[")
        if self.next() == b"]":
            self.position += 1
            return
        while True:
            self.skip_value(depth - 1)
            if self.next() != b",":
                self.take(b"]")
                return
            self.position += 1

    def finish(self) -> None:
        """Nothing but spaces may follow."""
        if self.next():
            self.fail(f"{self.what} goes on after its end")


def read_json_object(path: Path, most_bytes: int) -> dict[str, Any]:
    """The object that a JSON file holds: at most most_bytes long, nested at most 32 deep, keys distinct.

    Raises DataError with the file and, where there is one, the byte.
    """
    source = map_file(path)
    if len(source) > most_bytes:
        raise DataError(f"has {len(source)} bytes, at most {most_bytes} are allowed", path=path)
    scanner = Scanner(source, path, 0, len(source), "the file")
    if scanner.next() != b"{":
        scanner.fail("the file must hold a JSON object")
    scanner.skip_value()
    scanner.finish()
    try:
        value: dict[str, Any] = json.loads(source[:].decode(), object_pairs_hook=_distinct)
    except (ValueError, RecursionError) as error:
        raise DataError(f"is not JSON: {_reason(error)}", path=path) from None
    return value


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"key {twice[:80]!r} stands twice")
    return found


def _reason(error: Exception) -> str:
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)
