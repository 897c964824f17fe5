"""The Llama family: Llama 1-3, Mistral, TinyLlama, SmolLM2 (Touvron et al. 2023, arXiv:2302.13971)."""

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
        specs += attention(c, i, permuted=True)
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
        q = ops.rope(ops.linear(h, n + "q"), c.num_heads, table)
        k = ops.rope(ops.linear(h, n + "k"), c.num_kv_heads, table)
        v = ops.linear(h, n + "v")
        a = ops.attend(q, k, v, i, c.windows[i])
        x = ops.add(x, ops.linear(a, n + "o"))
        h = ops.rms_norm(x, n + "ffn_norm", c.norm_eps)
        h = ops.gate(ops.linear(h, n + "gate"), ops.linear(h, n + "up"), "silu")
        x = ops.add(x, ops.linear(h, n + "down"))
    x = ops.rms_norm(x, "norm", c.norm_eps)
    ops.logits(x, "embed" if c.tied_embeddings else "head")
