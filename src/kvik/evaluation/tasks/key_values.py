"""Key-value recall: a list of names with a number each, and one of the names once more.

After the key-value retrieval of Liu et al. 2023, "Lost in the middle" (arXiv:2307.03172), in lines instead of JSON.
"""

from __future__ import annotations

from itertools import chain, islice

from kvik.errors import ParameterError
from kvik.evaluation.model import TextTokens
from kvik.evaluation.tasks.recall import DIGITS, RecallItem, answers, beginning, filler, task_draw
from kvik.evaluation.tasks.texts import names
from kvik.params.checks import integer

__all__ = ["key_values"]

TITLE = "\n\nA list of names and their numbers:\n"
MOST_LINES = 4900  # names there are


def key_values(
    tokenizer: TextTokens,
    tokens: int,
    *,
    seed: int = 0,
    number: int = 0,
    lines: int | None = None,
    digits: int = DIGITS,
) -> RecallItem:
    """Item `number` of a seed, with a prompt of just so many tokens.

    lines: of the list, 1 to 4,900; None is as many as have room. What they leave of the prompt is everyday English around
    the list. digits: of the numbers. Raises ParameterError where the prompt has no room for the lines.
    """
    if lines is not None:
        integer("lines", lines, 1, MOST_LINES)
    draw = task_draw("keys", seed, number, tokens)

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special=False, first=False)

    keys = list(islice(names(draw), lines or MOST_LINES))
    answer, others = answers(draw, digits, len(keys))
    begin, title = beginning(tokenizer, ""), encode(TITLE)
    whole, rows, used, longest = tokens - len(begin) - len(title), list[list[list[int]]](), 0, 0
    for name, other in zip(keys, others, strict=True):
        both = [encode(f"{name}: {value}\n") for value in (other, answer)]
        used, longest = used + max(map(len, both)), max(longest, len(encode(f"\n{name}:")))
        if used + longest > whole:
            break
        rows.append(both)
    if not rows or (lines is not None and len(rows) < lines):
        raise ParameterError(f"{lines or 1} lines and the question do not fit in a prompt of {tokens} tokens")
    asked = draw.randrange(len(rows))
    end = encode(question := f"\n{keys[asked]}:")
    table = [both[at == asked] for at, both in enumerate(rows)]
    text = filler(tokenizer, draw, whole - len(end) - sum(map(len, table)))
    place = draw.randint(min(1, len(text)), len(text))  # the first piece lacks its beginning
    before = [*begin, *chain(*text[:place]), *title]
    context = [*before, *chain(*table), *chain(*text[place:])]
    first = len(before) + sum(map(len, table[:asked]))
    return RecallItem(
        "keys", (*context, *end), len(context), (first, first + len(table[asked])), question, answer,
        tuple(encode(f" {answer}")),
    )  # fmt: skip
