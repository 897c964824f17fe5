"""Checks that parameters share: each says in one line which field is wrong, and its range."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from kvik.errors import ParameterError

__all__ = [
    "above",
    "below",
    "check_length",
    "choose",
    "flag",
    "integer",
    "penalty",
    "real",
    "sequence",
    "strings",
    "token_ids",
]

MAX_CHARACTERS = 1000
MAX_REPETITION_PENALTY = 10.0


def integer(name: str, value: object, low: int, high: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ParameterError(f"{name} must be an integer, got {value!r}")
    if value < low or (high is not None and value > high):
        bound = f"at least {low}" if high is None else f"in [{low}, {high}]"
        shown = str(value) if abs(value) < 2**128 else f"an integer of {value.bit_length()} bits"
        raise ParameterError(f"{name} must be {bound}, got {shown}")


def real(name: str, value: object, low: float, high: float | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ParameterError(f"{name} must be a number, got {value!r}")
    if isinstance(value, int) and abs(value) > 2**1000:  # beyond what a float holds
        raise ParameterError(f"{name} must be finite, got an integer of {value.bit_length()} bits")
    if not math.isfinite(value) or value < low or (high is not None and value > high):
        bound = f"at least {low:g}" if high is None else f"in [{low:g}, {high:g}]"
        raise ParameterError(f"{name} must be finite and {bound}, got {value}")


Option = TypeVar("Option", bound=str)


def choose(what: str, name: object, options: Sequence[Option], aliases: Mapping[str, Option] | None = None) -> Option:
    """The option called `name`, or the one it is an alias of; ParameterError lists the options and names the nearest."""
    if not isinstance(name, str):
        raise ParameterError(f"{what} must be a string, got {name!r}")
    known = (aliases or {}).get(name, name)
    for option in options:
        if known == option:
            return option
    import difflib

    near = difflib.get_close_matches(name, options, 1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ParameterError(f"{what} must be one of {', '.join(options)}, got {name!r}{hint}")


def sequence(name: str, value: object, of: str) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple | set | frozenset):
        raise ParameterError(f"{name} must be a list of {of}, got {value!r}")
    return tuple(value)


def flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise ParameterError(f"{name} must be True or False, got {value!r}")


def above(name: str, value: object, low: float, high: float) -> None:
    """A number in (low, high]."""
    real(name, value, low, high)
    if value == low:
        raise ParameterError(f"{name} must be above {low:g}, got {value}")


def below(name: str, value: object, low: float, high: float) -> None:
    """A number in [low, high)."""
    real(name, value, low, high)
    if value == high:
        raise ParameterError(f"{name} must be below {high:g}, got {value}")


def penalty(value: object) -> None:
    above("repetition_penalty", value, 0.0, MAX_REPETITION_PENALTY)


def check_length(min_tokens: object, max_tokens: object) -> None:
    if max_tokens is not None:
        integer("max_tokens", max_tokens, 1)
    integer("min_tokens", min_tokens, 0)
    if max_tokens is not None and min_tokens > max_tokens:  # type: ignore[operator] # both are integers
        raise ParameterError(f"min_tokens {min_tokens} is above max_tokens {max_tokens}")


def token_ids(name: str, value: object) -> tuple[int, ...]:
    ids = sequence(name, value, "token ids")
    for token in ids:
        integer(name, token, 0)
    return ids


def strings(name: str, value: object, most: int) -> tuple[str, ...]:
    """Up to `most` strings of 1 to 1,000 characters; one string stands for itself."""
    found = (value,) if isinstance(value, str) else sequence(name, value, "strings")
    if len(found) > most:
        raise ParameterError(f"{name} takes at most {most} strings, got {len(found)}")
    if not all(isinstance(s, str) and s for s in found):
        raise ParameterError(f"{name} takes strings that are not empty, got {found!r}")
    for text in found:
        if len(text) > MAX_CHARACTERS:
            raise ParameterError(
                f"{name} takes strings of at most {MAX_CHARACTERS:,} characters, got one of {len(text):,}"
            )
        if any("\ud800" <= c <= "\udfff" for c in text):
            raise ParameterError(f"{name} takes text, got {text!r} with half a surrogate pair")
    return found
