"""Budgets by layer and by head: exact sums, protected slots, order."""

from __future__ import annotations

import numpy as np
from cache.eviction.simulated import Shape, pyramid
from hypothesis import given
from hypothesis import strategies as st

from kvik.cache.eviction import ada
from kvik.cache.eviction.allocation import layer_budgets, most_of_a_head, select
from kvik.cache.eviction.pyramid import budgets
from kvik.cache.eviction.ranking import best
from kvik.params import H2O, CacheParams, KeyDiff, Protected


@given(st.integers(1, 400), st.integers(0, 400), st.lists(st.integers(1, 400), min_size=1, max_size=32))
def test_the_pyramids_sum_is_exact(kept: int, protected: int, most: list[int]) -> None:
    found = budgets(kept, protected, most)
    assert sum(found) == min(kept * len(most), sum(most))
    for each, room in zip(found, most, strict=True):
        assert min(room, max(1, min(protected, kept))) <= each <= room
    if min(most) >= 2 * kept:  # room for the whole pyramid
        assert found == sorted(found, reverse=True)


@given(st.integers(2, 40), st.integers(1, 1000), st.integers(0, 100))
def test_the_pyramids_line(layers: int, kept: int, protected: int) -> None:
    protected = min(protected, kept)
    room = [2 * kept] * layers
    found, rest = budgets(kept, protected, room), kept - protected
    if rest >= 20 or protected:
        assert found == pyramid(kept, protected, room)
        assert abs(found[0] - protected - 1.95 * rest) < 1 and abs(found[-1] - protected - 0.05 * rest) < 1
        assert all(abs(a - 2 * b + c) <= 2 for a, b, c in zip(found, found[1:], found[2:], strict=False))


def test_pyramids_by_hand() -> None:
    assert budgets(100, 0, [1000] * 2) == [195, 5]
    assert budgets(100, 20, [1000] * 3) == [176, 100, 24]
    assert budgets(1, 0, [9] * 3) == [1, 1, 1] and budgets(2, 0, [9] * 3) == [3, 2, 1]
    assert budgets(80, 0, [100] * 3) == [100, 80, 60]  # the first layer has no more
    assert budgets(50, 0, [40, 100, 100]) == [40, 79, 31] and budgets(7, 0, [5]) == [5]


@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 3))
def test_ties_go_to_the_later(count: int, length: int, levels: int) -> None:
    scores = np.random.default_rng(count).integers(0, levels + 1, length).astype(np.float64)
    expected = sorted(range(length), key=lambda t: (scores[t], t))[-count:]
    assert np.flatnonzero(best(scores, count)).tolist() == sorted(expected)


@given(
    st.integers(1, 4), st.lists(st.integers(1, 20), min_size=1, max_size=4), st.integers(0, 6), st.integers(0, 6),
    st.floats(0.0, 1.0), st.sampled_from(["uniform", "ada"]), st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_exact_counts_and_protected_slots(
    layers: int, held_: list[int], first: int, last: int, share: float, heads: str, seed: int
) -> None:
    """Tables of unequal lengths where heads have their own; the budget may be too little for what is protected."""
    held = np.array([held_ if heads == "ada" else [min(held_)] * len(held_)] * layers)
    budget = max(1, int(share * held.mean()))
    first, last = min(first, budget), min(last, max(0, budget - first))
    scores = np.random.default_rng(seed).integers(0, 5, (layers, len(held_), int(held.max()))).astype(float)
    chosen = select(scores, held, [budget] * layers, Protected(first, last), heads)  # type: ignore[arg-type]
    assert (chosen.sum((1, 2)) == budget * len(held_)).all()
    for layer in range(layers):
        for head, slots in enumerate(held[layer]):
            row = chosen[layer, head]
            assert not row[slots:].any()
            if heads == "uniform":
                assert row.sum() == budget and row[:first].all() and row[slots - last : slots].all()
            elif slots >= budget:
                assert (
                    row[:first].all()
                    and row[slots - last : slots].all()
                    and row.sum() >= first + last + (budget - first - last) // 5
                )


def test_the_best_heads_get_more() -> None:
    ranks = np.array([[9.0, 8, 7, 6, 5, 4, 3, 2, 1, 0], [0.5] * 10])
    kept = ada.best_of_layer(ranks, 5, 0)
    assert kept.sum(1).tolist() == [9, 1] and kept[1, 9] and not kept[0, 9]
    assert ada.most_of_head(5, 0, 2) == 9
    same = ada.best_of_layer(np.zeros((3, 4)), 2, 0)
    assert same.tolist() == [[False, False, True, True]] * 3


@given(
    st.integers(1, 60), st.integers(1, 100), st.integers(0, 9), st.integers(1, 60) | st.integers(1, 100).map(lambda x: x / 100),
    st.sampled_from(["uniform", "pyramid"]), st.sampled_from(["uniform", "ada"]), st.integers(0, 2**32 - 1),
    st.sampled_from(["h2o", "keydiff"]),
)  # fmt: skip
def test_the_bound_of_a_head(
    prompt: int, tokens: int, every: int, budget: float, layers: str, heads: str, seed: int, policy: str
) -> None:
    """No head keeps more at any event; all counts fit the tables, and their sum is the budget's."""
    kind = {"h2o": H2O, "keydiff": KeyDiff}[policy]
    params = CacheParams(policy=kind(budget=budget, every=every), layers=layers, heads=heads)  # type: ignore[arg-type]
    scorer, noise, shape = params.scorer, np.random.default_rng(seed), Shape(num_layers=4, windows=(None,) * 4)
    assert scorer is not None
    bound = most_of_a_head(params, shape, 4, prompt, tokens)
    counts, last, evicted = np.zeros((4, 2), np.int64), 0, 0.0
    while (event := scorer.event(prompt, last + 1, int(evicted))) is not None and event <= tokens:
        held = counts + event - last
        kept = scorer.kept(event)
        scores = noise.random((4, 2, int(held.max()))) ** noise.integers(1, 9, (4, 2, 1))
        chosen = select(
            scores, held, layer_budgets(scorer, params.layers, event, held), scorer.protected(kept), params.heads
        )
        counts, last = chosen.sum(2), event
        assert counts.sum() == 8 * kept and (counts <= held).all() and (counts >= 1).all()
        assert counts.max() <= bound
        evicted = event - counts.mean()
