"""SQL queries on a database file that they can only read: bounded in time, rows and bytes.

A query of a model is text of a stranger. It is one statement, on a file opened read-only and immutable (no lock, no
journal: changes that a running program has not yet checkpointed are not seen); SQLite's authorizer admits reading and
functions and nothing else, so ATTACH, PRAGMA and every change are refused before they run.
"""

from __future__ import annotations

import os
import re
import sqlite3
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvik.errors import DataError, one_line
from kvik.files import open_regular
from kvik.params.checks import integer, real

__all__ = ["QueryError", "QueryLimits", "Row", "has_order", "open_database", "run_query", "same_rows"]

Row = tuple[Any, ...]

MAX_SQL_BYTES = 1_000_000
MAX_LIKE_PATTERN = 1_000
MAX_VALUE_BYTES = 250_000
"""Of any value a query makes or reads. One call of a function like instr or trim takes the square of it, seconds, and cannot
be stopped: time is looked at between steps of SQLite's machine."""
STEPS_PER_CHECK = 200
READING = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE}
OUTSIDE = {"load_extension", "readfile", "writefile", "edit", "fts3_tokenizer"}
"""Functions that reach beyond the database, in builds of SQLite that have them."""


@dataclass(frozen=True)
class QueryLimits:
    """What one query may take: seconds of time, rows and bytes of its result. Any one value has 250,000 bytes at most."""

    seconds: float = 10.0
    rows: int = 100_000
    bytes: int = 1 << 26

    def __post_init__(self) -> None:
        real("seconds", self.seconds, 0.001, 86_400)
        integer("rows", self.rows, 1)
        integer("bytes", self.bytes, 1, 2**31 - 1)


class QueryError(Exception):
    """A query that gives no result; the message is why."""


@contextmanager
def open_database(path: Path) -> Iterator[sqlite3.Connection]:
    """The database, for reading only. Raises DataError where it is missing or no SQLite database."""
    os.close(open_regular(path))
    connection = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro&immutable=1", uri=True, isolation_level=None)
    try:
        try:
            connection.execute("PRAGMA trusted_schema = OFF")
            connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        except sqlite3.Error as error:
            raise DataError(f"is no SQLite database that can be read: {error}", path=path) from None
        connection.text_factory = _text
        connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, MAX_VALUE_BYTES)
        connection.setlimit(sqlite3.SQLITE_LIMIT_SQL_LENGTH, MAX_SQL_BYTES)
        connection.setlimit(sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH, MAX_LIKE_PATTERN)
        connection.setlimit(sqlite3.SQLITE_LIMIT_ATTACHED, 0)
        connection.set_authorizer(_reading)
        yield connection
    finally:
        connection.close()


def run_query(connection: sqlite3.Connection, query: str, limits: QueryLimits) -> list[Row]:
    """The rows of one statement. Raises QueryError where it fails, gives no rows, or takes more than the limits."""
    end = time.monotonic() + limits.seconds
    connection.set_progress_handler(lambda: time.monotonic() > end, STEPS_PER_CHECK)
    try:
        cursor = connection.execute(_checked(query))
        if cursor.description is None:
            raise QueryError("is no query: it gives no rows")
        return _bounded(cursor, limits)
    except (sqlite3.Error, sqlite3.Warning) as error:
        code = getattr(error, "sqlite_errorcode", None)  # not on errors of the Python side
        if code == sqlite3.SQLITE_INTERRUPT:
            raise QueryError(f"takes longer than {limits.seconds:g} s") from None
        if code == sqlite3.SQLITE_AUTH:
            raise QueryError(f"does more than read: {one_line(str(error))}") from None
        raise QueryError(one_line(str(error))) from None
    finally:
        connection.set_progress_handler(None, 0)


def same_rows(gold: Sequence[Row], other: Sequence[Row], *, ordered: bool) -> bool:
    """Whether two results are the same: as multisets of rows, or as sequences; columns in order, values by ==.

    Names of columns do not count; 1 and 1.0 are equal, NULL equals NULL.
    """
    return list(gold) == list(other) if ordered else Counter(gold) == Counter(other)


_LEXEMES = re.compile(
    r"""'(?:[^']|'')*'?|"(?:[^"]|"")*"?|`(?:[^`]|``)*`?|\[[^\]]*\]?|--[^\n]*|/\*(?:[^*]|\*(?!/))*(?:\*/)?|[()]|\w+"""
)


def has_order(query: str) -> bool:
    """Whether a query's own rows are in an order: ORDER BY outside of parentheses, text, names and comments."""
    depth, last = 0, ""
    for match in _LEXEMES.finditer(query):
        lexeme = match.group().lower()
        if lexeme in "()":
            depth += 1 if lexeme == "(" else -1
        elif lexeme.startswith(("--", "/*")):
            continue
        elif depth == 0 and last == "order" and lexeme == "by":
            return True
        last = lexeme
    return False


def _reading(action: int, first: str | None, second: str | None, *_: object) -> int:
    """SQLite's authorizer: second is the function of SQLITE_FUNCTION."""
    if action not in READING or (action == sqlite3.SQLITE_FUNCTION and (second or "").lower() in OUTSIDE):
        return sqlite3.SQLITE_DENY
    return sqlite3.SQLITE_OK


def _text(data: bytes) -> str:
    """Text as stored, also where it is no UTF-8: different bytes stay different."""
    return data.decode("utf-8", "surrogateescape")


def _checked(query: str) -> str:
    if "\0" in query:
        raise QueryError("has a zero character")
    try:
        size = len(query.encode())
    except UnicodeEncodeError:
        raise QueryError("is no valid Unicode") from None
    if size > MAX_SQL_BYTES:
        raise QueryError(f"is longer than {MAX_SQL_BYTES} bytes")
    return query


def _bounded(cursor: sqlite3.Cursor, limits: QueryLimits) -> list[Row]:
    rows: list[Row] = []
    size = 0
    for row in cursor:
        size += sum(len(value) if isinstance(value, str | bytes) else 8 for value in row)
        if len(rows) == limits.rows:
            raise QueryError(f"gives more than {limits.rows} rows")
        if size > limits.bytes:
            raise QueryError(f"gives more than {limits.bytes} bytes")
        rows.append(row)
    return rows
