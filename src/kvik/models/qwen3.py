"""Qwen3, dense: queries and keys are normalized head by head (Qwen Team 2025, arXiv:2505.09388)."""

from __future__ import annotations

from kvik.models.blocks import attention_half, finish, gated_half
from kvik.models.config import ModelConfig, TensorSpec
from kvik.models.rope import rope_table
from kvik.models.specs import attention, decoder, feed_forward
from kvik.ops import Ops, Value

__all__ = ["forward", "tensors"]


def tensors(c: ModelConfig) -> list[TensorSpec]:
    """Every tensor of the model, in the order it is first used."""
    return decoder(c, lambda i: attention(c, i), lambda i: feed_forward(c, i))


def forward(ops: Ops[Value], c: ModelConfig) -> None:
    """One pass, from token ids to logits."""
    assert c.rope is not None
    table = rope_table(c.rope, c.head_size, c.context_length)
    x = ops.embed("embed")
    for i in range(c.num_layers):
        x = attention_half(ops, c, x, i, table)
        x = gated_half(ops, c, x, i)
    finish(ops, c, x)
