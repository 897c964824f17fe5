"""Reads a request's body: bounded bytes, strict JSON, an object of known fields."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any, NoReturn

from starlette.requests import Request

from kvik.server.errors import ApiError

__all__ = ["Fields", "parse_object", "read_body"]

MAX_HINTED = 64
"""Characters of an unknown field for which the nearest known one is looked for: the time grows with them."""

JsonObject = dict[str, Any]


async def read_body(request: Request, limit: int) -> bytes:
    """The whole body. ApiError 413 where it is longer than `limit` bytes, whether its length is announced or not."""
    announced = request.headers.get("content-length", "")
    if announced.isdigit() and int(announced) > limit:
        raise _too_large(limit)
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > limit:
            raise _too_large(limit)
        parts.append(part)
    return b"".join(parts)


def _too_large(limit: int) -> ApiError:
    # The rest of the body is not read, so the connection cannot be used again.
    return ApiError(
        413, f"the body is longer than {limit} bytes", code="body_too_large", headers={"Connection": "close"}
    )


def parse_object(body: bytes) -> JsonObject:
    """The JSON object of a body. ApiError 400 names what is wrong and where."""
    try:
        text = body.decode()
    except UnicodeDecodeError as error:
        raise ApiError(400, f"the body is no valid UTF-8 at byte {error.start}", code="invalid_json") from None
    try:
        value = json.loads(text, parse_constant=_no_constant, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno} column {error.colno}"
        raise ApiError(400, f"the body is no JSON: {error.msg} at {where}", code="invalid_json") from None
    except RecursionError:
        raise ApiError(400, "the body nests too deeply", code="invalid_json") from None
    except ValueError:  # int() of thousands of digits
        raise ApiError(400, "the body has a number with too many digits", code="invalid_json") from None
    if not isinstance(value, dict):
        raise ApiError(400, f"the body must be a JSON object, got {type(value).__name__}", code="invalid_json")
    return value


def _no_constant(name: str) -> NoReturn:
    raise ApiError(400, f"the body has {name}, which is no JSON", code="invalid_json")


def _object(pairs: list[tuple[str, Any]]) -> JsonObject:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise ApiError(400, f"the body has {name!r:.200} twice", param=name, code="invalid_json")
            seen.add(name)
    return found


class Fields:
    """The fields of a body, each known or refused.

    null counts as not given, as OpenAI's clients mean it.

    Args:
        body: the object.
        used: fields this endpoint honours.
        neutral: fields that are known but not honoured, with the values that ask for nothing.
        free: fields that change nothing about an answer, whatever they are.
        within: the field whose value this object is, for messages.
    """

    def __init__(
        self,
        body: JsonObject,
        used: Iterable[str],
        neutral: Mapping[str, tuple[Any, ...]],
        free: Iterable[str] = (),
        within: str = "",
    ) -> None:
        self.used, free, self._within = frozenset(used), frozenset(free), within and f"{within}."
        for name, value in body.items():
            if name in self.used or name in free:
                continue
            if name not in neutral:
                raise _unknown(self._within, name, (*self.used, *free, *neutral))
            if value is not None and not any(_same(value, one) for one in neutral[name]):
                raise _unsupported(self._within + name, neutral[name])
        self.given = {name: value for name, value in body.items() if value is not None and name in self.used}

    def take(self, name: str, kind: type, default: Any = None) -> Any:
        """The field's value, of one type; int takes no booleans. default where it is not given."""
        value = self.given.get(name, default)
        if value is not default and (not isinstance(value, kind) or (kind is int and isinstance(value, bool))):
            wanted = {str: "a string", bool: "true or false", int: "an integer", dict: "an object", list: "a list"}[
                kind
            ]
            raise ApiError(
                400, f"{name} must be {wanted}, got {json.dumps(value):.100}", param=name, code="invalid_type"
            )
        return value

    def require(self, name: str) -> Any:
        """The field's value. ApiError 400 where it is not given."""
        if name not in self.given:
            raise ApiError(400, f"{name} is missing", param=name, code="missing_field")
        return self.given[name]


def _same(value: Any, other: Any) -> bool:
    return bool(value == other) and isinstance(value, bool) == isinstance(other, bool)


def _unknown(within: str, name: str, known: tuple[str, ...]) -> ApiError:
    near = get_close_matches(name, known, 1) if len(name) <= MAX_HINTED else []
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return ApiError(400, f"unknown field {within + name!r:.200}{hint}", param=within + name, code="unknown_parameter")


def _unsupported(name: str, neutral: tuple[Any, ...]) -> ApiError:
    shown = " or ".join(json.dumps(one) for one in neutral)
    remedy = f"leave it out or give {shown}" if neutral else "leave it out"
    return ApiError(400, f"{name} is not supported; {remedy}", param=name, code="unsupported_parameter")
