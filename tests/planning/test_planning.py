"""What is advised for a task, and how a sentence is read as one."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvik.errors import ParameterError
from kvik.params import BeamParams, SamplingParams
from kvik.planning import ADVICE, STRATEGIES, TECHNIQUES, command_line, plan_decoding, sweep
from kvik.planning.descriptions import DESCRIPTIONS, VOCABULARY
from kvik.planning.tasks import FALLBACK, TASKS, features, read_task

HELD_OUT = [tuple(line.split("\t")) for line in (Path(__file__).parent / "held_out.tsv").read_text().splitlines()]


def test_sentences_kept_apart_are_read_right():
    assert len(HELD_OUT) == 100 and {task for task, _ in HELD_OUT} == set(TASKS)
    wrong = [(task, read_task(text).task, text) for task, text in HELD_OUT if read_task(text).task != task]
    assert len(wrong) <= 10, wrong


def test_they_are_kept_apart():
    known = {" ".join(features(line)) for lines in DESCRIPTIONS.values() for line in lines.strip().splitlines()}
    assert not known & {" ".join(features(text)) for _, text in HELD_OUT}
    ours = {gram for lines in DESCRIPTIONS.values() for line in lines.splitlines() for gram in five(line)}
    assert not [text for _, text in HELD_OUT if ours & set(five(text))]  # no template in common


def five(text):
    words = text.lower().split()
    return [tuple(words[i : i + 5]) for i in range(len(words) - 4)]


@pytest.mark.parametrize("task", TASKS)
def test_named_task(task):
    for name in (task, task.upper(), f"  {task} "):
        plan = plan_decoding(name)
        assert plan.task == task and plan.reading.sure and plan.reading.probability == 1
    assert plan.advice.technique in TECHNIQUES
    assert {plan.advice.strategy, *plan.advice.otherwise} <= set(STRATEGIES)


def test_every_task_has_advice_and_examples():
    assert set(ADVICE) == set(DESCRIPTIONS) == set(VOCABULARY) == set(TASKS)
    assert sum(len(lines.strip().splitlines()) for lines in DESCRIPTIONS.values()) > 400


@pytest.mark.parametrize("text", ["xqzzt", "42 !", "the", "pünktlich", "\u202e\x00"])
def test_what_is_not_clear_is_general_and_says_so(text):
    reading = read_task(text)
    assert reading.task == FALLBACK and not reading.sure and reading.probability < 0.5


def test_typing_error_names_the_nearest():
    assert read_task("sumarization")[:3] == (FALLBACK, False, "summarization")


def test_reasons_are_words_of_the_sentence():
    reading = read_task("Please translate my diary into Finnish")
    assert reading.task == "translation" and set(reading.because) <= {"translate", "into", "finnish", "diary"}
    assert "finnish" in reading.because


@pytest.mark.parametrize("text", ["", " \n", "x" * 4001])
def test_refused(text):
    with pytest.raises(ParameterError, match="the task must have 1 to 4,000 characters"):
        read_task(text)


def test_command_says_what_is_not_the_default():
    assert command_line(SamplingParams(temperature=0.0), "it's") == """kvik run 'it'"'"'s' --temperature 0"""
    preset = SamplingParams.preset("creative", temperature=1.0, n=3)
    assert command_line(preset, "x") == "kvik run x --preset creative --n 3"
    assert command_line(BeamParams(), "x") == "kvik run x --num-beams 4"
    assert command_line(SamplingParams(top_p=0.9), "x") == "kvik run x --temperature 1 --top-k 0 --top-p 0.9"


def test_sweep():
    found = sweep("temperature=0.1:1.5:8")
    assert [p.temperature for p in found.values()] == [0.1, 0.3, 0.5, 0.7, 0.9, 1.1, 1.3, 1.5]
    assert [p.top_k for p in sweep("k=1:100:4").values()] == [1, 34, 67, 100]
    assert list(sweep("p=1:0.5:2")) == ["top_p=1", "top_p=0.5"]
    assert all(isinstance(p, BeamParams) for p in sweep("beams=1:4:4").values())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("heat=0:1:2", "takes temperature, k, top_k"),
        ("temperature", "FIELD=FIRST:LAST:STEPS"),
        ("temperature=0:1", "FIELD=FIRST:LAST:STEPS"),
        ("temperature=0:1:1", "2 to 32 steps"),
        ("temperature=0:1:99", "2 to 32 steps"),
        ("temperature=nan:1:3", "2 to 32 steps"),
        ("temperature=0:1:2:3", "2 to 32 steps"),
        ("temperature=-1:1:3", "temperature must be"),
        ("p=0:2:3", "--sweep p=0:2:3: p must be"),
    ],
)
def test_sweep_refused(text, said):
    with pytest.raises(ParameterError, match=said):
        sweep(text)
