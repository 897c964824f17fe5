"""Gemma 3, its text model: layers with a window and layers that see all, each kind with its own rotary embedding, and
norms before and after both halves of a layer (Gemma Team 2025, arXiv:2503.19786).
"""

from __future__ import annotations

from kvik.models.blocks import finish
from kvik.models.config import ModelConfig, TensorSpec
from kvik.models.rope import rope_table
from kvik.models.specs import attention, embedding, feed_forward, of_layer, output
from kvik.ops import Ops, Value

__all__ = ["forward", "tensors"]

LESS_ONE = 1.0
"""Hugging Face files keep every norm's weight less 1."""


def tensors(c: ModelConfig) -> list[TensorSpec]:
    """Every tensor of the model, in the order it is first used."""

    def norm(i: int, name: str, gguf: str, hf: str) -> TensorSpec:
        return of_layer(i, name, gguf, hf + "_layernorm", (c.hidden_size,), hf_offset=LESS_ONE)

    specs = [embedding(c)]
    for i in range(c.num_layers):
        specs.append(norm(i, "attn_norm", "attn_norm", "input"))
        specs += attention(c, i, norm_offset=LESS_ONE)
        specs.append(norm(i, "attn_post_norm", "post_attention_norm", "post_attention"))
        specs.append(norm(i, "ffn_norm", "ffn_norm", "pre_feedforward"))
        specs += feed_forward(c, i)
        specs.append(norm(i, "ffn_post_norm", "post_ffw_norm", "post_feedforward"))
    return specs + output(c, norm_offset=LESS_ONE)


def forward(ops: Ops[Value], c: ModelConfig) -> None:
    """One pass, from token ids to logits."""
    assert c.rope is not None
    everywhere = rope_table(c.rope, c.head_size, c.context_length)
    nearby = rope_table(c.rope_local or c.rope, c.head_size, c.context_length)
    x = ops.embed("embed", c.embedding_scale)
    for i in range(c.num_layers):
        n, window = f"layers.{i}.", c.windows[i]
        table = everywhere if window is None else nearby
        h = ops.rms_norm(x, n + "attn_norm", c.norm_eps)
        q = ops.rms_norm(ops.linear(h, n + "q"), n + "q_norm", c.norm_eps, c.num_heads)
        k = ops.rms_norm(ops.linear(h, n + "k"), n + "k_norm", c.norm_eps, c.num_kv_heads)
        q, k = ops.rope(q, c.num_heads, table), ops.rope(k, c.num_kv_heads, table)
        a = ops.attend(q, k, ops.linear(h, n + "v"), i, window, c.attention_scale)
        x = ops.add(x, ops.rms_norm(ops.linear(a, n + "o"), n + "attn_post_norm", c.norm_eps))
        h = ops.rms_norm(x, n + "ffn_norm", c.norm_eps)
        h = ops.gate(ops.linear(h, n + "gate"), ops.linear(h, n + "up"), "gelu_tanh")
        x = ops.add(x, ops.rms_norm(ops.linear(h, n + "down"), n + "ffn_post_norm", c.norm_eps))
    finish(ops, c, x)
