"""Text that comes in: files, standard input, arguments. All of it must be UTF-8."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from kvik.errors import DataError, ParameterError

__all__ = ["argument_text", "decoded", "read_text"]

STDIN = "standard input"


def read_text(name: str) -> str:
    """The text of a file, or of standard input for "-". Raises DataError where there is none and for no UTF-8."""
    if name == "-":
        return decoded(sys.stdin.buffer.read() if sys.stdin is not None else b"", STDIN)
    from kvik.files import open_regular

    with open(open_regular(Path(name)), "rb") as file:
        return decoded(file.read(), name)


def argument_text(argument: str) -> str:
    """A prompt from the command line: "-" is standard input, less its last line break; else the argument itself.

    Raises ParameterError for one that is empty.
    """
    if argument == "-":
        text = read_text("-").removesuffix("\n").removesuffix("\r")
    else:
        text = decoded(os.fsencode(argument), "the prompt")
    if not text:
        raise ParameterError("the prompt is empty")
    return text


def decoded(data: bytes, name: str, before: int = 0) -> str:
    """The text of bytes that `before` others came ahead of. Raises DataError naming the byte that is wrong."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        byte = data[error.start]
        raise DataError(f"is not UTF-8: byte 0x{byte:02x}", path=name, offset=before + error.start) from None
