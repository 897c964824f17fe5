"""What is asked of the engine, and what it answers with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvik.decoding.sampler import TokenLogprob
from kvik.params import SamplingParams

__all__ = [
    "Choice",
    "Chunk",
    "Completion",
    "FinishReason",
    "Request",
    "ScoreRequest",
    "ScoreResult",
    "TokenLogprob",
    "TokenLogprobs",
    "Usage",
]

FinishReason = Literal["stop", "length", "cancelled", "no_token"]


@dataclass(frozen=True)
class Request:
    """A prompt to continue. seed is params.seed, or one drawn for a request without."""

    prompt: tuple[int, ...]
    params: SamplingParams
    seed: int


@dataclass(frozen=True)
class ScoreRequest:
    """Token ids whose log-probabilities are asked for."""

    token_ids: tuple[int, ...]
    return_logits: bool = False


class TokenLogprobs(NamedTuple):
    """Of one generated token: its log-probability, and the most probable tokens at its place."""

    token_id: int
    logprob: float
    top: tuple[TokenLogprob, ...]


@dataclass(frozen=True)
class Usage:
    """What a request took.

    Attributes:
        prompt_tokens: tokens of the prompt.
        completion_tokens: tokens generated, all samples together.
        cached_tokens: prompt tokens that were in the cache already.
        kv_bytes_now: bytes of the sequence's blocks when it ended, just before they were freed.
        kv_bytes_peak: most bytes its blocks took.
        kv_tokens_kept: tokens whose keys and values were still held at the end.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    kv_bytes_now: int
    kv_bytes_peak: int
    kv_tokens_kept: int


@dataclass(frozen=True)
class Choice:
    """One sample. token_ids include the token that ended it; text does not include a stop string or special token.

    cumulative_logprob: sum of the generated tokens' log-probabilities. logprobs: None unless asked for.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    cumulative_logprob: float
    logprobs: tuple[TokenLogprobs, ...] | None


@dataclass(frozen=True)
class Completion:
    """A request's answer. text is the first choice's; prompt_tokens are token ids."""

    text: str
    choices: tuple[Choice, ...]
    prompt_tokens: tuple[int, ...]
    usage: Usage


@dataclass(frozen=True)
class Chunk:
    """A piece of a sample as it comes. text may be empty while characters or stop strings are incomplete.

    finish_reason is None until the sample's last chunk, usage until the request's last.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] | None = None
    finish_reason: FinishReason | None = None
    usage: Usage | None = None


@dataclass(frozen=True)
class ScoreResult:
    """Log-probabilities of given tokens.

    token_ids [N]; logprobs [N - 1] float64, logprobs[i] is that of token i + 1; logits [N, V] float32 or None.
    """

    token_ids: tuple[int, ...]
    logprobs: NDArray[np.float64]
    logits: NDArray[np.float32] | None
