"""Runs in the environment of transformers: saves a GGUF's weights, dequantized to float32, as a folder it loads.

python dequantize.py IN.gguf OUT_FOLDER
"""

from __future__ import annotations

import sys
from typing import Any

import gguf
import numpy as np
import torch
from gguf.quants import dequantize
from transformers import LlamaConfig, LlamaForCausalLM

NAMES = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip


def halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """Undo llama.cpp's row order of q and k: it pairs neighbours (2i, 2i+1), transformers the halves (i, i + d/2)."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def main(source: str, folder: str) -> None:
    reader = gguf.GGUFReader(source)

    def field(name: str) -> Any:
        return reader.fields[f"llama.{name}"].contents()

    heads, kv_heads = int(field("attention.head_count")), int(field("attention.head_count_kv"))
    tied = not any(tensor.name == "output.weight" for tensor in reader.tensors)
    state: dict[str, torch.Tensor] = {}
    for tensor in reader.tensors:
        weight = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if tensor.name == "token_embd.weight":
            name = "model.embed_tokens.weight"
        elif tensor.name == "output_norm.weight":
            name = "model.norm.weight"
        elif tensor.name == "output.weight":
            name = "lm_head.weight"
        else:
            _, layer, kind, _ = tensor.name.split(".")
            name = f"model.layers.{layer}.{NAMES[kind]}.weight"
            if kind in ("attn_q", "attn_k"):
                weight = halves(weight, heads if kind == "attn_q" else kv_heads)
        state[name] = torch.from_numpy(np.ascontiguousarray(weight))
    if tied:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    config = LlamaConfig(
        vocab_size=state["model.embed_tokens.weight"].shape[0],
        hidden_size=int(field("embedding_length")),
        intermediate_size=int(field("feed_forward_length")),
        num_hidden_layers=int(field("block_count")),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=int(field("context_length")),
        rms_norm_eps=float(field("attention.layer_norm_rms_epsilon")),
        rope_parameters={"rope_type": "default", "rope_theta": float(field("rope.freq_base"))},
        tie_word_embeddings=tied,
        bos_token_id=int(reader.fields["tokenizer.ggml.bos_token_id"].contents()),
        eos_token_id=int(reader.fields["tokenizer.ggml.eos_token_id"].contents()),
    )
    model = LlamaForCausalLM(config)
    model.load_state_dict(state, strict=True)
    model.save_pretrained(folder)


if __name__ == "__main__":
    main(*sys.argv[1:])
