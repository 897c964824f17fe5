"""What a Hugging Face folder's config.json says about its model, checked and turned into a `ModelConfig`.

Sizes must be there; what else a file leaves out is what transformers 5 takes for it. Every field is validated here,
once: a wrong one is a DataError that names key and file, and a feature that this version does not compute is refused
by name, never ignored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from kvik.models import config_checks as check
from kvik.models.config import ModelConfig, RopeConfig
from kvik.models.config_fields import Fields, Path, short
from kvik.models.hf_rope import rope_from_hf

__all__ = ["config_from_hf"]

NEUTRAL: Mapping[str, object] = {
    "attention_bias": False,
    "mlp_bias": False,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
}
"""Fields that would change the computation; any other value than this one is refused."""

NO_EXPERTS: Mapping[str, object] = {"num_experts": 0, "num_local_experts": 0}
EVERY_LAYER: Mapping[str, object] = {"decoder_sparse_step": 1, "mlp_only_layers": []}
GEMMA3_NEUTRAL: Mapping[str, object] = {
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "use_bidirectional_attention": False,
}
GEMMA3_DEFAULTS: Mapping[str, object] = {  # the published multimodal models leave these out
    "vocab_size": 262208,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131072,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-6,
    "sliding_window": 4096,
    "sliding_window_pattern": 6,
}
GPT2_NEUTRAL: Mapping[str, object] = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "add_cross_attention": False,
    "quantization_config": None,
    "scale_attn_by_inverse_layer_idx": False,
    "scale_attn_weights": True,
}


def config_from_hf(config: Mapping[str, object], path: Path) -> ModelConfig:
    """The configuration of a Hugging Face folder's model, from its config.json.

    Raises DataError for a missing, mistyped, absurd or contradictory key and for an unsupported feature.
    """
    fields = Fields(config, path)
    names = fields.get("architectures")
    if not isinstance(names, list | tuple) or len(names) != 1 or not isinstance(names[0], str):
        raise fields.error("architectures", f"must be a list of one name, got {short(names)}")
    architecture = check.known(fields, "architectures", names[0], READERS)
    _check_type(fields, architecture, MODEL_TYPES[architecture])
    return READERS[architecture](fields)


def _check_type(f: Fields, architecture: str, known: str) -> None:
    """`model_type`, which a file may leave out, must not contradict `architectures`."""
    kind = f.text_or_none("model_type")
    if kind is not None and kind != known:
        raise f.error("model_type", f"is {short(kind)}, but architectures says {architecture}, whose is {known!r}")


def _llama(f: Fields) -> ModelConfig:
    f.refuse_unless(NO_EXPERTS)
    if (window := _window(f)) is not None:
        raise f.error("sliding_window", f"is {window}, which LlamaForCausalLM does not define")
    return _transformer(f, "llama", windows=_equal_windows(f, None))


def _mistral(f: Fields) -> ModelConfig:
    f = f.with_defaults({"sliding_window": 4096, "num_key_value_heads": 8})
    f.refuse_unless(NO_EXPERTS)
    return _transformer(f, "llama", windows=_equal_windows(f, _window(f)))


def _mixtral(f: Fields) -> ModelConfig:
    f = f.with_defaults({"num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2})
    experts = _experts(f, "num_local_experts", normalize=True)
    return _transformer(f, "moe", theta=1e6, windows=_equal_windows(f, _window(f)), **experts)


def _qwen2(f: Fields) -> ModelConfig:
    f = f.with_defaults({"num_key_value_heads": 32})
    f.refuse_unless(NO_EXPERTS)
    return _transformer(f, "qwen2", windows=_late_windows(f))


def _qwen3(f: Fields) -> ModelConfig:
    f = f.with_defaults({"num_key_value_heads": 32, "head_dim": 128})
    f.refuse_unless(NO_EXPERTS)
    return _transformer(f, "qwen3", qk_norm=True, windows=_late_windows(f))


def _qwen3_moe(f: Fields) -> ModelConfig:
    f = f.with_defaults({"num_key_value_heads": 4, "use_sliding_window": False})
    f.refuse_unless(EVERY_LAYER)
    count_key = "num_experts" if f.get("num_experts") is not None else "num_local_experts"  # transformers 5
    experts = _experts(f, count_key, normalize=f.flag("norm_topk_prob", False))
    windows = _equal_windows(f, _window(f))
    return _transformer(f, "moe", width_key="moe_intermediate_size", qk_norm=True, windows=windows, **experts)


def _gemma3(f: Fields) -> ModelConfig:
    f = f.with_defaults(GEMMA3_DEFAULTS)
    f.refuse_unless({**NO_EXPERTS, **GEMMA3_NEUTRAL})
    window = f.integer("sliding_window", 1, check.MAX_CONTEXT)
    pattern = f.integer("sliding_window_pattern", 1, check.MAX_LAYERS)
    return _transformer(
        f,
        "gemma3",
        activation=("hidden_activation", "gelu_pytorch_tanh"),
        tied=True,
        windows=_windows_by_type(f, window, lambda i: bool((i + 1) % pattern)),
        attention_scale=f.real("query_pre_attn_scalar", 0.0, check.MAX_WIDTH) ** -0.5,
        embedding_scale=_hidden(f) ** 0.5,
        qk_norm=True,
        **_rope_by_type(f),
    )


def _rope_by_type(f: Fields) -> dict[str, Any]:
    """Of layers that see all, and of those with a window: an object each, or the keys of older files."""
    context, nested, local = _context(f), f.inside("rope_parameters"), None
    everywhere = f.inside("rope_scaling")
    if nested is not None and everywhere is not None:
        raise f.error("rope_scaling", "is there beside rope_parameters; only one of them can say how positions turn")
    if nested is not None:
        everywhere, local = nested.inside("full_attention"), nested.inside("sliding_attention")
        if everywhere is None and local is None:
            raise f.error("rope_parameters", "has neither full_attention nor sliding_attention")
    theta = f.real_or_none("rope_theta", 1.0, check.MAX_THETA) or 1e6
    theta_local = f.real_or_none("rope_local_base_freq", 1.0, check.MAX_THETA) or 10000.0
    return {
        "rope": rope_from_hf(everywhere, f, theta, context),
        "rope_local": rope_from_hf(local, f, theta_local, context),
    }


def _gemma3_multimodal(f: Fields) -> ModelConfig:
    """Its text model; the tower that sees images is left alone."""
    f.refuse_unless({"quantization_config": None})
    text = f.required("text_config", f.inside("text_config"))
    _check_type(text, "Gemma3ForConditionalGeneration", MODEL_TYPES["Gemma3ForCausalLM"])
    return _gemma3(text.with_defaults({"tie_word_embeddings": f.flag("tie_word_embeddings", True)}))


def _gpt2(f: Fields) -> ModelConfig:
    f.refuse_unless(GPT2_NEUTRAL)
    hidden, heads = f.integer("n_embd", 1, check.MAX_WIDTH), f.integer("n_head", 1, check.MAX_HEADS)
    layers = f.integer("n_layer", 1, check.MAX_LAYERS)
    context_key = "n_ctx" if f.get("n_positions") is None and f.get("n_ctx") is not None else "n_positions"
    return ModelConfig(
        family="gpt2",
        vocab_size=f.integer("vocab_size", 1, check.MAX_VOCAB),
        hidden_size=hidden,
        intermediate_size=f.integer_or_none("n_inner", 1, check.MAX_WIDTH) or 4 * hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_size=check.even(f, "n_embd", check.divided(f, "n_embd", hidden, "n_head", heads)),
        context_length=f.integer(context_key, 1, check.MAX_CONTEXT),
        norm_eps=f.real("layer_norm_epsilon", 0.0, 0.1),
        rope=None,
        tied_embeddings=f.flag("tie_word_embeddings", True),
        windows=(None,) * layers,
    )


READERS: Mapping[str, Callable[[Fields], ModelConfig]] = {
    "GPT2LMHeadModel": _gpt2,
    "Gemma3ForCausalLM": _gemma3,
    "Gemma3ForConditionalGeneration": _gemma3_multimodal,
    "LlamaForCausalLM": _llama,
    "MistralForCausalLM": _mistral,
    "MixtralForCausalLM": _mixtral,
    "Qwen2ForCausalLM": _qwen2,
    "Qwen3ForCausalLM": _qwen3,
    "Qwen3MoeForCausalLM": _qwen3_moe,
}
"""How a folder whose config.json names this architecture is read."""

MODEL_TYPES: Mapping[str, str] = {
    "GPT2LMHeadModel": "gpt2",
    "Gemma3ForCausalLM": "gemma3_text",
    "Gemma3ForConditionalGeneration": "gemma3",
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "MixtralForCausalLM": "mixtral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
}
"""What `model_type` says beside an architecture, where it says anything."""


def _transformer(
    f: Fields,
    family: str,
    *,
    windows: tuple[int | None, ...],
    width_key: str = "intermediate_size",
    activation: tuple[str, str | tuple[str, ...]] = ("hidden_act", ("silu", "swish")),
    tied: bool = False,
    theta: float = 10000.0,
    rope: RopeConfig | None = None,
    **own: Any,
) -> ModelConfig:
    """What the architectures have in common.

    activation: its key and the value it may have, or several for the same. tied, theta: taken where the file says
    nothing. rope: where it is not read in the common way. own: further fields of ModelConfig.
    """
    f.refuse_unless({**NEUTRAL, activation[0]: activation[1]})
    hidden, heads, context = _hidden(f), f.integer("num_attention_heads", 1, check.MAX_HEADS), _context(f)
    head_size = f.integer_or_none("head_dim", 1, check.MAX_HEAD_SIZE)
    if head_size is None:
        head_size = check.divided(f, "hidden_size", hidden, "num_attention_heads", heads)
    if rope is None:
        theta = f.real_or_none("rope_theta", 1.0, check.MAX_THETA) or theta
        rope = rope_from_hf(_rope_object(f, theta), f, theta, context)
    return ModelConfig(
        family=family,
        vocab_size=f.integer("vocab_size", 1, check.MAX_VOCAB),
        hidden_size=hidden,
        intermediate_size=f.integer(width_key, 1, check.MAX_WIDTH),
        num_layers=_layers(f),
        num_heads=heads,
        num_kv_heads=check.kv_heads(f, "num_key_value_heads", heads),
        head_size=check.even(f, "head_dim", head_size),
        context_length=context,
        norm_eps=f.real("rms_norm_eps", 0.0, 0.1),
        rope=rope,
        tied_embeddings=f.flag("tie_word_embeddings", tied),
        windows=windows,
        **own,
    )


def _rope_object(f: Fields, theta: float) -> Fields | None:
    """`rope_parameters`, as transformers 5 writes it, or `rope_scaling` of older files; both must say the same.

    theta: the base where the object names none. It counts: transformers 5 takes rope_scaling where there are both.
    """
    new, old = f.inside("rope_parameters"), f.inside("rope_scaling")
    base = {"rope_theta": theta}
    if new is not None and old is not None and base | new.without() != base | old.without():
        problem = f"is {short(f.get('rope_scaling'))}, rope_parameters says {short(f.get('rope_parameters'))}"
        raise f.error("rope_scaling", problem + "; only one can say how positions turn")
    return new or old


def _hidden(f: Fields) -> int:
    return f.integer("hidden_size", 1, check.MAX_WIDTH)


def _layers(f: Fields) -> int:
    return f.integer("num_hidden_layers", 1, check.MAX_LAYERS)


def _context(f: Fields) -> int:
    return f.integer("max_position_embeddings", 1, check.MAX_CONTEXT)


def _experts(f: Fields, count_key: str, *, normalize: bool) -> dict[str, Any]:
    return {**check.experts(f, count_key, "num_experts_per_tok", _layers(f)), "normalize_experts": normalize}


def _window(f: Fields) -> int | None:
    """`sliding_window`, unless `use_sliding_window` turns it off."""
    window = f.integer_or_none("sliding_window", 1, check.MAX_CONTEXT)
    return window if f.flag("use_sliding_window", True) else None


def _equal_windows(f: Fields, window: int | None) -> tuple[int | None, ...]:
    """The same for every layer. `layer_types` must not say otherwise."""
    windows = (window,) * _layers(f)
    if _windows_by_type(f, window, lambda _: True) != windows:
        raise f.error(
            "layer_types", f"mixes kinds of layers, which is not supported here: {short(f.get('layer_types'))}"
        )
    return windows


def _late_windows(f: Fields) -> tuple[int | None, ...]:
    """Qwen's: from layer `max_window_layers` on."""
    f = f.with_defaults({"sliding_window": 4096, "use_sliding_window": False, "max_window_layers": 28})
    window, first = _window(f), f.integer("max_window_layers", 0, check.MAX_LAYERS)
    return _windows_by_type(f, window, lambda i: i >= first)


def _windows_by_type(f: Fields, window: int | None, sliding: Callable[[int], bool]) -> tuple[int | None, ...]:
    """As `layer_types` says, or by the rule in files without it."""
    layers, types = _layers(f), f.get("layer_types")
    if types is None:
        return tuple(window if sliding(i) else None for i in range(layers))
    known_types = ("full_attention", "sliding_attention")
    if not isinstance(types, list | tuple) or len(types) != layers or any(x not in known_types for x in types):
        raise f.error("layer_types", f"must be {layers} times {' or '.join(known_types)}, got {short(types)}")
    if window is None and "sliding_attention" in types:
        raise f.error("layer_types", "has sliding_attention, but no sliding_window is in use")
    return tuple(window if x == "sliding_attention" else None for x in types)
