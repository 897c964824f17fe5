"""Runs in the environment of transformers: saves a GGUF's weights, dequantized, as folders of safetensors it loads.

python dequantize.py IN.gguf F32_FOLDER BF16_FOLDER      the second one with tokenizer and chat template
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf.quants import dequantize
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
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


def save_tokenizer(reader: gguf.GGUFReader, folder: Path) -> None:
    """tokenizer.json and tokenizer_config.json of a GGUF whose words are split as SmolLM2's: single digits, byte level."""

    def field(name: str) -> Any:
        return reader.fields[f"tokenizer.{name}"].contents()

    if (kind := (field("ggml.model"), field("ggml.pre"))) != ("gpt2", "smollm"):
        raise SystemExit(f"no way to write a tokenizer of kind {kind}")
    words: list[str] = field("ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in field("ggml.merges")]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = int(gguf.TokenType.CONTROL)
    special = [word for word, kind in zip(words, field("ggml.token_type"), strict=True) if kind == control]
    tokenizer.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": False,
        "bos_token": words[field("ggml.bos_token_id")], "eos_token": words[field("ggml.eos_token_id")],
        "chat_template": field("chat_template"),
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1))


def main(source: str, f32_folder: str, bf16_folder: str) -> None:
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
    model.save_pretrained(f32_folder)
    model.to(torch.bfloat16).save_pretrained(bf16_folder)
    save_tokenizer(reader, Path(bf16_folder))


if __name__ == "__main__":
    main(*sys.argv[1:])
