"""Drawing tokens: the argmax of filtered log-probability + Gumbel noise, in native code and as its definition.

A sequence owns one frozen `Sampler`. The noise is keyed by position, so there is no state to advance: what a `Sampler`
draws at a position depends on the logits alone, never on the batch, on the order of calls or on what was drawn before.
Its snapshot is itself. The engine asks each sequence for a `DrawRequest` and calls `sample_rows` once a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvik import _native
from kvik.decoding import filters, noise
from kvik.decoding.pipeline import DrawRequest, filtered_scores
from kvik.decoding.state import DecodingState
from kvik.errors import DataError, ParameterError
from kvik.params import SamplingParams

__all__ = ["DrawRequest", "Drawn", "Sampler", "TokenLogprob", "sample_rows", "sample_rows_by_definition"]


class TokenLogprob(NamedTuple):
    """A token and the natural logarithm of its probability, at most 0."""

    token_id: int
    logprob: float


class Drawn(NamedTuple):
    """The outcome of one row.

    token_id is None where the filters left no token; logprob is then -inf. Otherwise logprob is the drawn token's
    log-probability. top holds the best tokens, falling, as many as params.logprobs asks and as have a probability
    above 0. Both are before bans and filters (logprobs_mode "raw") or after them ("processed").
    """

    token_id: int | None
    logprob: float
    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Sampler:
    """How one sequence draws its tokens.

    Attributes:
        vocab_size: V, 1 to 2^20.
        params: what to draw from; params.seed None has been resolved into `seed` by the caller.
        seed: 0 to 2^64 - 1.
        sample_index: which of the prompt's n samples this is, 0 to 2^32 - 1; part of the noise's key.
    """

    vocab_size: int
    params: SamplingParams
    seed: int
    sample_index: int = 0

    def __post_init__(self) -> None:
        for name, value, low, high in (
            ("vocab_size", self.vocab_size, 1, filters.MAX_VOCABULARY),
            ("seed", self.seed, 0, noise.MAX_SEED),
            ("sample_index", self.sample_index, 0, noise.MAX_SAMPLE),
        ):
            if not low <= value <= high:
                raise ParameterError(f"{name} must be in [{low}, {high}], got {value}")

    def request(self, position: int, state: DecodingState | None = None) -> DrawRequest:
        """The draw of the token at `position` of the sequence. state: what came before it; None edits nothing."""
        edits = None if state is None else state.edits()
        return DrawRequest(self.params, self.seed, self.sample_index, position, edits)

    def sample(self, logits: npt.NDArray[np.float32], position: int, state: DecodingState | None = None) -> Drawn:
        """Draws from one row, logits [V]; `sample_rows` for many."""
        if logits.shape != (self.vocab_size,):
            raise ParameterError(f"logits must have shape ({self.vocab_size},), got {logits.shape}")
        return sample_rows(logits[None], [self.request(position, state)])[0]


def sample_rows(
    logits: npt.NDArray[np.float32],
    requests: Sequence[DrawRequest],
    *,
    pool: _native.Pool | None = None,
    in_place: bool = False,
    isa: str = "",
) -> list[Drawn]:
    """Draws one token a row in one native call without the GIL.

    logits is float32 [R, V], each row contiguous. It is as before when the call returns; with in_place edits are made in
    it meanwhile and taken back, which spares a copy of the row. pool: whose threads share the rows. NaN or +inf in a row
    raises DataError naming position and token. isa "" takes the selected instruction set, which changes speed and
    nothing else.
    """
    rows = len(requests)
    filters.check_rows(logits, rows)
    if rows == 0:
        return []
    reals: list[tuple[float, ...]] = []
    whole: list[tuple[int, ...]] = []
    most = 0
    for p, seed, sample_index, position, _ in requests:
        reals.append(
            (p.temperature, p.top_p, p.min_p, p.typical_p, p.epsilon_cutoff, p.eta_cutoff, p.top_n_sigma,
             p.xtc_probability, p.xtc_threshold)
        )  # fmt: skip
        top = min(p.logprobs or 0, logits.shape[1])
        whole.append((seed, sample_index, position, p.top_k, top, p.logprobs_mode == "processed"))
        most = max(most, top)
    outcomes, tokens, logprobs = np.empty(rows, np.uint8), np.empty(rows, np.int32), np.empty(rows, np.float64)
    counts, top_ids, top_logprobs = np.empty(rows, np.int32), np.empty((rows, most), np.int32), np.empty((rows, most))
    _native.sample_rows(
        logits, np.array(reals, np.float64), np.array(whole, np.uint64), [request.edits for request in requests],
        outcomes, tokens, logprobs, counts, top_ids, top_logprobs,
        in_place and logits.flags.writeable, pool, isa,
    )  # fmt: skip
    if (outcomes == _native.SAMPLE_NOT_FINITE).any():
        row = int((outcomes == _native.SAMPLE_NOT_FINITE).argmax())
        _refuse(logits[row], requests[row].position)
    drawn = []
    for row, (outcome, token, logprob, count) in enumerate(
        zip(outcomes.tolist(), tokens.tolist(), logprobs.tolist(), counts.tolist(), strict=True)
    ):
        pairs = zip(top_ids[row, :count].tolist(), top_logprobs[row, :count].tolist(), strict=True) if count else ()
        best = tuple(TokenLogprob(*pair) for pair in pairs)
        drawn.append(Drawn(token if outcome == _native.SAMPLE_DRAWN else None, logprob, best))
    return drawn


def _refuse(row: npt.NDArray[np.float32], position: int) -> None:
    try:
        filters.checked(row)
    except DataError as error:
        raise DataError(f"position {position}: {error}") from None


def sample_rows_by_definition(logits: npt.NDArray[np.float32], requests: Sequence[DrawRequest]) -> list[Drawn]:
    """`sample_rows` in numpy: the definition, some milliseconds a row."""
    return [_draw_by_definition(row, request) for row, request in zip(logits, requests, strict=True)]


def _draw_by_definition(row: npt.NDArray[np.float32], request: DrawRequest) -> Drawn:
    params = request.params
    scores = filtered_scores(row, request)
    processed = params.logprobs_mode == "processed"
    reported = scores if processed else filters.checked(row)
    logprobs = filters.log_softmax(reported)
    order = np.argsort(-reported, kind="stable")[: params.logprobs or 0]
    top = tuple(TokenLogprob(int(t), float(logprobs[t])) for t in order if reported[t] > -np.inf)
    if scores.max() == -np.inf:
        return Drawn(None, float("-inf"), top)
    token_ids = np.arange(scores.size)
    token = int(np.argmax(scores + noise.gumbel(request.seed, request.sample_index, request.position, token_ids)))
    return Drawn(token, float(logprobs[token]), top)
