from __future__ import annotations

import json
import shlex
from dataclasses import replace

import pytest

from kvik.params import SamplingParams
from kvik.planning import ADVICE, STRATEGIES


@pytest.mark.parametrize("task", ADVICE)
def test_every_task(kvik, task):
    ended = kvik("plan", "decoding", task)
    assert ended.code == 0 and ended.err == ""
    report = json.loads(kvik("plan", "decoding", task, "--json").out)
    assert report["task"] == task and report["reading"]["sure"]
    for said in (report["strategy"]["name"], report["technique"]["name"], report["command"]):
        assert said in ended.out
    assert STRATEGIES[report["strategy"]["name"]].source in " ".join(ended.out.split())
    assert report["strategy"]["use"] and report["strategy"]["avoid"] and report["technique"]["use"]
    kind = report["params"].pop("kind")
    assert all(getattr(ADVICE[task].params, name) == value for name, value in report["params"].items())
    assert type(ADVICE[task].params).__name__ == kind


@pytest.mark.parametrize("task", ADVICE)
def test_its_command_asks_for_just_these_parameters(kvik, made, task):
    report = json.loads(kvik("plan", "decoding", task, "--json").out)
    program, verb, prompt, *arguments = shlex.split(report["command"])
    assert (program, verb, prompt) == ("kvik", "run", report["prompt"])
    assert kvik(verb, "hi", *arguments, *(() if "--num-beams" in arguments else ("--seed", "4"))).code == 0
    asked, wanted = made[-1].asked[0][1], ADVICE[task].params
    if isinstance(wanted, SamplingParams):
        filters = (
            {"top_k": 50, "top_p": 0.9} if wanted.temperature == 0 else {}
        )  # the model's own, which greedy is above
        wanted = replace(wanted, seed=4, **filters)
    assert asked == wanted


def test_sentence(kvik):
    ended = kvik("plan", "decoding", "I have to shorten twelve newspaper articles")
    assert ended.out.startswith("task          summarization (by 'shorten'") and ended.err == ""


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("xqzzt vrrp", "no word of this is known; planned for 'general'. Tasks: code, translation"),
        ("sumarization", "this is no task; did you mean 'summarization'?"),
        ("the", "not clear: nearest are"),
    ],
)
def test_what_is_not_clear(kvik, text, said):
    ended = kvik("plan", "decoding", text)
    assert ended.code == 0 and said in ended.err and ended.err.count("\n") == 1
    assert ended.out.startswith("task          general\n")


def test_refused(kvik):
    for arguments in (["decoding"], ["decoding", ""], ["decoding", " "], ["nonsense"]):
        ended = kvik("plan", *arguments)
        assert ended.code == 2 and ended.out == "" and ended.err.count("\n") == 1


def test_alone_prints_help(kvik):
    ended = kvik("plan")
    assert ended.code == 0 and "decoding" in ended.out
