"""One file per architecture family. `MODELS` says which file runs which family.

A family's file has `tensors(config)`, the tensors it needs, and `forward(ops, config)`, its ops in order.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from kvik.models import gemma3, gpt2, llama, moe, qwen2, qwen3
from kvik.models.config import ModelConfig, TensorSpec
from kvik.ops import Ops

__all__ = ["MODELS", "Family"]


class Family(Protocol):
    """What a family's file offers."""

    def tensors(self, c: ModelConfig, /) -> list[TensorSpec]: ...
    def forward(self, ops: Ops[Any], c: ModelConfig, /) -> None: ...


MODELS: Mapping[str, Family] = {
    "gemma3": gemma3,
    "gpt2": gpt2,
    "llama": llama,
    "moe": moe,
    "qwen2": qwen2,
    "qwen3": qwen3,
}
