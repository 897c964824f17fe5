"""Kvik runs language models, shows what happens inside a generation, and measures which settings to ship."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvik.errors import DataError, KvikError, ParameterError, StorageError, TryAgainError
from kvik.params import (
    H2O,
    TOVA,
    BeamParams,
    CacheParams,
    EngineParams,
    ExpectedAttention,
    Grammar,
    KeyDiff,
    SamplingParams,
    SnapKV,
    StreamingLLM,
)

if TYPE_CHECKING:
    from kvik.async_llm import AsyncLLM
    from kvik.engine.request import Choice, Chunk, Completion, LogitRows, Receipt, RequestStats, ScoreResult, Usage
    from kvik.engine.stats import EngineStats, StepStats
    from kvik.llm import LLM, ModelInfo

__version__ = "0.1.0"

__all__ = [
    "H2O",
    "LLM",
    "TOVA",
    "AsyncLLM",
    "BeamParams",
    "CacheParams",
    "Choice",
    "Chunk",
    "Completion",
    "DataError",
    "EngineParams",
    "EngineStats",
    "ExpectedAttention",
    "Grammar",
    "KeyDiff",
    "KvikError",
    "LogitRows",
    "ModelInfo",
    "ParameterError",
    "Receipt",
    "RequestStats",
    "SamplingParams",
    "ScoreResult",
    "SnapKV",
    "StepStats",
    "StorageError",
    "StreamingLLM",
    "TryAgainError",
    "Usage",
]

_LATER = {
    "AsyncLLM": "kvik.async_llm",
    "LLM": "kvik.llm",
    "ModelInfo": "kvik.llm",
    "Choice": "kvik.engine.request",
    "Chunk": "kvik.engine.request",
    "Completion": "kvik.engine.request",
    "LogitRows": "kvik.engine.request",
    "Receipt": "kvik.engine.request",
    "RequestStats": "kvik.engine.request",
    "ScoreResult": "kvik.engine.request",
    "EngineStats": "kvik.engine.stats",
    "StepStats": "kvik.engine.stats",
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
