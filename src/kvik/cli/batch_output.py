"""The --out file of a batch: whole lines only, one process at a time, and what is there already."""

from __future__ import annotations

import json
from pathlib import Path
from typing import IO, Any

from kvik.cli.batch_input import id_mark
from kvik.cli.output import plain
from kvik.errors import DataError, ParameterError
from kvik.files import atomic_write
from kvik.jsonl import LineFile, WithLines

__all__ = ["Results"]


class Results(WithLines):
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
        self._file = LineFile(self._path, "--out")
        try:
            size = self._file.size
            if size and not resume:
                raise ParameterError(f"--out {name} is not empty; --resume goes on with it, or name another file")
            if size and self._scan():
                self._drop_errors()
        except BaseException:
            self._file.close()
            raise

    def same_file(self, file: IO[bytes]) -> bool:
        """Whether an open file is this one."""
        return self._file.same_file(file)

    def write(self, entry: dict[str, Any]) -> None:
        """Append a line. StorageError when there is no room for it; then there is nothing of it."""
        self._file.write(plain(entry), hint="the results so far are kept; go on with --resume")

    def sync(self) -> None:
        """See to it that the results last."""
        self._file.sync()

    def _scan(self) -> bool:
        """Note what is there and cut off half a line. Whether there are errors."""
        errors, end = False, 0
        with open(self._path, "rb") as file:
            for number, data in enumerate(file, 1):
                found = self._entry(data)
                if found is None:
                    if data.endswith(b"\n"):
                        raise DataError(f"line {number} is no result of kvik run --batch", path=self.name)
                    self._file.cut(end)
                    return errors
                end += len(data)
                if "error" in found:
                    errors = True
                else:
                    self.finished[id_mark(found["id"])] = int(found["request"], 16)
                if not data.endswith(b"\n"):
                    self._file.end_line()
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
        old_file, self._file = self._file, LineFile(self._path, "--out")
        old_file.close()
