"""Checks what a conversation consists of: messages and tools."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from kvik.errors import ParameterError
from kvik.text.tokenizer import check_text

__all__ = ["Message", "check_messages", "check_tools", "mapped", "strings"]

_KEYS = ("role", "content")
_MORE = {"assistant": ("tool_calls",), "tool": ("tool_call_id", "name")}
_MOST_DEEP = 24
_MOST_VALUES = 1 << 16
_LARGEST_INT = 1 << 63

Message = Mapping[str, Any]


def check_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The messages as plain dicts. Raises ParameterError naming what is malformed.

    Each has `role` and `content`, both strings. The role "assistant" may have `tool_calls`, a list of objects, and then
    `content` may be None or missing; the role "tool" may have `tool_call_id` and `name`, strings.
    """
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise ParameterError(f"messages must be a list of messages, got {type(messages).__name__}")
    if not messages:
        raise ParameterError("messages is empty; give at least one")
    return [_message(message, f"messages[{index}]") for index, message in enumerate(messages)]


def _message(message: Message, name: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise ParameterError(f"{name} is no dict with role and content but {type(message).__name__}")
    role = message.get("role")
    known = (*_KEYS, *(_MORE.get(role, ()) if isinstance(role, str) else ()))
    for key in message:
        if key not in known:
            raise ParameterError(f"{name} has an unknown key {key!r}; {' and '.join(known)} are known")
    calls = _objects(message["tool_calls"], f"{name}.tool_calls") if "tool_calls" in message else []
    for key in known:
        if key == "tool_calls" or (key == "content" and calls and message.get(key) is None):
            continue
        if key in message:
            check_text(message[key], f"{name}.{key}")
        elif key in _KEYS:
            raise ParameterError(f"{name} has no {key}")
    return dict(message) | ({"tool_calls": calls} if "tool_calls" in message else {})


def check_tools(tools: Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]] | None:
    """The tools as plain JSON values. Raises ParameterError naming the value that is none."""
    return None if tools is None else _objects(tools, "tools")


def _objects(values: Any, name: str) -> list[dict[str, Any]]:
    if isinstance(values, str | bytes | Mapping) or not isinstance(values, Sequence):
        raise ParameterError(f"{name} must be a list of JSON objects, got {type(values).__name__}")
    left = [_MOST_VALUES]
    objects = []
    for index, value in enumerate(values):
        if not isinstance(value, Mapping):
            raise ParameterError(f"{name}[{index}] must be a JSON object, got {type(value).__name__}")
        objects.append(_json(value, f"{name}[{index}]", 0, left))
    return objects


def _json(value: Any, name: str, depth: int, left: list[int]) -> Any:
    """A copy of a JSON value in plain types. left: how many values may still come."""
    left[0] -= 1
    if left[0] < 0 or depth > _MOST_DEEP:
        raise ParameterError(f"{name:.200} is too much: at most {_MOST_VALUES} values, {_MOST_DEEP} deep")
    if isinstance(value, Mapping):
        for key in value:
            check_text(key, f"a key of {name:.200}")
        return {key: _json(entry, f"{name}.{key}", depth + 1, left) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_json(entry, f"{name}[{index}]", depth + 1, left) for index, entry in enumerate(value)]
    if isinstance(value, str):
        check_text(value, f"{name:.200}")
    elif isinstance(value, int) and not -_LARGEST_INT <= value < _LARGEST_INT:
        raise ParameterError(f"{name:.200} has more than 64 bits")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ParameterError(f"{name:.200} is {value}, which JSON cannot say")
    elif not (value is None or isinstance(value, int | float)):
        raise ParameterError(f"{name:.200} is {type(value).__name__}, which JSON cannot say")
    return value


def mapped(value: Any, change: Callable[[str], str]) -> Any:
    """A JSON value with a function applied to every string in it, keys too."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {change(key): mapped(entry, change) for key, entry in value.items()}
    return [mapped(entry, change) for entry in value] if isinstance(value, list) else value


def strings(value: Any) -> Iterator[str]:
    """Every string in a JSON value, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, entry in value.items():
            yield key
            yield from strings(entry)
    elif isinstance(value, list):
        for entry in value:
            yield from strings(entry)
