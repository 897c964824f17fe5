"""The definition: what each filter keeps, ties, edges, order, and that nothing writes into its input."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from kvik.decoding import DrawRequest, Edits, filters, noise
from kvik.decoding.pipeline import apply, filtered_scores, stages
from kvik.errors import KvikError, ParameterError
from kvik.params import SamplingParams

INF = float("inf")


def row(*values: float) -> np.ndarray:
    result = np.array(values, np.float64)
    result.flags.writeable = False  # a filter that writes into its input fails
    return result


def bans(*ids: int) -> Edits:
    return Edits(banned=np.array(ids, np.int32))


def kept(scores: np.ndarray) -> list[int]:
    return np.flatnonzero(scores > -INF).tolist()


def test_top_k_keeps_exactly_k_and_the_lower_id_of_equals() -> None:
    x = row(1, 3, 2, 3, 2, 2)
    assert kept(filters.top_k(x, 1)) == [1]
    assert kept(filters.top_k(x, 3)) == [1, 2, 3]
    assert kept(filters.top_k(x, 4)) == [1, 2, 3, 4]
    np.testing.assert_array_equal(filters.top_k(x, 6), x)
    np.testing.assert_array_equal(filters.top_k(x, 10**9), x)
    assert kept(filters.top_k(row(-INF, 0, -INF), 2)) == [1]
    assert kept(filters.top_k(row(-0.0, 0.0), 1)) == [0]


def test_top_p_on_round_probabilities() -> None:
    x = np.log(row(0.1, 0.4, 0.2, 0.3))
    assert kept(filters.top_p(x, 0.0)) == [1]
    assert kept(filters.top_p(x, 0.39)) == [1]
    assert kept(filters.top_p(x, 0.41)) == [1, 3]
    assert kept(filters.top_p(x, 0.71)) == [1, 2, 3]
    assert kept(filters.top_p(x, 1.0)) == [0, 1, 2, 3]


@pytest.mark.parametrize("size", [2, 4, 5, 8, 10, 1000])
def test_top_p_counts_equal_tokens_exactly(size: int) -> None:
    for count in range(1, size):
        assert kept(filters.top_p(row(*[2.5] * size), count / size)) == list(range(count))


def test_top_p_leaves_out_what_no_sum_can_need() -> None:
    assert kept(filters.top_p(row(0, -100, -INF), 1.0)) == [0]


def test_min_p() -> None:
    x = np.log(row(0.1, 0.4, 0.2, 0.3))
    assert kept(filters.min_p(x, 0.0)) == [0, 1, 2, 3]
    assert kept(filters.min_p(x, 0.49)) == [1, 2, 3]
    assert kept(filters.min_p(x, 0.51)) == [1, 3]
    assert kept(filters.min_p(x, 1.0)) == [1]
    assert kept(filters.min_p(row(2, 1, 2), 1.0)) == [0, 2]
    assert kept(filters.min_p(row(0, -700), 5e-324)) == [0, 1]


def test_ban_and_a_row_without_tokens() -> None:
    nothing = row(-INF, -INF)
    for result in (
        filters.top_k(nothing, 1),
        filters.top_p(nothing, 0.5),
        filters.min_p(nothing, 0.5),
        filters.typical(nothing, 0.5),
        filters.epsilon(nothing, 0.5),
        filters.eta(nothing, 0.5),
        filters.top_n_sigma(nothing, 1.0),
        filters.xtc(nothing, 0.1),
        filters.log_softmax(nothing),
        filters.temperature(nothing, 0.5),
        filters.greedy(nothing),
    ):
        np.testing.assert_array_equal(result, nothing)
    np.testing.assert_array_equal(apply(row(1, 2), SamplingParams(top_p=0.5, top_k=1, min_p=0.1), bans(0, 1)), nothing)


@pytest.mark.parametrize("value", [0.0, 1e-300, 1e-30, 9e-10])
def test_temperature_near_zero_is_greedy(value: float) -> None:
    result = apply(row(1, 5, 5, -2), SamplingParams(temperature=value))
    np.testing.assert_array_equal(result, [-INF, 0, -INF, -INF])


def test_temperature_scales() -> None:
    x = row(1, 2, 4, -INF)
    np.testing.assert_allclose(filters.temperature(x, 0.5), x * 2)
    with pytest.raises(ParameterError, match="temperature"):
        filters.temperature(x, 0.0)
    hot = apply(row(1e30, -1e30, 0), SamplingParams(temperature=1e308))
    assert np.isfinite(hot).all()
    cold = apply(row(3e38, -3e38, 0), SamplingParams(temperature=1e-9))
    np.testing.assert_array_equal(cold[:1], [0.0])
    assert not np.isnan(cold).any()


def test_temperature_keeps_distinct_logits_distinct() -> None:
    x = np.float32(17.0) + np.arange(64, dtype=np.float32) * np.spacing(np.float32(17.0))
    for value in (1e-9, 0.3, 0.7, 1e30, 1e300):
        assert (np.diff(filters.temperature(filters.checked(x), value)) > 0).all()


@pytest.mark.parametrize("bad", [float("nan"), INF])
def test_damaged_logits_are_named(bad: float) -> None:
    with pytest.raises(KvikError, match="logit of token 2 is"):
        apply(np.array([0, 1, bad], np.float32), SamplingParams())


@pytest.mark.parametrize(
    "call",
    [
        lambda x: filters.top_k(x, 0),
        lambda x: filters.top_p(x, -0.1),
        lambda x: filters.top_p(x, 1.1),
        lambda x: filters.top_p(x, math.nan),
        lambda x: filters.min_p(x, 2.0),
        lambda x: filters.min_p(x, math.nan),
        lambda x: filters.checked(np.zeros((2, 2))),
        lambda x: filters.checked(np.zeros(0)),
    ],
)
def test_ranges(call: Callable[[np.ndarray], object]) -> None:
    with pytest.raises(ParameterError, match="must"):
        call(row(1, 2))


def test_the_declared_order() -> None:
    x = np.log(row(0.5, 0.2, 0.2, 0.1))
    # top-p counts probabilities among the top k: 0.5 / 0.7 >= 0.7, while 0.5 of everything is not
    assert kept(apply(x, SamplingParams(top_k=2, top_p=0.69))) == [0]
    assert kept(apply(x, SamplingParams(top_p=0.69))) == [0, 1]
    # temperature comes first: squared probabilities are 25 : 4 : 4 : 1
    assert kept(apply(x, SamplingParams(temperature=0.5, top_p=0.69))) == [0]
    assert kept(apply(x, SamplingParams(temperature=0.5, min_p=0.1))) == [0, 1, 2]
    # a ban comes before everything
    assert kept(apply(x, SamplingParams(top_k=1), bans(0))) == [1]
    np.testing.assert_allclose(np.exp(apply(x, SamplingParams(top_k=3), bans(0))), [0, 0.4, 0.4, 0.2], atol=1e-7)


def test_apply_is_a_distribution_over_a_prefix_of_the_order(kind: str, make_row: Callable[..., np.ndarray]) -> None:
    rng = np.random.default_rng(3)
    for _ in range(20):
        x = make_row(rng, int(rng.integers(1, 400)), kind)
        x.flags.writeable = False
        params = SamplingParams(
            temperature=float(rng.choice([0.3, 1.0, 2.0])),
            top_k=int(rng.choice([0, 1, 7, 100])),
            top_p=float(rng.choice([0.0, 0.5, 0.9, 1.0])),
            min_p=float(rng.choice([0.0, 0.05])),
        )
        logprobs = apply(x, params)
        assert np.exp(logprobs).sum() == pytest.approx(1.0 if (x > -INF).any() else 0.0, abs=1e-12)
        chosen = set(kept(logprobs))
        order = np.argsort(-x.astype(np.float64), kind="stable")[: len(chosen)]
        assert chosen == set(order.tolist())


def probabilities(*values: float) -> np.ndarray:
    return np.log(row(*values))


def entropy(p: np.ndarray) -> float:
    return float(-(p[p > 0] * np.log(p[p > 0])).sum())


def test_typical_may_leave_the_best_token_out() -> None:
    x = probabilities(0.5, 0.2, 0.1, 0.1, 0.1)  # information 0.69, 1.61, 2.30; entropy 1.36
    assert kept(filters.typical(x, 0.1)) == [1]
    assert kept(filters.typical(x, 0.2)) == [1]
    assert kept(filters.typical(x, 0.21)) == [0, 1]
    assert kept(filters.typical(x, 0.75)) == [0, 1, 2]
    assert kept(filters.typical(x, 1.0)) == [0, 1, 2, 3, 4]
    assert kept(filters.typical(row(*[3.0] * 8), 0.5)) == [0, 1, 2, 3]  # equals by id


def test_typical_by_its_definition(kind: str, make_row: Callable[..., np.ndarray]) -> None:
    rng = np.random.default_rng(6)
    for p in (0.05, 0.3, 0.9):
        x = make_row(rng, 500, kind).astype(np.float64) / (1e37 if kind == "huge" else 1.0)
        if x.max() == -INF:
            assert kept(filters.typical(x, p)) == []
            continue
        q = np.exp(filters.log_softmax(x))
        information = -np.log(np.where(q > 0, q, 1.0))
        information[q == 0] = INF
        order = np.argsort(np.abs(information - entropy(q)), kind="stable")
        count = int(np.searchsorted(np.cumsum(q[order]), p - 1e-12)) + 1
        got = kept(filters.typical(x, p))
        assert abs(len(got) - count) <= 1 and (
            kind in ("ties", "equal") or set(got) <= set(order[: count + 1].tolist())
        )


def test_epsilon_keeps_the_best_token_at_least() -> None:
    x = probabilities(0.1, 0.4, 0.2, 0.3)
    assert kept(filters.epsilon(x, 0.19)) == [1, 2, 3]
    assert kept(filters.epsilon(x, 0.9)) == [1]
    assert kept(filters.epsilon(x, 1e-9)) == [0, 1, 2, 3]
    assert kept(filters.epsilon(row(2, 2, 0), 0.9)) == [0, 1]


def test_eta_is_the_lesser_of_two_bounds() -> None:
    x = probabilities(0.7, 0.2, 0.06, 0.04)
    bound = math.exp(-entropy(np.exp(x)))  # 0.416
    assert kept(filters.eta(x, 0.05)) == [0, 1, 2]  # eta itself
    assert kept(filters.eta(x, 0.3)) == [i for i in range(4) if np.exp(x[i]) >= min(0.3, math.sqrt(0.3) * bound)]
    assert kept(filters.eta(x, 0.99)) == [0]


def test_top_n_sigma_keeps_what_is_near_the_best() -> None:
    x = row(0, 1, 2, 3, -INF)
    sigma = np.std([0, 1, 2, 3])
    assert filters.spread(x) == pytest.approx(sigma, rel=1e-9)
    assert kept(filters.top_n_sigma(x, 0.9)) == [2, 3]
    assert kept(filters.top_n_sigma(x, 2.01 / sigma)) == [1, 2, 3]
    assert kept(filters.top_n_sigma(row(2, 2, 2), 0.1)) == [0, 1, 2]
    assert kept(filters.top_n_sigma(row(-INF, 2), 0.1)) == [1]
    cold = filters.temperature(x, 0.1)  # a factor on all scores changes nothing
    assert kept(filters.top_n_sigma(cold, 0.9)) == [2, 3]


def test_spread_is_the_standard_deviation(make_row: Callable[..., np.ndarray]) -> None:
    rng = np.random.default_rng(2)
    for size in (2, 17, 49152):
        for scale in (1e-30, 1.0, 1e30):
            x = make_row(rng, size, "normal").astype(np.float64) * scale
            assert filters.spread(x) == pytest.approx(x.std(), rel=1e-8)
    outlier = np.zeros(2**20)
    outlier[0] = -1.0
    assert filters.spread(outlier) == pytest.approx(outlier.std(), rel=1e-6)


def test_xtc_leaves_out_all_top_choices_but_the_least() -> None:
    x = probabilities(0.1, 0.4, 0.2, 0.25, 0.05)
    assert kept(filters.xtc(x, 0.1)) == [0, 4]
    assert kept(filters.xtc(x, 0.11)) == [0, 2, 4]
    assert kept(filters.xtc(x, 0.3)) == [0, 1, 2, 3, 4]  # one top choice only
    assert kept(filters.xtc(x, 0.0)) == [4]
    assert kept(filters.xtc(row(3, 3, 3, 0), 0.1)) == [2, 3]  # the least of equals has the highest id


def test_the_coin_falls_as_often_as_asked_and_depends_on_its_key_alone() -> None:
    coins = np.array([noise.coin(5, 0, position) for position in range(4000)])
    assert abs((coins < 0.3).mean() - 0.3) < 0.03 and (coins > 0).all() and (coins < 1).all()
    assert noise.coin(5, 0, 7) == coins[7] and len({noise.coin(5, 1, 7), noise.coin(6, 0, 7), coins[7]}) == 3


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda x: filters.typical(x, 0.0), "typical_p"),
        (lambda x: filters.typical(x, 1.5), "typical_p"),
        (lambda x: filters.epsilon(x, 0.0), "epsilon_cutoff"),
        (lambda x: filters.eta(x, 1.0), "eta_cutoff"),
        (lambda x: filters.top_n_sigma(x, 0.0), "top_n_sigma"),
        (lambda x: filters.top_n_sigma(x, math.nan), "top_n_sigma"),
        (lambda x: filters.xtc(x, 0.6), "xtc_threshold"),
    ],
)
def test_ranges_of_the_others(call: Callable[[np.ndarray], np.ndarray], name: str) -> None:
    with pytest.raises(ParameterError, match=name):
        call(row(1, 2))


def test_stages_name_what_each_parameter_left() -> None:
    params = SamplingParams(
        temperature=0.9, top_k=40, top_p=0.95, min_p=0.01, typical_p=0.9, epsilon_cutoff=1e-3, eta_cutoff=1e-3,
        top_n_sigma=3.0, xtc_probability=1.0,
    )  # fmt: skip
    x = np.random.default_rng(0).normal(size=200).astype(np.float32) * 3
    seen = list(stages(x, DrawRequest(params, 0, 0, 0, bans(5, 6))))
    assert [s.name for s in seen] == [
        "logits", "banned", "temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff",
        "top_n_sigma", "xtc",
    ]  # fmt: skip
    left = [len(kept(s.scores)) for s in seen]
    assert left == sorted(left, reverse=True) and left[0] == 200 and left[1] == 198 and left[3] == 40
    assert [s.name for s in stages(x, DrawRequest(SamplingParams(temperature=0.0, top_p=0.5), 0, 0, 0))] == [
        "logits", "temperature"
    ]  # fmt: skip
    np.testing.assert_array_equal(
        filtered_scores(x, DrawRequest(params, 0, 0, 0, bans(5, 6))) > -INF, seen[-1].scores > -INF
    )
