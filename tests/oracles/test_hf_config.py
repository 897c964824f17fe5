"""Configurations of config.json: what is read, what is taken for what is not there, what is refused under its name."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import transformers
from oracles.configurations import LLAMA as EXPECTED
from oracles.random_models.shapes import LLAMA3

from kvik.errors import DataError
from kvik.models.config import ModelConfig, RopeConfig
from kvik.models.hf_config import config_from_hf

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000.0,
    "rope_scaling": None,
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": True,
}
MISTRAL = {"architectures": ["MistralForCausalLM"], "sliding_window": None}
QWEN2 = {"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": False, "sliding_window": 4096}
QWEN3 = {"architectures": ["Qwen3ForCausalLM"], "head_dim": 128}
MIXTRAL = {"architectures": ["MixtralForCausalLM"], "num_local_experts": 8, "num_experts_per_tok": 2}
QWEN3_MOE = {
    "architectures": ["Qwen3MoeForCausalLM"], "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True,
    "moe_intermediate_size": 768, "mlp_only_layers": [], "decoder_sparse_step": 1,
}  # fmt: skip
GEMMA3 = {
    "architectures": ["Gemma3ForCausalLM"], "hidden_act": None, "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256, "sliding_window": 512, "rope_theta": 1e6, "rope_local_base_freq": 1e4,
    "head_dim": 64,
}  # fmt: skip
GPT2: dict[str, Any] = {
    "architectures": ["GPT2LMHeadModel"], "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
    "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024, "vocab_size": 50257,
}  # fmt: skip
ABSENT = object()
FULL, SLIDING = "full_attention", "sliding_attention"


def read(changes: dict[str, Any], base: dict[str, Any] = LLAMA) -> Any:
    return config_from_hf({k: v for k, v in (base | changes).items() if v is not ABSENT}, "some/config.json")


def test_sizes_of_a_llama() -> None:
    assert read({}) == EXPECTED
    assert read({"num_key_value_heads": ABSENT, "tie_word_embeddings": ABSENT}) == replace(
        EXPECTED, num_kv_heads=9, tied_embeddings=False
    )


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (MISTRAL, {}),
        (MISTRAL | {"sliding_window": 4096, "head_dim": 80}, {"windows": (4096,) * 30, "head_size": 80}),
        (MISTRAL | {"sliding_window": ABSENT}, {"windows": (4096,) * 30}),
        (QWEN2, {"family": "qwen2"}),
        (
            QWEN2 | {"use_sliding_window": True, "max_window_layers": 28},
            {"family": "qwen2", "windows": (None,) * 28 + (4096,) * 2},
        ),
        (
            QWEN2 | {"use_sliding_window": True, "layer_types": [SLIDING] + [FULL] * 29},
            {"family": "qwen2", "windows": (4096,) + (None,) * 29},
        ),
        (QWEN2 | {"layer_types": [FULL] * 30}, {"family": "qwen2"}),
        (QWEN3, {"family": "qwen3", "head_size": 128, "qk_norm": True}),
        (QWEN3 | {"head_dim": ABSENT}, {"family": "qwen3", "head_size": 128, "qk_norm": True}),
        (MIXTRAL, {"family": "moe", "num_experts": 8, "experts_used": 2}),
        (
            MIXTRAL | {"rope_theta": ABSENT, "sliding_window": 4096},
            {
                "family": "moe", "num_experts": 8, "experts_used": 2, "rope": RopeConfig(1e6),
                "windows": (4096,) * 30,
            },
        ),
        (
            QWEN3_MOE,
            {"family": "moe", "num_experts": 128, "experts_used": 8, "intermediate_size": 768, "qk_norm": True},
        ),
        (
            QWEN3_MOE | {"num_experts": ABSENT, "num_local_experts": 64, "norm_topk_prob": ABSENT},
            {
                "family": "moe", "num_experts": 64, "experts_used": 8, "intermediate_size": 768, "qk_norm": True,
                "normalize_experts": False,
            },
        ),
        (QWEN3_MOE | {"sliding_window": 4096}, {
            "family": "moe", "num_experts": 128, "experts_used": 8, "intermediate_size": 768, "qk_norm": True,
        }),
    ],
)  # fmt: skip
def test_sizes_of_the_other_families(changes: dict[str, Any], expected: dict[str, Any]) -> None:
    assert read(changes) == replace(EXPECTED, **expected)


def test_gemma3_in_old_and_new_spelling() -> None:
    expected = replace(
        EXPECTED,
        family="gemma3",
        rope=RopeConfig(theta=1e6),
        rope_local=RopeConfig(theta=1e4),
        windows=(512, 512, 512, 512, 512, None) * 5,
        attention_scale=0.0625,
        embedding_scale=24.0,
        qk_norm=True,
    )
    assert read(GEMMA3) == expected
    assert (
        read(GEMMA3 | {"rope_theta": ABSENT, "rope_local_base_freq": ABSENT, "sliding_window_pattern": 6}) == expected
    )
    types = {"layer_types": ([SLIDING] * 5 + [FULL]) * 5, "_sliding_window_pattern": 6}
    ropes = {FULL: {"rope_type": "default", "rope_theta": 1e6}, SLIDING: {"rope_type": "default", "rope_theta": 1e4}}
    new = {"rope_theta": ABSENT, "rope_local_base_freq": ABSENT, "rope_parameters": ropes}
    assert read(GEMMA3 | types | new) == expected
    scaling = {"factor": 8.0, "rope_type": "linear"}
    scaled = replace(expected, rope=RopeConfig(theta=1e6, kind="linear", factor=8.0))
    assert read(GEMMA3 | {"rope_scaling": scaling}) == scaled
    new["rope_parameters"] = {FULL: scaling | {"rope_theta": 1e6}, SLIDING: None}
    assert read(GEMMA3 | types | new) == scaled
    assert read(GEMMA3 | {"sliding_window_pattern": 2}).windows == (512, None) * 15
    assert read(GEMMA3 | {"tie_word_embeddings": ABSENT}).tied_embeddings


def test_a_published_multimodal_gemma3_leaves_much_out() -> None:
    text = {
        "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024,
    }  # fmt: skip
    config = read({"architectures": ["Gemma3ForConditionalGeneration"], "text_config": text}, {})
    oracle = transformers.Gemma3TextConfig(**text)
    assert (config.num_heads, config.num_kv_heads, config.head_size) == (8, 4, 256)
    assert config.vocab_size == oracle.vocab_size and config.context_length == oracle.max_position_embeddings
    assert config.norm_eps == oracle.rms_norm_eps and config.tied_embeddings
    assert config.rope == RopeConfig(theta=1e6, kind="linear", factor=8.0) and config.rope_local == RopeConfig(1e4)
    assert config.windows == tuple(1024 if kind == SLIDING else None for kind in oracle.layer_types)
    with pytest.raises(DataError, match=r"some/config.json: text_config.num_hidden_layers is missing"):
        read({"architectures": ["Gemma3ForConditionalGeneration"], "text_config": {}}, {})
    with pytest.raises(DataError, match=r"some/config.json: text_config is missing"):
        read({"architectures": ["Gemma3ForConditionalGeneration"]}, {})


def test_sizes_of_a_gpt2() -> None:
    expected = ModelConfig(
        family="gpt2", vocab_size=50257, hidden_size=768, intermediate_size=3072, num_layers=12, num_heads=12,
        num_kv_heads=12, head_size=64, context_length=1024, norm_eps=1e-5, rope=None, tied_embeddings=True,
        windows=(None,) * 12,
    )  # fmt: skip
    assert read({}, GPT2) == expected
    assert read({"n_inner": 1000, "tie_word_embeddings": False}, GPT2) == replace(
        expected, intermediate_size=1000, tied_embeddings=False
    )
    assert read({"n_positions": ABSENT, "n_ctx": 2048}, GPT2).context_length == 2048
    assert read({"activation_function": "gelu_pytorch_tanh", "reorder_and_upcast_attn": True}, GPT2) == expected


def test_rope_in_both_spellings() -> None:
    new = read({"rope_theta": ABSENT, "rope_parameters": LLAMA3}).rope
    old = read({"rope_theta": 500000.0, "rope_scaling": {k: v for k, v in LLAMA3.items() if k != "rope_theta"}})
    assert new == old.rope
    assert (new.kind, new.theta, new.factor, new.original_context) == ("llama3", 500000.0, 8.0, 64)
    assert read({"rope_scaling": {"type": "linear", "factor": 2.0}}).rope.factor == 2.0
    yarn = {"type": "yarn", "factor": None, "original_max_position_embeddings": 2048}
    assert read({"rope_scaling": yarn}).rope.factor == 4.0


NO_SIZES = [ABSENT, None, "many", -1, 0, 10**12, math.nan, True, [3, 4], {}]


@pytest.mark.parametrize(
    "key",
    [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "max_position_embeddings",
        "rms_norm_eps",
    ],
)
@pytest.mark.parametrize("value", NO_SIZES)
def test_sizes_that_are_no_sizes_are_named(key: str, value: object) -> None:
    with pytest.raises(DataError, match=f"some/config.json: {key} "):
        read({key: value})


@pytest.mark.parametrize("value", NO_SIZES)
@pytest.mark.parametrize("key", ["vocab_size", "n_embd", "n_head", "n_layer", "layer_norm_epsilon"])
def test_sizes_of_a_gpt2_that_are_no_sizes_are_named(key: str, value: object) -> None:
    with pytest.raises(DataError, match=f"some/config.json: {key} "):
        read({key: value}, GPT2)


@pytest.mark.parametrize("value", [x for x in NO_SIZES if x is not ABSENT])
@pytest.mark.parametrize(
    ("family", "key"),
    [
        (MIXTRAL, "num_local_experts"),
        (MIXTRAL, "num_experts_per_tok"),
        (QWEN3_MOE, "moe_intermediate_size"),
        (QWEN3_MOE, "num_experts_per_tok"),
        (GEMMA3, "sliding_window"),
        (GEMMA3, "sliding_window_pattern"),
        (GEMMA3, "query_pre_attn_scalar"),
    ],
)
def test_sizes_of_one_family_that_are_no_sizes_are_named(family: dict[str, Any], key: str, value: object) -> None:
    with pytest.raises(DataError, match=f"some/config.json: {key} "):
        read(family | {key: value})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ABSENT}, "architectures must be a list of one name"),
        ({"architectures": ["MistralForCausalML"]}, "nearest is 'MistralForCausalLM'"),
        (
            {"architectures": ["Gemma2ForCausalLM"]},
            "'Gemma2ForCausalLM' is not supported; nearest is 'Gemma3ForCausalLM'",
        ),
        ({"architectures": ["OPTForCausalLM"]}, 'never falls back .* executor="transformers"'),
        ({"attention_bias": True}, "attention_bias is True, which is not supported"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ({"num_local_experts": 8}, "num_local_experts is 8"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"num_key_value_heads": 4}, "num_key_value_heads is 4, which does not divide"),
        ({"num_attention_heads": 10, "num_key_value_heads": 5}, "hidden_size is 576, not a multiple"),
        ({"head_dim": 63}, "head_dim gives heads of size 63"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings must be true or false"),
        ({"sliding_window": 4096}, "sliding_window is 4096, which LlamaForCausalLM does not define"),
        ({"layer_types": [FULL, SLIDING]}, "layer_types must be 30 times"),
        ({"layer_types": [FULL] * 29 + [SLIDING]}, "layer_types has sliding_attention, but no sliding_window"),
        ({"layer_types": [FULL] * 29 + ["chunked_attention"]}, "layer_types must be 30 times"),
        ({"rope_theta": 0.5}, "rope_theta must be above 1"),
        ({"rope_scaling": "linear"}, "rope_scaling must be an object"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling.type 'dynamic' is not supported"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope_parameters.rope_type 'longrope' is not supported"),
        ({"rope_parameters": {FULL: {"rope_type": "default"}}}, "scales by layer type"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor is missing"),
        ({"rope_parameters": LLAMA3 | {"high_freq_factor": 1.0}}, "high_freq_factor is 1, not above"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0, "truncate": False}}, "rope_scaling.truncate is False"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0, "beta_fast": 0.5}}, "beta_fast is 0.5, not above"),
        (MISTRAL | {"sliding_window": 64, "layer_types": [FULL, SLIDING] * 15}, "layer_types mixes kinds of layers"),
        (QWEN2 | {"num_experts": 60}, "num_experts is 60"),
        (QWEN2 | {"layer_types": [SLIDING] * 30}, "layer_types has sliding_attention, but no sliding_window"),
        (QWEN2 | {"use_sliding_window": "no"}, "use_sliding_window must be true or false"),
        (QWEN3 | {"attention_bias": True}, "attention_bias is True"),
        (
            MIXTRAL | {"num_local_experts": 1024, "num_hidden_layers": 65},
            "num_local_experts is 1024 in 65 layers; 65536 experts are the most",
        ),
        (MIXTRAL | {"num_experts_per_tok": 9}, r"num_experts_per_tok must be in \[1, 8\], got 9"),
        (QWEN3_MOE | {"mlp_only_layers": [0]}, r"mlp_only_layers is \[0\], which is not supported"),
        (QWEN3_MOE | {"decoder_sparse_step": 2}, "decoder_sparse_step is 2"),
        (QWEN3_MOE | {"norm_topk_prob": 1}, "norm_topk_prob must be true or false"),
        (GEMMA3 | {"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0"),
        (GEMMA3 | {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0"),
        (GEMMA3 | {"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
        (GEMMA3 | {"hidden_activation": "gelu"}, "hidden_activation is 'gelu'"),
        (GEMMA3 | {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "rope_parameters has neither"),
        (GEMMA3 | {"rope_parameters": {FULL: {"rope_type": "dynamic"}}}, "rope_parameters.full_attention.rope_type"),
    ],
)
def test_contradictions_and_unsupported_features_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        read(changes)
    assert str(caught.value).startswith("some/config.json: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation_function": "gelu"}, "activation_function is 'gelu'"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
        ({"scale_attn_weights": False}, "scale_attn_weights is False"),
        ({"add_cross_attention": True}, "add_cross_attention is True"),
        ({"n_head": 7}, "n_embd is 768, not a multiple of n_head 7"),
        ({"n_positions": ABSENT, "n_ctx": ABSENT}, "n_positions is missing"),
        ({"n_inner": "wide"}, "n_inner must be an integer"),
    ],
)
def test_what_a_gpt2_may_not_say_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(changes, GPT2)


def test_a_model_type_that_contradicts_the_architecture_is_refused() -> None:
    with pytest.raises(DataError, match="model_type is 'qwen3', but architectures says LlamaForCausalLM"):
        config_from_hf(LLAMA | {"model_type": "qwen3"}, "config.json")
    assert config_from_hf(LLAMA | {"model_type": "llama"}, "config.json") == EXPECTED


def test_two_descriptions_of_rotation_must_agree() -> None:
    new = {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 100000.0}}
    same = config_from_hf(LLAMA | new | {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "config.json")
    assert same.rope == RopeConfig(theta=100000.0, kind="linear", factor=2.0)
    with pytest.raises(DataError, match=r"rope_scaling is .*, rope_parameters says .*; only one"):
        config_from_hf(LLAMA | new | {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}, "config.json")


@pytest.mark.parametrize(
    ("scaling", "top"),
    [({"rope_theta": 3e5}, ABSENT), ({}, 3e5), ({}, ABSENT)],
    ids=["inside", "at the top", "default"],
)
def test_two_descriptions_of_rotation_must_agree_on_its_base(scaling: dict[str, Any], top: Any) -> None:
    both = {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "rope_theta": top}
    both["rope_scaling"] = {"rope_type": "default"} | scaling
    taken = transformers.LlamaConfig(**copy.deepcopy({k: v for k, v in both.items() if v is not ABSENT}))
    assert taken.rope_parameters["rope_theta"] == (1e4 if top is ABSENT and not scaling else 3e5)
    with pytest.raises(DataError, match=r"rope_scaling is .*, rope_parameters says"):
        read(both)


@pytest.mark.parametrize("factor", [1e-300, 1e-9, 0.01])
def test_factors_that_stretch_nothing_are_refused(factor: float) -> None:
    for kind in ("linear", "yarn"):
        with pytest.raises(DataError, match=r"factor must be above 0\.01"):
            config_from_hf(LLAMA | {"rope_scaling": {"rope_type": kind, "factor": factor}}, "config.json")


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"factor": 4.0, "attention_factor": 1e-9}, r"attention_factor must be above 0\.01"),
        ({"original_max_position_embeddings": 1 << 28}, r"factor must be above 0\.01 .*, follows as 3\.05176e-05"),
    ],
)
def test_factors_of_yarn_are_bounded(own: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read({"rope_scaling": {"rope_type": "yarn"} | own})


def test_aliases_and_long_numbers() -> None:
    assert config_from_hf(LLAMA | {"hidden_act": "swish"}, "config.json") == EXPECTED
    with pytest.raises(DataError, match="hidden_size must be in") as caught:
        config_from_hf(LLAMA | {"hidden_size": 10**4000}, "config.json")
    assert len(str(caught.value)) < 200


def test_a_quantized_multimodal_model_is_refused_by_name() -> None:
    text = {key: value for key, value in (LLAMA | GEMMA3).items() if key != "architectures"}
    outer = {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": text}
    assert config_from_hf(outer, "config.json").family == "gemma3"
    named = outer | {"text_config": text | {"model_type": "gemma3_text"}}
    assert config_from_hf(named, "config.json").family == "gemma3"
    with pytest.raises(DataError, match=r"text_config\.model_type is 'llama', but architectures says"):
        config_from_hf(outer | {"text_config": text | {"model_type": "llama"}}, "config.json")
    with pytest.raises(DataError, match="quantization_config is"):
        config_from_hf(outer | {"quantization_config": {"quant_method": "fp8"}}, "config.json")
