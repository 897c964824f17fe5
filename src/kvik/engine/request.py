"""What is asked of the engine, and what it answers with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvik.decoding.beam import BeamStep
from kvik.decoding.sampler import TokenLogprob
from kvik.decoding.state import NO_WORDS, Words
from kvik.decoding.trace import TokenTrace
from kvik.params import AnyParams, BeamParams, CacheParams

__all__ = [
    "Choice",
    "Chunk",
    "Completion",
    "FinishReason",
    "LogitRows",
    "ParamsKind",
    "Receipt",
    "Request",
    "RequestStats",
    "ScoreRequest",
    "ScoreResult",
    "TokenLogprob",
    "TokenLogprobs",
    "Usage",
    "params_kind",
]

FinishReason = Literal["stop", "length", "cancelled", "no_token", "error"]
ParamsKind = Literal["sampling", "beam"]


def params_kind(params: AnyParams) -> ParamsKind:
    return "beam" if isinstance(params, BeamParams) else "sampling"


@dataclass(frozen=True)
class Request:
    """A prompt to continue.

    seed is params.seed, or one drawn for a request without; 0 where nothing is drawn. salt: only requests with the same
    one share cached prefixes. words: of params, as the model's tokens. cache: how keys and values are kept.
    """

    prompt: tuple[int, ...]
    params: AnyParams
    seed: int
    salt: str = ""
    words: Words = NO_WORDS
    cache: CacheParams = CacheParams()


@dataclass(frozen=True)
class ScoreRequest:
    """Token ids whose log-probabilities are asked for.

    reduce: logits are reduced as they are made, not kept. top: of how many best tokens at each place besides.
    first: token index from which on, 1 to their number; to an eviction policy the tokens before it are the prompt.
    salt: only requests with the same one share cached prefixes. cache: how keys and values are kept.
    """

    token_ids: tuple[int, ...]
    reduce: bool = True
    top: int = 0
    first: int = 1
    salt: str = ""
    cache: CacheParams = CacheParams()


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
        completion_tokens: tokens generated, all samples together; of a beam search those of the answers it gives.
        cached_tokens: prompt tokens that were in the cache already.
        kv_bytes_now: bytes of the request's blocks when its last sample ended, just before they were freed.
        kv_bytes_peak: most bytes its blocks took, those that samples share counted once.
        kv_tokens_kept: tokens of the last sample whose keys and values were still held at the end, the mean over layers
            and KV heads.
        kv_bytes_unshared: most bytes its blocks would have taken with a copy for each sample or beam.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    kv_bytes_now: int
    kv_bytes_peak: int
    kv_tokens_kept: float
    kv_bytes_unshared: int


@dataclass(frozen=True)
class RequestStats:
    """Where a request's time went, in seconds.

    Attributes:
        queue: from its arrival until its first token was computed.
        prefill: from then until its first token was out.
        decode: from then to its end.
        first_token: from its arrival to its first token; None where it had none.
        inter_token: between tokens that follow each other; samples of a request come together.
        cached_tokens: prompt tokens that were in the cache already.
        preemptions: how often its blocks were taken from it.
    """

    queue: float
    prefill: float
    decode: float
    first_token: float | None
    inter_token: tuple[float, ...]
    cached_tokens: int
    preemptions: int


@dataclass(frozen=True)
class Receipt:
    """What makes a completion repeatable, and what it said.

    Attributes:
        version: of Kvik.
        model: name, path, digest of packed weights and configuration, weights, kv, executor, device, isa.
        kind: of the parameters, "sampling" or "beam".
        params: every field of SamplingParams, seed the one that was used; or of BeamParams.
        cache: every field of CacheParams, the policy as text.
        prompt: token ids.
        outputs: token ids of each choice. finish_reasons: of each choice.
    """

    version: str
    model: Mapping[str, Any]
    kind: ParamsKind
    params: Mapping[str, Any]
    cache: Mapping[str, Any]
    prompt: tuple[int, ...]
    outputs: tuple[tuple[int, ...], ...]
    finish_reasons: tuple[FinishReason, ...]


@dataclass(frozen=True)
class Choice:
    """One sample, or one answer of a beam search. token_ids include the token that ended it; text does not include a stop
    string or special token.

    cumulative_logprob: sum of the generated tokens' log-probabilities. logprobs: None unless asked for. Those of a beam
    search are what it adds up: after repetition_penalty and all that bans. score: by which its answers are ranked, the sum
    (less diversity penalties) / length ** length_penalty; None for a sample. trace: what each token of a sample was drawn from; None unless asked for.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    cumulative_logprob: float
    logprobs: tuple[TokenLogprobs, ...] | None
    score: float | None = None
    trace: tuple[TokenTrace, ...] | None = None


@dataclass(frozen=True)
class Completion:
    """A request's answer. text is the first choice's; prompt_tokens are token ids.

    beams: the tree of a beam search, where BeamParams.trace asks for it.
    """

    text: str
    choices: tuple[Choice, ...]
    prompt_tokens: tuple[int, ...]
    usage: Usage
    stats: RequestStats | None = None
    receipt: Receipt | None = None
    beams: tuple[BeamStep, ...] | None = None


class Chunk(NamedTuple):
    """A piece of a sample as it comes. text may be empty while characters or stop strings are incomplete.

    finish_reason is None until the sample's last chunk, usage and stats until the request's last.
    """

    index: int  # type: ignore[assignment]  # hides tuple.index
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] | None = None
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    stats: RequestStats | None = None


@dataclass(frozen=True)
class ScoreResult:
    """Log-probabilities of given tokens.

    token_ids [N]; first: token index of the first entry, 1 to N. Entry i is of token first + i:
    logprobs [N - first] float64; logsumexp [N - first] float64, the logarithm of the sum of e^logit over the vocabulary, so
    that the token's logit is logprobs + logsumexp; top [N - first], the best tokens at its place, falling, ties to the lower
    id; empty unless asked for.
    logits [N - first + 1, V] float32, row i what comes before token first + i, the last row after the text; None where they
    were reduced.
    """

    token_ids: tuple[int, ...]
    first: int
    logprobs: NDArray[np.float64]
    logsumexp: NDArray[np.float64]
    top: tuple[tuple[TokenLogprob, ...], ...] = ()
    logits: NDArray[np.float32] | None = None


class LogitRows(NamedTuple):
    """Rows of logits of a text, logits [C, V] float32: row i is what token first + i was predicted from."""

    first: int
    logits: NDArray[np.float32]
