"""The examples of docs/serving.md run as they stand, on another port."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "serving.md").read_text()


@pytest.fixture
def examples(served, default_model_gguf):
    def of(language):
        for block in re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL):
            yield block.replace("http://127.0.0.1:8000", served.url).replace("smollm2-135m", str(default_model_gguf))

    return of


def test_python(examples, capsys):
    (code,) = examples("python")
    made = {}
    exec(code, made)
    made["client"].close()
    assert len(capsys.readouterr().out) > 20


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_shell(examples):
    (command,) = examples("sh")
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["choices"][0]["text"].startswith(" Paris")
