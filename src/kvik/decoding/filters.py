"""The filters of sampling: pure functions on one row of scores, float64 [V]; -inf marks a removed token.

This is the definition; native/sampler_filters.cpp is its fast twin, with the same kept set. pipeline.py has the order.
No function writes into its input. Probabilities are those among the tokens that remain. Some token survives every
filter: the best one, the one with the lowest id among equals, except where a filter is there to take it away: `typical`
keeps the most typical token, `xtc` the least of the top choices.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvik.decoding.elementary import Float64, exact_exp, exact_log
from kvik.errors import DataError, ParameterError

__all__ = [
    "LEAST_TEMPERATURE",
    "MAX_VOCABULARY",
    "check_rows",
    "checked",
    "epsilon",
    "eta",
    "greedy",
    "is_greedy",
    "log_softmax",
    "min_p",
    "spread",
    "temperature",
    "top_k",
    "top_n_sigma",
    "top_p",
    "typical",
    "xtc",
]

# Logits are f32: below this temperature every difference one of them can show becomes certainty, so it means greedy.
LEAST_TEMPERATURE = 1e-9
# Above it the distribution is uniform to within what f32 logits of any model hold; keeps products in range.
MOST_TEMPERATURE = 1e30
# A weight is an integer multiple of 2^-42 of the best token's; 2^20 of them cannot overflow 63 bits.
WEIGHT_BITS = 42
MAX_VOCABULARY = 2**20
# e^-40 is below half a weight: as far as sums are concerned nothing lies farther from the best
LEAST_DISTANCE = -40.0
SPREAD_UNITS = 2.0**31


def checked(logits: npt.ArrayLike) -> Float64:
    """A float64 copy of logits [V], 1 <= V <= 2^20; -inf is allowed, NaN and +inf raise DataError naming the token."""
    row = np.array(logits, dtype=np.float64)
    if row.ndim != 1 or not 1 <= row.size <= MAX_VOCABULARY:
        raise ParameterError(f"a row of logits must have one dimension of 1 to {MAX_VOCABULARY}, got shape {row.shape}")
    bad = np.isnan(row) | (row == np.inf)
    if bad.any():
        token = int(bad.argmax())
        raise DataError(f"the logit of token {token} is {row[token]}")
    return row


def check_rows(logits: npt.NDArray[np.float32], rows: int) -> None:
    """ParameterError unless logits are float32 [rows, V]."""
    if logits.ndim != 2 or logits.shape[0] != rows or logits.dtype != np.float32:
        raise ParameterError(f"logits must be float32 [{rows}, V], got {logits.dtype} {logits.shape}")


def log_softmax(scores: Float64) -> Float64:
    """Normalised log-probabilities in float64, [V] -> [V]; -inf stays -inf, a row of nothing else stays so."""
    best = scores.max()
    if best == -np.inf:
        return scores.copy()
    shifted = scores - best
    normalised: Float64 = shifted - np.log(np.exp(shifted).sum())
    return normalised


def is_greedy(value: float) -> bool:
    """Whether a temperature means the best token without noise: 0, and whatever is below 1e-9."""
    return value < LEAST_TEMPERATURE


def greedy(scores: Float64) -> Float64:
    """Keeps the best token, the lowest id among equals: the limit of temperature 0."""
    return top_k(scores, 1)


def inverse_temperature(value: float) -> float:
    """1 / temperature for values from 1e-9 on; beyond 1e30 a temperature acts as 1e30."""
    return 1.0 / min(value, MOST_TEMPERATURE)


def temperature(scores: Float64, value: float) -> Float64:
    """Scores times 1 / value, value >= 1e-9.

    Ackley, Hinton and Sejnowski 1985, "A learning algorithm for Boltzmann machines". In float64 distinct f32 logits
    stay distinct, so no later filter sees a tie that was none.
    """
    if is_greedy(value):
        raise ParameterError(f"temperature must be at least {LEAST_TEMPERATURE:g} to scale by, got {value}; use greedy")
    return scores * inverse_temperature(value)


def _descending(scores: Float64) -> npt.NDArray[np.intp]:
    """Token ids by falling score, equals by rising id."""
    return np.argsort(-scores, kind="stable")


def _keep(scores: Float64, token_ids: npt.NDArray[np.intp]) -> Float64:
    result = np.full_like(scores, -np.inf)
    result[token_ids] = scores[token_ids]
    return result


def top_k(scores: Float64, k: int) -> Float64:
    """Keeps exactly the k best tokens, k >= 1, or all there are (Fan, Lewis and Dauphin 2018, arXiv:1805.04833)."""
    if k < 1:
        raise ParameterError(f"top_k must be at least 1 to filter by, got {k}")
    return _keep(scores, _descending(scores)[:k])


def weights(scores: Float64) -> npt.NDArray[np.int64]:
    """Probabilities relative to the best token's as integers, 2^42 for the best: their sums are exact in any order."""
    best = scores.max()
    if best == -np.inf:
        return np.zeros(scores.shape, np.int64)
    return np.rint(exact_exp(scores - best) * 2.0**WEIGHT_BITS).astype(np.int64)


def _shortest(scores: Float64, order: npt.NDArray[np.intp], p: float) -> Float64:
    """Keeps the shortest beginning of order [V] with cumulative probability >= p, at least one token."""
    cumulative = np.cumsum(weights(scores)[order])
    total = int(cumulative[-1])
    needed = min(max(math.ceil(p * float(total)), 1), total)
    return _keep(scores, order[: int(np.searchsorted(cumulative, needed)) + 1])


def top_p(scores: Float64, p: float) -> Float64:
    """Keeps the smallest set of best tokens with cumulative probability >= p, p in [0, 1]; 0 keeps the best token.

    Holtzman et al. 2020, "The curious case of neural text degeneration", arXiv:1904.09751. Probabilities are those
    among the tokens that remain, exact to 2^-42 of the best one's; their sums are exact, so that p = 0.5 keeps two of
    four equals.
    """
    if not 0.0 <= p <= 1.0:
        raise ParameterError(f"top_p must be in [0, 1], got {p}")
    return _shortest(scores, _descending(scores), p)


def min_p(scores: Float64, p: float) -> Float64:
    """Keeps tokens with at least p times the best probability, p in [0, 1] (Nguyen et al. 2024, arXiv 2407.01082)."""
    if not 0.0 <= p <= 1.0:
        raise ParameterError(f"min_p must be in [0, 1], got {p}")
    best = scores.max()
    if p == 0.0 or best == -np.inf:
        return scores.copy()
    return np.where(scores - best >= exact_log(p), scores, -np.inf)


class Moments(NamedTuple):
    """Of the distribution that scores [V] make. log_sum: ln of the sum of e^(score - best); mean: of score - best, <= 0.

    The entropy is log_sum - mean.
    """

    log_sum: float
    mean: float


def moments(scores: Float64) -> Moments:
    """By sums of whole multiples of 2^-42, exact in any order: e^d for log_sum, d e^d (at most 1 / e) for the mean."""
    d = np.maximum(scores - scores.max(), LEAST_DISTANCE)
    e = exact_exp(d)
    total = int(np.rint(e * 2.0**WEIGHT_BITS).astype(np.int64).sum())
    moment = int(np.rint(e * d * 2.0**WEIGHT_BITS).astype(np.int64).sum())
    return Moments(float(exact_log(float(total) * 2.0**-WEIGHT_BITS)), float(moment) / float(total))


def typical(scores: Float64, p: float) -> Float64:
    """Keeps the tokens whose information is nearest the entropy, up to cumulative probability >= p, p in (0, 1].

    Meister et al. 2023, "Locally typical sampling", arXiv:2202.00666. Information - entropy is mean - score, so that
    distances are exact; equal ones by token id.
    """
    if not 0.0 < p <= 1.0:
        raise ParameterError(f"typical_p must be in (0, 1], got {p}")
    best = scores.max()
    if best == -np.inf:
        return scores.copy()
    d = scores - best
    return _shortest(scores, np.argsort(np.abs(d - moments(scores).mean), kind="stable"), p)


def _at_least(scores: Float64, log_probability: float, log_sum: float) -> Float64:
    """Tokens of at least this probability, the best ones in any case."""
    return np.where(scores - scores.max() >= min(log_probability + log_sum, 0.0), scores, -np.inf)


def epsilon(scores: Float64, cutoff: float) -> Float64:
    """Keeps tokens of at least this probability, cutoff in (0, 1), and the best (Hewitt, Manning and Liang 2022,
    "Truncation sampling as language model desmoothing", arXiv:2210.15191)."""
    if not 0.0 < cutoff < 1.0:
        raise ParameterError(f"epsilon_cutoff must be in (0, 1) to filter by, got {cutoff}")
    if scores.max() == -np.inf:
        return scores.copy()
    return _at_least(scores, float(exact_log(cutoff)), moments(scores).log_sum)


def eta(scores: Float64, cutoff: float) -> Float64:
    """Keeps tokens of at least min(eta, sqrt(eta) e^-entropy), eta in (0, 1), and the best (the same paper)."""
    if not 0.0 < cutoff < 1.0:
        raise ParameterError(f"eta_cutoff must be in (0, 1) to filter by, got {cutoff}")
    if scores.max() == -np.inf:
        return scores.copy()
    log_sum, mean = moments(scores)
    log_eta = float(exact_log(cutoff))
    return _at_least(scores, min(log_eta, 0.5 * log_eta - (log_sum - mean)), log_sum)


def spread(scores: Float64) -> float:
    """The standard deviation of the scores that remain (at least one), over their number.

    Of multiples of range / 2^31, whose sums are exact: the range is at most 1449 deviations of 2^20 scores, so that the
    relative error is below 1e-6, and about 1e-9 for a model's logits.
    """
    d = scores[scores > -np.inf]
    d = d - d.max()
    width = -float(d.min())
    if width == 0.0:
        return 0.0
    units = np.rint(d * (-SPREAD_UNITS / width)).astype(np.uint64)
    squares = units * units
    high, low = int((squares >> np.uint64(32)).sum()), int((squares & np.uint64(0xFFFFFFFF)).sum())
    variance = d.size * ((high << 32) + low) - int(units.sum()) ** 2  # times d.size^2, in units^2
    return math.sqrt(float(variance)) / float(d.size) * (width / SPREAD_UNITS)


def top_n_sigma(scores: Float64, n: float) -> Float64:
    """Keeps tokens within n standard deviations of the best score, n > 0 (Tang et al. 2024, "Top-nsigma: not all logits
    are you need", arXiv:2411.07641). The deviation is that of the scores that remain."""
    if not n > 0.0:
        raise ParameterError(f"top_n_sigma must be above 0 to filter by, got {n}")
    best = scores.max()
    if best == -np.inf:
        return scores.copy()
    return np.where(scores - best >= -(n * spread(scores)), scores, -np.inf)


def xtc(scores: Float64, threshold: float) -> Float64:
    """Removes all tokens of at least this probability but the least of them; two or more there must be.

    "Exclude Top Choices" (p-e-w 2024, as llama.cpp has it), once its coin fell for it: `noise.coin`. The least of equals
    has the highest id. threshold in [0, 0.5].
    """
    if not 0.0 <= threshold <= 0.5:
        raise ParameterError(f"xtc_threshold must be in [0, 0.5], got {threshold}")
    best = scores.max()
    if best == -np.inf:
        return scores.copy()
    bound = float(exact_log(threshold)) + moments(scores).log_sum if threshold > 0.0 else -math.inf
    above = np.count_nonzero((scores - best >= bound) & (scores > -np.inf))
    return _keep(scores, _descending(scores)[max(0, above - 1) :])
