"""Key-value recall: a list of names with a number each, and one of the names once more.

After the key-value retrieval of Liu et al. 2023, "Lost in the middle" (arXiv:2307.03172), in lines instead of JSON.
"""

from __future__ import annotations

from itertools import chain, islice

from kvik.errors import ParameterError
from kvik.evaluation.model import TextTokens
from kvik.evaluation.tasks.recall import RecallItem, beginning, filler, task_draw
from kvik.evaluation.tasks.texts import names
from kvik.params.checks import integer

__all__ = ["key_values"]

DIGITS = 5
MOST_LINES = 4900  # names there are


def key_values(
    tokenizer: TextTokens, tokens: int, *, seed: int = 0, number: int = 0, lines: int | None = None
) -> RecallItem:
    """Item `number` of a seed, with a prompt of just so many tokens.

    lines: of the list, 1 to 4,900; None is as many as have room. What they leave of the prompt is everyday English around
    the list. Raises ParameterError where the prompt has no room for the lines.
    """
    if lines is not None:
        integer("lines", lines, 1, MOST_LINES)
    draw = task_draw("keys", seed, number, tokens)

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special=False, first=False)

    numbers = draw.sample(range(10 ** (DIGITS - 1), 10**DIGITS), MOST_LINES)
    entries = list(zip(islice(names(draw), lines or MOST_LINES), numbers, strict=False))
    begin, title = beginning(tokenizer, ""), encode("\n\nA list of names and their numbers:\n")
    room, rows, longest = tokens - len(begin) - len(title), list[list[int]](), 0
    for name, value in entries:
        row, most = encode(f"{name}: {value}\n"), max(longest, len(encode(f"\n{name}:")))
        if len(row) + most > room:
            break
        rows.append(row)
        room, longest = room - len(row), most
    if not rows or (lines is not None and len(rows) < lines):
        raise ParameterError(f"{lines or 1} lines and the question do not fit in a prompt of {tokens} tokens")
    asked = draw.randrange(len(rows))
    name, value = entries[asked]
    end = encode(question := f"\n{name}:")
    text = filler(tokenizer, draw, room - len(end))
    place = draw.randint(min(1, len(text)), len(text))  # the first piece lacks its beginning
    before = [*begin, *chain(*text[:place]), *title]
    context = [*before, *chain(*rows), *chain(*text[place:])]
    first = len(before) + sum(map(len, rows[:asked]))
    return RecallItem(
        "keys", (*context, *end), len(context), (first, first + len(rows[asked])), question, str(value),
        tuple(encode(f" {value}")),
    )  # fmt: skip
