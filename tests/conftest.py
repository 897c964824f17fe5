"""Fixtures for all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kvik.weights.store import ModelStore


@pytest.fixture(scope="session")
def default_model_gguf() -> Path:
    """The default model's file: $KVIK_TEST_GGUF, else from the model store, which fetches it once."""
    named = os.environ.get("KVIK_TEST_GGUF")
    return Path(named) if named else ModelStore().resolve("smollm2-135m").path
