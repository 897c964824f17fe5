"""Against scipy, published examples, and what must hold for all numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from kvik.errors import ParameterError
from kvik.evaluation import statistics
from kvik.evaluation.agreement import cohen_kappa, krippendorff_alpha, sign_test
from kvik.evaluation.statistics import (
    Interval,
    average_ranks,
    block_bootstrap,
    bootstrap_mean,
    bootstrap_sums,
    bootstrap_test,
    equivalence,
    paired_block_bootstrap,
    paired_bootstrap,
    pearson,
    permutation_test,
    spearman,
)

RANDOM = np.random.default_rng(7)
SKEWED = RANDOM.exponential(size=60)
OTHER = SKEWED + RANDOM.normal(0.1, 0.5, size=60)
NUMBERS = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=12)


def test_the_mean_and_its_interval_are_those_of_scipy():
    found = bootstrap_mean(SKEWED, resamples=20_000, level=0.9)
    wanted = stats.bootstrap(
        (SKEWED,), np.mean, n_resamples=20_000, method="percentile", confidence_level=0.9, rng=np.random.default_rng(1)
    )
    spread = wanted.standard_error
    assert found.value == pytest.approx(SKEWED.mean(), rel=1e-12)
    assert found.low == pytest.approx(wanted.confidence_interval.low, abs=0.04 * spread)
    assert found.high == pytest.approx(wanted.confidence_interval.high, abs=0.04 * spread)


def test_intervals_hold_the_truth_as_often_as_they_say():
    held = 0
    for trial in range(300):
        low, high = bootstrap_mean(np.random.default_rng(trial).normal(3, 1, 40), level=0.9, resamples=500, seed=trial)[
            1:
        ]
        held += low <= 3 <= high
    assert 0.84 <= held / 300 <= 0.94  # the percentile interval of 40 is a little narrow


def test_a_seed_repeats_and_memory_does_not_change_the_result(monkeypatch):
    whole = bootstrap_mean(SKEWED, seed=3), permutation_test(SKEWED, OTHER, seed=3)
    assert whole == (bootstrap_mean(SKEWED, seed=3), permutation_test(SKEWED, OTHER, seed=3))
    assert bootstrap_mean(SKEWED, seed=4) != whole[0]
    monkeypatch.setattr(statistics, "_DRAWN_AT_ONCE", 1000)
    assert bootstrap_mean(SKEWED, seed=3) == pytest.approx(whole[0], rel=1e-12)


@given(NUMBERS, st.integers(0, 2**64 - 1))
@settings(max_examples=60, deadline=None)
def test_an_interval_lies_within_the_values(values, seed):
    value, low, high = bootstrap_mean(values, resamples=50, seed=seed)
    room = 1e-9 * max(map(abs, values))
    assert min(values) - room <= value <= max(values) + room
    if len(values) == 1:
        assert (low, high) == (-math.inf, math.inf)
    else:
        assert min(values) - room <= low <= high <= max(values) + room


def test_a_ratio_over_blocks_has_the_standard_error_of_its_linearization():
    tokens = RANDOM.integers(200, 600, size=400).astype(float)
    nll = tokens * RANDOM.normal(2.5, 0.3, size=400)
    found = block_bootstrap(nll, tokens, resamples=4000)
    ratio = nll.sum() / tokens.sum()
    wanted = math.sqrt(((nll - ratio * tokens) ** 2).sum()) / tokens.sum()
    assert found.interval.value == pytest.approx(ratio, rel=1e-12)
    assert found.standard_error == pytest.approx(wanted, rel=0.06)
    assert found.interval.high - found.interval.low == pytest.approx(2 * 1.96 * wanted, rel=0.1)
    exponent = block_bootstrap(nll, tokens, resamples=4000, transform=np.exp)
    assert exponent.interval == pytest.approx(tuple(np.exp(found.interval)), rel=1e-6)
    assert exponent.standard_error == pytest.approx(np.exp(ratio) * wanted, rel=0.07)


def test_paired_blocks_see_what_both_have_in_common():
    tokens = np.full(200, 500.0)
    hard = RANDOM.normal(2.5, 0.5, size=200)  # the same for both
    a, b = tokens * hard, tokens * (hard + 0.01 + RANDOM.normal(0, 0.01, size=200))
    found = paired_block_bootstrap(a, tokens, b, tokens)
    assert found.interval.value == pytest.approx((b - a).sum() / tokens.sum(), rel=1e-9)
    assert 0.005 < found.interval.low < found.interval.high < 0.015
    ratio = paired_block_bootstrap(a, tokens, b, tokens, compare=lambda x, y: np.exp(y - x))
    assert ratio.interval == pytest.approx(tuple(np.exp(found.interval)), rel=1e-6)


def test_both_ratios_of_a_resample_are_of_the_same_blocks():
    tops, bottoms = RANDOM.exponential(size=(2, 30))
    found = paired_block_bootstrap(tops, bottoms, tops, 2 * bottoms, compare=lambda a, b: b / a)
    assert found.interval == pytest.approx((0.5, 0.5, 0.5), rel=1e-12)


def test_resamples_without_a_denominator_do_not_count():
    found = block_bootstrap([1.0, 0.0, 0.0], [2.0, 0.0, 0.0])
    assert found.interval == Interval(0.5, 0.5, 0.5) and found.standard_error == 0.0
    assert block_bootstrap([3.0], [2.0]) == (Interval(1.5, -math.inf, math.inf), math.inf)


def test_figures_beyond_float64_are_infinite():
    found = block_bootstrap([2000.0, 1.0], [1.0, 1.0], transform=np.exp)
    assert found.interval.value == math.inf and found.interval.high == math.inf and math.isfinite(found.interval.low)
    assert found.standard_error == math.inf


def test_sums_of_several_columns():
    rows = RANDOM.random((50, 3))
    found = bootstrap_sums(rows, lambda sums: sums[:, 0] * sums[:, 1] / sums[:, 2])
    top, other, bottom = rows.sum(axis=0)
    assert found.interval.value == pytest.approx(top * other / bottom, rel=1e-12)
    assert found.interval.low < found.interval.value < found.interval.high


@pytest.mark.parametrize("size", [2, 5, 9])
def test_the_permutation_test_is_exact_where_it_can_be(size):
    a, b = np.round(SKEWED[:size], 1), np.round(OTHER[:size], 1)
    wanted = stats.permutation_test(
        (b, a),
        lambda x, y, axis: (x - y).mean(axis=axis),
        permutation_type="samples",
        n_resamples=np.inf,
        vectorized=True,
    )
    assert permutation_test(a, b) == pytest.approx(wanted.pvalue, abs=1e-12)


def test_a_random_permutation_test_is_near_the_exact_one_and_never_zero():
    a, b = SKEWED[:12], OTHER[:12]
    exact = permutation_test(a, b)
    assert permutation_test(a, b, resamples=4000) == pytest.approx(exact, abs=0.03)
    assert permutation_test(np.zeros(100), np.ones(100), resamples=999) == 1 / 1000


def test_the_bootstrap_test_agrees_with_the_t_test():
    wanted = stats.ttest_rel(SKEWED, OTHER).pvalue
    assert bootstrap_test(SKEWED, OTHER) == pytest.approx(wanted, abs=0.03)
    assert bootstrap_test([1.0], [2.0]) == 1.0
    assert bootstrap_test([1.0, 2.0], [1.0, 2.0]) == permutation_test([1.0, 2.0], [1.0, 2.0]) == 1.0


@given(st.lists(st.tuples(st.integers(-5, 5), st.integers(-5, 5)), min_size=1, max_size=20), st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_tests_do_not_care_which_run_is_called_a(pairs, seed):
    a, b = zip(*pairs, strict=True)
    assert permutation_test(a, b, seed=seed) == pytest.approx(permutation_test(b, a, seed=seed), abs=0.03)
    assert 0 < permutation_test(a, b, seed=seed) <= 1 and 0 < bootstrap_test(a, b, resamples=200, seed=seed) <= 1
    one, other = paired_bootstrap(a, b, resamples=50, seed=seed), paired_bootstrap(b, a, resamples=50, seed=seed)
    assert one == pytest.approx((-other.value, -other.high, -other.low), abs=1e-9)


@pytest.mark.parametrize(("wins", "losses"), [(0, 0), (1, 0), (8, 2), (5, 5), (30, 12), (1200, 1000)])
def test_the_sign_test_is_the_exact_binomial_one(wins, losses):
    wanted = stats.binomtest(wins, wins + losses).pvalue if wins + losses else 1.0
    assert sign_test(wins, losses) == pytest.approx(wanted, rel=1e-9)
    assert sign_test(losses, wins) == sign_test(wins, losses)


@pytest.mark.parametrize(
    ("low", "high", "margin", "verdict"),
    [
        (-0.01, 0.02, 0.03, "equivalent"), (0.005, 0.02, 0.03, "equivalent"), (0.005, 0.05, 0.03, "different"),
        (-0.05, -0.04, 0.03, "different"), (-0.05, 0.01, 0.03, "undecided"), (0.0, 0.0, 0.0, "undecided"),
        (0.1, 0.2, 0.0, "different"), (-math.inf, math.inf, 1e9, "undecided"), (-0.03, 0.0, 0.03, "undecided"),
    ],
)  # fmt: skip
def test_equivalence(low, high, margin, verdict):
    assert equivalence(Interval((low + high) / 2 if math.isfinite(low) else 0.0, low, high), margin) == verdict


def test_correlations_are_those_of_scipy():
    x, y = SKEWED, np.round(OTHER, 1)  # with ties
    linear, ranked = pearson(x, y), spearman(x, y)
    assert linear is not None and ranked is not None
    assert linear.value == pytest.approx(stats.pearsonr(x, y).statistic, rel=1e-12)
    assert ranked.value == pytest.approx(stats.spearmanr(x, y).statistic, rel=1e-12)
    wanted = stats.bootstrap(
        (x, y), lambda one, other: stats.pearsonr(one, other).statistic, paired=True, vectorized=False, n_resamples=400,
        method="percentile", rng=np.random.default_rng(1),
    )  # fmt: skip
    assert linear.low == pytest.approx(wanted.confidence_interval.low, abs=0.05)
    assert linear.high == pytest.approx(wanted.confidence_interval.high, abs=0.05)
    np.testing.assert_array_equal(average_ranks(y), stats.rankdata(y))


def test_correlations_that_cannot_be_told():
    assert pearson([1, 2, 3], [5, 5, 5]) is None and spearman([2, 2, 2], [1, 2, 3]) is None
    assert pearson([1e300, 2e300, 3e300], [1, 2, 3.0]).value == pytest.approx(1)
    assert pearson([1, 2, 3], [3, 2, 1]) == pytest.approx((-1, -1, -1))
    with pytest.raises(ParameterError, match="at least 3 pairs, got 2"):
        pearson([1, 2], [1, 2])


def test_kappa_of_published_tables():
    """Two readers of 50 grant proposals: 20 yes by both, 15 no by both, 5 and 10 apart; and Cohen's own table, n = 200."""
    one = ["y"] * 20 + ["y"] * 5 + ["n"] * 10 + ["n"] * 15
    other = ["y"] * 20 + ["n"] * 5 + ["y"] * 10 + ["n"] * 15
    assert cohen_kappa(one, other) == pytest.approx(0.4, abs=1e-12)
    table = [[50, 26, 24], [24, 4, 32], [6, 30, 4]]
    one = [i for i, row in enumerate(table) for count in row for _ in range(count)]
    other = [j for row in table for j, count in enumerate(row) for _ in range(count)]
    assert cohen_kappa(one, other) == pytest.approx((0.29 - 0.35) / (1 - 0.35), abs=1e-12)
    assert cohen_kappa(["a", "b"], ["a", "b"]) == 1 and cohen_kappa(["a", "b"], ["b", "a"]) == -1
    assert cohen_kappa(["a", "a"], ["a", "a"]) is None


def test_alpha_of_the_published_examples():
    """The nominal ones of Krippendorff 2011: two observers of 10 and of 12 units, four of 12 with gaps."""
    assert krippendorff_alpha(["0100000010", "1110010000"]) == pytest.approx(0.095, abs=5e-4)
    assert krippendorff_alpha(["aabbdcccedda", "babbbcccedd" + "d"]) == pytest.approx(0.692, abs=5e-4)
    rows = ["123321412...", "1233224125.3", ".3332342251.", "1233244" + "1251."]
    rated = [[None if label == "." else label for label in row] for row in rows]
    assert krippendorff_alpha(rated) == pytest.approx(0.743, abs=5e-4)


def test_alpha_where_it_cannot_be_told():
    assert krippendorff_alpha([["a", "a"], ["a", "a"]]) is None  # one label
    assert krippendorff_alpha([["a", None], [None, "b"]]) is None and krippendorff_alpha([]) is None
    assert krippendorff_alpha([["a", "b"], ["a", "b"], ["a", "b"]]) == 1


@given(st.lists(st.tuples(*[st.sampled_from("abc")] * 2), min_size=2, max_size=30))
@settings(max_examples=60, deadline=None)
def test_agreement_is_symmetric_and_at_most_one(pairs):
    one, other = zip(*pairs, strict=True)
    for found, turned in (
        (cohen_kappa(one, other), cohen_kappa(other, one)),
        (krippendorff_alpha([one, other]), krippendorff_alpha([other, one])),
    ):
        assert found == turned or found == pytest.approx(turned, abs=1e-12)
        assert found is None or found <= 1 + 1e-12


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: bootstrap_mean([]), "values must be numbers in one row, at least one"),
        (lambda: bootstrap_mean([1, math.nan]), "values must be finite, number 1 is nan"),
        (lambda: bootstrap_mean([1.0], level=1), "level must be between 0 and 1, got 1"),
        (lambda: bootstrap_mean([1.0], resamples=0), "resamples must be at least 1, got 0"),
        (lambda: bootstrap_mean([1.0], seed=-1), "seed must be in"),
        (lambda: paired_bootstrap([1.0], [1.0, 2.0]), "a and b must be pairs, got 1 and 2 numbers"),
        (lambda: block_bootstrap([1.0], [0.0]), "denominators must be at least 0 each and above 0 together"),
        (lambda: block_bootstrap([1.0, 1.0], [2.0, -1.0]), "denominators must be at least 0 each"),
        (lambda: paired_block_bootstrap([1.0], [1.0], [1.0, 2.0], [1.0, 2.0]), "must be pairs, got 1 and 2"),
        (lambda: bootstrap_sums([[1.0], [math.inf]], lambda s: s[:, 0]), "row 1 is not"),
        (lambda: equivalence(Interval(0, 0, 0), -1), "margin must be a number of at least 0, got -1"),
        (lambda: equivalence(Interval(0, 0, 0), math.nan), "margin must be"),
        (lambda: sign_test(-1, 2), "at least 0, got -1 and 2"),
        (lambda: cohen_kappa(["a"], ["a", "b"]), "got 1 and 2 labels"),
        (lambda: cohen_kappa([], []), "no labels"),
        (lambda: krippendorff_alpha([["a"], ["a", "b"]]), "got 1, 2"),
    ],
)  # fmt: skip
def test_what_cannot_be_computed_is_refused(call, said):
    with pytest.raises(ParameterError, match=said):
        call()


def test_rounding_of_scores_breaks_no_tie():
    """Differences of tenths are not tenths exactly; what is as far from 0 as the observed mean is still counted."""
    random = np.random.default_rng(0)
    for _ in range(200):
        a, b = random.integers(0, 11, size=(2, int(random.integers(2, 30))))
        for test in (statistics.permutation_test, statistics.bootstrap_test):
            assert test(a / 10, b / 10, resamples=300) == test(a, b, resamples=300)
