"""Fixtures of the evaluation tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from text.vocabularies import gguf_metadata

from kvik.text.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def smollm(default_model_gguf: Path) -> Tokenizer:
    return Tokenizer.from_gguf(gguf_metadata(default_model_gguf))
