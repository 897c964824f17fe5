"""Fixtures for all tests."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvik.weights.store import ModelStore


@pytest.fixture(scope="session")
def default_model_gguf() -> Path:
    """The default model's file: $KVIK_TEST_GGUF, else from the model store, which fetches it once."""
    named = os.environ.get("KVIK_TEST_GGUF")
    return Path(named) if named else ModelStore().resolve("smollm2-135m").path


@pytest.fixture(autouse=True)
def interrupts() -> Iterator[None]:
    """Ctrl-C means after each test what it meant before: event loops leave handlers of their own."""
    before = signal.getsignal(signal.SIGINT)
    yield
    if signal.getsignal(signal.SIGINT) is not before:
        signal.signal(signal.SIGINT, before)
