"""What both readers must make of the same model: SmolLM2-135M's sizes."""

from __future__ import annotations

from kvik.models.config import ModelConfig, RopeConfig

LLAMA = ModelConfig(
    family="llama",
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
    head_size=64,
    context_length=8192,
    norm_eps=1e-5,
    rope=RopeConfig(theta=100000.0),
    tied_embeddings=True,
    windows=(None,) * 30,
)
