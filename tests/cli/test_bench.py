from __future__ import annotations

import json
from dataclasses import replace

import pytest

from kvik.cli import bench, options


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(bench, "bandwidth", lambda threads: 30e9)


def test_json(kvik, made):
    ended = kvik("bench", "--json", "--prompt-tokens", "20", "--new-tokens", "6", "--repeat", "3", "--depth", "5")
    assert ended.code == 0 and ended.err == ""
    report = json.loads(ended.out)
    for name in ("prefill_tok_s", "decode_tok_s", "first_token_ms", "load_ms", "read_gb_s", "peak_rss_bytes"):
        assert report[name] > 0, name
    assert report["bandwidth_gb_s"] == 30
    assert set(report["step_ms"]) == {"matrices", "attention", "rest", "python"}
    assert report["read_gb_s"] == pytest.approx(1.0)  # the fake's step spends a microsecond in matrices
    for name in ("prefill_tok_s", "decode_tok_s", "first_token_ms", "read_gb_s"):
        assert report["range"][name]["min"] <= report[name] <= report["range"][name]["max"]
    assert report["settings"] == {
        "prompt_tokens": 20, "new_tokens": 6, "sequences": 1, "depth": 5, "repeat": 3, "seed": 0
    }  # fmt: skip
    assert report["model"]["name"] == "fake" and report["machine"]["cores"] >= 1
    asked = made[0].asked
    assert [(len(prompt), params.max_tokens) for prompt, params in asked] == [(20, 1), (5, 7)] * 4  # a round to warm up
    assert all(params.ignore_eos and params.temperature == 0.7 for _, params in asked)
    assert 0 not in {token for prompt, _ in asked for token in prompt}  # special tokens


def test_prompts_are_those_of_the_seed(kvik, made):
    for seed in ("1", "1", "2"):
        kvik("bench", "--json", "--prompt-tokens", "20", "--new-tokens", "1", "--repeat", "1", "--seed", seed)
    first, again, other = ([prompt for prompt, _ in model.asked] for model in made)
    assert first == again != other
    assert first[0] != first[2]  # each round has its own


def test_empty_context_is_one_token(kvik, made):
    kvik("bench", "--prompt-tokens", "4", "--new-tokens", "2", "--repeat", "1")
    assert [len(prompt) for prompt, _ in made[0].asked] == [4, 1] * 2


def test_table(kvik):
    out = kvik("bench", "--prompt-tokens", "4", "--new-tokens", "2", "--repeat", "1").out
    for name in (
        "fake:",
        "prefill_tok_s",
        "decode_tok_s",
        "step python",
        "read_gb_s",
        "bandwidth_gb_s",
        "peak_rss_bytes",
    ):
        assert name in out


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--sequences", "2"], ("--sequences", "batching")),
        (["--prompt-tokens", "0"], ("--prompt-tokens", "at least 1")),
        (["--repeat", "0"], ("--repeat", "at least 1")),
        (["--depth", "-1"], ("--depth", "at least 0")),
        (["--prompt-tokens", "2048"], ("--prompt-tokens", "2049", "2048")),
        (["--depth", "2000", "--new-tokens", "48"], ("--depth", "2049", "2048")),
    ],
)
def test_refused(kvik, arguments, named):
    ended = kvik("bench", *arguments)
    assert ended.code == 2 and ended.out == ""
    (line,) = ended.err.splitlines()
    for part in named:
        assert part in line


def test_torch_has_no_reading_rate(kvik, monkeypatch):
    make = options.make_llm

    def torch(model, **settings):
        llm = make(model, **settings)
        llm.info = replace(llm.info, executor="torch", isa=None)
        return llm

    monkeypatch.setattr(options, "make_llm", torch)
    arguments = ("bench", "--prompt-tokens", "4", "--new-tokens", "2", "--repeat", "1")
    assert json.loads(kvik(*arguments, "--json").out)["read_gb_s"] is None
    assert "read_gb_s" not in kvik(*arguments).out
