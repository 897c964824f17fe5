"""The commands as a user runs them, on the default model."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys

import pytest

from kvik.planning import ADVICE, plan_decoding

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
    # all full blocks of the first turn but perhaps the last, whose answer may be written otherwise as a message
    assert second["usage"]["cached_tokens"] >= first["usage"]["prompt_tokens"] // 16 * 16 > 0


def test_conversation_says_what_was_cached(kvik):
    lines = kvik(
        "chat", "--min-tokens", "8", "--max-tokens", "8", stdin="My name is Ada.\nWhat is my name?\n"
    ).stderr.splitlines()
    assert "cached" not in lines[0] and " cached) + 8 generated tokens" in lines[1]


def test_several_answers(kvik):
    arguments = ("Name a colour.", "--n", "4", "--seed", "3", "--max-tokens", "6")
    out = kvik("run", *arguments).stdout
    assert [f"--- answer {i} of 4 ---" in out for i in range(1, 5)] == [True] * 4
    texts = [choice["text"] for choice in json.loads(kvik("run", *arguments, "--json").stdout)["choices"]]
    assert out == "".join(f"--- answer {i} of 4 ---\n{text}\n" for i, text in enumerate(texts, 1))


def test_batch_gives_each_the_answer_it_has_alone_and_its_receipt_repeats_it(kvik, tmp_path):
    prompts = ["Why is the sky blue?", "Name three rivers.", "Write a haiku about the sea.", "What is 2 + 2?"] * 3
    requests, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = [{"id": i, "prompt": prompt, "max_tokens": 8 + i} for i, prompt in enumerate(prompts)]
    requests.write_text("".join(json.dumps(line) + "\n" for line in lines))
    kvik("run", "--batch", str(requests), "--out", str(out), "--seed", "5", "--kv-bytes", "16MiB")
    found = {one["id"]: one for one in map(json.loads, out.read_text().splitlines())}
    assert set(found) == set(range(12))
    for i in (0, 7):
        alone = json.loads(kvik("run", prompts[i], "--json", "--seed", "5", "--max-tokens", str(8 + i)).stdout)
        assert alone["choices"] == found[i]["choices"]
    receipt = tmp_path / "receipt.json"
    receipt.write_text(json.dumps(found[11]["receipt"]))
    tight = ("--kv-bytes", "16MiB", "--max-batch-tokens", "48")
    done = subprocess.run([*KVIK, "replay", str(receipt), "--crowd", "24", *tight], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("identical: ") and "among" in done.stdout, done.stderr


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


def test_xray_says_what_the_answer_says(kvik, tmp_path):
    arguments = ("The capital of France is", "--raw", "--seed", "2", "--max-tokens", "8", "--top-p", "0.8")
    (choice,) = json.loads(kvik("run", *arguments, "--json").stdout)["choices"]
    page = tmp_path / "page.html"
    found = json.loads(kvik("xray", *arguments, "--json", "--beams", "3", "--html", str(page)).stdout)
    assert [one["token_id"] for one in found["tokens"]] == choice["token_ids"]
    logs = [math.log(one["probability"]) for one in found["tokens"]]
    assert sum(logs) == pytest.approx(choice["cumulative_logprob"], abs=1e-3)
    assert found["tokens"][0]["candidates"][0]["text"] == " Paris" and found["tokens"][0]["nucleus_p"] == 0.8
    names = [stage["name"] for stage in found["tokens"][0]["stages"]]
    assert names == ["logits", "temperature", "top_k", "top_p"]
    assert "".join(node["text"] for node in found["beams"] if node["best"]).startswith(" Paris")
    assert "␣Paris" in page.read_text()


def test_strategies_compared(kvik):
    arguments = ("Once upon a time", "--raw", "--repeat", "3", "--max-tokens", "24", "--ignore-eos")
    found = json.loads(kvik("compare", "decoding", *arguments, "--strategies", "greedy,beam", "--sweep", "temperature=0.2:1.4:2", "--json").stdout)  # fmt: skip
    greedy, beam, cold, hot = found["strategies"]
    assert greedy["determinism"] == beam["determinism"] == greedy["self_bleu"] == 1
    assert hot["determinism"] == 0 and hot["distinct_2"] > cold["distinct_2"] >= greedy["distinct_2"]
    assert beam["mean_logprob"] > greedy["mean_logprob"] > cold["mean_logprob"] > hot["mean_logprob"]
    assert all(one["repeatable"] and one["tokens"] == 24 for one in found["strategies"])


@pytest.mark.parametrize("task", ADVICE)
def test_commands_of_plans_run(kvik, task):
    program, verb, *arguments = shlex.split(plan_decoding(task).command)
    assert program == "kvik" and kvik(verb, *arguments, "--max-tokens", "8").stdout.strip()


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
        rest, line = process.communicate(timeout=60)
    assert process.returncode == 130
    assert len(first + rest) > 1 and rest.endswith(b"\n") and b"interrupted" in line


def test_reader_that_leaves(default_model_gguf):
    command = [*KVIK, "run", "Count.", "--raw", "--ignore-eos", "--max-tokens", "8000", "-m", str(default_model_gguf)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.read(1)
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(timeout=60) == 141


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


def test_answers_of_a_shape_and_their_receipts(kvik, tmp_path):
    schema, receipt = tmp_path / "schema.json", tmp_path / "receipt.json"
    number = {"type": "object", "properties": {"n": {"type": "integer", "maximum": 99}}, "required": ["n"]}
    schema.write_text(json.dumps({**number, "additionalProperties": False}))
    shaped = ("--max-tokens", "60", "--temperature", "1.2", "--seed", "3", "--receipt", str(receipt))
    assert isinstance(
        json.loads(kvik("run", "A number, as JSON.", "--json-schema", str(schema), *shaped).stdout)["n"], int
    )
    kvik("replay", str(receipt))
    beams = ("--beams", "3", "--max-tokens", "60", "--receipt", str(receipt))
    text = kvik("run", "Which year?", "--regex", "(19|20)[0-9]{2}", *beams).stdout
    assert re.fullmatch("(19|20)[0-9]{2}\n", text)
    kvik("replay", str(receipt))
    text = kvik("run", "Add two numbers.", "--lark", 'start: N "+" N\nN: /[0-9]{1,4}/', "--max-tokens", "20").stdout
    assert re.fullmatch("[0-9]{1,4}[+][0-9]{1,4}\n", text)
    requests, results = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    requests.write_text('{"prompt": "hi", "grammar": {"kind": "regex", "text": "[ab]{5}"}}\n{"prompt": "hi"}\n')
    kvik("run", "--batch", str(requests), "--out", str(results), "--regex", "[cd]{4}")
    texts = {line["line"]: line["text"] for line in map(json.loads, results.read_text().splitlines())}
    assert re.fullmatch("[ab]{5}", texts[1]) and re.fullmatch("[cd]{4}", texts[2])
