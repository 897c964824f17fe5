"""What is drawn follows the distribution: chi-square over 100,000 draws for each strategy."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from kvik.decoding import DecodingState, DrawRequest, Edits, sample_rows
from kvik.decoding.pipeline import apply
from kvik.params import PRESETS, SamplingParams

DRAWS = 100_000
STRATEGIES = {
    "temperature 1": {},
    "temperature 0.7": {"temperature": 0.7},
    "temperature 2": {"temperature": 2.0},
    "top-k": {"top_k": 20},
    "top-p": {"top_p": 0.8},
    "top-p, many kept": {"top_p": 0.97, "temperature": 3.0},
    "min-p": {"min_p": 0.02},
    "combined": {"temperature": 0.9, "top_k": 50, "top_p": 0.9, "min_p": 0.01},
    "typical": {"typical_p": 0.9},
    "epsilon": {"epsilon_cutoff": 1e-3},
    "eta": {"eta_cutoff": 1e-3},
    "top-n-sigma": {"top_n_sigma": 2.0},
    "xtc": {"xtc_probability": 1.0, "xtc_threshold": 0.02},
    "balanced": PRESETS["balanced"],
}


def chi_square_limit(freedom: int, z: float = 4.0) -> float:
    """The chi-square quantile at the normal deviate z (4: p = 3e-5), by Wilson and Hilferty (1931)."""
    v = 2.0 / (9.0 * freedom)
    return freedom * (1.0 - v + z * math.sqrt(v)) ** 3


def draws(
    row: np.ndarray,
    params: SamplingParams,
    key: Callable[[int], tuple[int, int, int]],
    count: int,
    edits: Edits | None = None,
) -> np.ndarray:
    counts = np.zeros(row.size, np.int64)
    for begin in range(0, count, 10_000):
        requests = [DrawRequest(params, *key(i), edits) for i in range(begin, begin + 10_000)]
        rows = np.broadcast_to(row, (len(requests), row.size))
        np.add.at(counts, [drawn.token_id for drawn in sample_rows(rows, requests)], 1)
    return counts


def check(row: np.ndarray, params: SamplingParams, counts: np.ndarray, edits: Edits | None = None) -> None:
    expected = np.exp(apply(row, params, edits)) * counts.sum()
    assert (counts[expected == 0] == 0).all()
    common = expected >= 10
    pooled_expected = np.append(expected[common], expected[~common].sum())
    pooled = np.append(counts[common], counts[~common].sum())
    if pooled_expected[-1] < 10:
        pooled_expected, pooled = pooled_expected[:-1], pooled[:-1]
    chi = float(((pooled - pooled_expected) ** 2 / pooled_expected).sum())
    assert chi < chi_square_limit(pooled.size - 1)


@pytest.mark.parametrize("name", STRATEGIES)
def test_draws_follow_the_distribution_over_positions(name: str, make_row: Callable[..., np.ndarray]) -> None:
    row = make_row(np.random.default_rng(1), 1000, "peaked")
    params = SamplingParams(**STRATEGIES[name])  # type: ignore[arg-type]
    check(row, params, draws(row, params, lambda i: (17, 0, i), DRAWS))


def test_draws_follow_the_distribution_after_penalties(make_row: Callable[..., np.ndarray]) -> None:
    row = make_row(np.random.default_rng(1), 1000, "peaked")
    params = SamplingParams(
        logit_bias={3: 4.0, 7: -5.0}, repetition_penalty=1.4, presence_penalty=0.5, frequency_penalty=0.2,
        no_repeat_ngram_size=2, dry_multiplier=0.8, min_tokens=99, stop_token_ids=(int(row.argmax()),),
    )  # fmt: skip
    best = np.argsort(-row)[:12].tolist()
    state = DecodingState(params, [*best, *best[:5]], row.size)
    for token in (*best[:3], 900):
        state.accept(token)
    edits = state.edits()
    check(row, params, draws(row, params, lambda i: (17, 0, i), DRAWS, edits), edits)


def test_xtc_draws_a_mixture(make_row: Callable[..., np.ndarray]) -> None:
    row = make_row(np.random.default_rng(1), 200, "peaked")
    params = SamplingParams(xtc_probability=0.4, xtc_threshold=0.05)
    counts = draws(row, params, lambda i: (17, 0, i), DRAWS)
    without = np.exp(apply(row, SamplingParams()))
    falling = np.exp(apply(row, SamplingParams(xtc_probability=1.0, xtc_threshold=0.05)))
    expected = (0.6 * without + 0.4 * falling) * DRAWS
    common = expected >= 10
    chi = float(((counts - expected)[common] ** 2 / expected[common]).sum())
    assert chi < chi_square_limit(int(common.sum()))


@pytest.mark.parametrize("axis", ["seed", "sample"])
def test_draws_follow_the_distribution_over_seeds_and_samples(axis: str, make_row: Callable[..., np.ndarray]) -> None:
    row = make_row(np.random.default_rng(2), 300, "normal")
    params = SamplingParams()
    check(row, params, draws(row, params, (lambda i: (i, 0, 9)) if axis == "seed" else (lambda i: (3, i, 9)), DRAWS))


def test_draws_at_consecutive_positions_are_independent() -> None:
    # all pairs of consecutive draws from eight unequal tokens
    row = np.log(np.arange(1, 9)).astype(np.float32)
    requests = [DrawRequest(SamplingParams(), 23, 0, i) for i in range(DRAWS)]
    tokens = np.array([d.token_id for d in sample_rows(np.broadcast_to(row, (DRAWS, 8)), requests)])
    pairs = np.bincount(tokens[0::2] * 8 + tokens[1::2], minlength=64)
    p = np.arange(1, 9) / 36
    expected = np.outer(p, p).ravel() * pairs.sum()
    assert float(((pairs - expected) ** 2 / expected).sum()) < chi_square_limit(63)


@pytest.mark.slow
@pytest.mark.parametrize("name", STRATEGIES)
def test_draws_follow_the_distribution_on_the_full_vocabulary(name: str, make_row: Callable[..., np.ndarray]) -> None:
    row = make_row(np.random.default_rng(3), 49152, "peaked")
    params = SamplingParams(**STRATEGIES[name])  # type: ignore[arg-type]
    check(row, params, draws(row, params, lambda i: (29, 1, i), DRAWS))
