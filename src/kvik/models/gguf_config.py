"""What a GGUF file says about its model, checked and turned into a `ModelConfig`.

Keys are those that llama.cpp's converter writes and its loader reads. Every field is validated here, once: a wrong one
is a DataError that names key and file, and a feature that this version does not compute is refused by name, never
ignored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from kvik.errors import DataError
from kvik.models import config_checks as check
from kvik.models.config import ModelConfig, RopeConfig
from kvik.models.config_fields import Fields, Path, short
from kvik.models.rope import yarn_attention_factor

__all__ = ["config_from_gguf"]

NEUTRAL: Mapping[str, object] = {
    "attention.causal": True,
    "attention.clamp_kqv": 0.0,
    "attention.max_alibi_bias": 0.0,
    "attn_logit_softcapping": 0.0,
    "embedding_scale": 0.0,
    "final_logit_softcapping": 0.0,
    "logit_scale": 0.0,
    "residual_scale": 0.0,
    "use_parallel_residual": False,
}
"""Metadata that would change the computation; any other value than this one is refused."""

NO_EXPERTS: Mapping[str, object] = {"expert_count": 0}
NO_WINDOW: Mapping[str, object] = {"attention.sliding_window": 0}
PLAIN_SCALE: Mapping[str, object] = {"attention.scale": 0.0}
PLAIN_EXPERTS: Mapping[str, object] = {
    "expert_gating_func": (0, 1),  # softmax
    "expert_group_count": (0, 1),
    "expert_group_used_count": (0, 1),
    "expert_shared_count": 0,
    "expert_shared_feed_forward_length": 0,
    "expert_weights_scale": (0.0, 1.0),
    "interleave_moe_layer_step": (0, 1),
    "leading_dense_block_count": 0,
    "moe_every_n_layers": (0, 1),
}


class Header(NamedTuple):
    """A file's metadata, `fields` those that begin with its architecture, and the shapes of its tensors, rows first."""

    metadata: Fields
    fields: Fields
    shapes: Mapping[str, tuple[int, ...]]
    rope_divisors: tuple[float, ...] | None


def config_from_gguf(
    metadata: Mapping[str, object],
    tensor_shapes: Mapping[str, tuple[int, ...]],
    path: Path,
    *,
    rope_divisors: Iterable[float] | None = None,
) -> ModelConfig:
    """The configuration of a GGUF file's model.

    Args:
        metadata: the file's keys and values.
        tensor_shapes: shapes of its tensors, rows first.
        path: the file, for messages.
        rope_divisors: values of the tensor `rope_freqs.weight`, required where the file has it.

    Raises DataError for a missing, mistyped, absurd or contradictory key and for an unsupported feature.
    """
    fields = Fields(metadata, path)
    key = "general.architecture"
    architecture = check.known(fields, key, fields.text_or_none(key), READERS)
    divisors = None if rope_divisors is None else tuple(float(x) for x in rope_divisors)
    header = Header(fields, fields.under(f"{architecture}."), tensor_shapes, divisors)
    return READERS[architecture](header)


def _llama(h: Header) -> ModelConfig:
    window = h.fields.integer_or_none("attention.sliding_window", 0, check.MAX_CONTEXT) or None
    h.fields.refuse_unless(PLAIN_SCALE)
    windows = (window,) * _layers(h)
    if h.fields.integer_or_none("expert_count", 0, check.MAX_EXPERTS):
        return _transformer(h, "moe", windows=windows, **_experts(h))
    return _transformer(h, "llama", windows=windows)


def _qwen2(h: Header) -> ModelConfig:
    h.fields.refuse_unless({**NO_EXPERTS, **NO_WINDOW, **PLAIN_SCALE})
    return _transformer(h, "qwen2")


def _qwen3(h: Header) -> ModelConfig:
    h.fields.refuse_unless({**NO_EXPERTS, **NO_WINDOW, **PLAIN_SCALE})
    return _transformer(h, "qwen3", qk_norm=True)


def _qwen3_moe(h: Header) -> ModelConfig:
    h.fields.refuse_unless({**NO_WINDOW, **PLAIN_SCALE})
    return _transformer(h, "moe", width_key="expert_feed_forward_length", qk_norm=True, **_experts(h))


def _gemma3(h: Header) -> ModelConfig:
    h.fields.refuse_unless(NO_EXPERTS)
    layers, hidden, heads = _layers(h), _hidden(h), _heads(h)
    window = h.fields.integer_or_none("attention.sliding_window", 0, check.MAX_CONTEXT) or None
    # Files do not say what scores are multiplied by; llama.cpp knows the 27B model, the one that differs, by its depth.
    query_scalar = hidden // heads if layers == 62 else _head_size(h)
    scale = h.fields.real_or_none("attention.scale", 0.0, 1.0)
    return _transformer(
        h,
        "gemma3",
        windows=tuple(window if sliding else None for sliding in _sliding_layers(h.fields, layers)),
        rope_local=RopeConfig(theta=h.fields.real_or_none("rope.freq_base_swa", 1.0, check.MAX_THETA) or 10000.0),
        attention_scale=query_scalar**-0.5 if scale is None else scale,
        embedding_scale=hidden**0.5,
        qk_norm=True,
    )


def _gpt2(h: Header) -> ModelConfig:
    h.fields.refuse_unless({**NO_EXPERTS, **NO_WINDOW, **PLAIN_SCALE})
    return _transformer(h, "gpt2", norm_key="attention.layer_norm_epsilon", rotary=False)


READERS: Mapping[str, Callable[[Header], ModelConfig]] = {
    "gemma3": _gemma3,
    "gpt2": _gpt2,
    "llama": _llama,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "qwen3moe": _qwen3_moe,
}
"""How a file of this `general.architecture` is read."""


def _transformer(
    h: Header,
    family: str,
    *,
    width_key: str = "feed_forward_length",
    norm_key: str = "attention.layer_norm_rms_epsilon",
    rotary: bool = True,
    windows: tuple[int | None, ...] | None = None,
    **own: Any,
) -> ModelConfig:
    """What the architectures have in common. own: further fields of ModelConfig."""
    f = h.fields
    f.refuse_unless(NEUTRAL)
    vocab_size, hidden, heads, head_size, layers = _vocab_size(h), _hidden(h), _heads(h), _head_size(h), _layers(h)
    return ModelConfig(
        family=family,
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=f.required(width_key, f.per_layer(width_key, check.MAX_WIDTH)),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=check.kv_heads(f, "attention.head_count_kv", heads),
        head_size=head_size,
        context_length=f.integer("context_length", 1, check.MAX_CONTEXT),
        norm_eps=f.real(norm_key, 0.0, 0.1),
        rope=_rope(h, head_size) if rotary else None,
        tied_embeddings="output.weight" not in h.shapes,
        windows=(None,) * layers if windows is None else windows,
        **own,
    )


def _layers(h: Header) -> int:
    return h.fields.integer("block_count", 1, check.MAX_LAYERS)


def _hidden(h: Header) -> int:
    return h.fields.integer("embedding_length", 1, check.MAX_WIDTH)


def _heads(h: Header) -> int:
    return h.fields.required("attention.head_count", h.fields.per_layer("attention.head_count", check.MAX_HEADS))


def _head_size(h: Header) -> int:
    f, key = h.fields, "attention.key_length"
    size = f.integer_or_none(key, 1, check.MAX_HEAD_SIZE)
    if size is None:
        key = "embedding_length"
        size = check.divided(f, key, _hidden(h), "attention.head_count", _heads(h))
    for other in ("attention.value_length", "attention.key_length_swa", "attention.value_length_swa",
                  "rope.dimension_count", "rope.dimension_count_swa"):  # fmt: skip
        value = f.integer_or_none(other, 1, check.MAX_HEAD_SIZE)
        if value is not None and value != size:
            raise f.error(other, f"is {value}, but only the head size, {size}, is supported")
    return check.even(f, key, size)


def _vocab_size(h: Header) -> int:
    """Rows of the embedding, whose shape must be what the metadata say."""
    f, name = h.fields, "token_embd.weight"
    shape = h.shapes.get(name)
    if shape is None:
        raise DataError("is missing", path=f.path, tensor=name)
    if len(shape) != 2 or not 1 <= shape[0] <= check.MAX_VOCAB:
        raise DataError(f"must be a table of 1 to {check.MAX_VOCAB} rows, got shape {shape}", path=f.path, tensor=name)
    declared = f.integer_or_none("vocab_size", 1, check.MAX_VOCAB)
    if declared is not None and declared != shape[0]:
        raise f.error("vocab_size", f"is {declared}, but {name} has {shape[0]} rows")
    tokens = h.metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, list | tuple) and len(tokens) > shape[0]:
        raise h.metadata.error("tokenizer.ggml.tokens", f"has {len(tokens)} entries, {name} {shape[0]} rows")
    if shape[1] != _hidden(h):
        raise f.error("embedding_length", f"is {_hidden(h)}, but {name} has shape {shape}")
    return shape[0]


def _sliding_layers(fields: Fields, layers: int) -> list[bool]:
    """Which layers have a window: told one by one, or all but every n-th, 6 where the file does not say."""
    key = "attention.sliding_window_pattern"
    told = fields.get(key)
    if not isinstance(told, list | tuple):
        n = fields.integer_or_none(key, 1, check.MAX_LAYERS) or 6
        return [bool((i + 1) % n) for i in range(layers)]
    if len(told) != layers or not all(isinstance(x, bool) for x in told):
        raise fields.error(key, f"must be a number or {layers} times true or false, got {short(told)}")
    return list(told)


def _experts(h: Header) -> dict[str, Any]:
    f = h.fields
    f.refuse_unless(PLAIN_EXPERTS)
    if "blk.0.ffn_gate.0.weight" in h.shapes:
        problem = "keeps one expert alone, as files from before April 2024 did; convert the model anew"
        raise DataError(problem, path=f.path, tensor="blk.0.ffn_gate.0.weight")
    counts = check.experts(f, "expert_count", "expert_used_count", _layers(h))
    return {**counts, "normalize_experts": f.flag("expert_weights_norm", True)}


def _rope(h: Header, head_size: int) -> RopeConfig:
    theta = h.fields.real_or_none("rope.freq_base", 1.0, check.MAX_THETA) or 10000.0
    f, tensor, divisors = h.fields.under("rope.scaling."), "rope_freqs.weight", h.rope_divisors
    kind = f.text_or_none("type")
    factor = f.real_or_none("factor", check.MIN_FACTOR, check.MAX_FACTOR)
    if kind is None:  # files older than the key name only a linear scale
        factor = factor or h.fields.real_or_none("rope.scale_linear", check.MIN_FACTOR, check.MAX_FACTOR)
        kind = "none" if factor in (None, 1.0) else "linear"
    factor = factor or 1.0
    if kind not in ("none", "linear", "yarn"):
        raise f.error("type", f"{short(kind)} is not supported; none, linear and yarn are")
    if tensor in h.shapes and divisors is None:
        raise DataError("its values are needed to read the configuration", path=f.path, tensor=tensor)
    if kind != "yarn":
        f.refuse_unless({"attn_factor": 1.0, "yarn_attn_factor": 1.0})
    if divisors is not None:
        if len(divisors) != head_size // 2 or not all(check.MIN_FACTOR < x < math.inf for x in divisors):
            what = f"must hold {head_size // 2} finite positive numbers above {check.MIN_FACTOR}"
            raise DataError(what, path=f.path, tensor=tensor)
        if kind != "none":
            raise f.error("type", f"is {kind!r} beside the tensor {tensor}; only one can scale")
        return RopeConfig(theta=theta, divisors=divisors)
    if kind == "none":
        return RopeConfig(theta=theta)
    if kind == "linear":
        return RopeConfig(theta=theta, kind="linear", factor=factor)
    f.refuse_unless({"yarn_ext_factor": 1.0, "yarn_log_multiplier": 0.0})
    # llama.cpp multiplies these with the factor that YaRN derives, where transformers replaces it.
    scale = 1.0
    for key in ("attn_factor", "yarn_attn_factor"):
        scale *= f.real_or_none(key, check.MIN_FACTOR, check.MAX_FACTOR) or 1.0
    original = f.integer_or_none("original_context_length", 1, check.MAX_CONTEXT)
    betas = ("yarn_beta_fast", "yarn_beta_slow")
    return check.yarn(f, theta, factor, original, scale * yarn_attention_factor(factor), betas)
