"""A request's cache as JSON says it: `kv` and `evict`, each a text or an object."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from kvik.errors import ParameterError
from kvik.params.cache import CacheParams, cache_params
from kvik.params.checks import choose
from kvik.params.eviction import POLICIES, parse_policy, policy_of

__all__ = ["cache_field", "json_cache"]

_PACKING = ("group_size", "keep_first")
_EVICTING = ("policy", "layers", "heads")


def json_cache(kv: object, evict: object, base: CacheParams) -> CacheParams | None:
    """`base` with what a request says; None where it says nothing (both None).

    kv: formats as text ("k8v4"), or fields of CacheParams by name. evict: all about eviction as text
    ("snapkv:budget=25%,heads=ada"), or an object: "policy", its name or its text, the policy's fields ("budget" a number or
    "25%"), "layers", "heads". ParameterError begins with "kv" or "evict".
    """
    if kv is None and evict is None:
        return None
    given: dict[str, Any] = {}
    if isinstance(kv, Mapping):
        given = _formats(kv, base)
        if evict is not None and (twice := next((name for name in _EVICTING if name in given), None)):
            raise ParameterError(f"kv.{twice} and evict both say what is evicted; give one of them")
    elif kv is not None and not isinstance(kv, str):
        raise ParameterError(f"kv must be a string or an object, got {kv!r:.80}")
    try:
        found = cache_params(kv, None, base) if isinstance(kv, str) else replace(base, **given)
    except ParameterError as error:
        raise ParameterError(_within("kv", str(error), given)) from None
    return found if evict is None else _evicting(evict, found)


def _formats(kv: Mapping[Any, Any], base: CacheParams) -> dict[str, Any]:
    """The fields of an object; with no integers left, what only they need goes back to what is usual."""
    known = [field.name for field in fields(CacheParams)]
    given = {choose("kv: a field", name, known): value for name, value in kv.items()}
    formats = [given.get(name, getattr(base, name)) for name in ("k", "v")]
    if not any(isinstance(name, str) and ("int" in name or name in ("i8", "i4")) for name in formats):
        given = {name: getattr(CacheParams, name) for name in _PACKING} | given
    return given


def _evicting(evict: object, base: CacheParams) -> CacheParams:
    if isinstance(evict, str):
        try:
            return cache_params(None, evict, base)
        except ParameterError as error:
            raise ParameterError(f"evict: {error}") from None
    if not isinstance(evict, Mapping):
        raise ParameterError(f"evict must be a string or an object, got {evict!r:.80}")
    given = dict(evict)
    if not isinstance(given.get("policy"), str):
        raise ParameterError('evict.policy must be the name of a policy, like "snapkv", or "none"')
    text, spread = given.pop("policy"), dict[str, Any](layers="uniform", heads="uniform")
    try:
        spread |= {name: given.pop(name) for name in tuple(spread) if name in given}
        policy = parse_policy(text)
        if given:
            known = () if policy is None else tuple(field.name for field in fields(policy) if field.init)
            name = next((name for name in given if name not in known), None)
            if name is not None and not known:
                raise ParameterError(f"policy 'none' takes no fields, got {name!r}")
            given = {choose(f"a field of {text}", name, known): _value(name, value) for name, value in given.items()}
            policy = replace(policy, **given)  # type: ignore[type-var] # None has no fields, which is refused above
        return replace(base, policy=policy, **spread)
    except ParameterError as error:
        raise ParameterError(_within("evict", str(error), {**given, **spread})) from None


def _value(name: str, value: Any) -> Any:
    """A budget in JSON may be a text like "25%"."""
    if name != "budget" or not isinstance(value, str):
        return value
    policy = policy_of(f"{next(n for n, kind in POLICIES.items() if hasattr(kind, 'budget'))}:budget={value}")
    return policy.budget  # type: ignore[union-attr] # of one that has a budget


def cache_field(message: str) -> str | None:
    """Which of "kv" and "evict" a refusal of a whole cache is about, by its first words; None where it is another's."""
    first, second, *_ = [*message.split(" ", 2), ""]
    if first in ("k", "v") and second == "is":
        return "kv"
    return "evict" if first in ("policy", *POLICIES) else None


def _within(name: str, message: str, given: Mapping[str, Any]) -> str:
    """A message about a field of the object under its path, "kv.group_size must be …"; of a text as it is, or behind a colon."""
    first = message.partition(" ")[0]
    if first in given:
        return f"{name}.{message}"
    return message if first.rstrip(":") == name else f"{name}: {message}"
