"""Kvik runs language models, shows what happens inside a generation, and measures which settings to ship."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvik.errors import DataError, KvikError, ParameterError, StorageError, TryAgainError
from kvik.params import EngineParams, SamplingParams

if TYPE_CHECKING:
    from kvik.engine.request import Choice, Chunk, Completion, ScoreResult, Usage
    from kvik.llm import LLM, ModelInfo

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "Choice",
    "Chunk",
    "Completion",
    "DataError",
    "EngineParams",
    "KvikError",
    "ModelInfo",
    "ParameterError",
    "SamplingParams",
    "ScoreResult",
    "StorageError",
    "TryAgainError",
    "Usage",
]

_LATER = {
    "LLM": "kvik.llm",
    "ModelInfo": "kvik.llm",
    "Choice": "kvik.engine.request",
    "Chunk": "kvik.engine.request",
    "Completion": "kvik.engine.request",
    "ScoreResult": "kvik.engine.request",
    "Usage": "kvik.engine.request",
}


def __getattr__(name: str) -> Any:
    # Imported when first asked for: `import kvik` costs nothing that a command line does not use.
    if name not in _LATER:
        raise AttributeError(f"module 'kvik' has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(_LATER[name]), name)
    globals()[name] = value
    return value
