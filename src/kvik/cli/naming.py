"""Errors name an option as it is typed, though what was checked is a field."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

from kvik.errors import ParameterError

__all__ = ["flag", "naming_options"]

_NO_OPTION = {"grammar", "trace"}  # which of its options a grammar is of, GrammarOptions knows
_OTHERWISE = {"num_beams": "beams", "num_beam_groups": "beam_groups", "num_return_sequences": "n"}


def flag(name: str) -> str:
    """A field's option: `--top-p` for `top_p`."""
    return f"--{_OTHERWISE.get(name, name).replace('_', '-')}"


@contextmanager
def naming_options(*kinds: Any) -> Iterator[None]:
    """Where a ParameterError begins with a field of the dataclasses, say the options' names, but not in what was given.

    Of the words that follow only those with an underscore are taken for fields: others may be English.
    """
    try:
        yield
    except ParameterError as error:
        known = {f.name for kind in kinds for f in fields(kind)} - _NO_OPTION
        said, got, value = str(error).partition(", got ")
        first = re.match(r"\w+", said)
        if first is None or first[0] not in known:
            raise
        rest = re.sub(r"\b\w+_\w+\b", lambda word: flag(word[0]) if word[0] in known else word[0], said[first.end() :])
        raise ParameterError(flag(first[0]) + rest + got + value) from None
