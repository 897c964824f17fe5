"""From a row of logits to the scores that noise is added to: every edit and filter in the one declared order."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from kvik.decoding import filters, noise
from kvik.decoding.edits import Edits, edit_stages
from kvik.decoding.elementary import Float64
from kvik.params import SamplingParams

__all__ = ["DrawRequest", "Stage", "apply", "filtered_scores", "stages"]


class DrawRequest(NamedTuple):
    """What one row of logits needs to become a token. edits: None where nothing is done before temperature."""

    params: SamplingParams
    seed: int
    sample_index: int
    position: int
    edits: Edits | None = None


class Stage(NamedTuple):
    """Scores [V] after one step; name is that of the parameter that asked for it, "logits" at the beginning."""

    name: str
    scores: npt.NDArray[Any]


def stages(logits: npt.ArrayLike, request: DrawRequest) -> Iterator[Stage]:
    """The row as it comes, then as each edit (float32) and filter (float64) that does anything leaves it.

    logits [V] is not written to; NaN and +inf raise DataError. Greedy is one filter: the limit of temperature 0, where
    every other keeps the best token.
    """
    row = filters.checked(logits).astype(np.float32)
    yield Stage("logits", row)
    for name, after in edit_stages(row, request.edits):
        yield Stage(name, after)
        row = after
    scores = row.astype(np.float64)
    params = request.params
    if filters.is_greedy(params.temperature):
        yield Stage("temperature", filters.greedy(scores))
        return
    yield Stage("temperature", (scores := filters.temperature(scores, params.temperature)))
    if params.top_k:
        yield Stage("top_k", (scores := filters.top_k(scores, params.top_k)))
    if params.top_p < 1.0:
        yield Stage("top_p", (scores := filters.top_p(scores, params.top_p)))
    if params.min_p:
        yield Stage("min_p", (scores := filters.min_p(scores, params.min_p)))
    if params.typical_p < 1.0:
        yield Stage("typical_p", (scores := filters.typical(scores, params.typical_p)))
    if params.epsilon_cutoff:
        yield Stage("epsilon_cutoff", (scores := filters.epsilon(scores, params.epsilon_cutoff)))
    if params.eta_cutoff:
        yield Stage("eta_cutoff", (scores := filters.eta(scores, params.eta_cutoff)))
    if params.top_n_sigma:
        yield Stage("top_n_sigma", (scores := filters.top_n_sigma(scores, params.top_n_sigma)))
    if xtc_falls(request):
        yield Stage("xtc", filters.xtc(scores, params.xtc_threshold))


def xtc_falls(request: DrawRequest) -> bool:
    """Whether top choices are excluded at this position."""
    chance = request.params.xtc_probability
    return chance > 0.0 and noise.coin(request.seed, request.sample_index, request.position) < chance


def filtered_scores(logits: npt.ArrayLike, request: DrawRequest) -> Float64:
    """What the noise is added to: the last of `stages`, shifted so that the best token's score is 0."""
    for stage in stages(logits, request):
        scores = stage.scores
    best = scores.max()
    return scores.copy() if best == -np.inf else scores - best


def apply(logits: npt.ArrayLike, params: SamplingParams, edits: Edits | None = None) -> Float64:
    """Log-probabilities [V] of the distribution params draws from at position 0 of sample 0 under seed 0 (which XTC's
    coin alone looks at); a row of -inf where nothing remains."""
    return filters.log_softmax(filtered_scores(logits, DrawRequest(params, 0, 0, 0, edits)))
