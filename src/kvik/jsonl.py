"""Files of JSON objects, one a line: read line by line, each checked by itself; written so that every line is whole."""

from __future__ import annotations

import fcntl
import json
import os
import stat
from collections.abc import Iterator, Mapping
from io import UnsupportedOperation
from pathlib import Path
from types import TracebackType
from typing import IO, Any, NamedTuple, Self

from kvik.errors import DataError, ParameterError, TryAgainError
from kvik.files import open_regular, storage_errors

__all__ = ["MAX_LINE_BYTES", "Entries", "LineFile", "WithLines", "parse_object", "read_entries", "read_lines", "shown"]

MAX_LINE_BYTES = 64 << 20


def read_lines(file: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """Each line with its number from 1, without blank ones. Of one beyond MAX_LINE_BYTES just more than those."""
    number = 0
    while data := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        piece = data
        while len(piece) > MAX_LINE_BYTES and not piece.endswith(b"\n"):
            piece = file.readline(MAX_LINE_BYTES + 1)
        if data.strip():
            yield number, data


def parse_object(data: bytes) -> dict[str, Any]:
    """The object of a line; DataError says, without the line's number, what is wrong with it."""
    if len(data) > MAX_LINE_BYTES:
        raise DataError(f"has over {MAX_LINE_BYTES} bytes")
    try:
        found = json.loads(data.decode(), object_pairs_hook=_distinct, parse_constant=_not_json)
        json.dumps(found, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        raise DataError(f"is not UTF-8: byte 0x{data[error.start]:02x} (at byte {error.start} of the line)") from None
    except UnicodeEncodeError:
        raise DataError("has half a surrogate pair, which is no text") from None
    except RecursionError:
        raise DataError("is nested too deep") from None
    except ValueError as error:
        raise DataError(f"is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise DataError(f"must be an object, got {shown(found)}")
    return found


class Entries(NamedTuple):
    """A file's objects with their lines. torn: half a last line was left out; size: bytes of the whole lines."""

    entries: tuple[tuple[int, dict[str, Any]], ...]
    torn: bool
    size: int


def read_entries(path: Path) -> Entries:
    """The objects of a file that `LineFile` wrote. Raises DataError naming the line of what is none."""
    found: list[tuple[int, dict[str, Any]]] = []
    with open(open_regular(path), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        for number, data in read_lines(file):
            try:
                found.append((number, parse_object(data)))
            except DataError as error:
                if data.endswith(b"\n") or len(data) > MAX_LINE_BYTES:
                    raise DataError(f"line {number}: {error}", path=path) from None
                return Entries(tuple(found), True, size - len(data))
    return Entries(tuple(found), False, size)


def shown(value: object) -> str:
    """A JSON value for a message, cut where it is long."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:59]}…"


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise DataError(f"names {next(name for name in names if names.count(name) > 1)!r} twice")
    return found


def _not_json(name: str) -> None:
    raise ValueError(f"{name} is no number")


class LineFile:
    """A file that objects are appended to, by one process at a time. It is made where it is missing.

    What was written before a crash, a full disk or Ctrl-C is whole, but for a killed process's last line: `cut` takes half
    a one off.

    Args:
        path: the file. named: what messages call it.

    Raises ParameterError for what is no file, TryAgainError while another process writes to it, OSError as `open` does.
    """

    def __init__(self, path: Path, named: str) -> None:
        self.path, self.named = path, named
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NONBLOCK, 0o666)
        try:
            if not stat.S_ISREG(os.fstat(self._descriptor).st_mode):
                raise ParameterError(f"{named} must be a file, which {path} is not")
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise TryAgainError(f"{path}: another process writes to it") from None
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        os.close(self._descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def size(self) -> int:
        return os.fstat(self._descriptor).st_size

    def same_file(self, file: IO[bytes]) -> bool:
        """Whether an open file is this one."""
        try:
            return os.path.sameopenfile(self._descriptor, file.fileno())
        except UnsupportedOperation:  # no file at all
            return False

    def write(self, entry: Mapping[str, Any], hint: str = "") -> None:
        """Append a line. StorageError when there is no room for it; then there is nothing of it."""
        text = json.dumps(entry, ensure_ascii=False, allow_nan=False)
        data = text.encode("utf-8", "replace") + b"\n"
        before = self.size
        with storage_errors(self.path, hint=hint):
            try:
                while data:
                    data = data[os.write(self._descriptor, data) :]
            except BaseException:  # also Ctrl-C
                os.ftruncate(self._descriptor, before)
                raise

    def entries(self) -> tuple[tuple[int, dict[str, Any]], ...]:
        """What is there, after `cut` and `end_line` where the last line needs them."""
        found = read_entries(self.path)
        if found.torn:
            self.cut(found.size)
        elif found.size and os.pread(self._descriptor, 1, found.size - 1) != b"\n":
            self.end_line()
        return found.entries

    def cut(self, size: int) -> None:
        """Leave the first `size` bytes."""
        os.ftruncate(self._descriptor, size)

    def end_line(self) -> None:
        """Add the line break that the last line lacks."""
        os.write(self._descriptor, b"\n")

    def sync(self) -> None:
        """See to it that the lines last."""
        with storage_errors(self.path):
            os.fsync(self._descriptor)


class WithLines:
    """Closes the file that its lines are in at the end of a `with`."""

    _file: LineFile

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()
