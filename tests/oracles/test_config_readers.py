"""Configurations of files: what is read, and what is refused under its name."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader
from oracles.random_models import LLAMA3, SHAPES, Shape, hf_config, random_model, write_gguf

from kvik.errors import DataError
from kvik.models.config import ModelConfig, RopeConfig
from kvik.models.config_readers import config_from_gguf, config_from_hf
from kvik.models.rope import rope_table

METADATA: dict[str, Any] = {
    "general.architecture": "llama",
    "llama.block_count": 30,
    "llama.context_length": 8192,
    "llama.embedding_length": 576,
    "llama.feed_forward_length": 1536,
    "llama.attention.head_count": 9,
    "llama.attention.head_count_kv": 3,
    "llama.rope.freq_base": 100000.0,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.vocab_size": 49152,
    "llama.rope.dimension_count": 64,
}
SHAPES_OF_TENSORS: dict[str, tuple[int, ...]] = {"token_embd.weight": (49152, 576), "output_norm.weight": (576,)}
HF: dict[str, Any] = {
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
EXPECTED = ModelConfig(
    family="llama",
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
    head_size=64,
    context_length=8192,
    norm_eps=1e-5,
    rope=RopeConfig(theta=100000.0),
    tied_embeddings=True,
)
S = "llama.rope.scaling."
ABSENT = object()


def read_gguf_config(changes: dict[str, Any], shapes: dict[str, Any] | None = None, **options: Any) -> ModelConfig:
    metadata = {k: v for k, v in (METADATA | changes).items() if v is not ABSENT}
    tensor_shapes = {k: v for k, v in (SHAPES_OF_TENSORS | (shapes or {})).items() if v is not ABSENT}
    return config_from_gguf(metadata, tensor_shapes, "some.gguf", **options)


def read_hf_config(changes: dict[str, Any]) -> ModelConfig:
    return config_from_hf({k: v for k, v in (HF | changes).items() if v is not ABSENT}, "some/config.json")


def test_both_kinds_of_file_give_the_same_configuration() -> None:
    assert read_gguf_config({}) == EXPECTED
    assert read_hf_config({}) == EXPECTED


def test_what_may_be_left_out() -> None:
    left_out = ("llama.vocab_size", "llama.rope.dimension_count", "llama.rope.freq_base")
    short = read_gguf_config(dict.fromkeys(left_out, ABSENT))
    assert short.vocab_size == 49152 and short.rope == RopeConfig(theta=10000.0)
    assert read_gguf_config({"llama.attention.head_count_kv": ABSENT}).num_kv_heads == 9
    assert read_hf_config({"num_key_value_heads": ABSENT, "tie_word_embeddings": ABSENT}) == ModelConfig(
        **(vars(EXPECTED) | {"num_kv_heads": 9, "tied_embeddings": False})
    )


def test_head_size_window_and_head_of_their_own() -> None:
    keys = {"llama.attention.key_length": 80, "llama.attention.value_length": 80, "llama.rope.dimension_count": 80}
    config = read_gguf_config(keys | {"llama.attention.sliding_window": 4096}, {"output.weight": (49152, 576)})
    assert (config.head_size, config.sliding_window, config.tied_embeddings) == (80, 4096, False)
    mistral = {"architectures": ["MistralForCausalLM"], "head_dim": 80, "sliding_window": 4096}
    assert (read_hf_config(mistral).head_size, read_hf_config(mistral).sliding_window) == (80, 4096)
    assert read_hf_config(mistral | {"sliding_window": None}).sliding_window is None


def test_counts_given_by_layer_are_read_where_the_layers_agree() -> None:
    config = read_gguf_config({"llama.attention.head_count_kv": [3] * 30, "llama.feed_forward_length": [1536] * 30})
    assert config == EXPECTED
    with pytest.raises(DataError, match="head_count_kv differs between layers"):
        read_gguf_config({"llama.attention.head_count_kv": [3] * 29 + [1]})


def test_gguf_rope_scaling() -> None:
    assert read_gguf_config({S + "type": "none", S + "factor": 4.0}).rope.kind == "default"
    for keys in ({S + "type": "linear", S + "factor": 4.0}, {S + "factor": 4.0}, {"llama.rope.scale_linear": 4.0}):
        assert read_gguf_config(keys).rope == RopeConfig(theta=100000.0, kind="linear", factor=4.0)
    yarn = {S + "type": "yarn", S + "factor": 4.0, S + "original_context_length": 2048, S + "attn_factor": 0.5}
    rope = read_gguf_config(yarn | {S + "yarn_beta_fast": 16.0, S + "yarn_beta_slow": 2.0}).rope
    assert (rope.kind, rope.factor, rope.original_context, rope.beta_fast, rope.beta_slow) == ("yarn", 4.0, 2048, 16, 2)
    assert rope.attention_factor == pytest.approx(0.5 * (0.1 * math.log(4.0) + 1.0))
    divisors = [1.0] * 16 + [8.0] * 16
    config = read_gguf_config({}, {"rope_freqs.weight": (32,)}, rope_divisors=divisors)
    assert config.rope == RopeConfig(theta=100000.0, divisors=tuple(divisors))


def test_hf_rope_in_both_spellings() -> None:
    new = read_hf_config({"rope_theta": ABSENT, "rope_parameters": LLAMA3}).rope
    old = read_hf_config(
        {"rope_theta": 500000.0, "rope_scaling": {k: v for k, v in LLAMA3.items() if k != "rope_theta"}}
    )
    assert new == old.rope
    assert (new.kind, new.theta, new.factor, new.original_context) == ("llama3", 500000.0, 8.0, 64)
    assert read_hf_config({"rope_scaling": {"type": "linear", "factor": 2.0}}).rope.factor == 2.0
    yarn = {"type": "yarn", "factor": None, "original_max_position_embeddings": 2048}
    assert read_hf_config({"rope_scaling": yarn}).rope.factor == 4.0


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_model_and_its_gguf_file_agree(shape: Shape, tmp_path: Path) -> None:
    model = random_model(shape)
    expected = config_from_hf(hf_config(model), "config.json")
    reader = GGUFReader(write_gguf(model, tmp_path / "m.gguf"))
    metadata = {name: f.contents() for name, f in reader.fields.items()}
    tensors = {t.name: t for t in reader.tensors}
    divisors = tensors["rope_freqs.weight"].data if "rope_freqs.weight" in tensors else None
    shapes = {name: tuple(int(n) for n in reversed(t.shape)) for name, t in tensors.items()}
    config = config_from_gguf(metadata, shapes, "m.gguf", rope_divisors=divisors)
    for field in ("rope", "norm_eps"):
        got, want = getattr(config, field), getattr(expected, field)
        if field == "rope":
            got, want = (rope_table(r, shape.head_size, shape.context) for r in (got, want))
            assert got.inv_freq == pytest.approx(want.inv_freq, rel=1e-6)
            got, want = got.factor, want.factor
        assert got == pytest.approx(want, rel=1e-6)
    same = {"rope": expected.rope, "norm_eps": expected.norm_eps}
    assert ModelConfig(**(vars(config) | same)) == expected


@pytest.mark.parametrize("key", [k for k in METADATA if "kv" not in k and "rope" not in k and "vocab" not in k])
def test_missing_gguf_keys_are_named(key: str) -> None:
    with pytest.raises(DataError, match=f"some.gguf: {key} is missing"):
        read_gguf_config({key: ABSENT})


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
@pytest.mark.parametrize("value", [ABSENT, None, "many", -1, 0, 10**12, math.nan, True, [3, 4], {}])
def test_hf_sizes_that_are_no_sizes_are_named(key: str, value: object) -> None:
    with pytest.raises(DataError, match=f"some/config.json: {key} "):
        read_hf_config({key: value})


@pytest.mark.parametrize("key", [k for k in METADATA if not k.startswith("general")])
@pytest.mark.parametrize("value", ["many", -1, 0, 1e300, math.nan, math.inf, True, [], {}])
def test_gguf_values_that_are_no_sizes_are_named(key: str, value: object) -> None:
    with pytest.raises(DataError, match=f"some.gguf: {key} "):
        read_gguf_config({key: value})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"general.architecture": "llamo"}, "'llamo' is not supported; nearest is 'llama'"),
        ({"general.architecture": 3}, "general.architecture must be a string"),
        ({"llama.attention.head_count_kv": 2}, "head_count_kv is 2, which does not divide the 9"),
        (
            {"llama.attention.head_count": 7, "llama.attention.head_count_kv": 7},
            "embedding_length is 576, not a multiple",
        ),
        ({"llama.attention.key_length": 63, "llama.rope.dimension_count": ABSENT}, "key_length gives heads of size 63"),
        ({"llama.attention.value_length": 32}, "value_length is 32"),
        ({"llama.rope.dimension_count": 32}, "dimension_count is 32"),
        ({"llama.embedding_length": 1152}, "embedding_length is 1152, but token_embd.weight"),
        ({"llama.vocab_size": 49153}, "vocab_size is 49153, but token_embd.weight has 49152"),
        ({"tokenizer.ggml.tokens": ["x"] * 49153}, "tokenizer.ggml.tokens has 49153"),
        ({"llama.expert_count": 8}, "expert_count is 8, which is not supported"),
        ({"llama.attention.causal": False}, "causal is False"),
        ({"llama.logit_scale": 2.0}, "logit_scale is 2.0"),
        ({S + "type": "longrope"}, "'longrope' is not supported"),
        ({S + "type": "dynamic"}, "'dynamic' is not supported"),
        ({S + "type": "linear", S + "factor": -1.0}, "factor must be above 0"),
        ({S + "type": "yarn", S + "yarn_ext_factor": 0.5}, "yarn_ext_factor is 0.5"),
        ({S + "type": "yarn", S + "yarn_beta_slow": 64.0}, "yarn_beta_fast is 32, not above"),
        ({"llama.attention.sliding_window": -5}, "sliding_window must be in"),
    ],
)
def test_gguf_contradictions_and_unsupported_features_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        read_gguf_config(changes)
    assert str(caught.value).startswith("some.gguf: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("shapes", "options", "message"),
    [
        ({"token_embd.weight": ABSENT}, {}, "'token_embd.weight': is missing"),
        ({"token_embd.weight": (49152,)}, {}, "'token_embd.weight': must be a table"),
        ({"token_embd.weight": (0, 576)}, {}, "'token_embd.weight': must be a table"),
        ({"blk.0.attn_q.bias": (576,)}, {}, "'blk.0.attn_q.bias': biases are not supported"),
        ({"rope_freqs.weight": (32,)}, {}, "'rope_freqs.weight': its values are needed"),
        ({"rope_freqs.weight": (31,)}, {"rope_divisors": [1.0] * 31}, "must hold 32"),
        ({"rope_freqs.weight": (32,)}, {"rope_divisors": [0.0] * 32}, "must hold 32"),
    ],
)
def test_gguf_tensors_that_do_not_fit_are_named(shapes: dict[str, Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_gguf_config({}, shapes, **options)


def test_two_scalings_at_once_are_refused() -> None:
    with pytest.raises(DataError, match="only one can scale"):
        read_gguf_config({S + "type": "linear", S + "factor": 2.0}, rope_divisors=[1.0] * 32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ABSENT}, "architectures must be a list of one name"),
        ({"architectures": ["MistralForCausalML"]}, "nearest is 'MistralForCausalLM'"),
        ({"architectures": ["GPT2LMHeadModel"]}, "'GPT2LMHeadModel' is not supported"),
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
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types must all be"),
        ({"rope_theta": 0.5}, "rope_theta must be above 1"),
        ({"rope_scaling": "linear"}, "rope_scaling must be an object"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling.type 'dynamic' is not supported"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope_parameters.rope_type 'longrope' is not supported"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "scales by layer type"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor is missing"),
        ({"rope_parameters": LLAMA3 | {"high_freq_factor": 1.0}}, "high_freq_factor is 1, not above"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0, "truncate": False}}, "rope_scaling.truncate is False"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0, "beta_fast": 0.5}}, "beta_fast is 0.5, not above"),
    ],
)
def test_hf_contradictions_and_unsupported_features_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        read_hf_config(changes)
    assert str(caught.value).startswith("some/config.json: ") and "\n" not in str(caught.value)


def test_known_architectures_may_be_passed_in() -> None:
    with pytest.raises(DataError, match="nearest is 'llamb' of: gpt, llamb"):
        read_gguf_config({}, architectures={"gpt": "gpt", "llamb": "llama"})
