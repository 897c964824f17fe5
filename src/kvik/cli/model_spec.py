"""Models named with their settings, `REF[,key=value…]`, and several of them loaded beside each other."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from kvik.cli import options
from kvik.cli.cache_options import check_prompt
from kvik.cli.machine import memory
from kvik.cli.output import Progress, amount
from kvik.errors import DataError, ParameterError, TryAgainError
from kvik.params import CacheParams, EngineParams, cache_params, choose, kv_text, parse_kv

if TYPE_CHECKING:
    from pathlib import Path

    from kvik.llm import LLM

__all__ = [
    "KEYS",
    "ROOM_BYTES",
    "SPEC_HELP",
    "ModelSpec",
    "check_scored",
    "find_models",
    "load_models",
    "parse_spec",
    "parse_specs",
]

KEYS: dict[str, str] = {
    "weights": "auto, f32, bf16, int8 or int4",
    "kv": "formats of keys and values: f16, bf16, f32, int8, int4, k8v4, …",
    "evict": "none, or a policy, its fields behind + instead of commas: snapkv:budget=25%+window=32",
    "group_size": "16, 32, 64 or 128",
    "keep_first": "0 to 1024",
    "rotate": "true or false",
    "executor": "native or torch",
    "device": "cpu or cuda",
}
"""Settings of a model, arguments of `kvik.LLM` and fields of its CacheParams, with the values they take."""

SPEC_HELP = (
    "catalogue name, .gguf file, folder or hub id, with settings behind commas: "
    + ", ".join(f"{key}=" for key in KEYS)
    + "; fields of a policy are behind +, like evict=snapkv:budget=25%+window=32"
)

ROOM_BYTES = 300_000_000  # the executors' working memory, beside weights, caches and logits
_WINDOWS = 4  # sequences whose keys and values a pool holds at least
_PACKING: dict[str, Callable[[str], Any]] = {
    "group_size": int,
    "keep_first": int,
    "rotate": lambda text: text == "true",
}
_SETTING = re.compile(r"(\w+)=(.*)", re.DOTALL)


@dataclass(frozen=True)
class ModelSpec:
    """ref: as `kvik.LLM` takes it; settings: keys of `KEYS` with checked values."""

    ref: str
    settings: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        return ",".join([self.ref, *(f"{key}={value}" for key, value in self.settings)])

    def get(self, key: str, default: str) -> str:
        return dict(self.settings).get(key, default)

    def cache(self) -> CacheParams | None:
        """How keys and values are kept; None where nothing is said. ParameterError for what does not go together."""
        given = dict(self.settings)
        if not given.keys() & {"kv", "evict", *_PACKING}:
            return None
        evict = given.get("evict")
        found = cache_params(given.get("kv"), None if evict is None else evict.replace("+", ","), CacheParams())
        return replace(found, **{name: read(given[name]) for name, read in _PACKING.items() if name in given})

    def arguments(self) -> dict[str, Any]:
        """Of `kvik.LLM`."""
        given = {key: value for key, value in self.settings if key in ("weights", "executor", "device")}
        cache = self.cache()
        return given if cache is None else {**given, "cache": cache}


def parse_spec(option: str, text: str) -> ModelSpec:
    """The one model that an option names. Raises ParameterError naming the option."""
    found = parse_specs(option, text)
    if len(found) > 1:
        raise ParameterError(f"{option} takes one model, got {len(found)}: {', '.join(map(str, found))}")
    return found[0]


def parse_specs(option: str, text: str) -> list[ModelSpec]:
    """The models that an option names: a piece `key=value` belongs to the model before it.

    A file whose name looks like a setting is written with its folder (./a=b.gguf); one with a comma cannot be named.
    Raises ParameterError for unknown keys, naming the nearest, for values out of range, for a setting without a model.
    """
    found: list[ModelSpec] = []
    for piece in map(str.strip, text.split(",")):
        if not piece:
            raise ParameterError(f"{option} has an empty piece between its commas: {text!r}")
        setting = _SETTING.fullmatch(piece)
        if setting is None:
            found.append(ModelSpec(piece))
        elif not found:
            raise ParameterError(f"{option} begins with {piece}, before which a model must stand: REF,{piece}")
        else:
            found[-1] = _with(option, found[-1], setting[1], setting[2])
    for spec in found:
        _check(option, spec)
    return found


def _with(option: str, spec: ModelSpec, key: str, value: str) -> ModelSpec:
    from kvik.engine.executors import EXECUTORS
    from kvik.weights.layouts import parse_weights

    key = choose(f"{option}: a setting of {spec.ref}", key, tuple(KEYS))
    if key in dict(spec.settings):
        raise ParameterError(f"{option}: {key} of {spec.ref} is given twice")
    try:
        match key:
            case "weights":
                value = parse_weights(value)
            case "kv":
                value = kv_text(*parse_kv(value))
            case "group_size" | "keep_first":
                if not (value.isascii() and value.isdigit() and len(value) < 10):
                    raise ParameterError(f"{key} must be {KEYS[key]}, got {value!r}")
            case "rotate":
                value = choose("rotate", value.lower(), ("true", "false"))
            case "executor":
                value = choose("executor", value, EXECUTORS)
    except ParameterError as error:
        raise ParameterError(f"{option}: {error}") from None
    return replace(spec, settings=(*spec.settings, (key, value)))


def _check(option: str, spec: ModelSpec) -> None:
    """What settings are together."""
    from kvik.engine.executors import EXECUTORS, check_device

    try:
        spec.cache()
        check_device(choose("executor", spec.get("executor", "native"), EXECUTORS), spec.get("device", "cpu"))
    except ParameterError as error:
        raise ParameterError(f"{option}: {error}") from None


def check_scored(option: str, specs: Sequence[ModelSpec]) -> None:
    """ParameterError where a policy has no place to evict at in a text that is scored from its beginning."""
    for spec in specs:
        check_prompt(spec.cache() or CacheParams(), None, f"{option}: {spec}")


def find_models(specs: Sequence[ModelSpec]) -> None:
    """Fetch those of several models that are not here, so that a wrong name is refused before the first is measured.

    Raises what `ModelStore.resolve` does.
    """
    from kvik.weights.store import ModelStore

    for spec in specs if len(specs) > 1 else ():
        with Progress() as progress:
            ModelStore().resolve(spec.ref, progress)


def load_models(specs: Sequence[ModelSpec], engine: EngineParams, *, tokens: int | None = None) -> list[LLM]:
    """The models, fetched and packed if need be, with bars on a terminal; one that is named twice is loaded once.

    They take turns, so each has all the threads. tokens: most of a text that is computed at once, None is a model's
    context: without kv_bytes a pool holds a few such texts, not the share of the machine that a model has alone.
    Raises TryAgainError, before anything is loaded, where memory is short of all of them together.
    """
    different = list(dict.fromkeys(specs))
    pools: list[int | None] = [engine.kv_bytes] * len(different)
    if len(different) > 1:
        plans = [_plan(spec, tokens) for spec in different]
        pools = _pools(plans, engine.kv_bytes)
    loaded = {}
    for spec, pool in zip(different, pools, strict=True):
        with Progress() as progress:
            loaded[spec] = options.make_llm(
                spec.ref, **spec.arguments(), engine=replace(engine, kv_bytes=pool), progress=progress
            )
    return [loaded[spec] for spec in specs]


class _Plan(NamedTuple):
    """Bytes of a model's packed weights, of what its executor makes of them, of the pool it wants, and of one slab."""

    path: Path
    weights: str
    packed: int
    unpacked: int
    pool: int
    slab: int


def _plan(spec: ModelSpec, tokens: int | None) -> _Plan:
    from kvik.cache.layout import kv_layout
    from kvik.cache.storage import pool_size, usual_layouts
    from kvik.models.facts import read_facts
    from kvik.weights.layouts import parse_weights
    from kvik.weights.store import ModelStore

    with Progress() as progress:
        path = ModelStore().resolve(spec.ref, progress).path
    facts = read_facts(path, parse_weights(spec.get("weights", "auto")))
    if facts.refused is not None:
        raise DataError(facts.refused)
    assert facts.config is not None and facts.packed_bytes is not None  # as nothing is refused
    layout, context = kv_layout(facts.config, spec.cache() or CacheParams()), facts.config.context_length
    most = context if tokens is None else min(tokens, context)
    size = pool_size(layout, usual_layouts(facts.config), most, 1, None)
    floats = 4 * facts.parameters if spec.get("executor", "native") == "torch" else 0
    return _Plan(
        path,
        facts.weights,
        facts.packed_bytes,
        floats,
        size.nbytes * (1 if tokens is None else _WINDOWS),
        size.slab_bytes,
    )


def _pools(plans: Sequence[_Plan], kv_bytes: int | None) -> list[int | None]:
    """The bytes of each model's pool; where there is no room for what they want, equal shares of half of what is free."""
    packed = {(plan.path, plan.weights): plan.packed for plan in plans}  # one packed file is mapped once
    weights = sum(packed.values()) + sum(plan.unpacked for plan in plans) + ROOM_BYTES
    free = memory().available
    if kv_bytes is not None:
        _require(weights + len(plans) * kv_bytes, free, len(plans))
        return [kv_bytes] * len(plans)
    _require(weights + sum(plan.slab for plan in plans), free, len(plans))
    share = (free - weights) // (2 * len(plans))
    return [max(plan.slab, min(plan.pool, share)) for plan in plans]


def _require(need: int, free: int, count: int) -> None:
    if need > free:
        raise TryAgainError(
            f"{count} models beside each other need {amount(need)} of memory, {amount(free)} are free; close other "
            "programs, or take smaller weights or --kv-bytes"
        )
