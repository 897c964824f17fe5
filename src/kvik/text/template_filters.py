"""The filters and methods that chat templates may use, with a bound for each whose result can exceed its arguments.

A guard gets the meter and the arguments, which have been measured, and refuses before anything large is made.
"""

from __future__ import annotations

import json
import re
import string
from collections.abc import Callable, Iterator
from typing import Any

from jinja2.filters import FILTERS as _JINJA

from kvik.text.template_meter import Meter, Refused

__all__ = ["FILTERS", "GUARDS", "METHODS", "checked_format", "checked_percent", "plain"]

_MAX_WIDTH = 999
_MAX_DIGITS = 4300  # of a number read from a string; Python's own limit
_MAX_INDENT = 16

_PERCENT = re.compile(r"%(\([^()%]*\))?([#0\- +\d.*hlL]*)(.)?", re.DOTALL)


def plain(value: Any) -> Any:
    """Lists in place of iterators and ordinary strings in place of marked-up ones."""
    if isinstance(value, str):
        return str(value)
    return list(value) if isinstance(value, Iterator) else value


def checked_percent(meter: Meter, pattern: str, values: Any) -> str:
    """`pattern % values`."""
    fields = 0
    for found in _PERCENT.finditer(pattern):
        _check_width(found[2])
        if "*" in found[2] or found[3] == "(":
            raise Refused(f"formats with {found[0][:40]!r}")
        fields += 1
    meter.fits(len(pattern) + fields * (_MAX_WIDTH + meter.size(values)))
    text: str = pattern % values
    return text


def checked_format(
    meter: Meter, pattern: str, function: Callable[..., str], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> str:
    """`function(*args, **kwargs)`, Jinja's safe form of `pattern.format`."""
    fields = 0
    for _, name, spec, _ in string.Formatter().parse(pattern):
        if name is not None:
            fields += 1
            _check_width(spec or "")
            if "{" in (spec or ""):
                raise Refused(f"formats with {spec!r:.40}")
    meter.fits(len(pattern) + fields * (_MAX_WIDTH + meter.size(args) + meter.size(kwargs)))
    return function(*args, **kwargs)


def _check_width(spec: str) -> None:
    for digits in re.findall(r"\d+", spec):
        if len(digits) > 3:
            raise Refused(f"formats to a width of more than {_MAX_WIDTH}")


def _replacing(meter: Meter, text: Any, old: Any, new: Any, count: Any = None) -> None:
    text, old, new = str(text), str(old), str(new)
    meter.fits(len(text) + text.count(old) * len(new))


def _joining(meter: Meter, values: Any, separator: Any = "", attribute: Any = None) -> None:
    count = len(values) if hasattr(values, "__len__") else 0
    meter.fits(meter.size(values) + count * meter.size(separator))


def _indenting(meter: Meter, text: Any, width: Any = 4, first: Any = False, blank: Any = False) -> None:
    step = len(width) if isinstance(width, str) else int(width)
    meter.fits(len(text) + (text.count("\n") + 1) * step)


def _rounding(meter: Meter, value: Any, precision: Any = 0, method: Any = "common") -> None:
    if not isinstance(precision, int) or abs(precision) > 15:
        raise Refused(f"rounds to {precision!r} digits")


def _reading(meter: Meter, value: Any, *args: Any, **kwargs: Any) -> None:
    if isinstance(value, str) and len(value) > _MAX_DIGITS:
        raise Refused(f"reads a number of {len(value)} digits")


def _summing(meter: Meter, values: Any, attribute: Any = None, start: Any = 0) -> None:
    if not isinstance(start, int | float):  # lists would be copied once per element
        raise Refused("sums what are not numbers")


def _formatting(meter: Meter, pattern: Any, *args: Any, **kwargs: Any) -> None:
    checked_percent(meter, str(pattern), kwargs or args)


def _writing_json(
    meter: Meter, value: Any, ensure_ascii: Any = 0, indent: Any = None, separators: Any = None, sort_keys: Any = 0
) -> None:
    step = len(indent) if isinstance(indent, str) else int(indent or 0)
    if step > _MAX_INDENT or any(len(separator) > _MAX_INDENT for separator in separators or ()):
        raise Refused(f"indents or separates JSON by more than {_MAX_INDENT} characters")
    meter.fits(meter.size(value) * (1 + step * meter.depth(value)))


def _to_json(
    value: Any, ensure_ascii: Any = False, indent: Any = None, separators: Any = None, sort_keys: Any = False
) -> str:
    """As transformers has it: Jinja's own escapes HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


_JINJA_NAMES = (
    "abs capitalize count d default dictsort e escape first float format groupby indent int items join last length list"
    " lower map max min reject rejectattr replace reverse round safe select selectattr sort string sum title trim"
    " truncate unique upper wordcount"
)

FILTERS: dict[str, Callable[..., Any]] = {name: _JINJA[name] for name in _JINJA_NAMES.split()}
FILTERS["tojson"] = _to_json

GUARDS: dict[str, Callable[..., None]] = {
    "replace": _replacing, "join": _joining, "indent": _indenting, "round": _rounding, "int": _reading,
    "float": _reading, "sum": _summing, "format": _formatting, "tojson": _writing_json,
}  # fmt: skip


def _method(kind: type, name: str) -> Callable[..., Any]:
    function = getattr(kind, name)

    def call(meter: Meter, value: Any, *args: Any, **kwargs: Any) -> Any:
        result = function(value, *args, **kwargs)
        return list(result) if kind is dict and name != "get" else result

    return call


def _replace_method(meter: Meter, value: str, old: str, new: str, count: int = -1) -> str:
    _replacing(meter, value, old, new)
    return value.replace(old, new, count)


def _join_method(meter: Meter, value: str, parts: Any) -> str:
    _joining(meter, parts, value)
    return value.join(parts)


_METHOD_NAMES: dict[type, str] = {
    str: "capitalize casefold count endswith find index isalnum isalpha isascii isdecimal isdigit islower isnumeric"
    " isspace istitle isupper lower lstrip partition removeprefix removesuffix rfind rindex rpartition rsplit rstrip"
    " split splitlines startswith strip swapcase title upper",
    list: "count index",
    tuple: "count index",
    dict: "get items keys values",
}

#: What a template may call on a value: (type, name) to a function of the meter, the value and the arguments.
METHODS: dict[tuple[type, str], Callable[..., Any]] = {
    (kind, name): _method(kind, name) for kind, names in _METHOD_NAMES.items() for name in names.split()
}
METHODS[str, "replace"] = _replace_method
METHODS[str, "join"] = _join_method
