"""What to decode a task with: strategy, prompting technique, reasons and the command (guide sections 2.9 and 7)."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, NamedTuple

from kvik.params import PRESETS, AnyParams, BeamParams, SamplingParams
from kvik.planning.tasks import Reading, read_task

__all__ = ["ADVICE", "TECHNIQUES", "Advice", "DecodingPlan", "Technique", "command_line", "plan_decoding"]


class Technique(NamedTuple):
    """A way to ask. how: in a sentence; use: when it pays (guide section 7)."""

    how: str
    use: str


TECHNIQUES: Mapping[str, Technique] = {
    "zero-shot": Technique(
        "say what is wanted, without examples", "simple, well-known tasks; large models; no examples at hand"
    ),
    "few-shot": Technique(
        "put two to five worked examples before the input",
        "a format or style that must be met; special domains; models below 70 billion parameters",
    ),
    "chain of thought": Technique(
        'ask for the steps before the answer: "Let\'s think step by step.", or worked examples with their steps',
        "arithmetic, logic, several steps; what it gains ranges from nothing to 40 points with task and model: measure it",
    ),
    "self-consistency": Technique(
        "sample several chains of thought at temperature 0.8 and take the answer most of them reach",
        "chain of thought with one short answer, where several times the tokens are worth it",
    ),
}


class Advice(NamedTuple):
    """For one task.

    strategy: a name of STRATEGIES. params: that strategy's, adjusted to the task where it says so. reason: why.
    otherwise: names of strategies that suit it too, with when to prefer each. technique: a name of TECHNIQUES;
    technique_reason: why that one. prompt: an example of one that follows it.
    """

    strategy: str
    params: AnyParams
    reason: str
    otherwise: Mapping[str, str]
    technique: str
    technique_reason: str
    prompt: str


ADVICE: Mapping[str, Advice] = {
    "code": Advice(
        "greedy",
        SamplingParams(temperature=0.0, max_tokens=512),
        "a program has few right continuations, and a run that gives the same text again can be tested",
        {"temperature": "at 0.2, with n=5 and tests that pick the sample that passes"},
        "few-shot",
        "a signature and an example of the style fix format and names, above all with small models",
        "Python, one line. Double a list: [2 * x for x in values]. Keep the even numbers: [x for x in values if x % 2 == 0]. "
        "Square the odd numbers:",
    ),
    "translation": Advice(
        "greedy",
        SamplingParams(temperature=0.0, max_tokens=256),
        "the meaning is fixed, so that surprise is error",
        {"beam": "where the best wording is worth several times the computation, for a sentence at a time"},
        "few-shot",
        "a pair or two set register and terms, and that only the translation is to come",
        "Translate into French. Good morning. -> Bonjour. Thank you very much. -> Merci beaucoup. Where is the station? ->",
    ),
    "maths": Advice(
        "greedy",
        SamplingParams(temperature=0.0, max_tokens=512),
        "one right answer; a single unlikely token spoils every step after it",
        {"top-p": "with n=5 at temperature 0.8, for a vote on the answers (self-consistency)"},
        "chain of thought",
        "the steps are computation the model has no other place for",
        "A shirt costs $15 and is on 20% sale. What is the final price? Let's think step by step.",
    ),
    "factual QA": Advice(
        "greedy",
        SamplingParams(temperature=0.0, max_tokens=128),
        "the most probable answer is the one wanted, and the same question should get the same answer",
        {
            "factual": "in production, where answers may be long and greedy would repeat itself",
            "beam": "for an answer of a few words whose wording is free",
        },
        "zero-shot",
        "a plain question is well known to any instruction model; put the passage before it where the answer is in one",
        "What is the capital of Australia? Answer in one word.",
    ),
    "summarization": Advice(
        "beam",
        BeamParams(num_beams=4, no_repeat_ngram_size=3, max_tokens=160),
        "a summary is short and bound to its source: the sequence that is best as a whole beats the best next token",
        {"factual": "for long sources, where four beams cost too much", "greedy": "where speed matters most"},
        "zero-shot",
        "a well-known task: say the length and the form that is wanted",
        "Summarize in one sentence: The city council met on Monday and agreed, after four hours, to build two new bridges.",
    ),
    "story": Advice(
        "creative",
        SamplingParams.preset("creative", max_tokens=512),
        "a story lives on words that are not the most probable; the filters keep out those that make no sense",
        {"min-p": "for still more variety without losing the thread", "xtc": "against well-worn phrases"},
        "zero-shot",
        "examples would be copied; give setting, voice and length instead",
        "Write a story of 200 words about a lighthouse keeper who is afraid of water.",
    ),
    "dialogue": Advice(
        "top-p",
        SamplingParams(temperature=0.8, top_p=0.9, max_tokens=200),
        "people do not say the same thing twice; the nucleus narrows where a reply has to be exact",
        {"creative": "for invented characters", "balanced": "where the other side is a customer"},
        "few-shot",
        "two or three exchanges fix voice and length better than a description of them",
        "You are an old sailor. Guest: Is the sea calm today? Sailor: Calm as a sleeping cat. Guest: Shall we go out? Sailor:",
    ),
    "brainstorming": Advice(
        "min-p",
        SamplingParams(temperature=1.3, min_p=0.05, n=4, max_tokens=200),
        "variety is the point: a temperature of 1.2 to 1.5, several samples, and min-p so that they stay readable",
        {"temperature": "above 1.5, for what is beyond sense", "xtc": "to leave the obvious ideas out"},
        "zero-shot",
        "examples would draw the ideas towards themselves",
        "List five unusual names for a coffee shop.",
    ),
    "general": Advice(
        "balanced",
        SamplingParams.preset("balanced", max_tokens=512),
        "requests are mixed: temperature, top-k and top-p together are right for most and wrong for few",
        {"greedy": "for requests that are known to have one right answer", "top-p": "where nothing may be penalised"},
        "zero-shot",
        "nothing is known that examples could show",
        "Give me three tips for a good night's sleep.",
    ),
}
"""By task, those of kvik.planning.tasks."""


class DecodingPlan(NamedTuple):
    """A task's advice. task is what was planned for; reading says how it was found. command: runs it."""

    task: str
    reading: Reading
    advice: Advice
    command: str


def plan_decoding(text: str) -> DecodingPlan:
    """For one of the nine tasks by name, or a sentence that describes a task; "general" where that is not clear."""
    reading = read_task(text)
    advice = ADVICE[reading.task]
    return DecodingPlan(reading.task, reading, advice, command_line(advice.params, advice.prompt))


def command_line(params: AnyParams, prompt: str) -> str:
    """The `kvik run` that answers a prompt so; only what is not the default stands in it."""
    given = {f.name: getattr(params, f.name) for f in fields(params) if getattr(params, f.name) != f.default}
    words = ["kvik", "run", prompt]
    if isinstance(params, BeamParams):
        given = {"num_beams": params.num_beams, **given}
    else:  # the command line's defaults for these are the model's own
        sampling: dict[str, Any] = {"temperature": params.temperature}
        if params.temperature != 0.0:
            sampling |= {"top_k": params.top_k, "top_p": params.top_p}
        given = {**sampling, **given}
        for name, preset in PRESETS.items():
            if all(given.get(field) == value for field, value in preset.items()):
                words += ["--preset", name]
                given = {field: value for field, value in given.items() if field not in preset}
                break
    for field, value in given.items():
        for one in value if isinstance(value, tuple) else (value,):
            words += [f"--{field.replace('_', '-')}", _written(one)]
    return shlex.join(words)


def _written(value: Any) -> str:
    """A value as its option takes it; of logit_bias an (id, bias) pair."""
    if isinstance(value, tuple):
        return "=".join(map(_written, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
