"""What every family's definition is parameterized by, and the record of which tensors it needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

__all__ = ["ModelConfig", "Piece", "RopeConfig", "TensorSpec"]

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
    """Sizes of a decoder-only transformer. Checked against the tensors' shapes on load.

    Attributes:
        family: the key in MODELS.
        intermediate_size: width of the feed-forward network; of one expert where there are experts.
        windows: for each layer, how many slots a row sees, its own included; None sees all.
        rope: rotary embedding of layers that see all; None where positions are learned (GPT-2).
        rope_local: rotary embedding of layers with a window, where it differs (Gemma 3).
        attention_scale: what scores are multiplied by; None is 1 / sqrt(head_size).
        embedding_scale: what rows of the embedding are multiplied by.
        qk_norm: queries and keys are normalized head by head.
        num_experts, experts_used: of a mixture of experts; 0 where the network is dense.
        normalize_experts: the used experts' probabilities sum to 1.
    """

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
    rope: RopeConfig | None
    tied_embeddings: bool
    windows: tuple[int | None, ...]
    rope_local: RopeConfig | None = None
    attention_scale: float | None = None
    embedding_scale: float = 1.0
    qk_norm: bool = False
    num_experts: int = 0
    experts_used: int = 0
    normalize_experts: bool = True


class Piece(NamedTuple):
    """Rows (outputs) `begin` to `end` of a file's tensor; end None is its last.

    transposed: the file stores [inputs, outputs], as GPT-2's checkpoints do; begin and end still count outputs.
    """

    name: str
    begin: int = 0
    end: int | None = None
    transposed: bool = False


class TensorSpec(NamedTuple):
    """A tensor the model definition names, and where each kind of file keeps it.

    gguf, hf: a tensor of the file, or the pieces whose rows follow one another. GGUF stacks experts in a third, leading
        dimension: its rows are counted through all of them.
    permuted_heads: GGUF stores the rows of each head with rotary pairs interleaved (Llama's q and k); loading restores
        the halves-paired order. 0 means rows are as the definition wants them.
    hf_offset: added to every value that a Hugging Face file has (Gemma's norms are stored less 1).
    keep_f32: computed in f32 whatever layout is asked for (routers, learned positions).
    """

    name: str
    gguf: str | Piece | tuple[Piece, ...]
    hf: str | Piece | tuple[Piece, ...]
    shape: tuple[int, ...]
    permuted_heads: int = 0
    hf_offset: float = 0.0
    keep_f32: bool = False
