"""Refuses regular expressions from a file that could take forever.

Oniguruma backtracks: when something that must match does not, it tries every other reading of what came before. What
could have come before is counted here from the expression's form: readings of alternatives and optional parts multiply,
and each unbounded repetition multiplies by the length of the text. At most one of these and 64 other readings may stand
before what must match, so that an expression takes at most quadratic time. Published tokenizers keep to that. What none
of them needs (back references, calls, conditions, repeated groups of several readings) is refused.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass

from kvik.errors import DataError
from kvik.text.cutting import make_cutter, regex_cut

__all__ = ["regex_fault"]

_LONGEST = 8192
_MOST_DEEP = 32
_MOST_WAYS = 64
_FEW = 8  # a repetition with more counts than these is as good as unbounded
_ENDLESS = 1 << 30
_TRIALS = [char * 1000 + " \n1a!" for char in (" ", "\n", "a", "A", "1", "!", "中")] + ["a1 !" * 250]
_TRIAL_SECONDS = 0.5

_GROUP = re.compile(r"\(\?(?:[:=!>]|<[=!]|<[A-Za-z_]\w*>|[ims]*(?:-[ims]*)?[:)])|\((?!\?)")
_QUANTIFIER = re.compile(r"([*+?]|\{(\d{0,9})(,?)(\d{0,9})\})([?+]?)")
_SIMPLE = {"*": (0, _ENDLESS), "+": (1, _ENDLESS), "?": (0, 1)}
_ESCAPE = re.compile(
    r"\\(?:[pP]\{[^{}]{1,64}\}|x\{[0-9A-Fa-f]{1,8}\}|x[0-9A-Fa-f]{1,2}|u[0-9A-Fa-f]{4}|[^1-9kgXRKpPxu])", re.DOTALL
)


class _Fault(Exception):
    """What is wrong with an expression."""


@dataclass
class _Group:
    """What has been read of a group, or a part of it.

    Attributes:
        endless, ways: of the alternative being read, its unbounded repetitions and other readings.
        most, all_ways: of all alternatives before.
        fails: the most repetitions and readings before something that must match; None while nothing must.
    """

    endless: int = 0
    ways: int = 1
    most: int = 0
    all_ways: int = 0
    fails: tuple[int, int] | None = None

    def next_alternative(self) -> None:
        self.most, self.all_ways = max(self.most, self.endless), self.all_ways + self.ways
        self.endless, self.ways = 0, 1

    def add(self, part: _Group, low: int, high: int) -> None:
        """Append a complete part that stands low to high times."""
        if high > 1 and (part.most or part.all_ways > 1):
            raise _Fault("repeats what can be read in several ways")
        if low and part.fails is not None:
            endless, ways = self.endless + part.fails[0], self.ways * part.fails[1]
            if endless > 1 or ways > _MOST_WAYS:
                raise _Fault(
                    f"could take too long: more than one unbounded repetition or {_MOST_WAYS} readings stand before "
                    "what must match"
                )
            before = self.fails or (0, 1)
            self.fails = max(before[0], endless), max(before[1], ways)
        counts = high - low + 1
        self.endless += part.most + (counts > _FEW)
        self.ways *= part.all_ways if counts == 1 else 1 if counts > _FEW else part.all_ways + counts - 1
        self.ways = min(self.ways, _MOST_WAYS + 1)


def regex_fault(pattern: str) -> str | None:
    """What is wrong with an expression for `kvik.text.cutting.make_cutter`, or None."""
    if not 0 < len(pattern) <= _LONGEST:
        return f"an expression of {len(pattern)} characters; 1 to {_LONGEST} are read"
    try:
        _check_form(pattern)
        cut = make_cutter([regex_cut(pattern)])
        began = time.monotonic()
        for text in _TRIALS:
            cut(text)
            if time.monotonic() - began > _TRIAL_SECONDS:
                return "takes too long"
    except (_Fault, DataError) as error:
        return str(error)
    return None


def _check_form(pattern: str) -> None:
    groups, at = [_Group()], 0
    while at < len(pattern):
        char = pattern[at]
        if char == "(":
            found = _GROUP.match(pattern, at)
            if found is None or len(groups) > _MOST_DEEP:
                raise _unknown(pattern, at)
            at = found.end()
            if not found[0].endswith(")"):
                groups.append(_Group())
            continue
        if char == "|":
            groups[-1].next_alternative()
            at += 1
            continue
        part = _Group(all_ways=1, fails=(0, 1))
        if char == ")":
            if len(groups) == 1:
                raise _Fault("has a parenthesis too many")
            part = groups.pop()
            part.next_alternative()
            at += 1
        else:
            at = _atom_end(pattern, at)
        low, high, at = _times(pattern, at)
        groups[-1].add(part, low, high)
    if len(groups) > 1:
        raise _Fault("has a parenthesis too few")


def _times(pattern: str, at: int) -> tuple[int, int, int]:
    """How often what ends here stands, at least and at most, and where that is said."""
    found = _QUANTIFIER.match(pattern, at)
    if found is None:
        return 1, 1, at
    if found[1] in _SIMPLE:
        low, high = _SIMPLE[found[1]]
    elif not found[2] and not found[4]:
        raise _unknown(pattern, at)
    else:
        low = int(found[2] or 0)
        high = int(found[4] or _ENDLESS) if found[3] else low
    again = _QUANTIFIER.match(pattern, found.end())
    if again is not None or (found[5] == "+" and found[1] not in _SIMPLE):
        raise _Fault("repeats what can be read in several ways")
    return low, high, found.end()


def _atom_end(pattern: str, at: int) -> int:
    """Where the character, escape or class that begins here ends."""
    if pattern[at] in "*+?{":
        raise _unknown(pattern, at)
    if pattern[at] == "\\":
        return _escape_end(pattern, at)
    if pattern[at] != "[":
        return at + 1
    depth, begun = 0, at
    while at < len(pattern):
        if pattern[at] == "\\":
            at = _escape_end(pattern, at)
        elif pattern[at] == "[":
            depth += 1
            at += 1 + (pattern[at + 1 : at + 2] == "^")
            at += pattern[at : at + 1] == "]"  # a bracket that comes first is one of the characters
        else:
            depth -= pattern[at] == "]"
            at += 1
            if depth == 0:
                return at
    raise _unknown(pattern, begun)


def _escape_end(pattern: str, at: int) -> int:
    found = _ESCAPE.match(pattern, at)
    if found is None:
        raise _unknown(pattern, at)
    return found.end()


def _unknown(pattern: str, at: int) -> _Fault:
    return _Fault(f"uses {pattern[at : at + 4]!r}, which is not among what expressions may use")
