"""What a file says about its model, checked and turned into a `ModelConfig`.

Every field is validated here, once: a wrong one is a DataError that names key and file, and a feature that this
version does not compute is refused by name, never ignored.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping

from kvik.errors import DataError
from kvik.models.config import ModelConfig, RopeConfig
from kvik.models.config_fields import Fields, Path, short
from kvik.models.rope import yarn_attention_factor

__all__ = ["GGUF_ARCHITECTURES", "HF_ARCHITECTURES", "config_from_gguf", "config_from_hf"]

GGUF_ARCHITECTURES: Mapping[str, str] = {"llama": "llama"}
"""The family that runs a GGUF file's `general.architecture`."""

HF_ARCHITECTURES: Mapping[str, str] = {"LlamaForCausalLM": "llama", "MistralForCausalLM": "llama"}
"""The family that runs an entry of config.json's `architectures`."""

MAX_WIDTH = 1 << 20
MAX_LAYERS = 1024
MAX_HEADS = 4096
MAX_HEAD_SIZE = 1024
MAX_VOCAB = 1 << 20
MAX_CONTEXT = 1 << 28
MAX_FACTOR = 65536.0

GGUF_NEUTRAL: Mapping[str, object] = {
    "expert_count": 0,
    "attention.causal": True,
    "attention.clamp_kqv": 0.0,
    "attention.max_alibi_bias": 0.0,
    "attention.scale": 0.0,
    "attn_logit_softcapping": 0.0,
    "embedding_scale": 0.0,
    "final_logit_softcapping": 0.0,
    "logit_scale": 0.0,
    "residual_scale": 0.0,
    "use_parallel_residual": False,
}
"""Metadata that would change the computation; any other value than this one is refused."""

HF_NEUTRAL: Mapping[str, object] = {
    "attention_bias": False,
    "hidden_act": "silu",
    "mlp_bias": False,
    "num_local_experts": 0,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
}


def config_from_gguf(
    metadata: Mapping[str, object],
    tensor_shapes: Mapping[str, tuple[int, ...]],
    path: Path,
    *,
    rope_divisors: Iterable[float] | None = None,
    architectures: Mapping[str, str] = GGUF_ARCHITECTURES,
) -> ModelConfig:
    """The configuration of a GGUF file's model.

    Args:
        metadata: the file's keys and values.
        tensor_shapes: shapes of its tensors, rows first.
        path: the file, for messages.
        rope_divisors: values of the tensor `rope_freqs.weight`, required where the file has it.
        architectures: family by `general.architecture`.

    Raises DataError for a missing, mistyped, absurd or contradictory key and for an unsupported feature.
    """
    fields = Fields(metadata, path)
    arch = fields.text_or_none("general.architecture")
    family = _family(fields, "general.architecture", arch, architectures)
    p = f"{arch}."
    fields.refuse_unless(GGUF_NEUTRAL, p)
    for name in tensor_shapes:
        if name.endswith(".bias"):
            raise DataError("biases are not supported", path=path, tensor=name)
    vocab_size = _gguf_vocab_size(fields, p, tensor_shapes)
    hidden = fields.integer(p + "embedding_length", 1, MAX_WIDTH)
    embedding = tensor_shapes["token_embd.weight"]
    if embedding[1] != hidden:
        raise fields.error(p + "embedding_length", f"is {hidden}, but token_embd.weight has shape {embedding}")
    heads = fields.required(p + "attention.head_count", fields.per_layer(p + "attention.head_count", MAX_HEADS))
    head_size = _gguf_head_size(fields, p, hidden, heads)
    context = fields.integer(p + "context_length", 1, MAX_CONTEXT)
    layers = fields.integer(p + "block_count", 1, MAX_LAYERS)
    return ModelConfig(
        family=family,
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=fields.required(
            p + "feed_forward_length", fields.per_layer(p + "feed_forward_length", MAX_WIDTH)
        ),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=_kv_heads(fields, p + "attention.head_count_kv", heads),
        head_size=head_size,
        context_length=context,
        norm_eps=fields.real(p + "attention.layer_norm_rms_epsilon", 0.0, 0.1),
        rope=_gguf_rope(fields, p, head_size, "rope_freqs.weight" in tensor_shapes, rope_divisors),
        tied_embeddings="output.weight" not in tensor_shapes,
        windows=(fields.integer_or_none(p + "attention.sliding_window", 1, MAX_CONTEXT),) * layers,
    )


def config_from_hf(
    config: Mapping[str, object], path: Path, *, architectures: Mapping[str, str] = HF_ARCHITECTURES
) -> ModelConfig:
    """The configuration of a Hugging Face folder's model, from its config.json.

    Raises DataError for a missing, mistyped, absurd or contradictory key and for an unsupported feature.
    """
    fields = Fields(config, path)
    names = config.get("architectures")
    if not isinstance(names, list | tuple) or len(names) != 1 or not isinstance(names[0], str):
        raise fields.error("architectures", f"must be a list of one name, got {short(names)}")
    family = _family(fields, "architectures", names[0], architectures)
    fields.refuse_unless(HF_NEUTRAL)
    hidden = fields.integer("hidden_size", 1, MAX_WIDTH)
    heads = fields.integer("num_attention_heads", 1, MAX_HEADS)
    head_size = fields.integer_or_none("head_dim", 1, MAX_HEAD_SIZE)
    if head_size is None:
        head_size = _divided(fields, "hidden_size", hidden, "num_attention_heads", heads)
    context = fields.integer("max_position_embeddings", 1, MAX_CONTEXT)
    layers = fields.integer("num_hidden_layers", 1, MAX_LAYERS)
    return ModelConfig(
        family=family,
        vocab_size=fields.integer("vocab_size", 1, MAX_VOCAB),
        hidden_size=hidden,
        intermediate_size=fields.integer("intermediate_size", 1, MAX_WIDTH),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=_kv_heads(fields, "num_key_value_heads", heads),
        head_size=_even(fields, "head_dim", head_size),
        context_length=context,
        norm_eps=fields.real("rms_norm_eps", 0.0, 0.1),
        rope=_hf_rope(fields, context),
        tied_embeddings=fields.flag("tie_word_embeddings", False),
        windows=(_hf_window(fields, names[0]),) * layers,
    )


def _family(fields: Fields, key: str, name: str | None, architectures: Mapping[str, str]) -> str:
    if name is None:
        raise fields.error(key, "is missing")
    if name not in architectures:
        nearest = difflib.get_close_matches(name, architectures, 1, 0.0)
        known = ", ".join(sorted(architectures))
        raise fields.error(key, f"{short(name)} is not supported; nearest is {nearest[0]!r} of: {known}")
    return architectures[name]


def _kv_heads(fields: Fields, key: str, heads: int) -> int:
    kv_heads = fields.per_layer(key, MAX_HEADS)
    if kv_heads is None:
        return heads
    if heads % kv_heads:
        raise fields.error(key, f"is {kv_heads}, which does not divide the {heads} query heads")
    return kv_heads


def _divided(fields: Fields, key: str, width: int, heads_key: str, heads: int) -> int:
    if width % heads:
        raise fields.error(key, f"is {width}, not a multiple of {heads_key} {heads}")
    return width // heads


def _even(fields: Fields, key: str, head_size: int) -> int:
    if head_size % 2 or head_size > MAX_HEAD_SIZE:
        raise fields.error(key, f"gives heads of size {head_size}; it must be even and at most {MAX_HEAD_SIZE}")
    return head_size


def _gguf_vocab_size(fields: Fields, p: str, tensor_shapes: Mapping[str, tuple[int, ...]]) -> int:
    shape = tensor_shapes.get("token_embd.weight")
    if shape is None:
        raise DataError("is missing", path=fields.path, tensor="token_embd.weight")
    if len(shape) != 2 or not 1 <= shape[0] <= MAX_VOCAB:
        raise DataError(
            f"must be a table of 1 to {MAX_VOCAB} rows, got shape {shape}", path=fields.path, tensor="token_embd.weight"
        )
    declared = fields.integer_or_none(p + "vocab_size", 1, MAX_VOCAB)
    if declared is not None and declared != shape[0]:
        raise fields.error(p + "vocab_size", f"is {declared}, but token_embd.weight has {shape[0]} rows")
    tokens = fields.values.get("tokenizer.ggml.tokens")
    if isinstance(tokens, list | tuple) and len(tokens) > shape[0]:
        raise fields.error("tokenizer.ggml.tokens", f"has {len(tokens)} entries, token_embd.weight {shape[0]} rows")
    return shape[0]


def _gguf_head_size(fields: Fields, p: str, hidden: int, heads: int) -> int:
    key = p + "attention.key_length"
    size = fields.integer_or_none(key, 1, MAX_HEAD_SIZE)
    if size is None:
        key = p + "embedding_length"
        size = _divided(fields, key, hidden, p + "attention.head_count", heads)
    for other in ("attention.value_length", "rope.dimension_count"):
        value = fields.integer_or_none(p + other, 1, MAX_HEAD_SIZE)
        if value is not None and value != size:
            raise fields.error(p + other, f"is {value}, but only the head size, {size}, is supported")
    return _even(fields, key, size)


def _gguf_rope(
    fields: Fields, p: str, head_size: int, has_tensor: bool, divisors: Iterable[float] | None
) -> RopeConfig:
    theta = fields.real_or_none(p + "rope.freq_base", 1.0, 1e15) or 10000.0
    s = p + "rope.scaling."
    kind = fields.text_or_none(s + "type")
    factor = fields.real_or_none(s + "factor", 0.0, MAX_FACTOR) or 1.0
    if kind is None:  # files older than the key name only a linear scale
        factor = fields.real_or_none(p + "rope.scale_linear", 0.0, MAX_FACTOR) or factor
        kind = "none" if factor == 1.0 else "linear"
    if kind not in ("none", "linear", "yarn"):
        raise fields.error(s + "type", f"{short(kind)} is not supported; none, linear and yarn are")
    if has_tensor and divisors is None:
        raise DataError("its values are needed to read the configuration", path=fields.path, tensor="rope_freqs.weight")
    if divisors is not None:
        values = tuple(float(x) for x in divisors)
        if len(values) != head_size // 2 or not all(math.isfinite(x) and x > 0.0 for x in values):
            problem = f"must hold {head_size // 2} finite positive numbers"
            raise DataError(problem, path=fields.path, tensor="rope_freqs.weight")
        if kind != "none":
            raise fields.error(s + "type", f"is {kind!r} beside the tensor rope_freqs.weight; only one can scale")
        return RopeConfig(theta=theta, divisors=values)
    if kind == "none":
        return RopeConfig(theta=theta)
    if kind == "linear":
        return RopeConfig(theta=theta, kind="linear", factor=factor)
    fields.refuse_unless({"yarn_ext_factor": 1.0, "yarn_log_multiplier": 0.0}, s)
    # llama.cpp multiplies these with the factor that YaRN derives, where transformers replaces it.
    scale = 1.0
    for key in ("attn_factor", "yarn_attn_factor"):
        scale *= fields.real_or_none(s + key, 0.0, MAX_FACTOR) or 1.0
    return _yarn(
        fields,
        theta,
        factor,
        fields.integer_or_none(s + "original_context_length", 1, MAX_CONTEXT),
        scale * yarn_attention_factor(factor),
        (s + "yarn_beta_fast", s + "yarn_beta_slow"),
    )


def _yarn(
    fields: Fields, theta: float, factor: float, original: int | None, attention: float | None, betas: tuple[str, str]
) -> RopeConfig:
    fast = fields.real_or_none(betas[0], 0.0, MAX_FACTOR) or 32.0
    slow = fields.real_or_none(betas[1], 0.0, MAX_FACTOR) or 1.0
    if fast <= slow:
        raise fields.error(betas[0], f"is {fast:g}, not above {betas[1]} {slow:g}")
    return RopeConfig(
        theta=theta,
        kind="yarn",
        factor=factor,
        original_context=original,
        beta_fast=fast,
        beta_slow=slow,
        attention_factor=attention,
    )


def _hf_rope(top: Fields, context: int) -> RopeConfig:
    """`rope_parameters`, or the older pair `rope_theta` and `rope_scaling`."""
    key = "rope_parameters" if top.values.get("rope_parameters") is not None else "rope_scaling"
    values = top.values.get(key)
    if values is None:
        values = {}
    if not isinstance(values, Mapping):
        raise top.error(key, f"must be an object, got {short(values)}")
    fields = Fields(values, top.path, f"{key}.")
    fields.refuse_unless({"partial_rotary_factor": 1.0})
    theta = fields.real_or_none("rope_theta", 1.0, 1e15) or top.real_or_none("rope_theta", 1.0, 1e15) or 10000.0
    kind_key = "rope_type" if values.get("rope_type") is not None else "type"
    kind = fields.text_or_none(kind_key) or "default"
    if kind == "default":
        if nested := [name for name, value in values.items() if isinstance(value, Mapping)]:
            raise fields.error(nested[0], "scales by layer type, which is not supported")
        return RopeConfig(theta=theta)
    if kind == "linear":
        return RopeConfig(theta=theta, kind="linear", factor=fields.real("factor", 0.0, MAX_FACTOR))
    original = top.integer_or_none("original_max_position_embeddings", 1, MAX_CONTEXT)
    if original is None:
        original = fields.integer_or_none("original_max_position_embeddings", 1, MAX_CONTEXT)
    if kind == "llama3":
        return _hf_llama3(fields, theta, original or context)
    if kind == "yarn":
        return _hf_yarn(fields, theta, original or context, context)
    raise fields.error(kind_key, f"{short(kind)} is not supported; default, linear, llama3 and yarn are")


def _hf_llama3(fields: Fields, theta: float, original: int) -> RopeConfig:
    low = fields.real("low_freq_factor", 0.0, MAX_FACTOR)
    high = fields.real("high_freq_factor", 0.0, MAX_FACTOR)
    if high <= low:
        raise fields.error("high_freq_factor", f"is {high:g}, not above low_freq_factor {low:g}")
    return RopeConfig(
        theta=theta,
        kind="llama3",
        factor=fields.real("factor", 0.0, MAX_FACTOR),
        original_context=original,
        low_freq_factor=low,
        high_freq_factor=high,
    )


def _hf_yarn(fields: Fields, theta: float, original: int, context: int) -> RopeConfig:
    fields.refuse_unless({"truncate": True})
    factor = fields.real_or_none("factor", 0.0, MAX_FACTOR) or context / original
    attention = fields.real_or_none("attention_factor", 0.0, MAX_FACTOR)
    mscale, all_dim = (fields.real_or_none(key, -1.0, MAX_FACTOR) for key in ("mscale", "mscale_all_dim"))
    if attention is None and mscale and all_dim:
        attention = yarn_attention_factor(factor, mscale) / yarn_attention_factor(factor, all_dim)
    return _yarn(fields, theta, factor, original, attention, ("beta_fast", "beta_slow"))


def _hf_window(fields: Fields, architecture: str) -> int | None:
    window = fields.integer_or_none("sliding_window", 1, MAX_CONTEXT)
    if not fields.flag("use_sliding_window", True):
        window = None
    if window is not None and architecture != "MistralForCausalLM":
        raise fields.error("sliding_window", f"is {window}, which {architecture} does not define")
    layers = fields.values.get("layer_types")
    kind = "full_attention" if window is None else "sliding_attention"
    if layers is not None and (not isinstance(layers, list | tuple) or any(entry != kind for entry in layers)):
        raise fields.error("layer_types", f"must all be {kind!r}, got {short(layers)}")
    return window
