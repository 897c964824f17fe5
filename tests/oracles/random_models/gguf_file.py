"""A random model as the GGUF file that llama.cpp's converter makes of it, names mapped by the `gguf` package."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import MODEL_ARCH, GGMLQuantizationType, GGUFWriter
from oracles.random_models import vocabulary
from oracles.random_models.quantize import Rounding
from oracles.random_models.weights import saved_state

ARCHITECTURES = {
    "gemma3_text": MODEL_ARCH.GEMMA3,
    "gpt2": MODEL_ARCH.GPT2,
    "llama": MODEL_ARCH.LLAMA,
    "mistral": MODEL_ARCH.LLAMA,
    "mixtral": MODEL_ARCH.LLAMA,
    "qwen2": MODEL_ARCH.QWEN2,
    "qwen3": MODEL_ARCH.QWEN3,
    "qwen3_moe": MODEL_ARCH.QWEN3MOE,
}
KEPT_F32 = (".ffn_gate_inp.weight", "position_embd.weight")
Array = np.ndarray[Any, Any]


def write_gguf(model: Any, path: Path, rounding: Rounding | None = None) -> Path:
    """The model and a small byte-level tokenizer, matrices in F32 or as what they were rounded to."""
    architecture = ARCHITECTURES[model.config.model_type]
    writer = GGUFWriter(path, gguf.MODEL_ARCH_NAMES[architecture])
    if model.config.model_type == "gpt2":
        _add_gpt2_fields(writer, model.config)
    else:
        _add_fields(writer, model)
    _add_tokenizer(writer)
    for name, weight in converted(model, architecture).items():
        if rounding is None or weight.ndim == 1 or name.endswith(KEPT_F32):
            writer.add_tensor(name, weight, raw_dtype=GGMLQuantizationType.F32)
        else:
            writer.add_tensor(name, rounding.blocks(weight), raw_dtype=rounding.kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def converted(model: Any, architecture: MODEL_ARCH) -> dict[str, Array]:
    """The checkpoint's tensors by GGUF's names, as GGUF keeps them: experts stacked, norms whole, pairs interleaved."""
    c, found = model.config, _stacked(saved_state(model))
    names = gguf.get_tensor_name_map(architecture, c.num_hidden_layers)
    tensors = {}
    for name, weight in found.items():
        if architecture == MODEL_ARCH.GPT2 and re.search(r"\.c_(attn|proj|fc)\.weight$", name):
            weight = weight.T
        if architecture == MODEL_ARCH.GEMMA3 and name.endswith("norm.weight"):
            weight = weight + 1
        if architecture == MODEL_ARCH.LLAMA and name.endswith("q_proj.weight"):
            weight = _interleave_pairs(weight, c.num_attention_heads)
        if architecture == MODEL_ARCH.LLAMA and name.endswith("k_proj.weight"):
            weight = _interleave_pairs(weight, c.num_key_value_heads)
        mapped = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert mapped is not None, name
        tensors[mapped] = np.ascontiguousarray(weight)
    if c.model_type != "gpt2" and "rope_type" in c.rope_parameters and c.rope_parameters["rope_type"] == "llama3":
        plain = c.rope_parameters["rope_theta"] ** (-np.arange(0, c.head_dim, 2) / c.head_dim)
        tensors["rope_freqs.weight"] = (plain / model.model.rotary_emb.inv_freq.numpy()).astype(np.float32)
    return tensors


def _stacked(state: dict[str, Array]) -> dict[str, Array]:
    """Each layer's experts in one tensor [E, rows, columns]."""
    found: dict[str, Array] = {}
    experts: dict[str, list[Array]] = {}
    for name in sorted(state, key=lambda n: [int(x) if x.isdigit() else x for x in n.split(".")]):
        match = re.fullmatch(r"(.*\.experts)\.\d+\.(.*)", name)
        if match:
            experts.setdefault(".".join(match.groups()), []).append(state[name])
        else:
            found[name] = state[name]
    return found | {name: np.stack(parts) for name, parts in experts.items()}


def _interleave_pairs(weight: Array, heads: int) -> Array:
    """Rows i and i + D / 2 of each head become rows 2i and 2i + 1, the order in which ggml rotates them."""
    half = weight.shape[0] // heads // 2
    return weight.reshape(heads, 2, half, -1).transpose(0, 2, 1, 3).reshape(weight.shape)


def _add_fields(writer: GGUFWriter, model: Any) -> None:
    c = model.config
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_key_length(c.head_dim)
    writer.add_value_length(c.head_dim)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    if ARCHITECTURES[c.model_type] == MODEL_ARCH.LLAMA:
        writer.add_vocab_size(c.vocab_size)
        writer.add_rope_dimension_count(c.head_dim)
    if c.model_type in ("gemma3_text", "mistral", "mixtral") and c.sliding_window is not None:
        writer.add_sliding_window(c.sliding_window)
    if c.model_type in ("mixtral", "qwen3_moe"):
        writer.add_expert_count(c.num_local_experts)
        writer.add_expert_used_count(c.num_experts_per_tok)
    if c.model_type == "qwen3_moe":
        writer.add_expert_feed_forward_length(c.moe_intermediate_size)
        writer.add_expert_weights_norm(c.norm_topk_prob)
    if c.model_type == "gemma3_text":
        _add_gemma3_fields(writer, c)
    else:
        _add_rope(writer, c.rope_parameters)


def _add_gemma3_fields(writer: GGUFWriter, c: Any) -> None:
    """What the converter leaves to be known is written only where a random model differs from it."""
    _add_rope(writer, c.rope_parameters["full_attention"])
    writer.add_rope_freq_base_swa(c.rope_parameters["sliding_attention"]["rope_theta"])
    if c.query_pre_attn_scalar != c.head_dim:
        writer.add_attention_scale(c.query_pre_attn_scalar**-0.5)
    sliding = [kind == "sliding_attention" for kind in c.layer_types]
    if sliding != [bool((i + 1) % 6) for i in range(len(sliding))]:
        writer.add_sliding_window_pattern(sliding)


def _add_rope(writer: GGUFWriter, rope: dict[str, Any]) -> None:
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
        if rope["rope_type"] == "yarn":
            writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])


def _add_gpt2_fields(writer: GGUFWriter, c: Any) -> None:
    writer.add_context_length(c.n_positions)
    writer.add_embedding_length(c.n_embd)
    writer.add_block_count(c.n_layer)
    writer.add_feed_forward_length(c.n_inner or 4 * c.n_embd)
    writer.add_head_count(c.n_head)
    writer.add_layer_norm_eps(c.layer_norm_epsilon)


def _add_tokenizer(writer: GGUFWriter) -> None:
    tokens = vocabulary.tokens()
    control, unused = gguf.TokenType.CONTROL, gguf.TokenType.UNUSED
    kinds = [unused if vocabulary.is_unused(token) else gguf.TokenType.NORMAL for token in tokens]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([control] * len(vocabulary.SPECIAL) + kinds[len(vocabulary.SPECIAL) :])
    writer.add_token_merges(list(vocabulary.MERGES))
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_add_bos_token(False)
