"""What a text has to be."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from kvik.errors import ParameterError
from kvik.params.checks import choose

__all__ = ["Grammar", "GrammarKind", "grammar_of"]

GrammarKind = Literal["json_schema", "regex", "lark"]
KINDS: tuple[GrammarKind, ...] = ("json_schema", "regex", "lark")
MAX_GRAMMAR_CHARACTERS = 200_000


@dataclass(frozen=True)
class Grammar:
    """A JSON schema, a regular expression or a Lark grammar that the whole text matches.

    kind: "json_schema", "regex" or "lark". text: its source, 1 to 200,000 characters; a JSON schema may be given as an
    object and is kept as JSON. Syntax and cost are checked where a model's vocabulary is known
    (kvik.decoding.grammar); what is not supported is refused there by name.
    """

    kind: GrammarKind
    text: str

    def __post_init__(self) -> None:
        choose("grammar: kind", self.kind, KINDS)
        if self.kind == "json_schema" and isinstance(self.text, Mapping | bool):
            try:
                written = json.dumps(self.text, ensure_ascii=False, allow_nan=False)
            except (TypeError, ValueError, RecursionError) as error:
                raise ParameterError(f"grammar: the schema is no JSON: {error}") from None
            object.__setattr__(self, "text", written)
        if not isinstance(self.text, str) or not self.text:
            raise ParameterError(f"grammar: the {self.kind} must be text that is not empty, got {self.text!r:.80}")
        if len(self.text) > MAX_GRAMMAR_CHARACTERS:
            raise ParameterError(
                f"grammar: the {self.kind} has {len(self.text):,} characters, at most {MAX_GRAMMAR_CHARACTERS:,} are allowed"
            )

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any] | bool | str) -> Grammar:
        """Text that is JSON of a schema, given as an object or as JSON text."""
        return cls("json_schema", schema)  # type: ignore[arg-type] # __post_init__ makes it text

    @classmethod
    def regex(cls, pattern: str) -> Grammar:
        return cls("regex", pattern)

    @classmethod
    def lark(cls, source: str) -> Grammar:
        return cls("lark", source)


def grammar_of(given: object) -> Grammar | None:
    """A Grammar, None, or the mapping that a receipt has for one."""
    if given is None or isinstance(given, Grammar):
        return given
    if isinstance(given, Mapping) and set(given) == {"kind", "text"}:
        return Grammar(given["kind"], given["text"])
    raise ParameterError(f"grammar must be a Grammar, got {given!r:.80}")
