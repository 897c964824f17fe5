"""Tasks that are made, not collected: seeded, of exact lengths, with one answer each. What a cache forgets shows in them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from kvik.evaluation.model import TextTokens
from kvik.evaluation.tasks.key_values import key_values
from kvik.evaluation.tasks.needle import needle
from kvik.evaluation.tasks.recall import (
    PLACES,
    Compared,
    Place,
    Recalled,
    RecallItem,
    answer_params,
    compared,
    given,
    recalled,
)
from kvik.params import choose

__all__ = [
    "PLACES",
    "TASKS",
    "Compared",
    "Place",
    "RecallItem",
    "Recalled",
    "answer_params",
    "compared",
    "given",
    "key_values",
    "needle",
    "recall_items",
    "recalled",
]  # fmt: skip

TASKS: Mapping[str, Callable[..., RecallItem]] = {"needle": needle, "keys": key_values}
"""Each makes item `number` of a seed, with a prompt of as many tokens as asked for."""


def recall_items(
    task: str, tokenizer: TextTokens, count: int, tokens: int, *, seed: int = 0, first: int = 0, **more: int
) -> list[RecallItem]:
    """Items `first` to `first + count - 1` of a task; more: settings of its own (`needles`, `lines`)."""
    make = TASKS[choose("task", task, list(TASKS))]
    return [make(tokenizer, tokens, seed=seed, number=first + at, **more) for at in range(count)]
