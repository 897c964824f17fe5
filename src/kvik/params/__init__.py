"""What a user writes down: frozen, validated once, documented. What carries it out lives in its room."""

from kvik.params.beam import MAX_BEAMS, AnyParams, BeamParams, any_params, beam_params
from kvik.params.cache import GROUP_SIZES, KV_FORMATS, CacheParams, KVFormat, cache_params, kv_text, parse_kv
from kvik.params.checks import choose
from kvik.params.engine import EngineParams
from kvik.params.eviction import (
    H2O,
    POLICIES,
    TOVA,
    ExpectedAttention,
    KeyDiff,
    Policy,
    Protected,
    Scorer,
    SnapKV,
    StreamingLLM,
    parse_policy,
    policy_name,
    policy_text,
)
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
    "GROUP_SIZES",
    "H2O",
    "KV_FORMATS",
    "MAX_BEAMS",
    "MAX_LOGPROBS",
    "MAX_SEED",
    "POLICIES",
    "PRESETS",
    "TOVA",
    "AnyParams",
    "BeamParams",
    "CacheParams",
    "EngineParams",
    "ExpectedAttention",
    "Grammar",
    "KVFormat",
    "KeyDiff",
    "LogprobsMode",
    "Policy",
    "Protected",
    "SamplingParams",
    "Scorer",
    "SnapKV",
    "StreamingLLM",
    "any_params",
    "beam_params",
    "cache_params",
    "choose",
    "json_biases",
    "kv_text",
    "parse_kv",
    "parse_policy",
    "policy_name",
    "policy_text",
    "preset_fields",
]
