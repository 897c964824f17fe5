"""What a user writes down: frozen, validated once, documented. What carries it out lives in its room."""

from kvik.params.beam import MAX_BEAMS, AnyParams, BeamParams, any_params, beam_params
from kvik.params.checks import choose
from kvik.params.engine import EngineParams
from kvik.params.grammar import Grammar
from kvik.params.sampling import (
    MAX_LOGPROBS,
    MAX_SEED,
    PRESETS,
    LogprobsMode,
    SamplingParams,
    json_biases,
    preset_fields,
)

__all__ = [
    "MAX_BEAMS",
    "MAX_LOGPROBS",
    "MAX_SEED",
    "PRESETS",
    "AnyParams",
    "BeamParams",
    "EngineParams",
    "Grammar",
    "LogprobsMode",
    "SamplingParams",
    "any_params",
    "beam_params",
    "choose",
    "json_biases",
    "preset_fields",
]
