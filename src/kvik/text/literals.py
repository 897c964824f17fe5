"""Finds tokens that stand in the text as a whole, before the text between them is cut and merged."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Container, Iterable
from typing import NamedTuple

__all__ = ["Literal", "LiteralFinder"]

# White_Space of Unicode; Python's \s has U+001C to U+001F besides.
_SPACE = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
_SPACES = re.compile(f"[{_SPACE}]*")
_JOIN_CONTROLS = "\u200c\u200d"


class Literal(NamedTuple):
    """A token found in text as a whole.

    Attributes:
        text, token: what is looked for and its id.
        normalized: looked for, itself normalized, in the normalized text.
        lstrip, rstrip: whitespace before or after it belongs to it.
        single_word: no word character stands right before or after it.
    """

    text: str
    token: int
    normalized: bool = False
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False


class LiteralFinder:
    """Cuts texts at literals, from the left; of those that begin at one place the longest counts."""

    def __init__(self, literals: Iterable[Literal]) -> None:
        self._known = {literal.text: literal for literal in literals}
        lengths: dict[str, set[int]] = {}
        for text in self._known:
            lengths.setdefault(text[0], set()).add(len(text))
        self._lengths = {first: sorted(found, reverse=True) for first, found in lengths.items()}
        firsts = "".join(re.escape(first) for first in sorted(lengths))
        self._begin = re.compile(f"[{firsts}]") if firsts else None

    def split(self, text: str, hidden: Container[int] = ()) -> list[str | int]:
        """Ids of literals and, between them, text that is not empty, in order.

        hidden: ids that stay ordinary text; nothing is found inside one either.
        """
        if self._begin is None:
            return [text] if text else []
        parts: list[str | int] = []
        done = at = 0
        while (begin := self._begin.search(text, at)) is not None:
            start = begin.start()
            literal = self._longest(text, start)
            if literal is None:
                at = start + 1
                continue
            at = stop = start + len(literal.text)
            if literal.token in hidden or (literal.single_word and not _alone(text, start, stop)):
                continue
            if literal.lstrip:
                start = _spaces_before(text, done, start)
            if literal.rstrip:
                stop = _spaces_end(text, stop)
            if done < start:
                parts.append(text[done:start])
            parts.append(literal.token)
            done = stop
        if done < len(text):
            parts.append(text[done:])
        return parts

    def _longest(self, text: str, start: int) -> Literal | None:
        for length in self._lengths[text[start]]:
            literal = self._known.get(text[start : start + length])
            if literal is not None:
                return literal
        return None


def _spaces_before(text: str, lowest: int, start: int) -> int:
    while start > lowest and _SPACES.fullmatch(text[start - 1]):
        start -= 1
    return start


def _spaces_end(text: str, stop: int) -> int:
    found = _SPACES.match(text, stop)
    return stop if found is None else found.end()


def _alone(text: str, start: int, stop: int) -> bool:
    return not (start > 0 and _in_word(text[start - 1])) and not (stop < len(text) and _in_word(text[stop]))


def _in_word(char: str) -> bool:
    """Whether a character is one of a word: alphabetic, mark, decimal digit, connector or joiner (UTS #18, annex C)."""
    kind = unicodedata.category(char)
    circled = "\u24b6" <= char <= "\u24e9" or "\U0001f130" <= char <= "\U0001f189"
    return kind[0] in "LM" or kind in ("Nd", "Nl", "Pc") or char in _JOIN_CONTROLS or circled
