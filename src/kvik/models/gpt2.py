"""GPT-2: learned positions, layer norms and biases everywhere, one matrix for queries, keys and values
(Radford et al. 2019, "Language Models are Unsupervised Multitask Learners").
"""

from __future__ import annotations

from kvik.models.config import ModelConfig, Piece, TensorSpec
from kvik.ops import Ops, Value

__all__ = ["forward", "tensors"]


def tensors(c: ModelConfig) -> list[TensorSpec]:
    """Every tensor of the model, in the order it is first used. Hugging Face files store matrices transposed."""
    d, ff, t = c.hidden_size, c.intermediate_size, "transformer."
    specs = [
        TensorSpec("embed", "token_embd.weight", t + "wte.weight", (c.vocab_size, d)),
        TensorSpec("positions", "position_embd.weight", t + "wpe.weight", (c.context_length, d), keep_f32=True),
    ]
    for i in range(c.num_layers):
        specs += _norm(f"layers.{i}.attn_norm", f"blk.{i}.attn_norm", f"{t}h.{i}.ln_1", d)
        for part, name in enumerate("qkv"):
            rows = (part * d, part * d + d)
            specs += _linear(i, name, "attn_qkv", "attn.c_attn", (d, d), rows)
        specs += _linear(i, "o", "attn_output", "attn.c_proj", (d, d))
        specs += _norm(f"layers.{i}.ffn_norm", f"blk.{i}.ffn_norm", f"{t}h.{i}.ln_2", d)
        specs += _linear(i, "up", "ffn_up", "mlp.c_fc", (ff, d))
        specs += _linear(i, "down", "ffn_down", "mlp.c_proj", (d, ff))
    specs += _norm("norm", "output_norm", t + "ln_f", d)
    if not c.tied_embeddings:
        specs.append(TensorSpec("head", "output.weight", "lm_head.weight", (c.vocab_size, d)))
    return specs


def _norm(name: str, gguf: str, hf: str, width: int) -> list[TensorSpec]:
    return [
        TensorSpec(name, gguf + ".weight", hf + ".weight", (width,)),
        TensorSpec(name + "_bias", gguf + ".bias", hf + ".bias", (width,)),
    ]


def _linear(
    i: int, name: str, gguf: str, hf: str, shape: tuple[int, int], rows: tuple[int, int | None] = (0, None)
) -> list[TensorSpec]:
    """A matrix and its bias, the given rows of the file's."""
    g, h = f"blk.{i}.{gguf}", f"transformer.h.{i}.{hf}"
    weight = Piece(g + ".weight", *rows), Piece(h + ".weight", *rows, transposed=True)
    bias = Piece(g + ".bias", *rows), Piece(h + ".bias", *rows)
    return [
        TensorSpec(f"layers.{i}.{name}", *weight, shape),
        TensorSpec(f"layers.{i}.{name}_bias", *bias, shape[:1]),
    ]


def forward(ops: Ops[Value], c: ModelConfig) -> None:
    """One pass, from token ids to logits."""
    x = ops.add(ops.embed("embed"), ops.embed_positions("positions"))
    for i in range(c.num_layers):
        n = f"layers.{i}."
        h = ops.layer_norm(x, n + "attn_norm", n + "attn_norm_bias", c.norm_eps)
        q, k, v = (ops.linear(h, n + w, n + w + "_bias") for w in ("q", "k", "v"))
        a = ops.attend(q, k, v, i, c.windows[i])
        x = ops.add(x, ops.linear(a, n + "o", n + "o_bias"))
        h = ops.layer_norm(x, n + "ffn_norm", n + "ffn_norm_bias", c.norm_eps)
        h = ops.activate(ops.linear(h, n + "up", n + "up_bias"), "gelu_tanh")
        x = ops.add(x, ops.linear(h, n + "down", n + "down_bias"))
    x = ops.layer_norm(x, "norm", "norm_bias", c.norm_eps)
    ops.logits(x, "embed" if c.tied_embeddings else "head")
