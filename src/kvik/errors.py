"""The exceptions Kvik raises on purpose. Each carries the exit code its CLI command ends with.

A message is one line: what is wrong, with its name, and what to do about it.
"""

from __future__ import annotations

import os

__all__ = ["DataError", "KvikError", "ParameterError", "StorageError", "TryAgainError"]


class KvikError(Exception):
    """Base of all deliberate errors. Exit code 1 means a defect in Kvik itself."""

    exit_code = 1


class ParameterError(KvikError, ValueError):
    """A parameter, option or prompt is out of its range, unknown or contradictory."""

    exit_code = 2


class DataError(KvikError):
    """A file or its contents cannot be used; names the file and, where known, tensor and byte offset."""

    exit_code = 65

    def __init__(
        self,
        message: str,
        *,
        path: str | os.PathLike[str] | None = None,
        tensor: str | None = None,
        offset: int | None = None,
    ) -> None:
        where = "" if path is None else f"{os.fspath(path)}: "
        if tensor is not None:
            where += f"tensor {tensor!r}: "
        if offset is not None:
            message += f" (at byte {offset})"
        super().__init__(where + message)
        self.path, self.tensor, self.offset = path, tensor, offset


class StorageError(KvikError):
    """Reading or writing failed: no space, no permission, no network."""

    exit_code = 74


class TryAgainError(KvikError):
    """The work can be done later or resumed."""

    exit_code = 75
