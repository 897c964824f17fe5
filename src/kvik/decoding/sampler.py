"""Drawing tokens: the argmax of filtered log-probability + Gumbel noise, in native code and as its definition.

A sequence owns one frozen `Sampler`. The noise is keyed by position, so there is no state to advance: what a `Sampler`
draws at a position depends on the logits alone, never on the batch, on the order of calls or on what was drawn before.
Its snapshot is itself. The engine asks each sequence for a `DrawRequest` and calls `sample_rows` once a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvik import _native
from kvik.decoding import filters, noise
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


class DrawRequest(NamedTuple):
    """What one row of logits needs to become a token. banned: ids in [0, V) that may not be drawn."""

    params: SamplingParams
    seed: int
    sample_index: int
    position: int
    banned: tuple[int, ...] = ()


@dataclass(frozen=True)
class Sampler:
    """How one sequence draws its tokens.

    Attributes:
        vocab_size: V, 1 to 2^20.
        params: what to draw from; params.seed None has been resolved into `seed` by the caller.
        seed: 0 to 2^64 - 1.
        sample_index: which of the prompt's n samples this is, 0 to 2^32 - 1; part of the noise's key.
        end_ids: the model's end-of-text tokens, in [0, V). With params.stop_token_ids they are banned, also under
            ignore_eos, until params.min_tokens tokens are out.
    """

    vocab_size: int
    params: SamplingParams
    seed: int
    sample_index: int = 0
    end_ids: frozenset[int] = frozenset()
    _banned: tuple[int, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name, value, low, high in (
            ("vocab_size", self.vocab_size, 1, filters.MAX_VOCABULARY),
            ("seed", self.seed, 0, noise.MAX_SEED),
            ("sample_index", self.sample_index, 0, noise.MAX_SAMPLE),
        ):
            if not low <= value <= high:
                raise ParameterError(f"{name} must be in [{low}, {high}], got {value}")
        for name, ids in (("end-of-text token ids", self.end_ids), ("stop_token_ids", self.params.stop_token_ids)):
            outside = sorted(token for token in ids if not 0 <= token < self.vocab_size)
            if outside:
                listed = ", ".join(map(str, outside))
                raise ParameterError(f"{name} must be in [0, {self.vocab_size - 1}], got {listed}")
        object.__setattr__(self, "_banned", tuple(sorted(self.end_ids.union(self.params.stop_token_ids))))

    def request(self, position: int, num_generated: int) -> DrawRequest:
        """The draw of the token at `position` of the sequence, after num_generated tokens of this completion."""
        banned = self._banned if num_generated < self.params.min_tokens else ()
        return DrawRequest(self.params, self.seed, self.sample_index, position, banned)

    def sample(self, logits: npt.NDArray[np.float32], position: int, num_generated: int) -> Drawn:
        """Draws from one row, logits [V]; `sample_rows` for many."""
        if logits.shape != (self.vocab_size,):
            raise ParameterError(f"logits must have shape ({self.vocab_size},), got {logits.shape}")
        return sample_rows(logits[None], [self.request(position, num_generated)])[0]


def sample_rows(logits: npt.NDArray[np.float32], requests: Sequence[DrawRequest], *, isa: str = "") -> list[Drawn]:
    """Draws one token a row in one native call without the GIL.

    logits is float32 [R, V], each row contiguous, and is not written to. NaN or +inf in a row raises DataError naming
    position and token. isa "" takes the selected instruction set, which changes speed and nothing else.
    """
    rows = len(requests)
    if logits.ndim != 2 or logits.shape[0] != rows or logits.dtype != np.float32:
        raise ParameterError(f"logits must be float32 [{rows}, V], got {logits.dtype} {logits.shape}")
    if rows == 0:
        return []
    reals: list[tuple[float, ...]] = []
    whole: list[tuple[int, ...]] = []
    banned: list[int] = []
    most = 0
    for params, seed, sample_index, position, ban in requests:
        reals.append((params.temperature, params.top_p, params.min_p))
        processed = params.logprobs_mode == "processed"
        top = min(params.logprobs or 0, logits.shape[1])
        whole.append((seed, sample_index, position, params.top_k, top, processed, len(ban)))
        banned += ban
        most = max(most, top)
    outcomes, tokens, logprobs = np.empty(rows, np.uint8), np.empty(rows, np.int32), np.empty(rows, np.float64)
    counts, top_ids, top_logprobs = np.empty(rows, np.int32), np.empty((rows, most), np.int32), np.empty((rows, most))
    _native.sample_rows(
        logits, np.array(reals, np.float64), np.array(whole, np.uint64), np.array(banned, np.int32),
        outcomes, tokens, logprobs, counts, top_ids, top_logprobs, isa,
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
    scores = filters.filtered_scores(row, params, request.banned)
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
