"""Requests that every engine gets alike: seeded lengths, prompts and arrivals. Standard library only: workers use it."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import NamedTuple

FIRST_TOKEN, LAST_TOKEN = 100, 40_000  # ordinary words of the default model's vocabulary of 49,152
PROMPT_TOKENS = (32, 1024)
ANSWER_TOKENS = (16, 256)


class Work(NamedTuple):
    """One request. arrival: in units of the mean gap, from the beginning of the trace."""

    prompt: list[int]
    new_tokens: int
    arrival: float = 0.0


def token_ids(draw: random.Random, count: int) -> list[int]:
    return [draw.randrange(FIRST_TOKEN, LAST_TOKEN) for _ in range(count)]


def log_uniform(draw: random.Random, low: int, high: int) -> int:
    """An integer in [low, high], its logarithm uniform: short requests are common, long ones come up."""
    return min(high, max(low, round(math.exp(draw.uniform(math.log(low), math.log(high))))))


def poisson_trace(
    seed: str, count: int, prompt: tuple[int, int] = PROMPT_TOKENS, answer: tuple[int, int] = ANSWER_TOKENS
) -> list[Work]:
    """`count` requests of log-uniform lengths whose gaps are exponential with mean 1; the same for the same seed."""
    draw = random.Random(seed)
    now, found = 0.0, []
    for _ in range(count):
        ids = token_ids(draw, log_uniform(draw, *prompt))
        found.append(Work(ids, log_uniform(draw, *answer), now))
        now += draw.expovariate(1.0)
    return found


def equal_requests(seed: str, count: int, prompt: int, new: int) -> list[Work]:
    """`count` requests of equal length at once, no two prompts alike."""
    draw = random.Random(seed)
    return [Work(token_ids(draw, prompt), new) for _ in range(count)]


def mean_length(works: Sequence[Work]) -> float:
    """Tokens of prompt and answer, over the requests."""
    return sum(len(work.prompt) + work.new_tokens for work in works) / len(works)


def preallocation_waste(works: Sequence[Work], longest: int) -> float:
    """Share of slots unused while decoding if every sequence held `longest` of them from its first step to its last."""
    used = sum(work.new_tokens * (len(work.prompt) + (work.new_tokens + 1) / 2) for work in works)
    return 1.0 - used / sum(work.new_tokens * longest for work in works)
