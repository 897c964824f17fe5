"""The Llama family: Llama 1-3, Mistral, TinyLlama, SmolLM2 (Touvron et al. 2023, arXiv:2302.13971)."""

from __future__ import annotations

from kvik.models.config import ModelConfig, TensorSpec
from kvik.models.rope import rope_table
from kvik.ops import Ops, Value

__all__ = ["forward", "tensors"]


def tensors(c: ModelConfig) -> list[TensorSpec]:
    """Every tensor of the model, in the order it is first used."""
    q, kv = c.num_heads * c.head_size, c.num_kv_heads * c.head_size
    d, ff = c.hidden_size, c.intermediate_size
    specs = [TensorSpec("embed", "token_embd.weight", "model.embed_tokens.weight", (c.vocab_size, d))]
    for i in range(c.num_layers):
        n, g, h = f"layers.{i}.", f"blk.{i}.", f"model.layers.{i}."
        specs += [
            TensorSpec(n + "attn_norm", g + "attn_norm.weight", h + "input_layernorm.weight", (d,)),
            TensorSpec(n + "q", g + "attn_q.weight", h + "self_attn.q_proj.weight", (q, d), c.num_heads),
            TensorSpec(n + "k", g + "attn_k.weight", h + "self_attn.k_proj.weight", (kv, d), c.num_kv_heads),
            TensorSpec(n + "v", g + "attn_v.weight", h + "self_attn.v_proj.weight", (kv, d)),
            TensorSpec(n + "o", g + "attn_output.weight", h + "self_attn.o_proj.weight", (d, q)),
            TensorSpec(n + "ffn_norm", g + "ffn_norm.weight", h + "post_attention_layernorm.weight", (d,)),
            TensorSpec(n + "gate", g + "ffn_gate.weight", h + "mlp.gate_proj.weight", (ff, d)),
            TensorSpec(n + "up", g + "ffn_up.weight", h + "mlp.up_proj.weight", (ff, d)),
            TensorSpec(n + "down", g + "ffn_down.weight", h + "mlp.down_proj.weight", (d, ff)),
        ]
    specs.append(TensorSpec("norm", "output_norm.weight", "model.norm.weight", (d,)))
    if not c.tied_embeddings:
        specs.append(TensorSpec("head", "output.weight", "lm_head.weight", (c.vocab_size, d)))
    return specs


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
