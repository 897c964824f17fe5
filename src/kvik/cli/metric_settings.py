"""Settings of metrics as they are typed: NAME=VALUE, for all metrics that take NAME or for one."""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

from kvik.errors import ParameterError
from kvik.params import choose

__all__ = ["Given", "given_settings", "settings_by_metric"]

_FLAGS = {"true": True, "on": True, "yes": True, "false": False, "off": False, "no": False}


class Given(NamedTuple):
    """One setting. option: how it was typed; metric: the only one it is for, None for all that take it."""

    option: str
    metric: str | None
    name: str
    text: str


def given_settings(texts: Sequence[str], options: Mapping[str, str | None]) -> list[Given]:
    """What --setting was given, and the options that are settings by themselves (None is what was not given)."""
    found = [Given(f"--{name}", None, name, text) for name, text in options.items() if text is not None]
    for text in texts:
        place, equals, value = text.partition("=")
        metric, dot, name = place.rpartition(".")
        if not equals or not name or (dot and not metric):
            raise ParameterError(f"--setting takes NAME=VALUE or METRIC.NAME=VALUE, got {text!r}")
        found.append(Given(f"--setting {place}", metric or None, name, value))
    return found


def settings_by_metric(metrics: Sequence[str], given: Sequence[Given]) -> dict[str, dict[str, Any]]:
    """The settings of each metric.

    Raises ParameterError for one that none of the metrics takes, that the metric it is for does not take, that is given
    twice, or whose value does not fit.
    """
    from kvik.evaluation.metrics import GROUPS, METRICS
    from kvik.evaluation.scoring import settings_of

    found: dict[str, dict[str, Any]] = {metric: {} for metric in metrics}
    known = {metric: settings_of(METRICS[metric]) for metric in metrics}
    for one in given:
        chosen = list(metrics)
        if one.metric is not None:
            groups = [name for name, members in GROUPS.items() if set(members) <= set(metrics)]
            name = choose(one.option, one.metric, (*metrics, *groups))
            chosen = list(GROUPS.get(name, (name,)))
        takers = [metric for metric in chosen if one.name in known[metric]]
        if not takers or (one.metric is not None and len(takers) < len(chosen)):
            raise ParameterError(_refusal(one, {metric: tuple(known[metric]) for metric in chosen}))
        for metric in takers:
            if one.name in found[metric]:
                raise ParameterError(f"{one.option}: {metric} was given {one.name!r} already")
            found[metric][one.name] = _value(one, known[metric][one.name].annotation)
    return found


def _refusal(one: Given, known: Mapping[str, Sequence[str]]) -> str:
    takes = "; ".join(
        f"{metric} takes {', '.join(settings)}" if settings else f"{metric} takes none" for metric, settings in known.items()
    )
    import difflib

    near = difflib.get_close_matches(one.name, [name for settings in known.values() for name in settings], 1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"{one.option}: no setting {one.name!r}: {takes}{hint}"


def _value(one: Given, annotation: Any) -> Any:
    try:
        return _parsed(one.text, annotation)
    except ValueError as error:
        raise ParameterError(f"{one.option} {error}, got {one.text!r}") from None


def _parsed(text: str, kind: Any) -> Any:
    """The value of a text, by the annotation of what it is for. Raises ValueError saying what it takes."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return _of_union(text, inner)
    if origin is Literal:
        for value in inner:
            if text == str(value):
                return value
        raise ValueError(f"must be one of {', '.join(map(str, inner))}")
    if isinstance(origin, type) and issubclass(origin, Sequence):
        return tuple(_parsed(piece.strip(), inner[0]) for piece in text.split(","))
    if kind is types.NoneType:
        if text.lower() == "none":
            return None
        raise ValueError("takes none")
    if kind is bool:
        if text.lower() in _FLAGS:
            return _FLAGS[text.lower()]
        raise ValueError("takes on or off")
    if kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            raise ValueError("takes a whole number" if kind is int else "takes a number") from None
    if kind in (str, Path):
        return kind(text)
    raise ValueError("cannot be given here: it takes an object of the Python API")


def _of_union(text: str, kinds: Sequence[Any]) -> Any:
    """The first that fits, text last: everything is a text."""
    said = []
    for kind in sorted(kinds, key=lambda kind: kind in (str, Path)):
        try:
            return _parsed(text, kind)
        except ValueError as error:
            said.append(str(error))
    raise ValueError(" or ".join(dict.fromkeys(said)))
