"""Which task a sentence describes: naive Bayes over words, their beginnings and pairs of neighbours.

The features of a text are its words (lower case), the first four letters of longer words, so that forms of a word share
one, and pairs of neighbours, each counted once. A task's log-probability is the sum over the text's features of
log((count + a) / (total + a V)): how often the feature stands in the task's descriptions, a word of its vocabulary
counted five times, smoothed by a = 0.8; V is the number of known features. All tasks are equally likely beforehand.
(McCallum and Nigam 1998, "A comparison of event models for naive Bayes text classification".) Features that no
description has say nothing. The numbers 4, 5 and 0.8 are the best of a small grid, each description left out in turn.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from functools import cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvik.errors import ParameterError
from kvik.planning.descriptions import DESCRIPTIONS, VOCABULARY

__all__ = ["FALLBACK", "MAX_CHARACTERS", "SURE", "TASKS", "Reading", "features", "read_task"]

MAX_CHARACTERS = 4000
SMOOTHING = 0.8
STEM = 4
VOCABULARY_WEIGHT = 5
TASKS = tuple(DESCRIPTIONS)
FALLBACK = "general"
SURE = 0.5
"""Least probability of the nearest task with which a sentence counts as one of it."""

_WORD = re.compile(r"[a-z0-9+#][a-z0-9+#'’;-]*")
_ALIASES = {
    "coding": "code", "math": "maths", "mathematics": "maths", "qa": "factual QA", "factual": "factual QA",
    "question answering": "factual QA", "summary": "summarization", "summarisation": "summarization",
    "story writing": "story", "creative writing": "story", "chat": "dialogue", "ideas": "brainstorming",
    "assistant": "general", "default": "general", "translate": "translation",
}  # fmt: skip


class Reading(NamedTuple):
    """What a text was read as.

    task: what to plan for. sure: False where no task was clear and `task` is "general" for that reason. nearest: the most
    probable task, None where no word is known. probability: of it among all tasks, by the model's own account; 1 where
    the task was named. second: the one after it. because: the words that spoke most for `nearest`, best first.
    """

    task: str
    sure: bool
    nearest: str | None
    probability: float
    second: str | None
    because: tuple[str, ...]


def features(text: str) -> dict[str, tuple[str, ...]]:
    """Features of a text, each with the words it comes from."""
    words = _WORD.findall(text.lower())
    found: dict[str, tuple[str, ...]] = {word: (word,) for word in words}
    found.update({word[:STEM] + "…": (word,) for word in words if len(word) > STEM})
    found.update({f"{a} {b}": (a, b) for a, b in pairwise(words)})
    return found


class _Model(NamedTuple):
    columns: dict[str, int]
    weights: NDArray[np.float64]  # [tasks, features] log-probabilities


@cache
def _model() -> _Model:
    counts = []
    for task in TASKS:
        seen: Counter[str] = Counter()
        for line in DESCRIPTIONS[task].strip().splitlines():
            seen.update(list(features(line)))
        for word in dict.fromkeys(VOCABULARY[task].split()):
            seen.update(dict.fromkeys(features(word), VOCABULARY_WEIGHT))
        counts.append(seen)
    index = {name: place for place, name in enumerate(dict.fromkeys(name for seen in counts for name in seen))}
    table = np.full((len(TASKS), len(index)), SMOOTHING)
    for row, seen in zip(table, counts, strict=True):
        row[[index[name] for name in seen]] += list(seen.values())
    return _Model(index, np.log(table / table.sum(axis=1, keepdims=True)))


def read_task(text: str) -> Reading:
    """The task that is named, or that a sentence describes. ParameterError for a text that is empty or too long."""
    name = " ".join(text.lower().split())
    if not name or len(text) > MAX_CHARACTERS:
        raise ParameterError(f"the task must have 1 to {MAX_CHARACTERS:,} characters, got {len(text):,}")
    named = {task.lower(): task for task in TASKS} | _ALIASES
    if name in named:
        return Reading(named[name], True, named[name], 1.0, None, ())
    known_columns, weights = _model()
    known = {feature: words for feature, words in features(text).items() if feature in known_columns}
    if not known:
        near = difflib.get_close_matches(name, named, 1)
        return Reading(FALLBACK, False, named[near[0]] if near else None, 0.0, None, ())
    columns = weights[:, [known_columns[feature] for feature in known]]  # [tasks, features of the text]
    scores = columns.sum(axis=1)
    p = np.exp(scores - scores.max())
    p /= p.sum()
    best, second = np.argsort(-p, kind="stable")[:2].tolist()
    sure = bool(p[best] >= SURE)
    return Reading(
        TASKS[best] if sure else FALLBACK, sure, TASKS[best], float(p[best]), TASKS[second], _because(columns, best, known)
    )  # fmt: skip


def _because(columns: NDArray[np.float64], task: int, known: dict[str, tuple[str, ...]]) -> tuple[str, ...]:
    """Up to three words with the largest sum, over their features, of what the feature says for the task against the mean."""
    told = columns[task] - columns.mean(axis=0)
    sums: dict[str, float] = {}
    for value, words in zip(told.tolist(), known.values(), strict=True):
        for word in words:
            sums[word] = sums.get(word, 0.0) + value / len(words)
    ranked = sorted((word for word in sums if sums[word] > 0), key=lambda word: -sums[word])
    return tuple(ranked[:3])
