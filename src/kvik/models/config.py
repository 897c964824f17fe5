"""What every family's definition is parameterized by, and the record of which tensors it needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

__all__ = ["ModelConfig", "RopeConfig", "TensorSpec"]

RopeKind = Literal["default", "linear", "llama3", "yarn"]


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding and its scaling.

    Attributes:
        theta: base of the frequencies.
        kind: "default", "linear" (Chen et al. 2023), "llama3" (Meta 2024) or "yarn" (Peng et al. 2023).
        factor: context extension factor; 1 for "default".
        original_context: context length before extension ("llama3", "yarn").
        low_freq_factor, high_freq_factor: band edges of "llama3".
        beta_fast, beta_slow: band edges of "yarn" in rotations.
        attention_factor: multiplies cosine and sine under "yarn"; None derives 0.1 ln(factor) + 1.
        divisors: per-frequency divisors given by the file (GGUF tensor rope_freqs), in place of `kind`'s formula.
    """

    theta: float = 10000.0
    kind: RopeKind = "default"
    factor: float = 1.0
    original_context: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    divisors: tuple[float, ...] | None = None


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of a decoder-only transformer. Checked against the tensors' shapes on load."""

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    context_length: int
    norm_eps: float
    rope: RopeConfig
    tied_embeddings: bool
    sliding_window: int | None = None


class TensorSpec(NamedTuple):
    """A tensor the model definition names.

    permuted_heads: the file stores the rows of each head with rotary pairs interleaved (GGUF's Llama q and k);
    loading restores the halves-paired order. 0 means rows are as the definition wants them.
    """

    name: str
    gguf_name: str
    hf_name: str
    shape: tuple[int, ...]
    permuted_heads: int = 0
