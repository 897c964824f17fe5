"""Texts to measure on: files of text, standard input, and .jsonl files of {"text": …}, read a piece at a time."""

from __future__ import annotations

import codecs
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from kvik.cli.batch_input import BadLine, json_object, read_lines
from kvik.cli.input import STDIN
from kvik.errors import DataError, ParameterError
from kvik.files import open_regular, storage_errors

__all__ = ["TextSource", "opened_texts"]

_PIECE_BYTES = 1 << 16


@dataclass(frozen=True)
class TextSource:
    """One of the files. name: as it was given; lines: whether each line is a text of its own."""

    name: str
    file: IO[bytes]
    lines: bool

    def texts(self) -> Iterator[Iterable[str]]:
        """Its texts from the beginning, each in pieces; one has to be read before the next.

        Raises DataError for what is no UTF-8, with the byte, and for a line that has no text, with its number.
        """
        self.file.seek(0)
        shown = STDIN if self.name == "-" else self.name
        if not self.lines:
            yield _pieces(self.file, shown)
            return
        for number, data in read_lines(self.file):
            try:
                text = json_object(data).get("text")
                if not isinstance(text, str):
                    raise BadLine('needs "text", a string')
            except BadLine as error:
                raise DataError(f"line {number} {error}", path=shown) from None
            yield (text,)


def _pieces(file: IO[bytes], name: str) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    before = 0  # bytes ahead of the piece
    while True:
        data = file.read(_PIECE_BYTES)
        held = len(decoder.getstate()[0])
        try:
            yield decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            byte = error.object[error.start]
            raise DataError(f"is not UTF-8: byte 0x{byte:02x}", path=name, offset=before - held + error.start) from None
        if not data:
            return
        before += len(data)


@contextmanager
def opened_texts(names: Sequence[str]) -> Iterator[list[TextSource]]:
    """The files, open; standard input is kept in a temporary file, since it is read more than once.

    Raises ParameterError where standard input is named twice, DataError for what cannot be read, StorageError where there
    is no room to keep it.
    """
    if names.count("-") > 1:
        raise ParameterError("- is standard input, which can be read once")
    with ExitStack() as stack:
        yield [
            TextSource(
                name, stack.enter_context(_spooled() if name == "-" else open(open_regular(Path(name)), "rb")),
                Path(name).suffix.lower() == ".jsonl",
            )
            for name in names
        ]  # fmt: skip


@contextmanager
def _spooled() -> Iterator[IO[bytes]]:
    import shutil
    import tempfile

    with storage_errors(Path(tempfile.gettempdir())), tempfile.TemporaryFile() as file:
        if sys.stdin is not None:
            shutil.copyfileobj(sys.stdin.buffer, file)
            file.flush()
        yield file
