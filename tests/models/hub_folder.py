"""Tiny models as model hubs have them, written by hand: a folder of JSON files and safetensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from weights.safetensors_files import write_folder

TOKENS = [*map(chr, range(33, 127)), "Ġ", "ab", "<s>", "</s>"]
HEADS, KV_HEADS, HEAD_SIZE, HIDDEN, FF, LAYERS = 4, 2, 16, 64, 48, 2

CONFIG: Mapping[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": len(TOKENS), "hidden_size": HIDDEN,
    "intermediate_size": FF, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_SIZE, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "tie_word_embeddings": True, "bos_token_id": 96, "eos_token_id": 97,
}  # fmt: skip


def tensors(seed: int = 0, vocab: int = len(TOKENS)) -> dict[str, NDArray[np.float32]]:
    """By the names of the hub."""
    rng = np.random.default_rng(seed)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, HIDDEN), "model.norm.weight": (HIDDEN,)}
    q, kv = HEADS * HEAD_SIZE, KV_HEADS * HEAD_SIZE
    for i in range(LAYERS):
        n = f"model.layers.{i}."
        shapes |= {
            n + "input_layernorm.weight": (HIDDEN,), n + "post_attention_layernorm.weight": (HIDDEN,),
            n + "self_attn.q_proj.weight": (q, HIDDEN), n + "self_attn.k_proj.weight": (kv, HIDDEN),
            n + "self_attn.v_proj.weight": (kv, HIDDEN), n + "self_attn.o_proj.weight": (HIDDEN, q),
            n + "mlp.gate_proj.weight": (FF, HIDDEN), n + "mlp.up_proj.weight": (FF, HIDDEN),
            n + "mlp.down_proj.weight": (HIDDEN, FF),
        }  # fmt: skip
    made = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    return {name: 1 + 0.1 * v if v.ndim == 1 else v * np.float32(v.shape[1] ** -0.5 * 2) for name, v in made.items()}


def tokenizer_json() -> dict[str, Any]:
    """Byte-level BPE of TOKENS."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    special = [(96, "<s>"), (97, "</s>")]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": token, "content": text} | flags for token, text in special],
        "normalizer": None, "pre_tokenizer": byte_level, "post_processor": byte_level, "decoder": byte_level,
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
            "vocab": {text: i for i, text in enumerate(TOKENS[:96])}, "merges": ["a b"],
        },
    }  # fmt: skip


def write_model(
    folder: Path,
    weights: Mapping[str, NDArray[np.float32]] | None = None,
    *,
    shards: int = 1,
    dtype: str = "F32",
    generation: Mapping[str, Any] | None = None,
    **config: Any,
) -> Path:
    """config: fields of config.json that are other than CONFIG's; ... leaves one out."""
    write_folder(folder, tensors() if weights is None else weights, shards, dtype)
    fields = {key: value for key, value in {**CONFIG, **config}.items() if value is not ...}
    files = {
        "config.json": fields, "tokenizer.json": tokenizer_json(),
        "tokenizer_config.json": {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": False},
    }  # fmt: skip
    if generation is not None:
        files["generation_config.json"] = dict(generation)
    for name, value in files.items():
        (folder / name).write_text(json.dumps(value))
    return folder


def write_same_gguf(path: Path, weights: Mapping[str, NDArray[np.float32]]) -> Path:
    """The same model as GGUF has it: other names, rotary pairs interleaved."""
    import gguf

    names = {
        "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
        "embed_tokens": "token_embd", "norm": "output_norm",
    }  # fmt: skip
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FF)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(HEAD_SIZE)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([1] * 96 + [3, 3])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(96)
    writer.add_eos_token_id(97)
    for name, values in weights.items():
        stem = name.removeprefix("model.").removesuffix(".weight")
        layer = ""
        if stem.startswith("layers."):
            _, number, stem = stem.split(".", 2)
            layer = f"blk.{number}."
        heads = {"self_attn.q_proj": HEADS, "self_attn.k_proj": KV_HEADS}.get(stem)
        if heads:
            values = values.reshape(heads, 2, HEAD_SIZE // 2, HIDDEN).swapaxes(1, 2).reshape(values.shape)
        writer.add_tensor(f"{layer}{names[stem]}.weight", np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
