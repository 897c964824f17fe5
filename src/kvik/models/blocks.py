"""Halves of a layer that families share: x plus what is computed of its norm, and how a pass ends."""

from __future__ import annotations

from kvik.models.config import ModelConfig
from kvik.ops import Ops, RopeTable, Value

__all__ = ["attention_half", "finish", "gated_half"]


def attention_half(
    ops: Ops[Value], c: ModelConfig, x: Value, i: int, table: RopeTable, *, biased: bool = False
) -> Value:
    """x + o(attention): rotated queries and keys, normalized head by head before where the configuration says so.

    biased: queries, keys and values have biases.
    """
    n = f"layers.{i}."
    h = ops.rms_norm(x, n + "attn_norm", c.norm_eps)
    q, k, v = (ops.linear(h, n + name, f"{n}{name}_bias" if biased else None) for name in ("q", "k", "v"))
    if c.qk_norm:
        q = ops.rms_norm(q, n + "q_norm", c.norm_eps, c.num_heads)
        k = ops.rms_norm(k, n + "k_norm", c.norm_eps, c.num_kv_heads)
    a = ops.attend(ops.rope(q, c.num_heads, table), ops.rope(k, c.num_kv_heads, table), v, i, c.windows[i])
    return ops.add(x, ops.linear(a, n + "o"))


def gated_half(ops: Ops[Value], c: ModelConfig, x: Value, i: int) -> Value:
    """x + down(silu(gate) * up)."""
    n = f"layers.{i}."
    h = ops.rms_norm(x, n + "ffn_norm", c.norm_eps)
    h = ops.gate(ops.linear(h, n + "gate"), ops.linear(h, n + "up"), "silu")
    return ops.add(x, ops.linear(h, n + "down"))


def finish(ops: Ops[Value], c: ModelConfig, x: Value) -> None:
    """The last norm and the logits."""
    ops.logits(ops.rms_norm(x, "norm", c.norm_eps), "embed" if c.tied_embeddings else "head")
