"""The definition: what each filter keeps, ties, edges, order, and that nothing writes into its input."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from kvik.decoding import Edits, filters
from kvik.decoding.pipeline import apply
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
    np.testing.assert_array_equal(
        apply(row(1, 2), SamplingParams(top_p=0.5, top_k=1, min_p=0.1), bans(0, 1)), nothing
    )


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
