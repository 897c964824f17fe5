"""`kvik eval longppl` on a fake model: what stood in its context is probable."""

from __future__ import annotations

import json

import numpy as np
import pytest
from cli.fake_llm import FakeLLM

from kvik.engine.request import ScoreResult

TEXT = "so one " + "two " * 40 + "one " + "three " * 40


@pytest.fixture
def text(tmp_path) -> str:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return str(path)


@pytest.fixture
def memory(monkeypatch) -> None:
    def score(self, inputs, *, reduce=True, top=0, first=1):
        firsts = [first] * len(inputs) if isinstance(first, int) else first
        return [
            ScoreResult(
                tuple(ids), at, np.array([-1.0 if ids[i] in ids[:i] else -6.0 for i in range(at, len(ids))]),
                np.zeros(len(ids) - at),
            )
            for ids, at in zip(inputs, firsts, strict=True)
        ]  # fmt: skip

    monkeypatch.setattr(FakeLLM, "score", score)


def test_figures(kvik, text, memory, made):
    ended = kvik("eval", "longppl", text, "--window", "16", "--stride", "8", "--show-keys")
    assert ended.code == 0, ended.err
    head, table, said, keys = ended.out.split("\n\n")
    assert head == "smollm2-135m, key tokens by smollm2-135m" and len(made) == 1
    _, longppl, perplexity = table.splitlines()
    tokens = len(TEXT.split()) + 1  # the blank at the end is one
    assert longppl.split() == ["LongPPL", "2.7183", "-", "1", "key", "tokens,", "1.19", "%", "of", str(tokens)]
    assert perplexity.split()[:2] == ["perplexity", f"{np.exp((6 * 5 + (tokens - 5)) / tokens):.4f}"]
    assert "1 of 69 tokens are key to the evaluator: they gain more than 2 nats" in said
    assert "to above -2; short contexts of 16 tokens slid by 8" in said.replace("\n", " ")
    assert "key tokens in more than one segment" in said
    assert keys.splitlines()[1].split() == ["0", str(TEXT.rindex(" one")), "1.0000", '"', 'one"']


def test_none(kvik, text):
    """Every log-probability of this fake is -2: nothing is gained."""
    ended = kvik("eval", "longppl", text, "--window", "16", "--stride", "8")
    assert ended.out.splitlines()[3].split()[:3] == ["LongPPL", "none", "-"]
    report = json.loads(kvik("eval", "longppl", text, "--window", "16", "--json").out)
    assert (
        report["longppl"]["value"] is None and report["longppl"]["key_tokens"] == 0 and "keys" not in report["longppl"]
    )


def test_short_texts_are_said(kvik, text, tmp_path, memory):
    lines = tmp_path / "lines.jsonl"
    lines.write_text('{"text": "one two one"}\n{"text": "one"}\n')
    out = kvik("eval", "longppl", text, str(lines), "--window", "16", "--stride", "8").out
    assert "2 of 3 texts have no more than 16 tokens, and so no key tokens." in out


def test_an_evaluator_of_its_own(kvik, text, memory, made, tmp_path, monkeypatch):
    from models.small_models import write_gguf

    monkeypatch.setenv("KVIK_HOME", str(tmp_path / "store"))
    small = str(write_gguf(tmp_path / "small.gguf"))
    ended = kvik(
        "eval", "longppl", text, "-m", f"{small},weights=int8", "--evaluator", f"{small},weights=f32", "--window", "16",
        "--stride", "8", "--json", "--show-keys",
    )  # fmt: skip
    report = json.loads(ended.out)
    assert [m.settings["weights"] for m in made] == ["int8", "f32"]
    assert report["evaluator"] == f"{small},weights=f32"
    figures = report["longppl"]
    assert figures["rule"] == {"alpha": 2.0, "beta": -2.0, "window": 16, "stride": 8}
    assert [key["token"] for key in figures["keys"]] == [" one"]


def test_cutting(kvik, tmp_path, memory):
    path = tmp_path / "long.txt"
    path.write_text(TEXT * 30)
    ended = kvik("eval", "longppl", str(path), "--window", "1024")
    assert ended.code == 65 and "text 0 has" in ended.err and "fake, whose context is 2,048" in ended.err
    ended = kvik("eval", "longppl", str(path), "--window", "1024", "--cut")
    assert ended.code == 0 and "1 of 1 texts was cut to the context." in ended.out


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ([], 2, "TEXT"),
        (["t", "--alpha", "nan"], 2, "--alpha must be a finite number"),
        (["t", "--window", "0"], 2, "--window must be an integer of at least 1, got 0"),
        (["t", "--stride", "0"], 2, "--stride must be an integer of at least 1, got 0"),
        (["t", "--evaluator", "A,B"], 2, "--evaluator takes one model"),
        (["t"], 65, "t: no such file"),
    ],
)
def test_refusals(kvik, made, arguments, code, said):
    ended = kvik("eval", "longppl", *arguments)
    assert ended.code == code and said in ended.err and ended.out == "" and made == []


def test_a_window_beyond_the_context(kvik, text):
    ended = kvik("eval", "longppl", text)
    assert ended.code == 2 and "--window must be below 2048, the context of fake" in ended.err
