"""Which slots stay: the budget of each layer, then the best of its heads."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from kvik.cache.eviction import ada, pyramid
from kvik.cache.eviction.ranking import best
from kvik.cache.layout import CacheShape
from kvik.params import CacheParams, Protected, Scorer

__all__ = ["layer_budgets", "most_of_a_head", "select"]


def layer_budgets(
    policy: Scorer, layers: Literal["uniform", "pyramid"], tokens: int, held: NDArray[np.int64]
) -> list[int]:
    """Slots that each KV head of the L' layers keeps on average, at an event after so many tokens.

    held: [L', H_kv] slots of the tables. Their sum is L' times the budget, where the tables have so many.
    """
    most = [int(layer.sum()) // len(layer) for layer in held]
    kept = policy.kept(tokens)
    if layers == "pyramid":
        return pyramid.budgets(kept, sum(policy.protected(kept)), most)
    return [min(kept, each) for each in most]


def select(
    scores: NDArray[Any],
    held: NDArray[np.int64],
    budgets: list[int],
    protected: Protected,
    heads: Literal["uniform", "ada"],
) -> NDArray[np.bool_]:
    """The slots that stay, [L', H_kv, n]: protected ones, then those with the best scores; of equal ones the later.

    scores: [L', H_kv, n]; not a number is worst. budgets: [L'] slots of a head, on average.
    """
    slots = np.arange(scores.shape[2])
    ranks = np.nan_to_num(scores.astype(np.float64), nan=-np.finfo(np.float64).max)
    ranks[(slots < protected.first) | (slots >= held[:, :, None] - protected.last)] = np.inf
    ranks[slots >= held[:, :, None]] = -np.inf
    chosen = np.zeros(scores.shape, np.bool_)
    for layer, budget in enumerate(budgets):
        if heads == "ada":
            chosen[layer] = ada.best_of_layer(ranks[layer], budget, sum(protected))
        else:
            for head, row in enumerate(ranks[layer]):
                chosen[layer, head] = best(row, budget)
    return chosen


def most_of_a_head(params: CacheParams, shape: CacheShape, layers: int, prompt: int | None, tokens: int) -> int:
    """Most slots that a KV head of the L' layers keeps at any event of a sequence of `tokens` tokens; all without one."""
    policy = params.scorer
    first = None if policy is None else policy.event(prompt, 0)
    if policy is None or first is None or first > tokens:
        return tokens
    kept = min(policy.kept(tokens), tokens)
    budgets = (
        [kept] * layers
        if params.layers == "uniform"
        else pyramid.budgets(kept, sum(policy.protected(kept)), [tokens] * layers)
    )
    if params.heads == "uniform":
        return min(max(budgets), tokens)
    return min(ada.most_of_head(max(budgets), sum(policy.protected(kept)), shape.num_kv_heads), tokens)
