"""Tensors that families share: each under its name in the definition, in GGUF files and in Hugging Face files."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kvik.models.config import ModelConfig, TensorSpec

__all__ = ["attention", "decoder", "embedding", "feed_forward", "of_layer", "output", "qkv_biases"]


def of_layer(i: int, name: str, gguf: str, hf: str, shape: tuple[int, ...], **options: Any) -> TensorSpec:
    """A weight of layer i. options: further fields of TensorSpec."""
    return TensorSpec(
        f"layers.{i}.{name}", f"blk.{i}.{gguf}.weight", f"model.layers.{i}.{hf}.weight", shape, **options
    )  # fmt: skip


def decoder(
    c: ModelConfig, attention: Callable[[int], list[TensorSpec]], feed_forward: Callable[[int], list[TensorSpec]]
) -> list[TensorSpec]:
    """A whole model in the order of first use; each half of a layer has a norm before it and is given by its number."""
    width = (c.hidden_size,)
    specs = [embedding(c)]
    for i in range(c.num_layers):
        specs.append(of_layer(i, "attn_norm", "attn_norm", "input_layernorm", width))
        specs += attention(i)
        specs.append(of_layer(i, "ffn_norm", "ffn_norm", "post_attention_layernorm", width))
        specs += feed_forward(i)
    return specs + output(c)


def embedding(c: ModelConfig) -> TensorSpec:
    """embed [V, width]."""
    return TensorSpec("embed", "token_embd.weight", "model.embed_tokens.weight", (c.vocab_size, c.hidden_size))


def output(c: ModelConfig, *, norm_offset: float = 0.0) -> list[TensorSpec]:
    """norm [width], and head [V, width] unless it is the embedding."""
    specs = [
        TensorSpec("norm", "output_norm.weight", "model.norm.weight", (c.hidden_size,), hf_offset=norm_offset)
    ]  # fmt: skip
    if not c.tied_embeddings:
        specs.append(TensorSpec("head", "output.weight", "lm_head.weight", (c.vocab_size, c.hidden_size)))
    return specs


def attention(c: ModelConfig, i: int, *, permuted: bool = False, norm_offset: float = 0.0) -> list[TensorSpec]:
    """q, k, v, o of layer i, q_norm and k_norm where the configuration has them.

    permuted: GGUF interleaves the rotary pairs of q and k. norm_offset: what Hugging Face files lack in the norms.
    """
    q, kv, d = c.num_heads * c.head_size, c.num_kv_heads * c.head_size, c.hidden_size
    q_heads, k_heads = (c.num_heads, c.num_kv_heads) if permuted else (0, 0)
    specs = [
        of_layer(i, "q", "attn_q", "self_attn.q_proj", (q, d), permuted_heads=q_heads),
        of_layer(i, "k", "attn_k", "self_attn.k_proj", (kv, d), permuted_heads=k_heads),
        of_layer(i, "v", "attn_v", "self_attn.v_proj", (kv, d)),
        of_layer(i, "o", "attn_output", "self_attn.o_proj", (d, q)),
    ]
    if c.qk_norm:
        one_head = (c.head_size,)
        specs += [
            of_layer(i, "q_norm", "attn_q_norm", "self_attn.q_norm", one_head, hf_offset=norm_offset),
            of_layer(i, "k_norm", "attn_k_norm", "self_attn.k_norm", one_head, hf_offset=norm_offset),
        ]
    return specs


def qkv_biases(c: ModelConfig, i: int) -> list[TensorSpec]:
    """q_bias, k_bias, v_bias of layer i."""
    rows = {"q": c.num_heads * c.head_size, "k": c.num_kv_heads * c.head_size, "v": c.num_kv_heads * c.head_size}
    return [
        TensorSpec(f"layers.{i}.{x}_bias", f"blk.{i}.attn_{x}.bias", f"model.layers.{i}.self_attn.{x}_proj.bias", (n,))
        for x, n in rows.items()
    ]


def feed_forward(c: ModelConfig, i: int) -> list[TensorSpec]:
    """gate, up [F, width] and down [width, F] of layer i."""
    d, ff = c.hidden_size, c.intermediate_size
    return [
        of_layer(i, "gate", "ffn_gate", "mlp.gate_proj", (ff, d)),
        of_layer(i, "up", "ffn_up", "mlp.up_proj", (ff, d)),
        of_layer(i, "down", "ffn_down", "mlp.down_proj", (d, ff)),
    ]
