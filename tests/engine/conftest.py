"""A tokenizer of 98 tokens."""

from __future__ import annotations

import pytest
from models.small_models import write_gguf

from kvik.text.tokenizer import Tokenizer
from kvik.weights.gguf import read_gguf


@pytest.fixture(scope="session")
def small_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    with read_gguf(write_gguf(tmp_path_factory.mktemp("small") / "small.gguf")) as file:
        return Tokenizer.from_gguf(file.metadata)
