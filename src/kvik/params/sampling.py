"""How the tokens of one request are drawn and when it ends."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from kvik.errors import ParameterError
from kvik.params.checks import (
    above,
    below,
    check_length,
    choose,
    flag,
    integer,
    penalty,
    real,
    sequence,
    strings,
    token_ids,
)
from kvik.params.grammar import Grammar, grammar_of

__all__ = ["PRESETS", "LogprobsMode", "SamplingParams", "json_biases", "preset_fields"]

LogprobsMode = Literal["raw", "processed"]

MAX_SAMPLES = 128
MAX_STOP_STRINGS = 16
MAX_LOGPROBS = 1024
MAX_SEED = 2**64 - 1
MAX_TOP_K = 2**31 - 1
MAX_BIAS = 100.0
MAX_BIASED = 1024
MAX_ID_DIGITS = 10
MAX_BAD_WORDS = 256
MAX_BAD_CHARACTERS = 16384
MAX_PENALTY = 2.0
MAX_NGRAM = 1024
MAX_SIGMAS = 100.0
MAX_DRY = 100.0
MAX_DRY_LENGTH = 65536

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "factual": {"temperature": 0.3, "top_k": 20, "top_p": 0.85, "repetition_penalty": 1.1},
    "balanced": {"temperature": 0.7, "top_k": 50, "top_p": 0.9, "repetition_penalty": 1.15},
    "creative": {"temperature": 1.0, "top_k": 100, "top_p": 0.95, "repetition_penalty": 1.2},
}
"""The guide's three production templates (section 2.8)."""


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the tokens of one request are chosen and when it ends.

    What changes scores applies in one declared order: logit_bias, bad_words and min_tokens, grammar, repetition_penalty,
    presence_penalty, frequency_penalty, dry, no_repeat_ngram_size, temperature, top_k, top_p, min_p, typical_p,
    epsilon_cutoff, eta_cutoff, top_n_sigma, xtc. The best token that remains survives every filter but typical_p and xtc,
    which are there to leave it out; these leave some token.

    Attributes:
        n: samples of the prompt, 1 to 128.
        max_tokens: most tokens generated per sample, at least 1; None means up to the end of the context, or of the KV
            cache where that is smaller. An answer never passes either end.
        min_tokens: end-of-text and stop tokens are banned until this many tokens are out, at least 0; more than the
            context holds after the prompt is refused.
        logit_bias: added to the logits of token ids, {id: bias} of up to 1,024 ids, each bias in [-100, 100] (OpenAI).
        bad_words: up to 256 strings, together at most 16,384 characters, that do not come out: the last token of each
            is banned where the ones before it are there already, as it is encoded with and without a space before it
            (transformers, bad_words_ids).
        repetition_penalty: logits of tokens in prompt or answer are divided by it where positive, multiplied where
            negative (Keskar et al. 2019, CTRL, arXiv:1909.05858), above 0 and at most 10; 1 is off.
        presence_penalty: subtracted from tokens that the answer has already (OpenAI), in [-2, 2]; 0 is off.
        frequency_penalty: subtracted once for every time that the answer has the token (OpenAI), in [-2, 2]; 0 is off.
        no_repeat_ngram_size: no sequence of this many tokens comes twice, prompt and answer together (transformers),
            0 to 1,024; 0 is off.
        dry_multiplier: penalty of tokens that would repeat what prompt and answer had, 0 to 100; 0 is off ("Don't Repeat
            Yourself", as llama.cpp computes it): multiplier * base ** (length of the repetition - allowed length).
        dry_base: 1 to 10. dry_allowed_length: longest repetition without penalty, 1 to 65,536.
        dry_range: how many of the last tokens are looked at, 0 to 2**31 - 1; 0 is all.
        dry_breakers: up to 16 strings that no repetition reaches across.
        temperature: divides the logits; 0 is greedy. At least 0.
        top_k: keep the k most probable tokens, ties by lower id, 0 to 2**31 - 1; 0 is off.
        top_p: keep the smallest set of most probable tokens with cumulative probability >= top_p, in [0, 1];
            1 is off; 0 keeps the best token.
        min_p: keep tokens with at least min_p times the best token's probability, in [0, 1]; 0 is off.
        typical_p: keep the tokens whose information is nearest the entropy, up to this cumulative probability
            (Meister et al. 2023, arXiv:2202.00666), in (0, 1]; 1 is off.
        epsilon_cutoff: keep tokens of at least this probability, in [0, 1); 0 is off (Hewitt et al. 2022,
            arXiv:2210.15191).
        eta_cutoff: keep tokens of at least min(eta, sqrt(eta) * exp(-entropy)), in [0, 1); 0 is off (the same).
        top_n_sigma: keep tokens within so many standard deviations of the largest logit (Tang et al. 2024,
            arXiv:2411.07641), 0 to 100; 0 is off.
        xtc_probability: chance that all but the least of the tokens above xtc_threshold are left out ("Exclude Top
            Choices"), in [0, 1]; 0 is off. xtc_threshold: in [0, 0.5].
        grammar: what the text has to be; see `Grammar`. The text ends where the grammar does.
        seed: keys the noise, in [0, 2**64 - 1]; None draws a seed from the operating system.
        stop: up to 16 strings of at most 1,000 characters that end the text; the match itself is not returned.
        stop_token_ids: token ids that end the text beside the model's own; the id is kept in token_ids.
        ignore_eos: go on past the model's own end-of-text tokens.
        logprobs: for each generated token, report its log-probability and those of this many best tokens;
            None reports nothing, 0 only the generated token's.
        logprobs_mode: "raw" is before any bias or filter, "processed" after all of them.
        trace: keep for each token what `kvik xray` shows; see kvik.decoding.trace.
    """

    n: int = 1
    max_tokens: int | None = None
    min_tokens: int = 0
    logit_bias: tuple[tuple[int, float], ...] | Mapping[int, float] = ()
    bad_words: tuple[str, ...] = ()
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    no_repeat_ngram_size: int = 0
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_range: int = 0
    dry_breakers: tuple[str, ...] = ("\n", ":", '"', "*")
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    epsilon_cutoff: float = 0.0
    eta_cutoff: float = 0.0
    top_n_sigma: float = 0.0
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    grammar: Grammar | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    logprobs_mode: LogprobsMode = "raw"
    trace: bool = False

    @classmethod
    def preset(cls, name: str, **fields: Any) -> SamplingParams:
        """One of `PRESETS`, its fields replaced by those given. ParameterError for an unknown name lists the known."""
        return cls(**{**preset_fields(name), **fields})

    def __post_init__(self) -> None:
        integer("n", self.n, 1, MAX_SAMPLES)
        check_length(self.min_tokens, self.max_tokens)
        object.__setattr__(self, "logit_bias", _biases(self.logit_bias))
        object.__setattr__(self, "bad_words", strings("bad_words", self.bad_words, MAX_BAD_WORDS))
        if (size := sum(map(len, self.bad_words))) > MAX_BAD_CHARACTERS:
            raise ParameterError(f"bad_words takes at most {MAX_BAD_CHARACTERS:,} characters together, got {size:,}")
        penalty(self.repetition_penalty)
        real("presence_penalty", self.presence_penalty, -MAX_PENALTY, MAX_PENALTY)
        real("frequency_penalty", self.frequency_penalty, -MAX_PENALTY, MAX_PENALTY)
        integer("no_repeat_ngram_size", self.no_repeat_ngram_size, 0, MAX_NGRAM)
        self._check_dry()
        real("temperature", self.temperature, 0.0)
        integer("top_k", self.top_k, 0, MAX_TOP_K)
        real("top_p", self.top_p, 0.0, 1.0)
        real("min_p", self.min_p, 0.0, 1.0)
        above("typical_p", self.typical_p, 0.0, 1.0)
        below("epsilon_cutoff", self.epsilon_cutoff, 0.0, 1.0)
        below("eta_cutoff", self.eta_cutoff, 0.0, 1.0)
        real("top_n_sigma", self.top_n_sigma, 0.0, MAX_SIGMAS)
        real("xtc_probability", self.xtc_probability, 0.0, 1.0)
        real("xtc_threshold", self.xtc_threshold, 0.0, 0.5)
        if self.xtc_probability == 0.0 and self.xtc_threshold != SamplingParams.xtc_threshold:
            raise ParameterError("xtc_threshold needs xtc_probability, which is 0")
        if self.seed is not None:
            integer("seed", self.seed, 0, MAX_SEED)
        check_answer(self)
        if self.logprobs_mode not in ("raw", "processed"):
            raise ParameterError(f"logprobs_mode must be 'raw' or 'processed', got {self.logprobs_mode!r}")

    @property
    def num_sequences(self) -> int:
        """Sequences that it runs at once."""
        return self.n

    @property
    def num_answers(self) -> int:
        """Answers that it gives."""
        return self.n

    def _check_dry(self) -> None:
        real("dry_multiplier", self.dry_multiplier, 0.0, MAX_DRY)
        real("dry_base", self.dry_base, 1.0, 10.0)
        integer("dry_allowed_length", self.dry_allowed_length, 1, MAX_DRY_LENGTH)
        integer("dry_range", self.dry_range, 0, MAX_TOP_K)
        object.__setattr__(self, "dry_breakers", strings("dry_breakers", self.dry_breakers, MAX_STOP_STRINGS))
        if self.dry_multiplier == 0.0:
            for name in ("dry_base", "dry_allowed_length", "dry_range", "dry_breakers"):
                if getattr(self, name) != getattr(SamplingParams, name):
                    raise ParameterError(f"{name} needs dry_multiplier, which is 0")


def check_answer(params: Any) -> None:
    """What sampling and beam searches say alike of an answer: its grammar and ends, what is told of it."""
    object.__setattr__(params, "grammar", grammar_of(params.grammar))
    object.__setattr__(params, "stop", strings("stop", params.stop, MAX_STOP_STRINGS))
    object.__setattr__(params, "stop_token_ids", token_ids("stop_token_ids", params.stop_token_ids))
    flag("ignore_eos", params.ignore_eos)
    if params.grammar is not None and params.ignore_eos:
        raise ParameterError("ignore_eos cannot go with grammar: the text ends where the grammar does")
    if params.logprobs is not None:
        integer("logprobs", params.logprobs, 0, MAX_LOGPROBS)
    flag("trace", params.trace)


def preset_fields(name: object) -> Mapping[str, Any]:
    """The fields of one of `PRESETS`."""
    return PRESETS[choose("preset", name, tuple(PRESETS))]


def json_biases(given: object) -> object:
    """A logit_bias as JSON has it, an object whose names are token ids, with these as numbers; anything else as it is."""
    if not isinstance(given, Mapping):
        return given
    if len(given) > MAX_BIASED:
        raise ParameterError(f"logit_bias takes at most {MAX_BIASED:,} token ids, got {len(given):,}")
    for name in given:
        if not (isinstance(name, str) and name.isascii() and name.isdigit() and len(name) <= MAX_ID_DIGITS):
            raise ParameterError(f"logit_bias takes token ids as names, got {name!r:.80}")
    return tuple((int(name), bias) for name, bias in given.items())


def _biases(given: object) -> tuple[tuple[int, float], ...]:
    """(id, bias) by rising id, from a mapping or pairs."""
    pairs = given.items() if isinstance(given, Mapping) else sequence("logit_bias", given, "(token id, bias) pairs")
    found: dict[int, float] = {}
    for pair in pairs:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise ParameterError(f"logit_bias takes (token id, bias) pairs, got {pair!r}")
        token, bias = pair
        integer("logit_bias: a token id", token, 0)
        real(f"logit_bias of token {token}", bias, -MAX_BIAS, MAX_BIAS)
        if token in found:
            raise ParameterError(f"logit_bias has token {token} twice")
        found[token] = float(bias)
    if len(found) > MAX_BIASED:
        raise ParameterError(f"logit_bias takes at most {MAX_BIASED:,} token ids, got {len(found):,}")
    return tuple(sorted(found.items()))
