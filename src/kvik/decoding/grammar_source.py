"""Grammars as llguidance reads them, checked for what it would ignore, cut short or take too long over."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from kvik.decoding.grammar_schema import check_schema
from kvik.errors import ParameterError
from kvik.params import Grammar

__all__ = ["LIMITS", "grammar_source", "shortened"]

#: Of llguidance. Rows and steps of its Earley parser, symbols of the grammar, fuel and states of the lexer.
LIMITS: dict[str, Any] = {
    "max_items_in_row": 2000,
    "step_max_items": 10_000,
    "max_grammar_size": 50_000,
    "initial_lexer_fuel": 500_000,
    "step_lexer_fuel": 200_000,
    "max_lexer_states": 20_000,
    "precompute_large_lexemes": False,
    "verbose_errors": False,
}
#: The text alone decides: no bytes are cut into the tokens that the tokenizer would have made of them.
_OPTIONS = '\n%llguidance {"no_forcing": true}\n'
_WHITESPACE = r"[\x20\x0A\x0D\x09]{1,64}"
_MOST_SHOWN = 300
#: Parts that may be left out, one after the other, cost the lexer their number squared in one step.
MOST_OPTIONAL = 500
_OPTIONAL = re.compile(r"(?<!\\)(?:\\\\)*(?:[?*]|\{0?,|\{0\}|\(\||\|\)|\|\|)")


def grammar_source(grammar: Grammar) -> str:
    """The JSON that `LLMatcher` takes. ParameterError in one line for what cannot be meant or is not supported."""
    try:
        grammar.text.encode()
    except UnicodeEncodeError as error:
        raise ParameterError(f"grammar: a lone surrogate at {error.start}; it is no valid Unicode") from None
    if grammar.kind == "json_schema":
        return _json_schema(grammar.text)
    return _listed(_regex(grammar.text) if grammar.kind == "regex" else _lark(grammar.text))


def _listed(lark: str, *others: dict[str, Any]) -> str:
    return json.dumps({"grammars": [{"name": "start", "lark_grammar": lark + _OPTIONS}, *others]}, ensure_ascii=False)


def _json_schema(text: str) -> str:
    schema, patterns = check_schema(text)
    if isinstance(schema, dict):
        options = {"whitespace_pattern": _WHITESPACE} | schema.get("x-guidance", {})
        if options.get("whitespace_flexible") is False and "whitespace_pattern" not in schema["x-guidance"]:
            del options["whitespace_pattern"]
        schema = {**schema, "x-guidance": options}
    _check_optional(sum(len(_OPTIONAL.findall(pattern)) for pattern in patterns))
    return _listed("start: @schema", {"name": "schema", "json_schema": schema})


def _regex(pattern: str) -> str:
    from llguidance import regex_to_lark

    if (len(pattern) - len(pattern.rstrip("\\"))) % 2:
        raise ParameterError("grammar: the regular expression ends with a backslash that escapes nothing")
    _check_optional(len(_OPTIONAL.findall(pattern)))
    return f"start: /{regex_to_lark(pattern, '')}/"


def _check_optional(count: int) -> None:
    if count > MOST_OPTIONAL:
        raise ParameterError(
            f"grammar: too costly: {count:,} optional or repeated parts in its regular expressions, at most "
            f"{MOST_OPTIONAL} are allowed"
        )


class _Word(NamedTuple):
    kind: str
    text: str
    value: Any = None


_WORDS = re.compile(
    r"""(?P<skip>[ \t\r\n]+|(?:\#|//)[^\n]*)
    |(?P<string>"(?:\\.|[^"\\\n])*"i?)
    |(?P<regex>/(?:\\.|[^/\\])+/[imslux]*)
    |(?P<directive>%[a-z]+)
    |(?P<token><[^<>\s]+>)
    |(?P<name>[!?]?_?[A-Za-z][\w-]*)
    |(?P<mark>.)""",
    re.VERBOSE | re.DOTALL,
)
_SPACE = re.compile(r"\s*")
_WITH_JSON = ("%json", "%regex", "%llguidance")
_RULE_OPTIONS = ("capture", "lazy", "suffix")
_GRAMMAR_OPTIONS = ("no_forcing", "allow_initial_skip", "ignore_once")


def _lark(text: str) -> str:
    """The grammar, without what needs more than a text: tokens by name or number, options of generation."""
    words = list(_words(text))
    for word in words:
        if word.kind == "token":
            raise ParameterError(f"grammar: {word.text:.60} names a token; a grammar here is of text alone")
        if word.text == "%llguidance":
            for name in word.value if isinstance(word.value, dict) else ():
                if name not in _GRAMMAR_OPTIONS:
                    raise ParameterError(f"grammar: %llguidance: {name!r:.60} is none of {', '.join(_GRAMMAR_OPTIONS)}")
        if word.text == "%json":
            _check_optional(sum(len(_OPTIONAL.findall(one)) for one in check_schema(json.dumps(word.value))[1]))
    for options in _rule_options(words):
        for name in options:
            if name not in _RULE_OPTIONS:
                raise ParameterError(f"grammar: rules have no option {name:.60} here, only {', '.join(_RULE_OPTIONS)}")
    _check_optional(_optional_parts(words))
    return text


def _optional_parts(words: list[_Word]) -> int:
    """Of all terminals and regular expressions, those that terminals take over from others counted each time."""
    # of each terminal: optional parts, and the terminals in it; "": of the rules
    own: dict[str, int] = {"": 0}
    uses: dict[str, list[str]] = {"": []}
    name = ""
    for word, after in zip(words, [*words[1:], _Word("mark", "")], strict=True):
        if word.kind == "name" and after.text in (":", "[", "."):
            is_terminal = word.text.lstrip("!?_")[:1].isupper()
            if after.text == ":" or not is_terminal:
                name = word.text.lstrip("!?") if is_terminal else ""
                own.setdefault(name, 0), uses.setdefault(name, [])
        elif word.kind == "name":
            uses[name].append(word.text)
        elif word.kind == "regex":
            own[name] += len(_OPTIONAL.findall(word.text))
        elif (name and word.text in ("?", "*", "[", "~", "&", "{")) or (
            name and word.text == "|" and after.text in ("|", ")", "")
        ):
            own[name] += 1
    total: dict[str, int] = {}
    waiting = [name for name in own if name]
    under_way: set[str] = set()
    while waiting:
        one = waiting[-1]
        open_ones = [use for use in uses[one] if use in own and use not in total and use not in under_way]
        if one not in total and open_ones:
            under_way.add(one)
            waiting += open_ones
            continue
        waiting.pop()
        if one not in total:
            total[one] = min(2**60, own[one] + sum(total.get(use, 0) for use in uses[one]))
    return max(own[""], *total.values()) if total else own[""]


def _words(text: str) -> Iterator[_Word]:
    at, decode = 0, json.JSONDecoder().raw_decode
    while found := _WORDS.match(text, at):
        at, kind = found.end(), found.lastgroup or ""
        value = None
        if found[0] in _WITH_JSON:
            try:
                value, at = decode(text, _SPACE.match(text, at).end())  # type: ignore[union-attr] # it matches nothing
            except (ValueError, RecursionError) as error:
                raise ParameterError(f"grammar: {found[0]} is followed by no JSON: {error}") from None
        if kind != "skip":
            yield _Word(kind, found[0], value)


def _rule_options(words: list[_Word]) -> Iterator[list[str]]:
    """Names of the options of each rule that has some: `name[one, other=…]:`."""
    opened: int | None = None
    for at, word in enumerate(words):
        if word.text == "[":
            opened = at
        elif word.text == "]" and opened is not None:
            if opened and words[opened - 1].kind == "name" and at + 1 < len(words) and words[at + 1].text == ":":
                inner = words[opened + 1 : at]
                yield [w.text for w, before in zip(inner, [_Word("mark", ","), *inner], strict=False)
                       if w.kind == "name" and before.text == ","]  # fmt: skip
            opened = None


def shortened(reason: str) -> str:
    """What llguidance says, in one line."""
    if reason.startswith("NoExtension"):
        return "no text matches it, or none that the model's vocabulary can write"
    if reason.startswith("oneOf constraints"):
        return "oneOf is supported where its schemas can be seen to exclude each other; anyOf is without that"
    found = re.search(r"^error: (.*)$", reason, re.MULTILINE)  # of a regular expression, below a picture of the place
    reason = reason if found is None else f"regular expression: {found[1]}"
    reason = re.sub(r"\n *\d+ \| .*", "", reason.replace("<non-verbose/>", ""), flags=re.DOTALL)
    reason = re.sub(r"\s+", " ", reason).strip()
    return reason if len(reason) <= _MOST_SHOWN else reason[:_MOST_SHOWN] + "…"
