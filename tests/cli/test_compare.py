from __future__ import annotations

import json

import pytest
from cli.fake_llm import ANSWER, FakeLLM

from kvik.cli import compare as verb
from kvik.evaluation.compare import Run, measure
from kvik.params import SamplingParams

RUN = ("compare", "decoding", "hi", "--raw", "--repeat", "3", "--max-tokens", "5")


def test_json(kvik, made):
    ended = kvik(*RUN, "--strategies", "greedy,balanced", "--sweep", "temperature=0.5:1:2", "--json", "--seed", "7")
    assert ended.code == 0 and ended.err == ""
    report = json.loads(ended.out)
    found = {one["name"]: one for one in report["strategies"]}
    assert list(found) == ["greedy", "balanced", "temperature=0.5", "temperature=1"]
    for one in found.values():
        assert 0 < one["slowest"] <= one["tokens_per_second"] <= one["fastest"]
        assert one["tokens"] == 5 and len(one["texts"]) == 3
        assert one["repeatable"] is True
    assert found["greedy"]["params"]["temperature"] == 0 and found["balanced"]["params"]["repetition_penalty"] == 1.15
    greedy = found["greedy"]
    assert (greedy["determinism"] == greedy["self_bleu"] == 1 and greedy["repetition"] is None) or greedy[
        "repetition"
    ] >= 0
    assert -1e-3 < greedy["mean_logprob"] <= 0  # the fake is sure
    assert report["settings"] == {
        "prompt": "hi", "prompt_tokens": 1, "raw": True, "repeat": 3, "max_tokens": 5, "ignore_eos": False, "seed": 7
    }  # fmt: skip
    assert report["model"]["name"] == "fake" and report["machine"]["cores"] >= 1
    asked = [(params.temperature, params.seed) for _, params in made[0].asked]
    rounds = [asked[i : i + 4] for i in range(0, 16, 4)]
    assert [sorted(t for t, _ in one) for one in rounds] == [[0, 0.5, 0.7, 1]] * 4  # interleaved
    assert [{seed for _, seed in one} for one in rounds] == [{7}, {7}, {8}, {9}]
    assert len({one[0] for one in rounds}) == 4  # no strategy always goes first


def test_table(kvik):
    ended = kvik(*RUN, "--strategies", "greedy,top-k")
    head, _, body = ended.out.partition("\n\n")
    assert "fake: weights auto" in head and "3 runs of at most 5 tokens" in head
    lines = body.splitlines()
    assert lines[0].split() == [
        "strategy", "tok/s", "tokens", "distinct-1", "distinct-2", "self-BLEU", "logprob", "repeated", "same"
    ]  # fmt: skip
    assert [line.split()[0] for line in lines[1:3]] == ["greedy", "top-k"]
    assert "same tokens again with the same seed" in ended.out


def test_beam_search_beside_sampling(kvik, made):
    ended = kvik(*RUN, "--strategies", "greedy,beam", "--json")
    _, beam = json.loads(ended.out)["strategies"]
    assert beam["params"]["num_beams"] == 4 and beam["params"]["max_tokens"] == 5
    assert beam["determinism"] == 1 and beam["texts"][0].startswith("The sky")


def test_a_model_that_varies_is_told(kvik, monkeypatch):
    calls = []

    def says(self, follow):
        calls.append(1)
        return (follow + len(calls)) % len(ANSWER) + 1

    monkeypatch.setattr(FakeLLM, "says", says)
    ended = kvik(*RUN, "--strategies", "greedy", "--max-tokens", "4")
    assert "not the same tokens with the same seed: greedy" in ended.out


def test_figures_by_hand():
    runs = [Run("a b a b", (1, 2), -1.0, 0.5), Run("a b c", (1, 3, 4), -4.0, 0.5), Run("a b a b", (1, 2), -1.0, 1.0)]
    found = measure("x", SamplingParams(), runs[0], runs)
    assert (found.tokens_per_second, found.slowest, found.fastest) == (4.0, 2.0, 6.0)
    assert found.tokens == pytest.approx(7 / 3) and found.mean_logprob == pytest.approx(-6 / 7)
    assert found.distinct_1 == pytest.approx(3 / 11) and found.distinct_2 == pytest.approx(3 / 8)
    assert found.determinism == pytest.approx(1 / 3) and found.repetition == 0.0
    assert not measure("x", SamplingParams(), runs[1], runs).repeatable


def test_nothing_said_is_not_zero():
    found = measure("x", SamplingParams(), Run("", (), 0.0, 0.1), [Run("", (), 0.0, 0.1)])
    assert (found.distinct_1, found.self_bleu, found.repetition, found.mean_logprob, found.determinism) == (None,) * 5
    assert verb._figure(None) == "-"


@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
def test_plot(kvik, tmp_path, ending):
    path = tmp_path / f"a.{ending}"
    ended = kvik(*RUN, "--strategies", "greedy,balanced", "--sweep", "p=0.5:1:2", "--plot", str(path))
    assert ended.code == 0 and ended.err == ""
    assert path.read_bytes().startswith({"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[ending])


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--strategies", "greedy,warm"], ("--strategies must be one of greedy, beam", "'warm'")),
        (["--strategies", " ,"], ("--strategies names none",)),
        (["--strategies", ""], ("--strategies names none",)),
        (["--strategies", "", "--sweep", "p=0.5:1:2"], ("--strategies names none",)),
        (["--sweep", "k=1:2:5"], ("--sweep k=1:2:5 has 2 different whole numbers, not 5",)),
        (["--sweep", "p=0.5:0.5000001:3"], ("has 1 different values, not 3",)),
        (["--sweep", "beams=1:70:3"], ("--sweep beams=1:70:3: beams must be in [1, 64], got 70",)),
        (["--sweep", "heat=0:1:2"], ("--sweep takes temperature", "'heat'")),
        (["--sweep", "temperature=1:2"], ("--sweep takes FIELD=FIRST:LAST:STEPS",)),
        (["--sweep", "p=0:2:3"], ("--sweep p=0:2:3: p must be finite and in [0, 1]",)),
        (["--repeat", "0"], ("--repeat must be in [1, 100], got 0",)),
        (["--max-tokens", "0"], ("--max-tokens must be in [1, 4096]",)),
        (["--seed", "-1"], ("--seed must be in",)),
        (["--plot", "a.txt"], ("--plot writes .png, .svg, .pdf",)),
    ],
)
def test_refused_before_a_model_is_loaded(kvik, made, arguments, named):
    ended = kvik("compare", "decoding", "hi", *arguments)
    assert ended.code == 2 and ended.out == "" and made == []
    (line,) = ended.err.splitlines()
    assert all(name in line for name in named), line


def test_plot_without_matplotlib(kvik, monkeypatch, made):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    ended = kvik("compare", "decoding", "hi", "--plot", "a.png")
    assert ended.code == 2 and 'pip install "kvik[plots]"' in ended.err and made == []


def test_prompt(kvik, made):
    assert kvik("compare", "decoding", "").code == 2
    kvik("compare", "decoding", "-", "--system", "Short.", "--strategies", "greedy", "--repeat", "1", stdin=b"why")
    ids = made[-1].asked[0][0]
    assert made[-1].tokenizer.decode(ids) == " <system> Short. <user> why <assistant>"
