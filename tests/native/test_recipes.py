"""Every op of the vocabulary on the native executor: what the definition computes, and the same bits however it is run."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from native.recipes import GPT2, MOE, RECIPES, Recipe, random_recipe
from native.tiny import assert_invariant, make_pass, pack, tokens

from kvik.weights.layouts import Layout
from kvik.weights.packed import PackedTensor


def compare(recipe: Recipe, weights: dict[str, PackedTensor], bound: float, kv: str = "f32", most: float = 1.0) -> None:
    """Each row's largest error within the bound, relative to the largest logit; `most`: of how many of the rows."""
    native, torch = recipe.native(weights, kv=kv), recipe.torch(weights, kv=kv)
    errors = []
    for length, start in ((150, 0), (1, 150), (2, 151), (7, 153)):  # planned as many rows, one, two, some
        ids = tokens(recipe.vocab, length, start)
        work = make_pass([(ids, start, range(10, 20)), (ids[:1], start // 50, [3])][: 1 + (length > 2)])
        want, got = torch.run(work), native.run(work)
        assert np.isfinite(want).all() and np.isfinite(got).all()
        errors.append(np.abs(got - want).max(1) / np.abs(want).max())
    assert np.quantile(np.concatenate(errors), most) <= bound, recipe


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: r.name)
def test_native_equals_the_definition(recipe: Recipe) -> None:
    compare(recipe, recipe.weights(Layout.F32), 2e-5)
    compare(recipe, recipe.weights(Layout.F16, 1), 2e-3, "f16")


@pytest.mark.parametrize("layout", [Layout.BF16, Layout.INT8])
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: r.name)
def test_native_rounds_as_the_definition(recipe: Recipe, layout: Layout) -> None:
    # A value that rounds the other way can make a row choose another expert.
    compare(recipe, recipe.weights(layout), 5e-2, most=0.9 if recipe.network == "experts" else 1.0)


@pytest.mark.parametrize("layout", [Layout.F32, Layout.BF16, Layout.INT4_MIN])
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: r.name)
def test_bits_are_invariant(recipe: Recipe, layout: Layout) -> None:
    weights = recipe.weights(layout)
    assert_invariant(lambda **how: recipe.native(weights, **how), recipe.vocab)


@pytest.mark.parametrize("seed", range(8))
def test_random_recipes(seed: int) -> None:
    recipe = random_recipe(seed)
    weights = recipe.weights(Layout.F32, seed)
    compare(recipe, weights, 1e-4)
    assert_invariant(lambda **how: recipe.native(weights, **how), recipe.vocab, 80)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8, 300))
def test_more_random_recipes(seed: int) -> None:
    test_random_recipes(seed)


def test_few_rows_meet_no_more_often_than_llama() -> None:
    """One phase for each product and one of attention; norms, rotations and sums are done by whoever ends one."""
    for recipe in RECIPES:
        runner = recipe.native(recipe.weights(Layout.INT8))
        runner.run(make_pass([([1, 2], 0, [0])]))
        layer = 6 if recipe.network == "experts" else 5  # the router's product
        assert runner.phases == 2 + layer * len(recipe.windows), recipe.name


def test_a_position_outside_the_table_is_refused() -> None:
    runner = replace(GPT2, positions=20).native(replace(GPT2, positions=20).weights(Layout.F32))
    work = make_pass([(tokens(GPT2.vocab, 20), 0, range(2))])
    runner.run(work)
    with pytest.raises(ValueError, match="position outside the table"):
        runner.run(work._replace(positions=work.positions + 1))


# ---- routing -----------------------------------------------------------------------------------------------------------


def routed(recipe: Recipe, router: np.ndarray) -> dict[str, PackedTensor]:
    weights = recipe.weights(Layout.F32)
    for i in range(len(recipe.windows)):
        weights[f"{i}.router"] = pack(router.astype(np.float32), Layout.F32, "router")
    return weights


def with_ruined_experts(weights: dict[str, PackedTensor], recipe: Recipe, kept: int) -> dict[str, PackedTensor]:
    """The weights with NaN in every expert from `kept` on."""
    ruined = dict(weights)
    for name, tensor in weights.items():
        if name.endswith(("gates", "ups", "downs")):
            data = tensor.data.copy()
            data.view(np.float32).reshape(recipe.experts, -1)[kept:] = np.nan
            ruined[name] = replace(tensor, data=data)
    return ruined


@pytest.mark.parametrize("rows", [1, 2, 3, 40])
def test_ties_go_to_the_lower_experts_and_the_others_are_not_computed(rows: int) -> None:
    recipe = replace(MOE, experts=20, used=3)
    weights = routed(recipe, np.zeros((20, recipe.hidden)))
    work = make_pass([(tokens(recipe.vocab, rows), 0, range(3))])
    want = recipe.torch(weights).run(work)
    for isa in ("portable", "auto"):
        got = recipe.native(with_ruined_experts(weights, recipe, 3), isa=isa).run(work)
        assert np.abs(got - want).max() <= 2e-3 * np.abs(want).max()


def test_all_rows_may_go_to_one_expert_and_every_row_to_all() -> None:
    one = replace(MOE, used=1, windows=(None,), embed_scale=100.0)
    router = np.zeros((one.experts, one.hidden))
    router[:, 0] = np.arange(one.experts)  # whichever sign the row has, the last or the first expert
    compare(one, routed(one, router), 2e-5)
    compare(replace(MOE, used=8), MOE.weights(Layout.F32), 2e-5)
    compare(replace(MOE, experts=1, used=1), replace(MOE, experts=1).weights(Layout.F32), 2e-5)


def test_scores_far_apart_do_not_overflow() -> None:
    router = 1e4 * np.random.default_rng(3).standard_normal((MOE.experts, MOE.hidden))
    compare(MOE, routed(MOE, router), 2e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"inner": 40}, "inner width of an expert"), ({"hidden": 72}, "width of a model with experts"),
     ({"used": 9}, "at least one and at most all"), ({"experts": 1025}, "experts must be in")],
)  # fmt: skip
def test_experts_the_kernels_lack_are_refused(change: dict[str, int], message: str) -> None:
    recipe = replace(MOE, windows=(None,), **change)
    with pytest.raises(ValueError, match=message):
        recipe.native(recipe.weights(Layout.F32))
