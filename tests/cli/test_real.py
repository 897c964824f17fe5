"""The commands as a user runs them, on the default model."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest

KVIK = [sys.executable, "-m", "kvik.cli"]


@pytest.fixture(scope="module")
def kvik(default_model_gguf, tmp_path_factory):
    """kvik("run", "hi", stdin="…") on the default model, in a store of its own."""
    home = tmp_path_factory.mktemp("store")

    def run(verb, *arguments, stdin="", code=0):
        command = [*KVIK, verb, *arguments, *(() if verb == "models" else ("-m", str(default_model_gguf)))]
        environment = {**os.environ, "KVIK_HOME": str(home)}
        done = subprocess.run(command, input=stdin, capture_output=True, text=True, env=environment, timeout=120)
        assert done.returncode == code, done.stderr
        return done

    return run


def test_answer_and_its_line(kvik):
    done = kvik("run", "Why is the sky blue?", "--temperature", "0", "--max-tokens", "40")
    assert "scatter" in done.stdout.lower()
    (line,) = done.stderr.splitlines()
    assert "generated tokens, first token in" in line and "tokens/s, weights 96.6 MB, KV" in line


def test_same_seed_same_answer_in_every_form(kvik):
    arguments = ("Once upon a time", "--raw", "--seed", "11", "--max-tokens", "24")
    text = kvik("run", *arguments).stdout.removesuffix("\n")
    answer = json.loads(kvik("run", *arguments, "--json").stdout)
    assert answer["text"] == text
    (choice,) = answer["choices"]
    assert len(choice["token_ids"]) == answer["usage"]["completion_tokens"] == 24
    assert choice["finish_reason"] == "length" and choice["cumulative_logprob"] < 0
    assert (
        answer["usage"]["kv_bytes_peak"] == 32 * answer["model"]["kv_bytes_per_token"]
    )  # 4 + 23 tokens in blocks of 16
    other = kvik("run", *arguments[:2], "--seed", "12", "--max-tokens", "24").stdout
    assert other.removesuffix("\n") != text


def test_conversation_through_a_pipe(kvik):
    done = kvik(
        "chat", "--json", "--temperature", "0", "--max-tokens", "30", stdin="My name is Ada.\nWhat is my name?\n"
    )
    first, second = map(json.loads, done.stdout.splitlines())
    assert "Ada" in first["text"] and second["text"]
    assert second["usage"]["prompt_tokens"] > first["usage"]["prompt_tokens"] + first["usage"]["completion_tokens"]


def test_logprobs_of_a_text_and_of_its_scrambled_words(kvik):
    def perplexity(text):
        return json.loads(kvik("eval", "logprobs", "-", "--json", stdin=text).stdout)["perplexity"]

    assert perplexity("The quick brown fox jumps over the lazy dog.") < perplexity(
        "Dog lazy the fox over brown jumps the."
    )


def test_text_longer_than_the_context_is_refused(kvik):
    for verb in (("eval", "logprobs", "-"), ("run", "-")):
        done = kvik(*verb, stdin="word " * 9000, code=2)
        assert "8192" in done.stderr and done.stderr.count("\n") == 1


def test_bench(kvik):
    done = kvik("bench", "--json", "--prompt-tokens", "32", "--new-tokens", "8", "--repeat", "2", "--depth", "20")
    report = json.loads(done.stdout)
    for name in ("prefill_tok_s", "decode_tok_s", "first_token_ms", "load_ms", "read_gb_s", "bandwidth_gb_s"):
        assert report[name] > 0, name
    assert report["peak_rss_bytes"] > report["model"]["weights_bytes"]
    assert all(milliseconds > 0 for milliseconds in report["step_ms"].values())


def test_packed_form_is_shown(kvik, default_model_gguf):
    kvik("run", "hi", "--max-tokens", "1")
    report = json.loads(kvik("models", "show", str(default_model_gguf), "--json").stdout)
    assert "user" in report["chat_template"]["roles"] and report["context_length"] == 8192
    (form,) = [form for form in report["packed"] if form["weights"] == "auto"]
    assert sum(form["layouts"].values()) < form["bytes"] < 1.1 * sum(form["layouts"].values())


def test_quality_of_a_format(kvik, default_model_gguf):
    done = kvik("models", "show", str(default_model_gguf), "--weights", "int4", "--quality", "--tokens", "96", "--json")
    report = json.loads(done.stdout)
    found = report["quality"]
    assert found["base"] == "f32" and found["figures"]["tokens"] == 96
    assert 0.0005 < found["figures"]["kl_mean"] < 0.05 and 0.8 < found["figures"]["same_top"] < 1
    assert {form["weights"] for form in report["packed"]} >= {"int4"}  # the f32 form made for it is gone
    assert "f32" not in {form["weights"] for form in report["packed"]}


def test_ctrl_c(default_model_gguf):
    command = [*KVIK, "run", "Count.", "--raw", "--ignore-eos", "--max-tokens", "8000", "-m", str(default_model_gguf)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        first = process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        rest, line = process.communicate(timeout=20)
    assert process.returncode == 130
    assert len(first + rest) > 1 and rest.endswith(b"\n") and b"interrupted" in line


def test_reader_that_leaves(default_model_gguf):
    command = [*KVIK, "run", "Count.", "--raw", "--ignore-eos", "--max-tokens", "8000", "-m", str(default_model_gguf)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.read(1)
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(timeout=20) == 141


@pytest.mark.parametrize(
    ("content", "said"), [(b"", "kvik: error:"), (b"GGUF", "kvik: error:"), (b"\x00" * 4096, "kvik: error:")]
)
def test_bad_model_file(tmp_path, content, said):
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    environment = {**os.environ, "KVIK_HOME": str(tmp_path / "store")}
    done = subprocess.run([*KVIK, "run", "hi", "-m", str(path)], capture_output=True, text=True, env=environment)
    assert done.returncode == 65 and done.stdout == ""
    assert done.stderr.startswith(said) and str(path) in done.stderr and done.stderr.count("\n") == 1
