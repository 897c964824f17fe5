"""Mixtures of experts: Mixtral (Jiang et al. 2024, arXiv:2401.04088) and Qwen3-MoE (Qwen Team 2025, arXiv:2505.09388).

Qwen3-MoE normalizes queries and keys; that tells the two apart.
"""

from __future__ import annotations

from kvik.models.blocks import attention_half, finish
from kvik.models.config import ModelConfig, Piece, TensorSpec
from kvik.models.rope import rope_table
from kvik.models.specs import attention, decoder
from kvik.ops import Experts, Ops, Value

__all__ = ["forward", "tensors"]


def tensors(c: ModelConfig) -> list[TensorSpec]:
    """Every tensor of the model, in the order it is first used."""
    return decoder(c, lambda i: attention(c, i, permuted=not c.qk_norm), lambda i: _experts(c, i))


def _experts(c: ModelConfig, i: int) -> list[TensorSpec]:
    """The router [E, width] and the experts' matrices, which Hugging Face files keep one by one and GGUF stacked."""
    block = f"model.layers.{i}.{'mlp' if c.qk_norm else 'block_sparse_moe'}"
    gate, up, down = ("gate_proj", "up_proj", "down_proj") if c.qk_norm else ("w1", "w3", "w2")
    count, d, ff = c.num_experts, c.hidden_size, c.intermediate_size

    def stacked(name: str, hf: str, rows: int, columns: int) -> TensorSpec:
        pieces = tuple(Piece(f"{block}.experts.{e}.{hf}.weight") for e in range(count))
        return TensorSpec(
            f"layers.{i}.experts_{name}", f"blk.{i}.ffn_{name}_exps.weight", pieces, (count * rows, columns)
        )

    return [
        TensorSpec(
            f"layers.{i}.router", f"blk.{i}.ffn_gate_inp.weight", f"{block}.gate.weight", (count, d), keep_f32=True
        ),
        stacked("gate", gate, ff, d),
        stacked("up", up, ff, d),
        stacked("down", down, d, ff),
    ]


def forward(ops: Ops[Value], c: ModelConfig) -> None:
    """One pass, from token ids to logits."""
    assert c.rope is not None
    table = rope_table(c.rope, c.head_size, c.context_length)
    x = ops.embed("embed")
    for i in range(c.num_layers):
        n = f"layers.{i}."
        x = attention_half(ops, c, x, i, table)
        h = ops.rms_norm(x, n + "ffn_norm", c.norm_eps)
        experts = Experts(
            gate=n + "experts_gate", up=n + "experts_up", down=n + "experts_down",
            count=c.num_experts, used=c.experts_used, normalize=c.normalize_experts, activation="silu",
        )  # fmt: skip
        x = ops.add(x, ops.experts(h, ops.linear(h, n + "router"), experts))
    finish(ops, c, x)
