"""Refuses regular expressions from a file that could take forever.

Oniguruma backtracks. What makes that exponential is a repeated group that can be read in several ways, such as
`(a+)+`; such expressions are refused by their form, and what no tokenizer needs (back references, calls, conditions)
with them. What remains is polynomial; expressions that are slow on a thousand equal characters are refused by trial.
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
_MOST_UNBOUNDED = 2  # of one alternative; no published tokenizer we know has more
_AS_GOOD_AS_UNBOUNDED = 64
_TRIALS = [char * 1000 + " \n1a!" for char in (" ", "\n", "a", "A", "1", "!", "中")] + ["a1 !" * 250]
_TRIAL_SECONDS = 0.5

_GROUP = re.compile(r"\(\?(?:[:=!>]|<[=!]|<[A-Za-z_]\w*>|[ims]*(?:-[ims]*)?[:)])|\((?!\?)")
_QUANTIFIER = re.compile(r"[*+?]|\{(\d{1,9})?(,)?(\d{1,9})?\}")
_ESCAPE = re.compile(
    r"\\(?:[pP]\{[^{}]{1,64}\}|x\{[0-9A-Fa-f]{1,8}\}|x[0-9A-Fa-f]{1,2}|u[0-9A-Fa-f]{4}|[^1-9kgXRKpPxu])"
)


@dataclass
class _Group:
    """What has been read of a group: the most unbounded repetitions of an alternative, and whether it can be read in
    several ways."""

    most: int = 0
    here: int = 0
    variable: bool = False


def regex_fault(pattern: str) -> str | None:
    """What is wrong with an expression for `kvik.text.cutting.make_cutter`, or None."""
    if not 0 < len(pattern) <= _LONGEST:
        return f"an expression of {len(pattern)} characters; 1 to {_LONGEST} are read"
    fault = _fault_of_form(pattern)
    if fault is not None:
        return fault
    try:
        cut = make_cutter([regex_cut(pattern)])
        began = time.monotonic()
        for text in _TRIALS:
            cut(text)
            if time.monotonic() - began > _TRIAL_SECONDS:
                return "an expression that takes too long"
    except DataError as error:
        return str(error)
    return None


def _fault_of_form(pattern: str) -> str | None:
    groups, last, at = [_Group()], None, 0
    while at < len(pattern):
        char, group = pattern[at], groups[-1]
        if char == "(":
            found = _GROUP.match(pattern, at)
            if found is None or len(groups) > _MOST_DEEP:
                return f"uses {pattern[at : at + 4]!r}, which is not among what expressions may use"
            at = found.end()
            if not found[0].endswith(")"):
                groups.append(_Group())
            last = None
        elif char == ")":
            if len(groups) == 1:
                return "has a parenthesis too many"
            last = groups.pop()
            last.most = max(last.most, last.here)
            groups[-1].here += last.most
            groups[-1].variable |= last.variable
            at += 1
        elif char == "|":
            group.most, group.here, group.variable, last = max(group.most, group.here), 0, True, None
            at += 1
        elif (found := _QUANTIFIER.match(pattern, at)) is not None:
            low, high = _bounds(found)
            if high > 1 and (last is None or last.variable):
                return "repeats what can be read in several ways"
            group.here += high > _AS_GOOD_AS_UNBOUNDED
            group.variable |= low != high
            at = found.end()
            if found[0] in ("*", "+", "?") or "," in found[0]:
                at += pattern[at : at + 1] in ("?", "+") if found[0] in ("*", "+", "?") else pattern[at : at + 1] == "?"
            last = _Group(variable=True)
        else:
            end = _atom_end(pattern, at)
            if end is None:
                return f"uses {pattern[at : at + 4]!r}, which is not among what expressions may use"
            at, last = end, _Group()
        if groups[-1].here > _MOST_UNBOUNDED:
            return f"has more than {_MOST_UNBOUNDED} unbounded repetitions in one alternative"
    return None if len(groups) == 1 else "has a parenthesis too few"


def _bounds(found: re.Match[str]) -> tuple[int, int]:
    endless = 1 << 30
    plain = {"*": (0, endless), "+": (1, endless), "?": (0, 1)}.get(found[0])
    if plain is not None:
        return plain
    low = int(found[1] or 0)
    return low, int(found[3] or endless) if found[2] else low


def _atom_end(pattern: str, at: int) -> int | None:
    """Where the character, escape or class that begins here ends; None for an escape we do not know."""
    if pattern[at] == "\\":
        found = _ESCAPE.match(pattern, at)
        return None if found is None else found.end()
    if pattern[at] != "[":
        return at + 1
    depth = 0
    while at < len(pattern):
        if pattern[at] == "\\":
            found = _ESCAPE.match(pattern, at)
            if found is None:
                return None
            at = found.end()
            continue
        if pattern[at] == "[":
            depth += 1
            at += 1 + (pattern[at + 1 : at + 2] == "^")
            at += pattern[at : at + 1] == "]"  # a bracket that comes first is one of the characters
            continue
        depth -= pattern[at] == "]"
        at += 1
        if depth == 0:
            return at
    return None
