"""Small models of one architecture with random weights, as GGUF files of mixed types and as folders of safetensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import tokenizers
from gguf.quants import quantize
from safetensors.numpy import save_file

TOKENS = [*map(chr, range(33, 127)), "Ġ", "ab", "<s>", "</s>"]
LAYERS, WIDTH, FEED_FORWARD, CONTEXT = 2, 64, 96, 128
HEADS, KV_HEADS = 4, 2
TEMPLATE = "\n{# small #}\n{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


def shapes(layers: int = LAYERS) -> dict[str, tuple[int, ...]]:
    """Tensors by their GGUF names less ".weight"."""
    kv = WIDTH // HEADS * KV_HEADS
    found: dict[str, tuple[int, ...]] = {"token_embd": (len(TOKENS), WIDTH), "output_norm": (WIDTH,)}
    for i in range(layers):
        b = f"blk.{i}."
        found |= {
            b + "attn_norm": (WIDTH,), b + "attn_q": (WIDTH, WIDTH), b + "attn_k": (kv, WIDTH),
            b + "attn_v": (kv, WIDTH), b + "attn_output": (WIDTH, WIDTH), b + "ffn_norm": (WIDTH,),
            b + "ffn_gate": (FEED_FORWARD, WIDTH), b + "ffn_up": (FEED_FORWARD, WIDTH),
            b + "ffn_down": (WIDTH, FEED_FORWARD),
        }  # fmt: skip
    return found


def weight_of(name: str, shape: tuple[int, ...]) -> np.ndarray:
    if len(shape) == 1:
        return np.ones(shape, np.float32)
    seed = sum(name.encode())
    return np.random.default_rng(seed).normal(0, 0.3, shape).astype(np.float32)


def write_gguf(
    path: Path, types: Mapping[str, str] | None = None, *, architecture: str = "llama", template: str | None = TEMPLATE,
    extra: Mapping[str, Any] | None = None, window: int = 32,
) -> Path:  # fmt: skip
    """types: by the last part of a matrix's name, others are Q4_1. extra: metadata as strings. window: 0 is none."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("a small one")
    writer.add_block_count(LAYERS)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(50_000.0)
    writer.add_sliding_window(window)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([1] * 96 + [3, 3])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(96)
    writer.add_eos_token_id(97)
    writer.add_float32("general.sampling.temp", 0.5)
    if template is not None:
        writer.add_chat_template(template)
    for key, value in (extra or {}).items():
        writer.add_string(key, value)
    for name, shape in shapes().items():
        kind = getattr(gguf.GGMLQuantizationType, "F32" if len(shape) == 1 else _type(name, types or {}))
        data = quantize(weight_of(name, shape), kind)
        writer.add_tensor(f"{name}.weight", data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _type(name: str, types: Mapping[str, str]) -> str:
    return next((kind for part, kind in types.items() if name.endswith(part)), "Q4_1")


def write_folder(folder: Path, *, architecture: str = "LlamaForCausalLM", dtype: type = np.float16) -> Path:
    """config.json, generation_config.json, tokenizer.json, README.md and model.safetensors."""
    folder.mkdir()
    names = {
        "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
    }  # fmt: skip
    state = {}
    for name, shape in shapes().items():
        whole = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}.get(name)
        if whole is None:
            _, layer, kind = name.split(".")
            whole = f"model.layers.{layer}.{names[kind]}"
        state[f"{whole}.weight"] = weight_of(name, shape).astype(dtype)
    save_file(state, folder / "model.safetensors")
    config = {
        "architectures": [architecture], "vocab_size": len(TOKENS), "hidden_size": WIDTH,
        "intermediate_size": FEED_FORWARD, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS, "max_position_embeddings": CONTEXT, "rms_norm_eps": 1e-5,
        "rope_theta": 50_000.0, "tie_word_embeddings": True, "bos_token_id": 96, "eos_token_id": 97,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(
        json.dumps({"temperature": 0.4, "repetition_penalty": 1.1, "num_beams": 4})
    )
    (folder / "README.md").write_text("---\nlicense: mit\n---\nwords")
    made = tokenizers.Tokenizer(tokenizers.models.BPE({token: i for i, token in enumerate(TOKENS)}, [("a", "b")]))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens([tokenizers.AddedToken(token, special=True) for token in ("<s>", "</s>")])
    made.save(str(folder / "tokenizer.json"))
    return folder
