"""Receipts as JSON: written by whoever ran a request, read by whoever wants to see that it repeats."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any, NoReturn, get_args

from kvik.engine.request import FinishReason, ParamsKind, Receipt
from kvik.errors import DataError, ParameterError
from kvik.params import AnyParams, BeamParams, CacheParams, SamplingParams

__all__ = ["cache_of", "params_of", "receipt_from_json", "receipt_to_json"]

_MODEL = {"name": str, "path": str, "digest": str, "weights": str, "kv": str, "executor": str, "device": str}
_REASONS: tuple[FinishReason, ...] = get_args(FinishReason)
_KINDS: dict[ParamsKind, type[SamplingParams] | type[BeamParams]] = {"sampling": SamplingParams, "beam": BeamParams}
_MAX_TOKEN = 2**31 - 1


def receipt_to_json(receipt: Receipt) -> str:
    """One object, its fields by name."""
    return json.dumps(asdict(receipt), ensure_ascii=False, allow_nan=False)


def receipt_from_json(text: str, name: str) -> Receipt:
    """The receipt that a JSON text holds, and nothing else. DataError, naming `name` and the field, for any other text."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"is no receipt: not JSON: {error}", path=name) from None
    return _Reader(name).receipt(found)


def cache_of(receipt: Receipt) -> CacheParams:
    """How the cache is kept when the receipt is repeated."""
    return CacheParams.from_dict(receipt.cache)


def params_of(receipt: Receipt) -> AnyParams:
    """The parameters that repeat it."""
    return _KINDS[receipt.kind](**receipt.params)


class _Reader:
    def __init__(self, name: str) -> None:
        self.name = name

    def fail(self, message: str) -> NoReturn:
        raise DataError(f"is no receipt: {message}", path=self.name)

    def receipt(self, found: Any) -> Receipt:
        wanted = [f.name for f in fields(Receipt)]
        entries = self.entries(found, wanted, "it")
        if not isinstance(entries["version"], str):
            self.fail("version is no text")
        if entries["kind"] not in _KINDS:
            self.fail(f"kind is {entries['kind']!r}, none of {', '.join(_KINDS)}")
        params = self.params(entries["params"], _KINDS[entries["kind"]])
        prompt = self.tokens(entries["prompt"], "prompt")
        outputs = tuple(
            self.tokens(one, f"outputs[{i}]") for i, one in enumerate(self.list(entries["outputs"], "outputs"))
        )
        reasons = self.list(entries["finish_reasons"], "finish_reasons")
        if not prompt:
            self.fail("prompt is empty")
        name = "num_return_sequences" if entries["kind"] == "beam" else "n"
        fewer = entries["kind"] == "beam" and 0 < len(outputs) < params[name]  # a search may not find as many
        if len(outputs) != len(reasons) or (len(outputs) != params[name] and not fewer):
            self.fail(f"{name} is {params[name]}, with {len(outputs)} outputs and {len(reasons)} finish_reasons")
        for reason in reasons:
            if reason not in _REASONS:
                self.fail(f"finish_reasons has {reason!r}, none of {', '.join(_REASONS)}")
        model, cache = self.model(entries["model"]), self.cache(entries["cache"])
        return Receipt(entries["version"], model, entries["kind"], params, cache, prompt, outputs, tuple(reasons))

    def model(self, found: Any) -> Mapping[str, Any]:
        entries = self.entries(found, [*_MODEL, "isa"], "model")
        for key, kind in _MODEL.items():
            if not isinstance(entries[key], kind):
                self.fail(f"model.{key} is no text")
        if not isinstance(entries["isa"], str | None):
            self.fail("model.isa is no text")
        return entries

    def params(self, found: Any, kind: type[SamplingParams] | type[BeamParams]) -> dict[str, Any]:
        entries = self.entries(found, [f.name for f in fields(kind)], "params")
        try:
            params = kind(**entries)
        except ParameterError as error:
            self.fail(f"params: {error}")
        if isinstance(params, SamplingParams) and params.seed is None:
            self.fail("params: seed is missing, so the request cannot be repeated")
        return asdict(params)

    def cache(self, found: Any) -> dict[str, Any]:
        entries = self.entries(found, [f.name for f in fields(CacheParams)], "cache")
        try:
            return CacheParams.from_dict(entries).as_dict()
        except ParameterError as error:
            self.fail(f"cache: {error}")

    def entries(self, found: Any, wanted: list[str], what: str) -> dict[str, Any]:
        if not isinstance(found, dict):
            self.fail(f"{what} is no object")
        if unlike := set(found) ^ set(wanted):
            name = sorted(unlike)[0]
            self.fail(f"{what} has {'an unknown' if name in found else 'no'} field {name!r}")
        return found

    def tokens(self, found: Any, what: str) -> tuple[int, ...]:
        for token in self.list(found, what):
            if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token <= _MAX_TOKEN:
                self.fail(f"{what} has {token!r}, which is no token id")
        return tuple(found)

    def list(self, found: Any, what: str) -> list[Any]:
        if not isinstance(found, list):
            self.fail(f"{what} is no list")
        return found
