"""The filters of sampling: pure functions on one row of scores, float64 [V]; -inf marks a removed token.

This is the definition; native/sampler.cpp is its fast twin, with the same kept set and the same drawn token. The
order is fixed: banned (min_tokens), temperature, top-k, top-p, min-p. No function writes into its input. The best
remaining token, the one with the lowest id among equals, survives every filter.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from kvik.decoding.elementary import Float64, exact_exp, exact_log
from kvik.errors import DataError, ParameterError
from kvik.params import SamplingParams

__all__ = [
    "LEAST_TEMPERATURE",
    "MAX_VOCABULARY",
    "apply",
    "ban",
    "checked",
    "filtered_scores",
    "greedy",
    "is_greedy",
    "log_softmax",
    "min_p",
    "temperature",
    "top_k",
    "top_p",
]

# Logits are f32: below this temperature every difference one of them can show becomes certainty, so it means greedy.
LEAST_TEMPERATURE = 1e-9
# Above it the distribution is uniform to within what f32 logits of any model hold; keeps products in range.
MOST_TEMPERATURE = 1e30
# A weight is an integer multiple of 2^-42 of the best token's; 2^20 of them cannot overflow 63 bits.
WEIGHT_BITS = 42
MAX_VOCABULARY = 2**20


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


def log_softmax(scores: Float64) -> Float64:
    """Normalised log-probabilities in float64, [V] -> [V]; -inf stays -inf, a row of nothing else stays so."""
    best = scores.max()
    if best == -np.inf:
        return scores.copy()
    shifted = scores - best
    normalised: Float64 = shifted - np.log(np.exp(shifted).sum())
    return normalised


def ban(scores: Float64, token_ids: Iterable[int]) -> Float64:
    """Removes token_ids (each in [0, V)), e.g. the ends of text until min_tokens are out."""
    result = scores.copy()
    for token in token_ids:
        if not 0 <= token < scores.size:
            raise ParameterError(f"banned token id must be in [0, {scores.size - 1}], got {token}")
        result[token] = -np.inf
    return result


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


def top_p(scores: Float64, p: float) -> Float64:
    """Keeps the smallest set of best tokens with cumulative probability >= p, p in [0, 1]; 0 keeps the best token.

    Holtzman et al. 2020, "The curious case of neural text degeneration", arXiv:1904.09751. Probabilities are those
    among the tokens that remain, exact to 2^-42 of the best one's; their sums are exact, so that p = 0.5 keeps two of
    four equals.
    """
    if not 0.0 <= p <= 1.0:
        raise ParameterError(f"top_p must be in [0, 1], got {p}")
    order = _descending(scores)
    cumulative = np.cumsum(weights(scores)[order])
    total = int(cumulative[-1])
    needed = min(max(math.ceil(p * float(total)), 1), total)
    return _keep(scores, order[: int(np.searchsorted(cumulative, needed)) + 1])


def min_p(scores: Float64, p: float) -> Float64:
    """Keeps tokens with at least p times the best probability, p in [0, 1] (Nguyen et al. 2024, arXiv 2407.01082)."""
    if not 0.0 <= p <= 1.0:
        raise ParameterError(f"min_p must be in [0, 1], got {p}")
    best = scores.max()
    if p == 0.0 or best == -np.inf:
        return scores.copy()
    return np.where(scores - best >= exact_log(p), scores, -np.inf)


def filtered_scores(logits: npt.ArrayLike, params: SamplingParams, banned: Iterable[int] = ()) -> Float64:
    """What the noise is added to: all filters in order on logits [V], shifted so that the best token's score is 0."""
    scores = ban(checked(logits), banned)
    if is_greedy(params.temperature):
        scores = greedy(scores)
    else:
        scores = temperature(scores, params.temperature)
        if params.top_k:
            scores = top_k(scores, params.top_k)
        if params.top_p < 1.0:
            scores = top_p(scores, params.top_p)
        scores = min_p(scores, params.min_p)
    best = scores.max()
    return scores if best == -np.inf else scores - best


def apply(logits: npt.ArrayLike, params: SamplingParams, banned: Iterable[int] = ()) -> Float64:
    """Log-probabilities [V] of the distribution params draws from; a row of -inf where nothing remains.

    logits [V] is not written to; NaN and +inf raise KvikError, banned ids outside [0, V) ParameterError.
    """
    return log_softmax(filtered_scores(logits, params, banned))
