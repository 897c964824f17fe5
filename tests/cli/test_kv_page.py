"""What docs/kv-cache.md says of commands, policies and their fields is what the code does."""

from __future__ import annotations

import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest

from kvik.cli import options
from kvik.errors import TryAgainError
from kvik.params import POLICIES, Scorer, parse_kv

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "kv-cache.md").read_text()
COMMANDS = [
    line for block in re.findall(r"```\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines() if line.startswith("kvik")
]  # fmt: skip


@pytest.mark.parametrize("line", [line for line in COMMANDS if "models show" not in line])
def test_command_is_one(kvik, monkeypatch, tmp_path, line):
    def stop(model, **settings):
        raise TryAgainError("here a model would be loaded")

    monkeypatch.setattr(options, "make_llm", stop)
    monkeypatch.setattr("kvik.cli.eval_divergence.load_models", lambda specs, *rest, **more: stop(specs))
    _, *arguments = shlex.split(line.partition("<")[0])
    ended = kvik(*arguments, *(["--port", "0"] if arguments[0] == "serve" else []), stdin=b"text")
    assert ended.code == 75, ended.err


def test_policies_have_their_rows():
    rows = dict(re.findall(r"^\| `(\w+)` \| .* \| (.*) \|$", PAGE.partition("## Policies")[2], re.MULTILINE))
    assert set(rows) == set(POLICIES)
    shared = {"budget", "at"}
    for name, kind in POLICIES.items():
        told = dict(re.findall(r"`(\w+)` \((\d*\.?\d+)", rows[name]))
        own = {
            f.name: f.default for f in fields(kind) if f.init and not (f.name in shared and issubclass(kind, Scorer))
        }
        assert {field: float(value) for field, value in told.items()} == own, name


def test_formats_are_formats():
    table = PAGE.partition("## Formats")[2].partition("- Keys")[0]
    for name in re.findall(r"`([\w/]+)`", table.replace("`--kv`", "")):
        parse_kv(name)


def test_python(default_model_gguf, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    exec(code.replace('"smollm2-135m"', repr(str(default_model_gguf))), {})
    now, peak, kept = map(float, capsys.readouterr().out.split())
    assert 0 < now < peak and 0 < kept < 200
