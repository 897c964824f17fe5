from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from models.small_models import write_folder, write_gguf

from kvik.cli import quality
from kvik.cli.machine import Memory
from kvik.models.loading import load_model
from kvik.weights.store import ModelStore

MIXED = {"token_embd": "Q8_0", "attn_v": "F16"}


@pytest.fixture
def store(tmp_path, monkeypatch) -> ModelStore:
    monkeypatch.setenv("KVIK_HOME", str(tmp_path / "store"))
    return ModelStore()


@pytest.fixture
def small(tmp_path) -> Path:
    return write_gguf(tmp_path / "small.gguf", MIXED, extra={"general.license": "mit"})


def said(text: str) -> dict[str, str]:
    """The lines of the first table by name, those that go on joined."""
    found: dict[str, str] = {}
    name = ""
    for line in text.split("\n\n")[0].splitlines():
        begin, _, rest = line.partition("  ")
        name = begin or name
        found[name] = f"{found.get(name, '')} {rest.strip()}".strip()
    return found


def test_what_is_shown(kvik, store, small):
    ended = kvik("models", "show", str(small))
    assert ended.code == 0 and ended.err == "" and not store.root.exists()
    lines = said(ended.out)
    assert lines["architecture"] == "llama, run by family llama" and lines["licence"] == "mit"
    assert lines["layers"] == "2, 64 wide" and lines["attention"] == "4 heads of 16, 2 of keys and values"
    assert lines["feed-forward"] == "96 wide" and lines["windows"] == "32 tokens in 2 of 2 layers"
    assert lines["positions"] == "rotary, base 50000" and lines["context"] == "128 tokens"
    assert lines["KV in f16"] == "256 bytes a token, 8.2 kB for the whole context"  # of windows of 32
    assert lines["KV in int4"] == lines["KV in f16"]  # what a window of 32 sees is never packed
    assert lines["vocabulary"] == "98 tokens; the output head has the embedding's weights"
    assert lines["chat template"] == "system, user, assistant, tool; begins {# small #}"
    assert lines["defaults"] == "temperature 0.5" and lines["packed forms"] == "none yet"
    table = ended.out.split("\n\n")[1].splitlines()
    assert table[0].split("  ")[0] == "type" and "as auto" in table[0]
    rows = {(line.split()[0], line.split()[4]): line for line in table[1:-1]}
    assert rows["Q4_1", "int4_min"].endswith("exact") and rows["F32", "vector"].split()[1] == "5"
    assert table[-1].startswith("together")


def test_nothing_is_wider_than_80_columns_but_paths(kvik, store, small):
    text = kvik("models", "show", str(small), "--weights", "int4").out
    assert all(len(line) <= 80 or str(small) in line for line in text.splitlines())


def test_json_has_the_same_and_more(kvik, store, small):
    report = json.loads(kvik("models", "show", str(small), "--json", "--weights", "int8").out)
    assert report["path"] == str(small) and report["bytes"] == small.stat().st_size
    assert report["weights"] == "int8" and report["license"] == "mit" and report["context_length"] == 128
    assert report["kv"][0] == {"kv": "f16", "token_bytes": 256, "context_bytes": 32 * 256}
    assert [one["kv"] for one in report["kv"]] == ["f16", "int8", "k8v4", "int4"]
    assert report["config"]["num_kv_heads"] == 2 and report["chat_template"]["roles"][0] == "system"
    assert {group["layout"] for group in report["groups"]} == {"int8", "int8_min", "vector"}
    assert report["packed_bytes"] == sum(group["packed_bytes"] for group in report["groups"])
    assert report["packed"] == [] and "quality" not in report


def test_packed_forms_and_the_errors_they_were_packed_with(kvik, store, small):
    assert "seen when packed" in kvik("models", "show", str(small), "--weights", "int4").out
    largest = load_model(small, "int4", lambda *_: None, store).weights.notes["largest_error"]
    text = kvik("models", "show", str(small), "--weights", "int4").out
    assert "seen when packed" not in text and f"  {max(largest.values()):.2g}\n" in text
    assert re.match(r"int4 \(.* kB\) in .*weights-int4\.kvik", said(text)["packed forms"])


def test_a_folder_of_safetensors(kvik, store, tmp_path):
    folder = write_folder(tmp_path / "small")
    lines = said(kvik("models", "show", str(folder)).out)
    assert lines["architecture"] == "LlamaForCausalLM, run by family llama" and lines["licence"] == "mit"
    assert lines["defaults"] == "temperature 0.4, repetition_penalty 1.1; not followed: num_beams=4"
    assert lines["source"] == str(folder) and lines["chat template"] == "none"


def test_what_does_not_run_is_shown_with_the_reason(kvik, store, tmp_path):
    path = write_gguf(tmp_path / "m.gguf", architecture="mamba")
    ended = kvik("models", "show", str(path))
    assert ended.code == 0
    lines = said(ended.out)
    assert lines["architecture"] == "mamba, run by nothing here" and "is not supported" in lines["refused"]
    assert "context" not in lines and "licence" not in lines
    assert ended.out.split("\n\n")[1].splitlines()[0].split() == ["type", "tensors", "in", "the", "file"]
    assert json.loads(kvik("models", "show", str(path), "--json").out)["config"] is None
    ended = kvik("models", "show", str(path), "--quality")
    assert ended.code == 65 and "mamba" in ended.err and ended.out == ""


def test_show_fetches_nothing(kvik, store):
    ended = kvik("models", "show", "smollm2")
    assert ended.code == 2 and "kvik models pull smollm2-135m" in ended.err
    assert not store.root.exists()


def test_show_of_what_is_no_model(kvik, store, tmp_path):
    path = tmp_path / "bad.gguf"
    path.write_bytes(b"GGUF\x03\x00")
    ended = kvik("models", "show", str(path))
    assert ended.code == 65 and str(path) in ended.err and ended.err.count("\n") == 1


def test_damaged_packed_form_is_told(kvik, store, small):
    folder = store.make_folder(small)
    (folder / "weights-auto.kvik").write_bytes(b"KVIKPACK and no more")
    ended = kvik("models", "show", str(small))
    assert ended.code == 0 and "damaged" in ended.err and "none yet" in ended.out


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--tokens", "5"], "--tokens needs --quality"),
        (["--text", "x"], "--text needs --quality"),
        (["--quality", "--tokens", "0"], "--tokens must be at least 1"),
        (["--quality", "--weights", "f32"], "--quality compares with f32 weights"),
        (["--weights", "int5"], "weights"),
    ],
)
def test_wrong_usage(kvik, store, small, made, arguments, named):
    ended = kvik("models", "show", str(small), *arguments)
    assert ended.code == 2 and named in ended.err and ended.out == "" and made == []


class TestQuality:
    """The fake's f32 logits leave half the vocabulary out; its others give a quarter of the mass to that half."""

    wanted = np.log(4 / 3)

    @pytest.fixture(autouse=True)
    def room(self, monkeypatch):
        self.free = 10**12
        monkeypatch.setattr(quality, "memory", lambda: Memory(10**12, self.free))

    @pytest.fixture
    def text(self, tmp_path) -> str:
        path = tmp_path / "text.txt"
        path.write_text("one two three four five six " * 60)
        return str(path)

    def test_figures_and_what_they_are_of(self, kvik, store, small, made, text):
        ended = kvik(
            "models", "show", str(small), "--weights", "int8", "--quality", "--tokens", "200", "--text", text, "--json"
        )
        found = json.loads(ended.out)["quality"]
        assert (found["weights"], found["base"], found["base_reason"]) == ("int8", "f32", None)
        assert found["text"] == text and found["window"] == 128  # the model's context
        figures = found["figures"]
        assert figures["tokens"] == 200 and figures["same_top"] == 1.0
        assert figures["kl_mean"] == pytest.approx(self.wanted, rel=1e-5) == figures["kl_p99"]
        assert figures["perplexity"] == pytest.approx(32 * 4 / 3, rel=1e-5)
        assert figures["perplexity_ratio"] == pytest.approx(4 / 3, rel=1e-5)
        assert [(m.model, m.settings["weights"], m.settings["kv"]) for m in made] == [
            (str(small), "int8", "f32"), (str(small), "f32", "f32")
        ]  # fmt: skip

    def test_one_line_of_meaning_a_figure(self, kvik, store, small, made, text):
        ended = kvik("models", "show", str(small), "--quality", "--tokens", "50", "--text", text)
        head, lines = ended.out.split("\n\n")[2:]
        assert (
            " ".join(head.split()) == f"--weights auto against f32, 50 predictions in windows of 128 tokens, of {text}:"
        )
        assert [line.split("  ")[0] for line in lines.splitlines()] == [
            "KL, mean",
            "KL, 99 %",
            "same best",
            "perplexity",
        ]
        assert "0.287682" in lines and "100.00 %" in lines and "1.3333" in lines

    def test_where_f32_does_not_fit_auto_is_the_base_and_it_is_said(self, kvik, store, small, made, text):
        self.free = 1_000_000
        arguments = ("models", "show", str(small), "--quality", "--tokens", "50", "--text", text)
        ended = kvik(*arguments, "--weights", "int8")
        assert ended.code == 0 and "--weights int8 against auto (f32 weights beside these would need" in " ".join(
            ended.out.split()
        )
        assert [m.settings["weights"] for m in made] == ["int8", "auto"]
        ended = kvik(*arguments)
        assert ended.code == 75 and "close other programs" in ended.err

    def test_only_a_form_that_was_there_before_stays(self, kvik, store, small, made, text, monkeypatch):
        form = store.make_folder(small) / "weights-f32.kvik"
        arguments = ("models", "show", str(small), "--quality", "--tokens", "9", "--text", text)

        def packs(path, weights, **settings):
            form.write_bytes(b"x")
            return original(path, weights=weights, **settings)

        from kvik.cli import options

        original = options.make_llm
        monkeypatch.setattr(options, "make_llm", packs)
        assert kvik(*arguments).code == 0 and not form.exists()
        form.write_bytes(b"there before")
        assert kvik(*arguments).code == 0 and form.exists()

    def test_a_text_with_nothing_to_predict(self, kvik, store, small, made, tmp_path):
        path = tmp_path / "empty.txt"
        path.write_text("")
        ended = kvik("models", "show", str(small), "--quality", "--text", str(path))
        assert ended.code == 65 and "no token to predict" in ended.err
