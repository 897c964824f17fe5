"""The command line with a fake model, and as a process of its own."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from cli.fake_llm import FakeLLM

from kvik.cli import options
from kvik.cli.app import main


@dataclass(frozen=True)
class Ended:
    code: int
    out: str
    err: str


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[FakeLLM]:
    """Models are fakes; the list has those that were made."""
    models: list[FakeLLM] = []

    def make(model: str, **settings: object) -> FakeLLM:
        models.append(FakeLLM(model, **settings))
        return models[-1]

    monkeypatch.setattr(options, "make_llm", make)
    monkeypatch.setattr("kvik.cli.eval_perplexity.find_models", lambda specs: None)  # fakes have no files
    return models


@pytest.fixture
def kvik(
    made: list[FakeLLM], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Ended]:
    """Run a command in this process on a fake model: kvik("run", "hi", stdin=b"...")."""

    def run(*arguments: str, stdin: bytes = b"") -> Ended:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        code = main(arguments)
        return Ended(code, *capsys.readouterr())

    return run


@pytest.fixture
def process(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[bytes]]:
    """Run a command as a user does, with the real model store: process("run", "hi", env={...})."""

    def run(*arguments: str, stdin: bytes = b"", env: dict[str, str] | None = None, **more: object):
        return subprocess.run(
            [sys.executable, "-m", "kvik.cli", *arguments], input=stdin, capture_output="stdout" not in more,
            env={**os.environ, **(env or {})}, timeout=120, check=False, **more,
        )  # type: ignore[call-overload] # fmt: skip

    return run
