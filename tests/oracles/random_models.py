"""Seeded random Llama and Mistral models of transformers, and their GGUF files, for tests against Kvik.

Random weights of the usual size give nearly uniform attention, where a wrong position or mask hardly shows. Query
weights are therefore grown until the mean largest attention probability is at least `SHARPNESS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from kvik.models.config_readers import config_from_hf
from kvik.models.llama import tensors

SHARPNESS = 0.5
VOCAB = 320
PROBE_TOKENS = 96
FILE_TYPES = {
    "F32": GGMLQuantizationType.F32,
    "F16": GGMLQuantizationType.F16,
    "BF16": GGMLQuantizationType.BF16,
    "Q4_0": GGMLQuantizationType.Q4_0,
    "Q4_1": GGMLQuantizationType.Q4_1,
    "Q8_0": GGMLQuantizationType.Q8_0,
}


@dataclass(frozen=True)
class Shape:
    """A random model. The sequences that tests run must be longer than its window."""

    name: str
    heads: int = 4
    kv_heads: int = 2
    head_size: int = 32
    hidden: int = 128
    intermediate: int = 192
    layers: int = 3
    tied: bool = False
    window: int | None = None
    rope: Mapping[str, Any] = field(default_factory=lambda: {"rope_type": "default", "rope_theta": 10000.0}, hash=False)
    context: int = 512
    seed: int = 0

    def __str__(self) -> str:
        return self.name


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}

SHAPES = (
    Shape("untied", seed=1),
    Shape("tied-grouped-by-three", heads=6, kv_heads=2, head_size=16, hidden=96, tied=True, seed=2),
    Shape("one-kv-head-of-64", heads=4, kv_heads=1, head_size=64, hidden=160, layers=2, seed=3),
    Shape("heads-of-80", heads=2, kv_heads=2, head_size=80, hidden=64, tied=True, seed=4),
    Shape("window", window=24, seed=5),
    Shape("window-not-of-blocks", window=37, heads=3, kv_heads=1, head_size=64, hidden=96, tied=True, seed=6),
    Shape("linear", rope={"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0}, seed=7),
    Shape("llama3", rope=LLAMA3, head_size=64, tied=True, seed=8),
    Shape("yarn", rope=YARN, seed=9),
)


def random_model(shape: Shape) -> LlamaForCausalLM | MistralForCausalLM:
    """The model in float32 with eager attention, sharpened."""
    torch.manual_seed(shape.seed)
    sizes: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_size,
        "max_position_embeddings": shape.context,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": shape.tied,
        "rope_parameters": dict(shape.rope),
        "attn_implementation": "eager",
        "bos_token_id": None,
        "eos_token_id": None,
    }
    model: LlamaForCausalLM | MistralForCausalLM
    if shape.window is None:
        model = LlamaForCausalLM(LlamaConfig(**sizes))
    else:
        model = MistralForCausalLM(MistralConfig(sliding_window=shape.window, **sizes))
    model = model.float().eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 1:
                weight.uniform_(0.5, 1.5)
            else:
                weight.normal_(0.0, 1.0 if "embed" in name else weight.shape[1] ** -0.5)
        for _ in range(12):
            if sharpness(model, shape.seed) >= SHARPNESS:
                return model
            for layer in model.model.layers:
                layer.self_attn.q_proj.weight.mul_(1.5)
    raise AssertionError(f"{shape}: attention stays flat, {sharpness(model, shape.seed)}")


def sharpness(model: LlamaForCausalLM | MistralForCausalLM, seed: int) -> float:
    """Mean over layers, heads and the rows after the 16th of the largest attention probability."""
    ids = torch.from_numpy(random_tokens(PROBE_TOKENS, seed))[None]
    with torch.no_grad():
        attentions = model(ids.long(), output_attentions=True).attentions
    return float(torch.stack([a[..., 16:, :].amax(-1).mean() for a in attentions]).mean())


def random_tokens(count: int, seed: int) -> np.ndarray[Any, np.dtype[np.int32]]:
    """Token ids without the special ones."""
    return np.random.default_rng(seed).integers(2, VOCAB, count, dtype=np.int32)


def oracle_logits(model: LlamaForCausalLM | MistralForCausalLM, ids: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """[T, V] of a whole sequence at once."""
    with torch.no_grad():
        logits: np.ndarray[Any, Any] = model(torch.from_numpy(ids).long()[None]).logits[0].numpy()
    return logits


def kvik_weights(model: LlamaForCausalLM | MistralForCausalLM) -> dict[str, np.ndarray[Any, Any]]:
    """The state by the names of Kvik's definition; rows as transformers has them."""
    state = model.state_dict()
    config = config_from_hf(hf_config(model), "config.json")
    return {spec.name: state[spec.hf_name].numpy() for spec in tensors(config)}


def hf_config(model: LlamaForCausalLM | MistralForCausalLM) -> dict[str, Any]:
    """config.json as a file would hold it."""
    config: dict[str, Any] = model.config.to_dict()
    return config | {"architectures": [type(model).__name__]}


def quantize_model(model: LlamaForCausalLM | MistralForCausalLM, file_type: str) -> None:
    """Round every matrix in place to what a file of this type holds."""
    kind = FILE_TYPES[file_type]
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                rounded = gguf.dequantize(gguf.quantize(weight.numpy(), kind), kind)
                weight.copy_(torch.from_numpy(rounded.astype(np.float32)))


def write_gguf(model: LlamaForCausalLM | MistralForCausalLM, path: Path, file_type: str = "F32") -> Path:
    """The model as llama.cpp's converter writes it, its matrices in `file_type`, with a small byte-level tokenizer."""
    c = model.config
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_key_length(c.head_dim)
    writer.add_value_length(c.head_dim)
    writer.add_rope_dimension_count(c.head_dim)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_vocab_size(c.vocab_size)
    if getattr(c, "sliding_window", None) is not None:
        writer.add_sliding_window(c.sliding_window)
    _add_rope(writer, model)
    _add_tokenizer(writer)
    _add_tensors(writer, model, FILE_TYPES[file_type])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_rope(writer: GGUFWriter, model: LlamaForCausalLM | MistralForCausalLM) -> None:
    rope = model.config.rope_parameters
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "llama3":  # as divisors of the plain frequencies
        size = model.config.head_dim
        plain = rope["rope_theta"] ** (-np.arange(0, size, 2) / size)
        divisors = plain / model.model.rotary_emb.inv_freq.numpy()
        writer.add_tensor("rope_freqs.weight", divisors.astype(np.float32))
    elif rope["rope_type"] != "default":
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
        if rope["rope_type"] == "yarn":
            writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])


def _add_tensors(
    writer: GGUFWriter, model: LlamaForCausalLM | MistralForCausalLM, matrix_type: GGMLQuantizationType
) -> None:
    state = model.state_dict()
    for spec in tensors(config_from_hf(hf_config(model), "config.json")):
        weight = state[spec.hf_name].numpy()
        if spec.gguf_name.endswith("attn_q.weight"):
            weight = _interleave_pairs(weight, model.config.num_attention_heads)
        elif spec.gguf_name.endswith("attn_k.weight"):
            weight = _interleave_pairs(weight, model.config.num_key_value_heads)
        kind = matrix_type if weight.ndim == 2 else GGMLQuantizationType.F32
        writer.add_tensor(spec.gguf_name, gguf.quantize(np.ascontiguousarray(weight), kind), raw_dtype=kind)


def _interleave_pairs(weight: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Rows i and i + D / 2 of each head become rows 2i and 2i + 1, the order in which ggml rotates them."""
    half = weight.shape[0] // heads // 2
    return weight.reshape(heads, 2, half, -1).transpose(0, 2, 1, 3).reshape(weight.shape)


def _add_tokenizer(writer: GGUFWriter) -> None:
    """Two special tokens, the 256 bytes, a few merges, and unused tokens up to the vocabulary's size."""
    tokens, merges = ["<|endoftext|>", "<|im_end|>", *_byte_characters()], []
    for pair in ("Ġ t", "h e", "i n", "Ġt he", "e r", "a n", "o n"):
        merges.append(pair)
        tokens.append(pair.replace(" ", ""))
    types = [gguf.TokenType.CONTROL] * 2 + [gguf.TokenType.NORMAL] * (len(tokens) - 2)
    for i in range(VOCAB - len(tokens)):
        tokens.append(f"<unused{i}>")
        types.append(gguf.TokenType.UNUSED)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_add_bos_token(False)


def _byte_characters() -> list[str]:
    """The printable stand-ins of GPT-2's byte-level BPE, by byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    stand_in = {b: b for b in printable} | {b: 256 + i for i, b in enumerate(others)}
    return [chr(stand_in[b]) for b in range(256)]
