"""JSON schemas: what is not known is refused by name, and what would cost too much by its number."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterator
from decimal import Decimal
from fractions import Fraction
from typing import Any, NamedTuple, NoReturn

from kvik.errors import ParameterError

__all__ = ["check_schema"]

#: Keywords that llguidance reads.
_READ = frozenset((
    "anyOf", "oneOf", "allOf", "$ref", "const", "enum", "type", "items", "additionalItems", "prefixItems", "minItems",
    "maxItems", "properties", "additionalProperties", "patternProperties", "required", "minProperties",
    "maxProperties", "minLength", "maxLength", "pattern", "format", "minimum", "maximum", "exclusiveMinimum",
    "exclusiveMaximum", "multipleOf",
))  # fmt: skip
#: Keywords that say nothing about which JSON is valid.
_NOTES = frozenset((
    "$schema", "$id", "id", "$anchor", "$comment", "$defs", "definitions", "title", "description", "default",
    "examples", "example", "deprecated", "readOnly", "writeOnly", "contentMediaType", "contentEncoding",
    "contentSchema", "discriminator",
))  # fmt: skip
_KNOWN = _READ | _NOTES
_ONE = ("items", "additionalItems", "additionalProperties")
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems", "items")
_MAPS = ("properties", "patternProperties", "$defs", "definitions")
_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
_LAYOUT = ("item_separator", "key_separator", "whitespace_flexible", "whitespace_pattern")

MOST_PATTERNS = 100  # each is compared with each
MOST_MULTIPLE = 20_000  # states of the automaton that counts remainders
MOST_LEVELS = 100


class Schema(NamedTuple):
    """A schema that was checked, and the regular expressions in it."""

    schema: Any
    patterns: list[str]


def check_schema(text: str) -> Schema:
    """The schema that a JSON text holds. ParameterError names the keyword that is wrong."""
    try:
        schema = json.loads(text, object_pairs_hook=_object, parse_constant=_constant)
    except RecursionError:
        _fail(f"the schema is nested more than {MOST_LEVELS} levels deep")
    except ParameterError:
        raise
    except ValueError as error:
        _fail(f"the schema is no JSON: {error}")
    if not isinstance(schema, dict | bool):
        _fail("the schema must be an object or a boolean")
    if isinstance(schema, dict) and "x-guidance" in schema:
        _check_layout(schema["x-guidance"])
    multiples: set[Fraction] = set()
    keys, patterns = list[str](), list[str]()
    for one, place in _schemas(schema):
        _check_keywords(one, place)
        for key in _BOUNDS:
            _check_number(one.get(key), key)
        if isinstance(value := one.get("multipleOf"), int | float) and not isinstance(value, bool) and value > 0:
            multiples.add(Fraction(Decimal(str(value))))
        if isinstance(found := one.get("patternProperties"), dict):
            keys += found
        if isinstance(pattern := one.get("pattern"), str):
            patterns.append(pattern)
    if len(keys) > MOST_PATTERNS:
        _fail(f"patternProperties has {len(keys)} patterns in all; at most {MOST_PATTERNS} are allowed")
    _check_multiples(multiples)
    return Schema(schema, [*patterns, *keys])


def _check_keywords(one: dict[str, Any], place: str) -> None:
    for key in one:
        layout = key == "x-guidance"
        if key not in _KNOWN and not (place == "#" if layout else key.startswith("x-")):
            near = difflib.get_close_matches(key[:60], _KNOWN, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            _fail(f"the schema's {key!r:.60} in {place} is not supported{hint}")


def _fail(message: str) -> NoReturn:
    raise ParameterError(f"grammar: {message}")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                _fail(f"the schema has {key!r:.60} twice in one object")
            seen.add(key)
    return found


def _constant(name: str) -> NoReturn:
    _fail(f"the schema has {name}, which is no JSON")


def _check_layout(given: object) -> None:
    """Of x-guidance, what decides how JSON is written is allowed; what makes a schema mean less is not."""
    if not isinstance(given, dict):
        _fail("x-guidance must be an object")
    for key in given:
        if key not in _LAYOUT:
            _fail(f"x-guidance: {key!r:.60} is none of {', '.join(_LAYOUT)}")


def _check_number(value: object, key: str) -> None:
    """A bound is kept as a double; one that is none would be moved."""
    if isinstance(value, int) and not isinstance(value, bool) and (abs(value) >= 2**1000 or int(float(value)) != value):
        _fail(f"{key} is an integer that no double holds")


def _check_multiples(multiples: set[Fraction]) -> None:
    """What is a multiple of several numbers is one of their least common multiple, which an automaton counts up to."""
    scale = math.lcm(*(value.denominator for value in multiples))
    common = Fraction(math.lcm(*(int(value * scale) for value in multiples)), scale).numerator
    if common > MOST_MULTIPLE:
        _fail(f"multipleOf: the common multiple of all of them has {common:.6g}, at most {MOST_MULTIPLE:,} is allowed")


def _schemas(schema: Any) -> Iterator[tuple[dict[str, Any], str]]:
    """Each object that is a schema, with its place as a JSON pointer."""
    waiting = [(schema, "#", 0)]
    while waiting:
        one, place, level = waiting.pop()
        if not isinstance(one, dict):
            continue
        if level > MOST_LEVELS:
            _fail(f"the schema is nested more than {MOST_LEVELS} levels deep")
        yield one, place
        below: list[tuple[Any, str]] = [(one[key], f"{place}/{key}") for key in _ONE if key in one]
        for key in _LISTS:
            if isinstance(listed := one.get(key), list):
                below += [(item, f"{place}/{key}/{index}") for index, item in enumerate(listed)]
        for key in _MAPS:
            if isinstance(mapped := one.get(key), dict):
                below += [(item, f"{place}/{key}/{name:.40}") for name, item in mapped.items()]
        waiting += [(item, where, level + 1) for item, where in below]
