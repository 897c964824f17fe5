"""Texts to measure on: files of text, standard input, and .jsonl files of {"text": …}, read a piece at a time."""

from __future__ import annotations

import codecs
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NamedTuple

from kvik.cli.input import STDIN
from kvik.errors import DataError, ParameterError
from kvik.files import open_regular, storage_errors
from kvik.jsonl import parse_object, read_lines

__all__ = ["TEXTS_HELP", "TextFacts", "TextSource", "Texts", "opened_texts"]

TEXTS_HELP = 'Text files in UTF-8, .jsonl files with {"text": …} in each line, or - for standard input.'

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
                text = parse_object(data).get("text")
            except DataError as error:
                raise DataError(f"line {number} {error}", path=shown) from None
            if not isinstance(text, str):
                raise DataError(f'line {number} needs "text", a string', path=shown)
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


class TextFacts(NamedTuple):
    """What is in one of the files. digest: of its texts."""

    name: str
    texts: int
    bytes: int
    digest: str


class Texts:
    """All of the files, one after another.

    Attributes:
        facts: of each file, once they are read.
        bytes: of all texts.
    """

    def __init__(self, sources: Sequence[TextSource]) -> None:
        self._sources = sources
        self._digest = ""
        self.facts: list[TextFacts] = []
        self.bytes = 0

    def read(self) -> None:
        """Read all of them once, so that what cannot be read is refused before a model is loaded."""
        from kvik.evaluation.window_scores import CountedText, new_digest

        whole = new_digest()
        for source in self._sources:
            own, count, size = new_digest(), 0, 0
            for text in source.texts():
                counted = CountedText(text)
                for _ in counted:
                    pass
                own.update(counted.digest())
                whole.update(counted.digest())
                count, size = count + 1, size + counted.bytes
            self.facts.append(TextFacts(source.name, count, size, own.hexdigest()))
        self._digest = whole.hexdigest()
        self.bytes = sum(fact.bytes for fact in self.facts)

    def texts(self) -> Iterator[Iterable[str]]:
        """Every text from the beginning, in pieces."""
        for source in self._sources:
            yield from source.texts()

    def check(self, digest: str) -> None:
        """Raise DataError where what was read since had another digest."""
        if digest != self._digest:
            raise DataError("the texts changed while they were read", path=", ".join(s.name for s in self._sources))

    def refuse(self, out: str) -> None:
        """Raise ParameterError where a file to write to is one of them."""
        for source in self._sources:
            if os.path.exists(out) and os.path.samestat(os.stat(out), os.fstat(source.file.fileno())):
                raise ParameterError(f"--out and TEXT are the same file: {out}")


@contextmanager
def opened_texts(names: Sequence[str]) -> Iterator[Texts]:
    """The files, open; standard input is kept in a temporary file, since it is read more than once.

    Raises ParameterError where standard input is named twice, DataError for what cannot be read, StorageError where there
    is no room to keep it.
    """
    if names.count("-") > 1:
        raise ParameterError("- is standard input, which can be read once")
    with ExitStack() as stack:
        sources = []
        for name in names:
            opened = stack.enter_context(_spooled() if name == "-" else _opened(name))
            sources.append(TextSource(name, opened, Path(name).suffix.lower() == ".jsonl"))
        yield Texts(sources)


def _opened(name: str) -> IO[bytes]:
    return open(open_regular(Path(name)), "rb")


@contextmanager
def _spooled() -> Iterator[IO[bytes]]:
    folder = Path(tempfile.gettempdir())
    with storage_errors(folder):
        file = tempfile.TemporaryFile()  # noqa: SIM115 - closed below
    with file:
        with storage_errors(folder):
            if sys.stdin is not None:
                shutil.copyfileobj(sys.stdin.buffer, file)
                file.flush()
        yield file
