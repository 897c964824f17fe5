"""The exceptions Kvik raises on purpose. Each carries the exit code its CLI command ends with.

A message is one line: what is wrong, with its name, and what to do about it.
"""

from __future__ import annotations

import os

__all__ = ["DataError", "KvikError", "ParameterError", "StorageError", "TryAgainError", "one_line"]

# What would break a line, steer a terminal or turn the direction of writing: C0 and C1, separators, bidirectional marks.
_UNSEEN = (*range(32), *range(0x7F, 0xA0), 0x2028, 0x2029, *range(0x202A, 0x202F), *range(0x2066, 0x206A))
_ESCAPES = {code: chr(code).encode("unicode_escape").decode() for code in _UNSEEN}


def one_line(text: str) -> str:
    r"""Text of strangers (paths, names in files) for people to read: control characters as \n, \x1b, \u202e."""
    return text.translate(_ESCAPES)


class KvikError(Exception):
    """Base of all deliberate errors. Exit code 1 means a defect in Kvik itself."""

    exit_code = 1

    def __init__(self, message: str = "") -> None:
        super().__init__(one_line(message))


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
