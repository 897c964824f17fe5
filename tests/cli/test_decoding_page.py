"""What docs/decoding.md says of commands, names and order is what the code does."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from kvik.cli import options
from kvik.errors import TryAgainError
from kvik.planning import STRATEGIES

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "decoding.md").read_text()
COMMANDS = [
    line
    for block in re.findall(r"```\n(.*?)```", PAGE, re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
    if line.startswith("kvik ")
]


def test_there_are_commands():
    assert len(COMMANDS) > 15 and {shlex.split(line)[1] for line in COMMANDS} >= {"run", "plan", "compare", "xray"}


@pytest.mark.parametrize("line", COMMANDS)
def test_command_is_one(kvik, monkeypatch, line):
    def stop(model, **settings):
        raise TryAgainError("here a model would be loaded")

    monkeypatch.setattr(options, "make_llm", stop)
    _, *arguments = shlex.split(line, comments=True)
    ended = kvik(*arguments, stdin=b"text")
    assert ended.code in (0, 75), ended.err


def test_every_strategy_has_its_row():
    rows = dict(re.findall(r"^\| `([a-z-]+)` \| (.*?) \|", PAGE, re.MULTILINE))
    assert set(STRATEGIES) <= set(rows)


def test_order_is_that_of_the_parameters():
    (line,) = re.findall(r"^logits → (.*)$", PAGE, re.MULTILINE)
    assert line.split(" → ") == [
        "logit_bias", "bad_words and min_tokens", "grammar", "repetition_penalty", "presence_penalty", "frequency_penalty",
        "dry", "no_repeat_ngram_size", "temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff",
        "top_n_sigma", "xtc", "draw",
    ]  # fmt: skip


def test_pictures_are_there():
    for name in re.findall(r"!\[[^]]*\]\(([^)]+)\)", PAGE):
        path = Path(__file__).resolve().parents[2] / "docs" / name
        assert path.exists() and path.stat().st_size < 100_000
