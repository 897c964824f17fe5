"""What an answer has to be: OpenAI's `response_format`, and `grammar`, ours."""

from __future__ import annotations

from typing import Any

from kvik.errors import ParameterError
from kvik.params import Grammar
from kvik.server.body import Fields
from kvik.server.errors import ApiError

__all__ = ["FORMATS", "grammar_field", "names"]

FORMATS = ("response_format", "grammar")
_KINDS = ("text", "json_object", "json_schema")


def grammar_field(fields: Fields) -> dict[str, Grammar]:
    """`grammar` for SamplingParams or BeamParams where the body asks for one. Both fields at once are refused."""
    given = fields.take("response_format", dict)
    own = fields.take("grammar", dict)
    if own is not None:
        if given is not None and given.get("type") != "text":
            raise _refuse("grammar", "grammar and response_format exclude each other")
        _known(own, ("kind", "text"), "grammar", required=("kind", "text"))
        return {"grammar": Grammar(own["kind"], own["text"])}
    if given is None:
        return {}
    kind = given.get("type")
    if kind not in _KINDS:
        raise _refuse(
            "response_format.type", f"response_format.type must be one of {', '.join(_KINDS)}, got {kind!r:.60}"
        )
    allowed = ("type", "json_schema") if kind == "json_schema" else ("type",)
    _known(given, allowed, "response_format", required=allowed)
    if kind == "text":
        return {}
    if kind == "json_object":
        return {"grammar": Grammar.json_schema({"type": "object"})}
    return {"grammar": _schema(given["json_schema"])}


def _schema(given: Any) -> Grammar:
    """strict or not, the schema is kept to."""
    name = "response_format.json_schema"
    if not isinstance(given, dict):
        raise _refuse(name, f"{name} must be an object")
    _known(given, ("name", "description", "schema", "strict"), name, required=("name", "schema"))
    for key, kinds, wanted in (
        ("name", str, "a string"), ("description", str, "a string"), ("strict", bool, "true or false"),
        ("schema", dict, "an object"),
    ):  # fmt: skip
        if given.get(key) is not None and not isinstance(given[key], kinds):
            raise _refuse(f"{name}.{key}", f"{name}.{key} must be {wanted}")
    try:
        return Grammar.json_schema(given["schema"])
    except ParameterError as error:
        raise _refuse(f"{name}.schema", f"{name}.schema{str(error).removeprefix('grammar')}") from None


def _known(given: dict[str, Any], allowed: tuple[str, ...], name: str, required: tuple[str, ...]) -> None:
    Fields(given, allowed, {}, within=name)
    for key in required:
        if given.get(key) is None:
            raise _refuse(f"{name}.{key}", f"{name}.{key} is missing")


def _refuse(param: str, message: str) -> ApiError:
    return ApiError(400, message, param=param, code="invalid_value")


def names(fields: Fields) -> dict[str, str]:
    """What the parameter `grammar` is called in this body."""
    return {} if fields.given.get("grammar") is not None else {"grammar": "response_format"}
