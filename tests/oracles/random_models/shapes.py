"""Which random models there are: for each family its features, in sizes that leave remainders."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

VOCAB = 320
DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}


@dataclass(frozen=True)
class Shape:
    """A random model. The sequences that tests run must be longer than twice its window.

    kind: of transformers' models, one of `model.KINDS`.
    more: further fields of its configuration.
    in_gguf: whether llama.cpp's files can say all of it.
    """

    name: str
    kind: str = "llama"
    heads: int = 4
    kv_heads: int = 2
    head_size: int = 32
    hidden: int = 128
    intermediate: int = 192
    layers: int = 3
    tied: bool = False
    window: int | None = None
    rope: Mapping[str, Any] = field(default_factory=lambda: dict(DEFAULT_ROPE), hash=False)
    context: int = 512
    seed: int = 0
    more: Mapping[str, Any] = field(default_factory=dict, hash=False)
    in_gguf: bool = True

    def __str__(self) -> str:
        return self.name


LLAMAS = (
    Shape("untied", seed=1),
    Shape("tied-grouped-by-three", heads=6, kv_heads=2, head_size=16, hidden=96, tied=True, seed=2),
    Shape("one-kv-head-of-64", heads=4, kv_heads=1, head_size=64, hidden=160, layers=2, seed=3),
    Shape("heads-of-80", heads=2, kv_heads=2, head_size=80, hidden=64, tied=True, seed=4),
    Shape("window", kind="mistral", window=24, seed=5),
    Shape(
        "window-not-of-blocks", kind="mistral", window=37, heads=3, kv_heads=1, head_size=64, hidden=96, tied=True,
        seed=6,
    ),
    Shape("linear", rope=LINEAR, seed=7),
    Shape("llama3", rope=LLAMA3, head_size=64, tied=True, seed=8),
    Shape("yarn", rope=YARN, seed=9),
)  # fmt: skip

GEMMA_WINDOWS = {"query_pre_attn_scalar": 48, "layer_types": ["sliding_attention", "full_attention"] * 2}
QWEN_WINDOWS = {"use_sliding_window": True, "max_window_layers": 1}
EXPERTS = {"num_local_experts": 5, "num_experts_per_tok": 2}
QWEN_EXPERTS = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 96}

FAMILIES = (
    Shape("qwen2", kind="qwen2", seed=21),
    Shape("qwen2-tied-yarn", kind="qwen2", heads=3, kv_heads=1, hidden=96, tied=True, rope=YARN, seed=22),
    Shape("qwen2-late-windows", kind="qwen2", window=29, seed=23, more=QWEN_WINDOWS, in_gguf=False),
    Shape("qwen3", kind="qwen3", heads=3, kv_heads=1, head_size=64, hidden=96, tied=True, seed=24),
    Shape("qwen3-late-windows", kind="qwen3", window=40, seed=25, more=QWEN_WINDOWS, in_gguf=False),
    Shape("gemma3", kind="gemma3", window=32, layers=7, tied=True, seed=26, more={"query_pre_attn_scalar": 32}),
    Shape(
        "gemma3-linear", kind="gemma3", heads=3, kv_heads=1, head_size=64, hidden=96, layers=4, tied=True, window=27,
        rope=LINEAR, seed=27, more=GEMMA_WINDOWS,
    ),
    Shape("gpt2", kind="gpt2", kv_heads=4, intermediate=512, tied=True, context=256, seed=28),
    Shape("gpt2-untied", kind="gpt2", heads=3, kv_heads=3, head_size=64, hidden=192, layers=2, context=180, seed=29),
    Shape("mixtral", kind="mixtral", seed=30, more=EXPERTS),
    Shape("mixtral-window", kind="mixtral", heads=2, kv_heads=1, hidden=96, window=33, layers=2, seed=31, more=EXPERTS),
    Shape("qwen3-moe", kind="qwen3_moe", seed=32, more={**QWEN_EXPERTS, "norm_topk_prob": True}),
    Shape(
        "qwen3-moe-unnormalized", kind="qwen3_moe", heads=3, kv_heads=1, head_size=64, hidden=96, layers=2, tied=True,
        seed=33, more=QWEN_EXPERTS,
    ),
)  # fmt: skip

SHAPES = LLAMAS + FAMILIES


def wide(kind: str) -> Shape:
    """A model of this kind whose every matrix has inputs by the 256, as GGUF's K types need."""
    more = {"mixtral": EXPERTS, "qwen3_moe": {**QWEN_EXPERTS, "moe_intermediate_size": 256}}.get(kind, {})
    if kind == "gemma3":
        more = {"layer_types": ["sliding_attention", "full_attention"]}
    return Shape(
        f"wide-{kind}", kind=kind, heads=4, kv_heads=4 if kind == "gpt2" else 2, head_size=64, hidden=256,
        intermediate=256, layers=2, tied=kind in ("gemma3", "gpt2"), window=24 if kind == "gemma3" else None,
        seed=50, more=more,
    )  # fmt: skip
