"""Tensors that families share: each under its name in the definition, in GGUF files and in Hugging Face files."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from kvik.models.config import ModelConfig, Piece, TensorSpec

__all__ = ["as_named_in", "attention", "embedding", "feed_forward", "of_layer", "output", "pieces", "qkv_biases"]


def of_layer(i: int, name: str, gguf: str, hf: str, shape: tuple[int, ...], **options: Any) -> TensorSpec:
    """A weight of layer i. options: further fields of TensorSpec."""
    return TensorSpec(
        f"layers.{i}.{name}", f"blk.{i}.{gguf}.weight", f"model.layers.{i}.{hf}.weight", shape, **options
    )  # fmt: skip


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


def pieces(place: str | Piece | tuple[Piece, ...]) -> tuple[Piece, ...]:
    """Where a tensor's rows are, in order, however few there are."""
    if isinstance(place, str):
        return (Piece(place),)
    return (place,) if isinstance(place, Piece) else place


def as_named_in(names: Collection[str], specs: list[TensorSpec]) -> list[TensorSpec]:
    """specs, the embedding first, with their Hugging Face names as a checkpoint of these tensor names has them.

    Checkpoints saved without their head lack the first word of the names (GPT-2's on the hub); in multimodal ones
    (Gemma 3) the text model is `language_model`. Where none of these fits, the names stay and what is missing is named
    when it is read.
    """
    model, _, embed = str(specs[0].hf).partition(".")
    forms = (  # what stands before the names of the model's tensors, and of its head
        (f"{model}.", ""),
        ("", ""),
        (f"language_model.{model}.", "language_model."),
        (f"{model}.language_model.", ""),
    )
    of_model, of_head = next((form for form in forms if form[0] + embed in names), forms[0])

    def renamed(name: str) -> str:
        first, _, rest = name.partition(".")
        return of_model + rest if first == model else of_head + name

    return [s._replace(hf=tuple(p._replace(name=renamed(p.name)) for p in pieces(s.hf))) for s in specs]
