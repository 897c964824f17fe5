"""What a model thinks of a text, and whether it says the same thing again."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence

__all__ = ["determinism", "mean_logprob"]


def mean_logprob(logprobs: Sequence[float]) -> float | None:
    """Arithmetic mean of a text's log-probabilities, natural logarithms: minus the logarithm of its perplexity.

    At most 0; None for a text without tokens.
    """
    return math.fsum(logprobs) / len(logprobs) if len(logprobs) else None


def determinism(outputs: Sequence[Hashable]) -> float | None:
    """Share of pairs of repeats that are the same, among all pairs: the chance that two runs agree.

    outputs: what each repeat gave, compared whole. In [0, 1], 1 where all are the same; None below two repeats.
    """
    count = len(outputs)
    if count < 2:
        return None
    return sum(same * (same - 1) for same in Counter(outputs).values()) / (count * (count - 1))
