"""Keeps texts of a conversation from becoming special tokens, whatever a template does with them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable

from kvik.errors import ParameterError

__all__ = ["Shield", "unmarked", "unused_mark"]

# Code points that are no characters: none of them means anything in a text.
_NONCHARACTERS = [*range(0xFDD0, 0xFDF0), *(plane << 16 | last for plane in range(17) for last in (0xFFFE, 0xFFFF))]


def unused_mark(texts: Iterable[str]) -> str:
    """A noncharacter that none of the texts contains. Raises ParameterError when they contain them all."""
    listed = list(texts)
    for point in _NONCHARACTERS:
        mark = chr(point)
        if not any(mark in text or _escaped(mark) in text for text in listed):
            return mark
    raise ParameterError("the messages use all 66 noncharacters of Unicode; take one out")


def unmarked(text: str, mark: str) -> str:
    """A rendered text without its marks."""
    return text.replace(mark, "").replace(_escaped(mark), "")


def _escaped(mark: str) -> str:
    """The mark in JSON of ASCII characters only, in which a template may write a message."""
    return json.dumps(mark)[1:-1]


class Shield:
    """Puts a mark into message texts wherever a special token's text could come about.

    Inside every special token's text, and, since templates cut and join texts, after every character that begins one.
    The latter is left out where a constant of the template begins (`</think>` in what an assistant wrote), so that the
    template finds it. Marks are taken out again once the special tokens have been found.
    """

    def __init__(self, special: tuple[str, ...], constants: set[str], texts: set[str]) -> None:
        self.special = special
        self._constants = {constant for constant in constants if not any(s in constant for s in special)}
        self._kept = tuple(constant for constant in self._constants if constant)
        firsts = {text[0] for text in special}
        self._first = re.compile("[" + "".join(map(re.escape, sorted(firsts))) + "]") if firsts else None
        # What would complete a special token that the template's own text leaves begun.
        longest = max(map(len, special), default=0)
        tails = {own[-length:] for own in constants | texts for length in range(1, min(longest, len(own)) + 1)}
        self._rests = tuple({text[at:] for text in special for at in range(1, len(text)) if text[:at] in tails})

    def marked(self, text: str, mark: str) -> str:
        """The text with its marks."""
        return text if self._first is None else self._first.sub(lambda found: self._char(found, mark), text)

    def marked_content(self, text: str, mark: str) -> str:
        """As `marked`, and one in front where the text could complete what the template began."""
        start = len(text) - len(text.lstrip())
        body = text[start:]
        if body and any(body.startswith(rest) or rest.startswith(body.rstrip()) for rest in self._rests):
            return text[:start] + mark + self.marked(body, mark)
        return self.marked(text, mark)

    def marked_value(self, text: str, mark: str) -> str:
        """As `marked_content`, but as it is where the template may compare it with a constant (`type == "function"`)."""
        return text if text in self._constants else self.marked_content(text, mark)

    def _char(self, found: re.Match[str], mark: str) -> str:
        char, text, at = found[0], found.string, found.start()
        common = char.isalnum() or char.isspace()  # begins too many words to be worth marking
        if (common or text.startswith(self._kept, at)) and not text.startswith(self.special, at):
            return char
        return char + mark
