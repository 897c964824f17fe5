"""Configurations of GGUF files: what is read, and what is refused under its name."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from oracles.configurations import LLAMA

from kvik.errors import DataError
from kvik.models.config import RopeConfig
from kvik.models.gguf_config import config_from_gguf

SIZES: dict[str, Any] = {
    "block_count": 30,
    "context_length": 8192,
    "embedding_length": 576,
    "feed_forward_length": 1536,
    "attention.head_count": 9,
    "attention.head_count_kv": 3,
    "rope.freq_base": 100000.0,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "vocab_size": 49152,
    "rope.dimension_count": 64,
}
SHAPES_OF_TENSORS: dict[str, tuple[int, ...]] = {"token_embd.weight": (49152, 576), "output_norm.weight": (576,)}
S = "rope.scaling."
ABSENT = object()

EXPERTS = {"expert_count": 8, "expert_used_count": 2}
QWEN_EXPERTS = {"expert_count": 128, "expert_used_count": 8, "expert_feed_forward_length": 768}
GEMMA = {"attention.sliding_window": 512, "rope.freq_base": 1e6}
GPT2 = {
    "attention.layer_norm_rms_epsilon": ABSENT, "attention.layer_norm_epsilon": 1e-5, "rope.freq_base": ABSENT,
    "attention.head_count_kv": ABSENT, "rope.dimension_count": ABSENT, "vocab_size": ABSENT,
}  # fmt: skip


def read(changes: dict[str, Any], shapes: dict[str, Any] | None = None, arch: str = "llama", **options: Any) -> Any:
    """The configuration of a file with these sizes, its keys without the architecture."""
    metadata = {f"{arch}.{k}": v for k, v in (SIZES | changes).items() if v is not ABSENT}
    metadata |= {"general.architecture": arch}
    tensor_shapes = {k: v for k, v in (SHAPES_OF_TENSORS | (shapes or {})).items() if v is not ABSENT}
    return config_from_gguf(metadata, tensor_shapes, "some.gguf", **options)


def test_sizes_of_a_llama() -> None:
    assert read({}) == LLAMA


@pytest.mark.parametrize(
    ("arch", "changes", "expected"),
    [
        ("qwen2", {}, {"family": "qwen2"}),
        (
            "qwen3",
            {"attention.key_length": 128, "attention.value_length": 128, "rope.dimension_count": ABSENT},
            {"family": "qwen3", "head_size": 128, "qk_norm": True},
        ),
        (
            "qwen3moe",
            QWEN_EXPERTS,
            {"family": "moe", "num_experts": 128, "experts_used": 8, "intermediate_size": 768, "qk_norm": True},
        ),
        (
            "qwen3moe",
            QWEN_EXPERTS | {"expert_weights_norm": False, "expert_gating_func": 1, "expert_weights_scale": 1.0},
            {
                "family": "moe", "num_experts": 128, "experts_used": 8, "intermediate_size": 768, "qk_norm": True,
                "normalize_experts": False,
            },
        ),
        ("llama", EXPERTS, {"family": "moe", "num_experts": 8, "experts_used": 2}),
        ("llama", {"expert_count": 0, "expert_used_count": 0}, {}),
        (
            "gpt2",
            GPT2,
            {"family": "gpt2", "num_kv_heads": 9, "rope": None},
        ),
    ],
)  # fmt: skip
def test_sizes_of_the_other_families(arch: str, changes: dict[str, Any], expected: dict[str, Any]) -> None:
    assert read(changes, arch=arch) == replace(LLAMA, **expected)


def test_gemma3_knows_what_its_files_leave_out() -> None:
    config = read(GEMMA, arch="gemma3")
    assert config == replace(
        LLAMA,
        family="gemma3",
        rope=RopeConfig(theta=1e6),
        rope_local=RopeConfig(theta=10000.0),
        windows=(512, 512, 512, 512, 512, None) * 5,
        attention_scale=0.125,
        embedding_scale=24.0,
        qk_norm=True,
    )
    told = {"rope.freq_base_swa": 5e4, "attention.scale": 0.5, "attention.sliding_window_pattern": 2}
    config = read(GEMMA | told, arch="gemma3")
    assert config.rope_local == RopeConfig(theta=5e4) and config.attention_scale == 0.5
    assert config.windows == (512, None) * 15
    one_by_one = [False] * 29 + [True]
    config = read(GEMMA | {"attention.sliding_window_pattern": one_by_one}, arch="gemma3")
    assert config.windows == (None,) * 29 + (512,)
    assert read(GEMMA | {"attention.sliding_window": 0}, arch="gemma3").windows == (None,) * 30
    scaled = read(GEMMA | {S + "type": "linear", S + "factor": 8.0}, arch="gemma3")
    assert (scaled.rope.factor, scaled.rope_local.factor) == (8.0, 1.0)


def test_gemma3_of_62_layers_scales_by_its_width() -> None:
    sizes = {"block_count": 62, "attention.key_length": 128, "rope.dimension_count": 128}
    assert read(GEMMA | sizes, arch="gemma3").attention_scale == 64**-0.5


def test_what_may_be_left_out() -> None:
    left_out = ("vocab_size", "rope.dimension_count", "rope.freq_base")
    short = read(dict.fromkeys(left_out, ABSENT))
    assert short.vocab_size == 49152 and short.rope == RopeConfig(theta=10000.0)
    assert read({"attention.head_count_kv": ABSENT}).num_kv_heads == 9


def test_head_size_window_and_head_of_their_own() -> None:
    keys = {"attention.key_length": 80, "attention.value_length": 80, "rope.dimension_count": 80}
    config = read(keys | {"attention.sliding_window": 4096}, {"output.weight": (49152, 576)})
    assert (config.head_size, config.windows, config.tied_embeddings) == (80, (4096,) * 30, False)
    assert read({"attention.sliding_window": 0}).windows == (None,) * 30


def test_counts_given_by_layer_are_read_where_the_layers_agree() -> None:
    config = read({"attention.head_count_kv": [3] * 30, "feed_forward_length": [1536] * 30})
    assert config == LLAMA
    with pytest.raises(DataError, match="head_count_kv differs between layers"):
        read({"attention.head_count_kv": [3] * 29 + [1]})


def test_rope_scaling() -> None:
    assert read({S + "type": "none", S + "factor": 4.0}).rope.kind == "default"
    for keys in ({S + "type": "linear", S + "factor": 4.0}, {S + "factor": 4.0}, {"rope.scale_linear": 4.0}):
        assert read(keys).rope == RopeConfig(theta=100000.0, kind="linear", factor=4.0)
    assert read({S + "factor": 4.0, "rope.scale_linear": 2.0}).rope.factor == 4.0
    yarn = {S + "type": "yarn", S + "factor": 4.0, S + "original_context_length": 2048, S + "attn_factor": 0.5}
    rope = read(yarn | {S + "yarn_beta_fast": 16.0, S + "yarn_beta_slow": 2.0}).rope
    assert (rope.kind, rope.factor, rope.original_context, rope.beta_fast, rope.beta_slow) == ("yarn", 4.0, 2048, 16, 2)
    assert rope.attention_factor == pytest.approx(0.5 * (0.1 * math.log(4.0) + 1.0))
    divisors = [1.0] * 16 + [8.0] * 16
    config = read({}, {"rope_freqs.weight": (32,)}, rope_divisors=divisors)
    assert config.rope == RopeConfig(theta=100000.0, divisors=tuple(divisors))


@pytest.mark.parametrize("key", [k for k in SIZES if "kv" not in k and "rope" not in k and "vocab" not in k])
def test_missing_keys_are_named(key: str) -> None:
    with pytest.raises(DataError, match=f"some.gguf: llama.{key} is missing"):
        read({key: ABSENT})


@pytest.mark.parametrize(
    ("arch", "changes", "key"),
    [
        ("llama", EXPERTS, "expert_used_count"),
        ("qwen3moe", QWEN_EXPERTS, "expert_count"),
        ("qwen3moe", QWEN_EXPERTS, "expert_feed_forward_length"),
        ("gpt2", GPT2, "attention.layer_norm_epsilon"),
        ("gemma3", GEMMA, "attention.layer_norm_rms_epsilon"),
    ],
)
def test_missing_keys_of_one_family_are_named(arch: str, changes: dict[str, Any], key: str) -> None:
    with pytest.raises(DataError, match=f"some.gguf: {arch}.{key} is missing"):
        read(changes | {key: ABSENT}, arch=arch)


@pytest.mark.parametrize("key", SIZES)
@pytest.mark.parametrize("value", ["many", -1, 0, 1e300, math.nan, math.inf, True, [], {}])
def test_values_that_are_no_sizes_are_named(key: str, value: object) -> None:
    with pytest.raises(DataError, match=f"some.gguf: llama.{key} "):
        read({key: value})


@pytest.mark.parametrize("value", ["many", -1, 1e300, math.nan, True, [], {}])
@pytest.mark.parametrize(
    ("arch", "changes", "key"),
    [
        ("llama", EXPERTS, "expert_count"),
        ("llama", EXPERTS, "expert_used_count"),
        ("qwen3moe", QWEN_EXPERTS, "expert_feed_forward_length"),
        ("gemma3", GEMMA, "attention.sliding_window"),
        ("gemma3", GEMMA, "attention.sliding_window_pattern"),
        ("gemma3", GEMMA, "rope.freq_base_swa"),
        ("gemma3", GEMMA, "attention.scale"),
    ],
)
def test_values_of_one_family_that_are_no_sizes_are_named(
    arch: str, changes: dict[str, Any], key: str, value: object
) -> None:
    with pytest.raises(DataError, match=f"some.gguf: {arch}.{key} "):
        read(changes | {key: value}, arch=arch)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention.head_count_kv": 2}, "head_count_kv is 2, which does not divide the 9"),
        ({"attention.head_count": 7, "attention.head_count_kv": 7}, "embedding_length is 576, not a multiple"),
        ({"attention.key_length": 63, "rope.dimension_count": ABSENT}, "key_length gives heads of size 63"),
        ({"attention.value_length": 32}, "value_length is 32"),
        ({"rope.dimension_count": 32}, "dimension_count is 32"),
        ({"embedding_length": 1152}, "embedding_length is 1152, but token_embd.weight"),
        ({"vocab_size": 49153}, "vocab_size is 49153, but token_embd.weight has 49152"),
        ({"attention.causal": False}, "causal is False"),
        ({"logit_scale": 2.0}, "logit_scale is 2.0"),
        ({"attention.scale": 0.5}, "attention.scale is 0.5"),
        ({S + "type": "longrope"}, "'longrope' is not supported"),
        ({S + "type": "dynamic"}, "'dynamic' is not supported"),
        ({S + "type": "linear", S + "factor": -1.0}, "factor must be above 0"),
        ({S + "type": "yarn", S + "yarn_ext_factor": 0.5}, "yarn_ext_factor is 0.5"),
        ({S + "type": "yarn", S + "yarn_beta_slow": 64.0}, "yarn_beta_fast is 32, not above"),
        ({"attention.sliding_window": -5}, "sliding_window must be in"),
        (
            EXPERTS | {"expert_count": 1024, "block_count": 65},
            "expert_count is 1024 in 65 layers; 65536 experts are the most",
        ),
        (EXPERTS | {"expert_used_count": 9}, r"expert_used_count must be in \[1, 8\], got 9"),
        (EXPERTS | {"expert_shared_count": 1}, "expert_shared_count is 1, which is not supported"),
        (EXPERTS | {"expert_gating_func": 2}, "expert_gating_func is 2, which is not supported"),
        (EXPERTS | {"expert_weights_scale": 2.5}, "expert_weights_scale is 2.5"),
        (EXPERTS | {"expert_group_count": 8}, "expert_group_count is 8"),
        (EXPERTS | {"leading_dense_block_count": 1}, "leading_dense_block_count is 1"),
    ],
)
def test_contradictions_and_unsupported_features_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        read(changes)
    assert str(caught.value).startswith("some.gguf: llama.") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arch", "changes", "message"),
    [
        ("qwen2", {"expert_count": 4}, "qwen2.expert_count is 4"),
        ("llama", {S + "type": "none", S + "attn_factor": 2.0}, "attn_factor is 2.0"),
        ("llama", {S + "type": "linear", S + "factor": 4.0, S + "attn_factor": 2.0}, "attn_factor is 2.0"),
        ("qwen3", {"attention.sliding_window": 4096}, "qwen3.attention.sliding_window is 4096"),
        ("gpt2", GPT2 | {"attention.sliding_window": 4096}, "gpt2.attention.sliding_window is 4096"),
        ("gemma3", GEMMA | {"final_logit_softcapping": 30.0}, "gemma3.final_logit_softcapping is 30.0"),
        ("gemma3", GEMMA | {"attn_logit_softcapping": 50.0}, "gemma3.attn_logit_softcapping is 50.0"),
        ("gemma3", GEMMA | {"attention.sliding_window_pattern": [True] * 29}, "must be a number or 30 times"),
        ("gemma3", GEMMA | {"attention.sliding_window_pattern": [1] * 30}, "must be a number or 30 times"),
        ("gemma3", GEMMA | {"attention.key_length_swa": 32}, "key_length_swa is 32, but only the head size, 64"),
        ("qwen3moe", QWEN_EXPERTS | {"expert_shared_feed_forward_length": 64}, "shared_feed_forward_length is 64"),
    ],
)
def test_features_a_family_does_not_have_are_named(arch: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(changes, arch=arch)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("llamo", "'llamo' is not supported; nearest is 'llama' of: gemma3, gpt2, llama, qwen2, qwen3, qwen3moe"),
        ("gemma2", "nearest is 'gemma3'"),
        ("qwen2moe", "nearest is 'qwen3moe'"),
        ("qwen2moe", 'never falls back to another implementation such as executor="transformers"'),
        (3, "general.architecture must be a string"),
        (None, "general.architecture is missing"),
    ],
)
def test_unknown_architectures_name_the_nearest(name: object, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        config_from_gguf({"general.architecture": name}, SHAPES_OF_TENSORS, "some.gguf")
    assert str(caught.value).startswith("some.gguf: ") and "\n" not in str(caught.value)


def test_more_tokens_than_rows_are_refused() -> None:
    metadata = {f"llama.{k}": v for k, v in SIZES.items()} | {"general.architecture": "llama"}
    with pytest.raises(DataError, match=r"some.gguf: tokenizer.ggml.tokens has 49153"):
        config_from_gguf(metadata | {"tokenizer.ggml.tokens": ["x"] * 49153}, SHAPES_OF_TENSORS, "some.gguf")


@pytest.mark.parametrize(
    ("shapes", "options", "message"),
    [
        ({"token_embd.weight": ABSENT}, {}, "'token_embd.weight': is missing"),
        ({"token_embd.weight": (49152,)}, {}, "'token_embd.weight': must be a table"),
        ({"token_embd.weight": (0, 576)}, {}, "'token_embd.weight': must be a table"),
        ({"rope_freqs.weight": (32,)}, {}, "'rope_freqs.weight': its values are needed"),
        ({"rope_freqs.weight": (31,)}, {"rope_divisors": [1.0] * 31}, "must hold 32"),
        ({"rope_freqs.weight": (32,)}, {"rope_divisors": [0.0] * 32}, "must hold 32"),
        ({"rope_freqs.weight": (32,)}, {"rope_divisors": [1e-9] * 32}, "above 0.01"),
    ],
)
def test_tensors_that_do_not_fit_are_named(shapes: dict[str, Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read({}, shapes, **options)


def test_experts_one_by_one_are_refused() -> None:
    with pytest.raises(DataError, match=r"'blk.0.ffn_gate.0.weight': keeps one expert alone"):
        read(EXPERTS, {"blk.0.ffn_gate.0.weight": (1536, 576)})


def test_two_scalings_at_once_are_refused() -> None:
    with pytest.raises(DataError, match="only one can scale"):
        read({S + "type": "linear", S + "factor": 2.0}, rope_divisors=[1.0] * 32)
