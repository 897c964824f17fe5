"""What a user writes down: frozen, validated once, documented. What carries it out lives in its room."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from kvik.errors import ParameterError

__all__ = ["EngineParams", "LogprobsMode", "SamplingParams", "choose"]

LogprobsMode = Literal["raw", "processed"]

MAX_SAMPLES = 128
MAX_STOP_STRINGS = 16
MAX_STOP_CHARACTERS = 1000
MAX_LOGPROBS = 1024
MAX_SEED = 2**64 - 1
MAX_TOP_K = 2**31 - 1
MAX_THREADS = 256
MAX_KV_BYTES = 2**50


def _integer(name: str, value: object, low: int, high: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ParameterError(f"{name} must be an integer, got {value!r}")
    if value < low or (high is not None and value > high):
        bound = f"at least {low}" if high is None else f"in [{low}, {high}]"
        shown = str(value) if abs(value) < 2**128 else f"an integer of {value.bit_length()} bits"
        raise ParameterError(f"{name} must be {bound}, got {shown}")


def _real(name: str, value: object, low: float, high: float | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ParameterError(f"{name} must be a number, got {value!r}")
    if isinstance(value, int) and abs(value) > 2**1000:  # beyond what a float holds
        raise ParameterError(f"{name} must be finite, got an integer of {value.bit_length()} bits")
    if not math.isfinite(value) or value < low or (high is not None and value > high):
        bound = f"at least {low:g}" if high is None else f"in [{low:g}, {high:g}]"
        raise ParameterError(f"{name} must be finite and {bound}, got {value}")


Option = TypeVar("Option", bound=str)


def choose(what: str, name: object, options: Sequence[Option], aliases: Mapping[str, Option] | None = None) -> Option:
    """The option called `name`, or the one it is an alias of; ParameterError lists the options and names the nearest."""
    if not isinstance(name, str):
        raise ParameterError(f"{what} must be a string, got {name!r}")
    known = (aliases or {}).get(name, name)
    for option in options:
        if known == option:
            return option
    import difflib

    near = difflib.get_close_matches(name, options, 1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ParameterError(f"{what} must be one of {', '.join(options)}, got {name!r}{hint}")


def _sequence(name: str, value: object, of: str) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple | set | frozenset):
        raise ParameterError(f"{name} must be a list of {of}, got {value!r}")
    return tuple(value)


def _flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise ParameterError(f"{name} must be True or False, got {value!r}")


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the tokens of one request are chosen and when it ends.

    The filters apply in one declared order: min_tokens, temperature, top_k, top_p, min_p.

    Attributes:
        n: samples of the prompt, 1 to 128.
        max_tokens: most tokens generated per sample, at least 1; None means up to the end of the context, or of the KV
            cache where that is smaller. An answer never passes either end.
        min_tokens: end-of-text and stop tokens are banned until this many tokens are out, at least 0; more than the
            context holds after the prompt is refused.
        temperature: divides the logits; 0 is greedy. At least 0.
        top_k: keep the k most probable tokens, ties by lower id, 0 to 2**31 - 1; 0 is off.
        top_p: keep the smallest set of most probable tokens with cumulative probability >= top_p, in [0, 1];
            1 is off; 0 keeps the best token.
        min_p: keep tokens with at least min_p times the best token's probability, in [0, 1]; 0 is off.
        seed: keys the noise, in [0, 2**64 - 1]; None draws a seed from the operating system.
        stop: up to 16 strings of at most 1,000 characters that end the text; the match itself is not returned.
        stop_token_ids: token ids that end the text beside the model's own; the id is kept in token_ids.
        ignore_eos: go on past the model's own end-of-text tokens.
        logprobs: for each generated token, report its log-probability and those of this many best tokens;
            None reports nothing, 0 only the generated token's.
        logprobs_mode: "raw" is before any bias or filter, "processed" after all of them.
    """

    n: int = 1
    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    logprobs_mode: LogprobsMode = "raw"

    def __post_init__(self) -> None:
        _integer("n", self.n, 1, MAX_SAMPLES)
        if self.max_tokens is not None:
            _integer("max_tokens", self.max_tokens, 1)
        _integer("min_tokens", self.min_tokens, 0)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ParameterError(f"min_tokens {self.min_tokens} is above max_tokens {self.max_tokens}")
        _real("temperature", self.temperature, 0.0)
        _integer("top_k", self.top_k, 0, MAX_TOP_K)
        _real("top_p", self.top_p, 0.0, 1.0)
        _real("min_p", self.min_p, 0.0, 1.0)
        if self.seed is not None:
            _integer("seed", self.seed, 0, MAX_SEED)
        stop = (self.stop,) if isinstance(self.stop, str) else _sequence("stop", self.stop, "strings")
        if len(stop) > MAX_STOP_STRINGS:
            raise ParameterError(f"stop takes at most {MAX_STOP_STRINGS} strings, got {len(stop)}")
        if not all(isinstance(s, str) and s for s in stop):
            raise ParameterError(f"stop takes strings that are not empty, got {stop!r}")
        for text in stop:
            if len(text) > MAX_STOP_CHARACTERS:
                raise ParameterError(
                    f"stop takes strings of at most {MAX_STOP_CHARACTERS:,} characters, got one of {len(text):,}"
                )
            if any("\ud800" <= c <= "\udfff" for c in text):
                raise ParameterError(f"stop takes text, got {text!r} with half a surrogate pair")
        object.__setattr__(self, "stop", stop)
        ids = _sequence("stop_token_ids", self.stop_token_ids, "token ids")
        for token in ids:
            _integer("stop_token_ids", token, 0)
        object.__setattr__(self, "stop_token_ids", ids)
        _flag("ignore_eos", self.ignore_eos)
        if self.logprobs is not None:
            _integer("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        if self.logprobs_mode not in ("raw", "processed"):
            raise ParameterError(f"logprobs_mode must be 'raw' or 'processed', got {self.logprobs_mode!r}")


@dataclass(frozen=True, kw_only=True)
class EngineParams:
    """The machine's share an engine may use.

    Attributes:
        threads: threads of the native core, 1 to 256; None takes every core this process may run on.
        kv_bytes: bytes of the KV cache's pool, 1 to 2**50; None takes a quarter of the machine's memory, or less where
            max_sequences whole contexts are less.
        max_batch_tokens: most tokens computed in one step, 1 to 65,536; a longer prompt is computed in chunks.
        max_sequences: most sequences (samples counted one by one) that run at once, 1 to 4,096; others wait.
        max_waiting: most requests that wait, 0 to 1,000,000; a further one is refused with TryAgainError.
        prefix_sharing: prompts that begin alike share the blocks of what they have in common.
    """

    threads: int | None = None
    kv_bytes: int | None = None
    max_batch_tokens: int = 512
    max_sequences: int = 128
    max_waiting: int = 1024
    prefix_sharing: bool = True

    def __post_init__(self) -> None:
        if self.threads is not None:
            _integer("threads", self.threads, 1, MAX_THREADS)
        if self.kv_bytes is not None:
            _integer("kv_bytes", self.kv_bytes, 1, MAX_KV_BYTES)
        _integer("max_batch_tokens", self.max_batch_tokens, 1, 65536)
        _integer("max_sequences", self.max_sequences, 1, 4096)
        _integer("max_waiting", self.max_waiting, 0, 1_000_000)
        _flag("prefix_sharing", self.prefix_sharing)
