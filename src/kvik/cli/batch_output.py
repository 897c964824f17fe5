"""The --out file of a batch: whole lines only, one process at a time, and what is there already."""

from __future__ import annotations

import fcntl
import json
import os
import stat
from io import UnsupportedOperation
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from kvik.cli.batch_input import id_mark
from kvik.cli.output import plain
from kvik.errors import DataError, ParameterError, TryAgainError
from kvik.files import atomic_write, storage_errors

__all__ = ["Results"]


class Results:
    """Results, appended a line each.

    What was written before a crash, a full disk or Ctrl-C is whole: half a last line is cut off by the next `--resume`,
    lines of errors are taken out by it, since their requests are tried again.

    Args:
        name: the file's. resume: go on with it, instead of refusing one that is not empty.

    Attributes:
        finished: marks of the requests with results there, by marks of their ids.
    """

    def __init__(self, name: str, resume: bool) -> None:
        self.name = name
        self.finished: dict[int, int] = {}
        self._path = Path(name)
        self._descriptor = self._open()
        try:
            size = os.fstat(self._descriptor).st_size
            if size and not resume:
                raise ParameterError(f"--out {name} is not empty; --resume goes on with it, or name another file")
            if size and self._scan():
                self._drop_errors()
        except BaseException:
            os.close(self._descriptor)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        os.close(self._descriptor)

    def _open(self) -> int:
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NONBLOCK, 0o666)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise ParameterError(f"--out must be a file, which {self.name} is not")
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise TryAgainError(f"{self.name}: another process writes to it") from None
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def same_file(self, file: IO[bytes]) -> bool:
        """Whether an open file is this one."""
        try:
            return os.path.sameopenfile(self._descriptor, file.fileno())
        except UnsupportedOperation:  # no file at all
            return False

    def write(self, entry: dict[str, Any]) -> None:
        """Append a line. StorageError when there is no room for it; then there is nothing of it."""
        text = json.dumps(plain(entry), ensure_ascii=False, allow_nan=False)
        data = text.encode("utf-8", "replace") + b"\n"
        before = os.fstat(self._descriptor).st_size
        with storage_errors(self._path, hint="the results so far are kept; go on with --resume"):
            try:
                while data:
                    data = data[os.write(self._descriptor, data) :]
            except BaseException:  # also Ctrl-C
                os.ftruncate(self._descriptor, before)
                raise

    def sync(self) -> None:
        """See to it that the results last."""
        with storage_errors(self._path):
            os.fsync(self._descriptor)

    def _scan(self) -> bool:
        """Note what is there and cut off half a line. Whether there are errors."""
        errors, end = False, 0
        with open(self._path, "rb") as file:
            for number, data in enumerate(file, 1):
                found = self._entry(data)
                if found is None:
                    if data.endswith(b"\n"):
                        raise DataError(f"line {number} is no result of kvik run --batch", path=self.name)
                    os.ftruncate(self._descriptor, end)
                    return errors
                end += len(data)
                if "error" in found:
                    errors = True
                else:
                    self.finished[id_mark(found["id"])] = int(found["request"], 16)
                if not data.endswith(b"\n"):
                    os.write(self._descriptor, b"\n")
                    break
        return errors

    @staticmethod
    def _entry(data: bytes) -> dict[str, Any] | None:
        try:
            found = json.loads(data)
            if "error" not in found:
                int(found["request"], 16)
                hash(found["id"])
        except (ValueError, TypeError, KeyError, RecursionError):
            return None
        return found if isinstance(found, dict) else None

    def _drop_errors(self) -> None:
        with open(self._path, "rb") as old, atomic_write(self._path.resolve()) as new:  # not a link to it
            for data in old:
                if "error" not in json.loads(data):
                    new.write(data)
        old_descriptor, self._descriptor = self._descriptor, self._open()
        os.close(old_descriptor)
