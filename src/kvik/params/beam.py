"""Beam search."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from kvik.errors import ParameterError
from kvik.params.checks import check_length, integer, penalty, real
from kvik.params.grammar import Grammar
from kvik.params.sampling import MAX_NGRAM, SamplingParams, check_answer, preset_fields

__all__ = ["MAX_BEAMS", "AnyParams", "BeamParams", "EarlyStopping", "any_params", "beam_params"]

EarlyStopping = bool | Literal["never"]
MAX_BEAMS = 64
MAX_LENGTH_PENALTY = 10.0
MAX_DIVERSITY_PENALTY = 100.0
_DRAWING = frozenset({
    "preset", "temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "top_n_sigma",
    "xtc_probability", "xtc_threshold", "seed",
})  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class BeamParams:
    """Beam search over the answers to one prompt; the names, and what they mean, are those of transformers' `generate`.

    A finished beam's score is its sum of log-probabilities / length ** length_penalty, the length that of the answer.

    Attributes:
        num_beams: beams that are followed, 1 to 64.
        num_return_sequences: best answers returned, 1 to num_beams.
        max_tokens: most tokens of an answer, at least 1; None: to the end of the context or of the KV cache.
        min_tokens: as in SamplingParams.
        length_penalty: -10 to 10; 0 is neutral, above 0 favours longer answers, below 0 shorter ones.
        early_stopping: True ends the search when num_beams answers are finished; False when no beam is likely to beat the
            worst of them; "never" when none can.
        no_repeat_ngram_size: as in SamplingParams. repetition_penalty: as in SamplingParams, on log-probabilities.
        num_beam_groups: groups that diverge from those before them, a divisor of num_beams (Vijayakumar et al. 2018,
            arXiv:1610.02424). diversity_penalty: subtracted for each beam of an earlier group that takes the same token
            at the same step; needs num_beam_groups > 1.
        grammar, stop, stop_token_ids, ignore_eos, logprobs: as in SamplingParams.
        trace: keep the tree of the search, as `kvik xray` shows it.
    """

    num_beams: int = 4
    num_return_sequences: int = 1
    max_tokens: int | None = None
    min_tokens: int = 0
    length_penalty: float = 1.0
    early_stopping: EarlyStopping = False
    no_repeat_ngram_size: int = 0
    repetition_penalty: float = 1.0
    num_beam_groups: int = 1
    diversity_penalty: float = 0.0
    grammar: Grammar | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    trace: bool = False

    def __post_init__(self) -> None:
        integer("num_beams", self.num_beams, 1, MAX_BEAMS)
        integer("num_return_sequences", self.num_return_sequences, 1)
        if self.num_return_sequences > self.num_beams:
            raise ParameterError(
                f"num_return_sequences {self.num_return_sequences} is above num_beams {self.num_beams}"
            )
        check_length(self.min_tokens, self.max_tokens)
        real("length_penalty", self.length_penalty, -MAX_LENGTH_PENALTY, MAX_LENGTH_PENALTY)
        if not isinstance(self.early_stopping, bool) and self.early_stopping != "never":
            raise ParameterError(f"early_stopping must be True, False or 'never', got {self.early_stopping!r}")
        integer("no_repeat_ngram_size", self.no_repeat_ngram_size, 0, MAX_NGRAM)
        penalty(self.repetition_penalty)
        integer("num_beam_groups", self.num_beam_groups, 1, MAX_BEAMS)
        if self.num_beams % self.num_beam_groups:
            raise ParameterError(f"num_beam_groups {self.num_beam_groups} does not divide num_beams {self.num_beams}")
        real("diversity_penalty", self.diversity_penalty, 0.0, MAX_DIVERSITY_PENALTY)
        if self.diversity_penalty and self.num_beam_groups == 1:
            raise ParameterError("diversity_penalty needs num_beam_groups above 1")
        check_answer(self)

    @property
    def num_sequences(self) -> int:
        """Sequences that it runs at once."""
        return self.num_beams

    @property
    def num_answers(self) -> int:
        """Answers that it gives."""
        return self.num_return_sequences


AnyParams = SamplingParams | BeamParams


def any_params(given: Mapping[str, Any], base: SamplingParams | None = None) -> AnyParams:
    """A beam search where num_beams is given and not 1, else `base` with what was given; "preset" may be among that.

    ParameterError names a field of the one kind that was given for the other.
    """
    beams = given.get("num_beams", 1)
    if isinstance(beams, bool) or beams != 1:
        return beam_params(given)
    known = {field.name for field in fields(SamplingParams)}
    rest = {name: value for name, value in given.items() if name not in ("num_beams", "preset")}
    for name in rest:
        if name not in known:
            raise ParameterError(f"{name} needs num_beams above 1")
    preset = preset_fields(given["preset"]) if "preset" in given else {}
    return replace(base or SamplingParams(), **{**preset, **rest})


def beam_params(given: Mapping[str, Any], base: BeamParams | None = None) -> BeamParams:
    """`base` with what was given beside num_beams: fields of BeamParams, and `n`, which means num_return_sequences.

    ParameterError names a field that only sampling has, unless it asks for nothing.
    """
    known = {field.name for field in fields(BeamParams)}
    neutral = {field.name: field.default for field in fields(SamplingParams)}
    used = {}
    for name, value in given.items():
        if name == "n":
            used["num_return_sequences"] = value
        elif name in known:
            used[name] = value
        elif name not in neutral or value != neutral[name]:
            why = "a beam search draws nothing" if name in _DRAWING else "it is not one of a beam search's parameters"
            raise ParameterError(f"{name} cannot go with num_beams: {why}")
    if "n" in given and "num_return_sequences" in given:
        raise ParameterError("n and num_return_sequences mean the same; give one of them")
    return replace(base or BeamParams(), **used)
