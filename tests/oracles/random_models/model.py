"""A shape's model in transformers: random, float32, sharp.

Random weights of the usual size give nearly uniform attention, where a wrong position or mask hardly shows. Queries are
therefore grown until the mean largest attention probability is at least `SHARPNESS`, routers likewise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import transformers
from oracles.random_models.shapes import VOCAB, Shape

SHARPNESS = 0.5
PROBE_TOKENS = 96
ROUTER_GAIN = 2.0

KINDS: Mapping[str, tuple[str, str]] = {
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM"),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel"),
    "llama": ("LlamaConfig", "LlamaForCausalLM"),
    "mistral": ("MistralConfig", "MistralForCausalLM"),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM"),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM"),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM"),
    "qwen3_moe": ("Qwen3MoeConfig", "Qwen3MoeForCausalLM"),
}
"""transformers' classes of configuration and model."""


def random_model(shape: Shape) -> Any:
    """The model in float32 with eager attention, sharpened."""
    torch.manual_seed(shape.seed)
    config_class, model_class = (getattr(transformers, name) for name in KINDS[shape.kind])
    config = config_class(
        **(_gpt2_fields(shape) if shape.kind == "gpt2" else _fields(shape)),
        **shape.more,
        vocab_size=VOCAB,
        tie_word_embeddings=shape.tied,
        attn_implementation="eager",
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    model = model_class(config).float().eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            _randomize(model, name, weight)
        for _ in range(12):
            if sharpness(model, shape.seed) >= SHARPNESS:
                return model
            _grow_queries(model, 1.5)
    raise AssertionError(f"{shape}: attention stays flat, {sharpness(model, shape.seed)}")


def _fields(shape: Shape) -> dict[str, Any]:
    rope: dict[str, Any] = dict(shape.rope)
    if shape.kind == "gemma3":
        rope = {
            "full_attention": rope | {"rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        }
    return {
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_size,
        "max_position_embeddings": shape.context,
        "rms_norm_eps": 1e-5,
        "rope_parameters": rope,
        **({} if shape.kind == "llama" else {"sliding_window": shape.window}),
    }


def _gpt2_fields(shape: Shape) -> dict[str, Any]:
    assert shape.hidden == shape.heads * shape.head_size
    return {
        "n_embd": shape.hidden,
        "n_inner": None if shape.intermediate == 4 * shape.hidden else shape.intermediate,
        "n_layer": shape.layers,
        "n_head": shape.heads,
        "n_positions": shape.context,
    }


def _randomize(model: Any, name: str, weight: torch.Tensor) -> None:
    gpt2, gemma = (model.config.model_type.startswith(x) for x in ("gpt2", "gemma3"))
    if name.endswith("bias"):
        weight.normal_(0.0, 0.3)
    elif weight.ndim == 1:
        weight.uniform_(-0.5, 0.5) if gemma else weight.uniform_(0.5, 1.5)
    elif "embed" in name or name.endswith(("wte.weight", "wpe.weight")):
        weight.normal_(0.0, weight.shape[1] ** -0.5 if gemma else 0.7)
    elif name.endswith(("mlp.gate.weight", "block_sparse_moe.gate.weight")):
        weight.normal_(0.0, ROUTER_GAIN * weight.shape[1] ** -0.5)
    else:
        weight.normal_(0.0, weight.shape[0 if gpt2 and "lm_head" not in name else -1] ** -0.5)


def _grow_queries(model: Any, factor: float) -> None:
    if model.config.model_type == "gpt2":
        for block in model.transformer.h:
            for tensor in (block.attn.c_attn.weight, block.attn.c_attn.bias):
                tensor[..., : model.config.n_embd].mul_(factor)
        return
    for layer in model.model.layers:
        attention = layer.self_attn
        if not hasattr(attention, "q_norm"):
            for tensor in attention.q_proj.parameters():
                tensor.mul_(factor)
        elif model.config.model_type.startswith("gemma3"):  # its norms are stored less 1
            attention.q_norm.weight.add_(1.0).mul_(factor).sub_(1.0)
        else:
            attention.q_norm.weight.mul_(factor)


def sharpness(model: Any, seed: int) -> float:
    """Mean over layers, heads and the rows after the 16th of the largest attention probability."""
    ids = torch.from_numpy(random_tokens(PROBE_TOKENS, seed))[None]
    with torch.no_grad():
        attentions = model(ids.long(), output_attentions=True).attentions
    return float(torch.stack([a[..., 16:, :].amax(-1).mean() for a in attentions]).mean())


def random_tokens(count: int, seed: int) -> np.ndarray[Any, np.dtype[np.int32]]:
    """Token ids without the special ones."""
    return np.random.default_rng(seed).integers(2, VOCAB, count, dtype=np.int32)


def oracle_logits(model: Any, ids: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """[T, V] of a whole sequence at once."""
    with torch.no_grad():
        logits: np.ndarray[Any, Any] = model(torch.from_numpy(ids).long()[None]).logits[0].numpy()
    return logits


def relative_error(ours: Any, oracle: Any) -> float:
    """Largest difference over the oracle's largest magnitude."""
    assert ours.shape == oracle.shape
    return float(np.abs(ours - oracle).max() / np.abs(oracle).max())


def change_matrices(model: Any, change: Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]) -> None:
    """Put change(matrix) in the place of every matrix a file may quantize, inputs along its last axis.

    Routers and learned positions stay, as in llama.cpp's files.
    """
    with torch.no_grad():
        for module_name, module in model.named_modules():
            if type(module).__name__.endswith("Router") or module_name.endswith("wpe"):
                continue
            transposed = isinstance(module, transformers.pytorch_utils.Conv1D)
            for weight in module.parameters(recurse=False):
                if weight.ndim >= 2:
                    matrix = weight.T if transposed else weight
                    changed = torch.from_numpy(change(matrix.contiguous().numpy()))
                    weight.copy_(changed.T if transposed else changed)
