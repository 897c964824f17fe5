"""A needle in a haystack: one sentence with a number somewhere in everyday English, and a question for the number.

After Kamradt 2023, "Needle in a Haystack", as in RULER's single needles (Hsieh et al. 2024, arXiv:2404.06654).
"""

from __future__ import annotations

import random
from itertools import islice

from kvik.errors import ParameterError
from kvik.evaluation.model import TextTokens
from kvik.evaluation.tasks.recall import DIGITS, RecallItem, answers, beginning, filler, task_draw
from kvik.evaluation.tasks.texts import names
from kvik.params.checks import integer

__all__ = ["needle"]

MOST_NEEDLES = 70


def needle(
    tokenizer: TextTokens, tokens: int, *, seed: int = 0, number: int = 0, needles: int = 1, digits: int = DIGITS
) -> RecallItem:
    """Item `number` of a seed, with a prompt of just so many tokens.

    needles: sentences of the kind, each about something else and with a number of its own; one of them is asked for. digits: of the numbers.
    The places of all are drawn evenly. Raises ParameterError where the prompt has no room for them.
    """
    integer("needles", needles, 1, MOST_NEEDLES)
    draw = task_draw("needle", seed, number, tokens)
    wanted = list(islice(names(draw), needles))
    answer, others = answers(draw, digits, needles - 1)

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special=False, first=False)

    question = f"\n\nWhat is the number of the {wanted[0]}? The number of the {wanted[0]} is"
    begin, end = beginning(tokenizer, "Remember the numbers that are told in this text."), encode(question)
    facts = [
        encode(f" The number of the {name} is {value}.") for name, value in zip(wanted, (answer, *others), strict=True)
    ]
    room = tokens - len(begin) - len(end) - sum(map(len, facts))
    if room < 0:
        raise ParameterError(f"{needles} needles and the question take {tokens - room} tokens, the prompt has {tokens}")
    context, first = hidden(draw, begin, facts, filler(tokenizer, draw, room))
    return RecallItem(
        "needle", (*context, *end), len(context), (first, first + len(facts[0])), question, answer,
        tuple(encode(f" {answer}")),
    )  # fmt: skip


def hidden(
    draw: random.Random, begin: list[int], facts: list[list[int]], pieces: list[list[int]]
) -> tuple[list[int], int]:
    """The context, the facts behind its pieces in random places and order, and where the first of the facts begins."""
    places = [draw.randint(min(1, len(pieces)), len(pieces)) for _ in facts]  # not before what is cut off
    found, at = list(begin), 0
    for index in range(len(pieces) + 1):
        for which in draw.sample(range(len(facts)), len(facts)):
            if places[which] == index:
                at = len(found) if which == 0 else at
                found += facts[which]
        if index < len(pieces):
            found += pieces[index]
    return found, at
