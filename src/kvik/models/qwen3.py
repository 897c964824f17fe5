"""Qwen3, dense: queries and keys are normalized head by head (Qwen Team 2025, arXiv:2505.09388)."""

from __future__ import annotations

from kvik.models.config import ModelConfig, TensorSpec
from kvik.models.rope import rope_table
from kvik.models.specs import attention, embedding, feed_forward, of_layer, output
from kvik.ops import Ops, Value

__all__ = ["forward", "tensors"]


def tensors(c: ModelConfig) -> list[TensorSpec]:
    """Every tensor of the model, in the order it is first used."""
    width = (c.hidden_size,)
    specs = [embedding(c)]
    for i in range(c.num_layers):
        specs.append(of_layer(i, "attn_norm", "attn_norm", "input_layernorm", width))
        specs += attention(c, i)
        specs.append(of_layer(i, "ffn_norm", "ffn_norm", "post_attention_layernorm", width))
        specs += feed_forward(c, i)
    return specs + output(c)


def forward(ops: Ops[Value], c: ModelConfig) -> None:
    """One pass, from token ids to logits."""
    assert c.rope is not None
    table = rope_table(c.rope, c.head_size, c.context_length)
    x = ops.embed("embed")
    for i in range(c.num_layers):
        n = f"layers.{i}."
        h = ops.rms_norm(x, n + "attn_norm", c.norm_eps)
        q = ops.rms_norm(ops.linear(h, n + "q"), n + "q_norm", c.norm_eps, c.num_heads)
        k = ops.rms_norm(ops.linear(h, n + "k"), n + "k_norm", c.norm_eps, c.num_kv_heads)
        v = ops.linear(h, n + "v")
        a = ops.attend(ops.rope(q, c.num_heads, table), ops.rope(k, c.num_kv_heads, table), v, i, c.windows[i])
        x = ops.add(x, ops.linear(a, n + "o"))
        h = ops.rms_norm(x, n + "ffn_norm", c.norm_eps)
        h = ops.gate(ops.linear(h, n + "gate"), ops.linear(h, n + "up"), "silu")
        x = ops.add(x, ops.linear(h, n + "down"))
    x = ops.rms_norm(x, "norm", c.norm_eps)
    ops.logits(x, "embed" if c.tied_embeddings else "head")
