"""Which fields a body may have, and the sampling they ask for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kvik.engine.admission import Admission
from kvik.errors import ParameterError
from kvik.params import AnyParams, CacheParams, any_params, cache_field, json_biases, json_cache
from kvik.server.body import Fields, JsonObject
from kvik.server.errors import ApiError
from kvik.server.formats import FORMATS, grammar_field
from kvik.text.tokenizer import check_text

__all__ = [
    "GENERATION", "Common", "cache_of", "chat_fields", "check_policy", "check_top", "completion_fields", "generation_params",
]  # fmt: skip

MAX_TOP_LOGPROBS = 20
"""Best tokens a request may ask for: what they take grows with n, prompts and tokens. OpenAI's limit for chats."""

SAMPLING = (
    "n", "min_tokens", "logit_bias", "bad_words", "repetition_penalty", "presence_penalty", "frequency_penalty",
    "no_repeat_ngram_size", "dry_multiplier", "dry_base", "dry_allowed_length", "dry_range", "dry_breakers",
    "temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "top_n_sigma",
    "xtc_probability", "xtc_threshold", "seed", "stop", "stop_token_ids", "ignore_eos", "logprobs_mode",
)  # fmt: skip
"""Fields of SamplingParams that a body has under the same name; their defaults are OpenAI's too."""

BEAMS = ("num_beams", "length_penalty", "early_stopping", "num_beam_groups", "diversity_penalty")
"""Fields that only BeamParams has. num_beams above 1 makes the request a beam search, of which n answers are returned."""

CACHE = ("kv", "evict")
"""How keys and values are kept: texts or objects."""

GENERATION = (*SAMPLING, *BEAMS, *FORMATS, *CACHE, "preset")
"""Fields that say how an answer is made, alike in both kinds of bodies."""

_COMMON = ("model", "max_tokens", "logprobs", "stream", "stream_options", "cache_salt", "receipt", *GENERATION)
_FREE = ("user", "metadata", "safety_identifier", "prompt_cache_key")
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "service_tier": ("auto", "default"),
    "store": (False,),
    "trace": (False,),
}
_CHAT_NEUTRAL = {
    **_NEUTRAL, "parallel_tool_calls": (True,), "modalities": (["text"],), "verbosity": ("medium",),
    "reasoning_effort": (), "audio": (), "functions": (), "function_call": (), "prediction": (), "web_search_options": (),
}  # fmt: skip


@dataclass(frozen=True)
class Common:
    """What both kinds of answers are asked for. max_tokens: None where it was not given."""

    stream: bool
    include_usage: bool
    receipt: bool
    salt: str
    max_tokens: int | None


def chat_fields(body: JsonObject) -> tuple[Fields, Common]:
    """The fields of /v1/chat/completions."""
    used = (*_COMMON, "messages", "tools", "tool_choice", "top_logprobs", "max_completion_tokens")
    fields = Fields(body, used, _CHAT_NEUTRAL, _FREE)
    newer, older = (fields.take(name, int) for name in ("max_completion_tokens", "max_tokens"))
    if newer is not None and older is not None and newer != older:
        message = f"max_completion_tokens is {newer} and max_tokens is {older}; give one of them"
        raise ApiError(400, message, param="max_completion_tokens", code="invalid_value")
    return fields, _common(fields, older if newer is None else newer)


def completion_fields(body: JsonObject) -> tuple[Fields, Common]:
    """The fields of /v1/completions."""
    # best_of as many as n chooses nothing
    neutral = {**_NEUTRAL, "best_of": (body["n"] if isinstance(body.get("n"), int) else 1,), "suffix": ("",)}
    fields = Fields(body, (*_COMMON, "prompt", "echo"), neutral, _FREE)
    return fields, _common(fields, fields.take("max_tokens", int, 16))


def _common(fields: Fields, max_tokens: int | None) -> Common:
    stream = fields.take("stream", bool, False)
    options = fields.take("stream_options", dict, {})
    if options and not stream:
        raise ApiError(400, "stream_options needs stream", param="stream_options", code="invalid_value")
    inner = Fields(options, ("include_usage",), {"include_obfuscation": (False,)}, within="stream_options")
    salt = fields.take("cache_salt", str, "")
    check_text(salt, "cache_salt")
    return Common(
        stream, inner.take("include_usage", bool, False), fields.take("receipt", bool, False), salt, max_tokens
    )


def _check_count(n: Any, beams: Any) -> None:
    """n under its own name; it is num_return_sequences for BeamParams."""
    if isinstance(n, bool) or not isinstance(n, int):
        raise ParameterError(f"n must be an integer, got {n!r:.40}")
    if n < 1:
        raise ParameterError(f"n must be at least 1, got {n!r:.40}")
    if isinstance(beams, int) and 1 < beams < n:
        raise ParameterError(f"n is {n!r:.40}, above num_beams {beams!r:.40}")


def check_top(top: int | None, name: str) -> int | None:
    """The number of best tokens, None where none was given. ApiError 400 names the field."""
    if top is not None and not 0 <= top <= MAX_TOP_LOGPROBS:
        raise ApiError(
            400, f"{name} must be in [0, {MAX_TOP_LOGPROBS}], got {top!r:.40}", param=name, code="invalid_value"
        )
    return top


def generation_params(fields: Fields, max_tokens: int | None, logprobs: int | None) -> AnyParams:
    """The sampling or the beam search of a body. ParameterError begins with the field's name."""
    given = {name: fields.given[name] for name in (*SAMPLING, *BEAMS, "preset") if name in fields.given}
    if "logit_bias" in given:
        given["logit_bias"] = json_biases(given["logit_bias"])
    given |= grammar_field(fields)
    if isinstance(given.get("stop"), dict):
        raise ParameterError("stop must be a string or a list of strings")
    beams = given.get("num_beams", 1)
    if isinstance(beams, bool) or beams != 1:
        _check_count(given.get("n", 1), beams)
    return any_params(given | {"max_tokens": max_tokens, "logprobs": logprobs})


def cache_of(fields: Fields, admission: Admission) -> CacheParams:
    """How the keys and values of a body's requests are kept: the engine's where it does not say. ParameterError begins with
    kv or evict, also where the model cannot have it."""
    base = admission.cache
    cache = json_cache(fields.given.get("kv"), fields.given.get("evict"), base) or base
    try:
        admission.layout(cache)
    except ParameterError as error:
        raise ParameterError(f"{cache_field(str(error)) or 'kv'}: {error}") from None
    return cache


def check_policy(cache: CacheParams, prompt_tokens: int | None) -> None:
    """ParameterError, naming evict, where the policy makes no sense for a prompt of so many tokens (None: a text)."""
    try:
        cache.check(prompt_tokens)
    except ParameterError as error:
        raise ParameterError(f"evict: {error}") from None
