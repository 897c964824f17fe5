"""`kvik eval divergence` on a fake model: f32 weights leave half the vocabulary out, others give a quarter of the mass to it."""

from __future__ import annotations

import json

import numpy as np
import pytest
from models.small_models import write_gguf

KL = np.log(4 / 3)
WORDS = "one two three four five six " * 60


@pytest.fixture
def small(tmp_path, monkeypatch) -> str:
    monkeypatch.setenv("KVIK_HOME", str(tmp_path / "store"))
    return str(write_gguf(tmp_path / "small.gguf"))


@pytest.fixture
def text(tmp_path) -> str:
    path = tmp_path / "text.txt"
    path.write_text(WORDS)
    return str(path)


def test_figures_and_what_they_mean(kvik, small, text):
    ended = kvik(
        "eval",
        "divergence",
        text,
        "--model",
        f"{small},weights=int8",
        "--against",
        f"{small},weights=f32",
        "--window",
        "64",
    )
    assert ended.code == 0, ended.err
    head, table = ended.out.split("\n\n")
    assert " ".join(head.split()) == (
        f"{small},weights=int8 against {small},weights=f32: 361 predictions in windows of 64 tokens, 63 of them new, of {text}:"
    )
    lines = {line.split("  ")[0]: line for line in table.splitlines()}
    assert list(lines)[1:] == ["KL, mean", "KL, median", "KL, 99 %", "KL, largest", "same best", "perplexity"]
    assert "0.287682" in lines["KL, mean"] and "0.287682 to 0.287682" in lines["KL, mean"]
    assert "100.00 %" in lines["same best"] and "changes 0 times" in lines["same best"]
    assert "1.3333" in lines["perplexity"] and "42.67 of 32; 1 is the same" in lines["perplexity"]


def test_json_has_the_names_of_the_api(kvik, small, made, text, tmp_path):
    lines = tmp_path / "lines.jsonl"
    lines.write_text('{"text": "one two"}\n{"text": ""}\n')
    ended = kvik(
        "eval", "divergence", text, str(lines), "-m", small, "--against", f"{small},weights=f32,kv=f32", "--tokens", "100",
        "--json", "--threads", "1",
    )  # fmt: skip
    report = json.loads(ended.out)
    assert report["model"] == small and report["reference"] == f"{small},weights=f32,kv=f32"
    assert report["text"] == f"{text}, {lines}"
    figures = report["divergence"]
    assert figures["tokens"] == 100 and figures["kl_mean"] == pytest.approx(KL, rel=1e-5) and figures["window"] == 512
    assert figures["kl_interval"] is None and figures["flipped"] == []
    assert [m.settings["engine"].threads for m in made] == [1, 1]


def test_a_setting_against_itself(kvik, small, made, text):
    ended = kvik("eval", "divergence", text, "-m", small, "--against", small)
    assert "the two are one and the same" in " ".join(ended.out.split()) and len(made) == 1
    assert "0.000000" in ended.out and "1.0000" in ended.out


def test_without_a_text(kvik, small, made, monkeypatch):
    from kvik.evaluation import offline

    monkeypatch.setattr(offline, "offline_text", lambda: WORDS)
    ended = kvik("eval", "divergence", "-m", small, "--against", f"{small},weights=f32")
    assert ended.code == 0 and "the language reference inside Python" in " ".join(ended.out.split())


def test_picture(kvik, small, text, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "kl.svg"
    for against in (f"{small},weights=f32", small):  # also where nothing is lost
        ended = kvik("eval", "divergence", text, "-m", small, "--against", against, "--plot", str(path))
        assert ended.code == 0, ended.err
        assert path.read_text().startswith("<?xml")


def test_flips_are_shown(kvik, small, text, made, monkeypatch):
    from cli.fake_llm import FakeLLM

    plain = FakeLLM.logits

    def logits(self, rows):
        found = plain(self, rows)
        found[:, 3 if self.settings.get("weights") == "f32" else 5] += 1
        return found

    monkeypatch.setattr(FakeLLM, "logits", logits)
    ended = kvik("eval", "divergence", text, "-m", small, "--against", f"{small},weights=f32", "--tokens", "40")
    head, *rows = ended.out.split("\n\n")[-1].splitlines()
    assert head.split() == ["KL", "text", "byte", "after", "reference", "model", "came"] and len(rows) == 5
    assert '" is"' in rows[0] and '".\\n"' in rows[0] and rows[0].rstrip().endswith(('e"', 'o"', 'r"', 'x"'))
    assert "the 5 of the largest KL of 40" in ended.out


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--model", "A"], 2, "--against"),
        (["--against", "A"], 2, "--model"),
        (["--model", "A,weigths=f32", "--against", "A"], 2, "did you mean 'weights'"),
        (["--model", "A,B", "--against", "A"], 2, "--model takes one model, got 2: A, B"),
        (
            ["--model", "A", "--against", "http://localhost:1/v1"],
            2,
            "--against: an endpoint does not give whole distributions",
        ),
        (["--model", "A", "--against", "A", "--window", "1"], 2, "--window must be at least 2, got 1"),
        (["--model", "A", "--against", "A", "--window", "9", "--stride", "9"], 2, "--stride must be in [1, 8]"),
        (["--model", "A", "--against", "A", "--tokens", "0"], 2, "--tokens must be at least 1, got 0"),
        (["--model", "A", "--against", "A", "--plot", "x.gif"], 2, "--plot writes"),
        (["--model", "A", "--against", "A", "--window", "3000"], 2, "--window must be an integer in [2, 2048]"),
        (["missing.txt", "--model", "A", "--against", "A"], 65, "missing.txt: no such file"),
    ],
)
def test_refusals(kvik, arguments, code, said):
    ended = kvik("eval", "divergence", *arguments)
    assert ended.code == code and said in ended.err and ended.out == "" and ended.err.count("\n") == 1


@pytest.mark.parametrize(
    ("data", "code", "said"), [(b"", 65, "no token to predict"), (b"one \xff two", 65, "not UTF-8: byte 0xff")]
)
def test_texts_that_cannot_be_read(kvik, tmp_path, data, code, said):
    path = tmp_path / "t.txt"
    path.write_bytes(data)
    ended = kvik("eval", "divergence", str(path), "--model", "A", "--against", "A")
    assert ended.code == code and said in ended.err and ended.out == ""
