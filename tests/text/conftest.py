"""Fixtures of the text tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from text.vocabularies import gguf_metadata, smollm_oracle

from kvik.text.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def smollm_metadata(default_model_gguf: Path) -> dict[str, Any]:
    return gguf_metadata(default_model_gguf)


@pytest.fixture(scope="session")
def smollm(smollm_metadata: dict[str, Any]) -> Tokenizer:
    return Tokenizer.from_gguf(smollm_metadata)


@pytest.fixture(scope="session")
def smollm_reference(smollm_metadata: dict[str, Any]) -> Any:
    """The default model's tokenizer in `tokenizers`."""
    return smollm_oracle(smollm_metadata)
