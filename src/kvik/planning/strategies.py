"""The decoding strategies by name: parameters, where each comes from, when to use it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from kvik.errors import ParameterError
from kvik.params import AnyParams, BeamParams, SamplingParams

__all__ = ["MOST_STEPS", "STRATEGIES", "SWEEPS", "Strategy", "sweep"]

MOST_STEPS = 32


class Strategy(NamedTuple):
    """A named way to choose tokens. source: the guide's section, or the paper. use, avoid: tasks, and what to expect."""

    params: AnyParams
    what: str
    source: str
    use: str
    avoid: str


STRATEGIES: Mapping[str, Strategy] = {
    "greedy": Strategy(
        SamplingParams(temperature=0.0),
        "always the most probable token",
        "guide 2.3",
        "one right answer, read by a machine or checked: code, translation, maths, facts",
        "creative text: it repeats itself and never varies",
    ),
    "beam": Strategy(
        BeamParams(num_beams=4),
        "the most probable of several sequences followed at once",
        "guide 2.4; Graves 2012, arXiv:1211.3711",
        "short texts with little freedom: summaries, translation, one answer to a question",
        "open-ended text, which comes out bland; answers that must differ",
    ),
    "temperature": Strategy(
        SamplingParams(temperature=0.8),
        "draws from the whole vocabulary, logits divided by the temperature",
        "guide 2.5; Ackley, Hinton and Sejnowski 1985",
        "the model's own distribution, sharpened or flattened and else untouched",
        "long texts above 1: every token is a chance to leave the rails",
    ),
    "top-k": Strategy(
        SamplingParams(temperature=0.8, top_k=50),
        "draws from the k most probable tokens",
        "guide 2.6; Fan, Lewis and Dauphin 2018, arXiv:1805.04833",
        "general use, a hard limit on surprises",
        "where certainty varies a lot: k is too many for a sure token and too few for an open one",
    ),
    "top-p": Strategy(
        SamplingParams(temperature=0.8, top_p=0.9),
        "draws from the fewest tokens that have probability p together",
        "guide 2.7; Holtzman et al. 2020, arXiv:1904.09751",
        "a default for sampling: the number of candidates follows the model's certainty",
        "high temperatures: a flat distribution lets thousands of tokens in",
    ),
    "min-p": Strategy(
        SamplingParams(temperature=1.2, min_p=0.05),
        "draws from tokens with at least min_p times the best one's probability",
        "Nguyen et al. 2024, arXiv:2407.01082",
        "temperatures above 1: variety where the model is unsure, none where it is sure",
        "one right answer",
    ),
    "typical": Strategy(
        SamplingParams(typical_p=0.9),
        "draws from the tokens whose information is nearest the entropy",
        "Meister et al. 2023, arXiv:2202.00666",
        "summaries and stories that repeat themselves under top-p",
        "one right answer: the most probable token may be left out as too little surprising",
    ),
    "epsilon": Strategy(
        SamplingParams(epsilon_cutoff=3e-4),
        "draws from tokens of at least this probability",
        "Hewitt et al. 2022, arXiv:2210.15191",
        "long open-ended text: cuts the unreliable tail and nothing else",
        "high temperatures, where few tokens reach it",
    ),
    "eta": Strategy(
        SamplingParams(eta_cutoff=3e-4),
        "as epsilon, with a lower threshold where the entropy is high",
        "Hewitt et al. 2022, arXiv:2210.15191",
        "long open-ended text in which the model is often unsure",
        "one right answer",
    ),
    "top-n-sigma": Strategy(
        SamplingParams(temperature=1.2, top_n_sigma=1.0),
        "draws from tokens within n standard deviations of the largest logit",
        "Tang et al. 2024, arXiv:2411.07641",
        "reasoning in several samples: what it keeps does not depend on the temperature",
        "texts that want rare words",
    ),
    "xtc": Strategy(
        SamplingParams(temperature=0.8, min_p=0.02, xtc_probability=0.5, xtc_threshold=0.1),
        "now and then leaves out all but the least of the probable tokens",
        "p-e-w 2024, text-generation-webui pull request 6335",
        "stories and ideas without the obvious word",
        "facts, code, formats: the right token may be one of those left out",
    ),
    "factual": Strategy(
        SamplingParams.preset("factual"),
        "temperature 0.3, top-k 20, top-p 0.85, repetition penalty 1.1",
        "guide 2.8",
        "answers to questions in production",
        "creative text",
    ),
    "balanced": Strategy(
        SamplingParams.preset("balanced"),
        "temperature 0.7, top-k 50, top-p 0.9, repetition penalty 1.15",
        "guide 2.8",
        "assistants and chatbots: mixed requests in production",
        "code and formats: the penalty punishes brackets and names that have to come again",
    ),
    "creative": Strategy(
        SamplingParams.preset("creative"),
        "temperature 1, top-k 100, top-p 0.95, repetition penalty 1.2",
        "guide 2.8",
        "stories, poems, dialogue",
        "facts, code",
    ),
}

SWEEPS: Mapping[str, str] = {
    "temperature": "temperature", "k": "top_k", "top_k": "top_k", "p": "top_p", "top_p": "top_p", "min_p": "min_p",
    "typical_p": "typical_p", "beams": "num_beams", "repetition_penalty": "repetition_penalty",
}  # fmt: skip
"""What can be swept, by its name and its short one."""
_WHOLE = frozenset({"top_k", "num_beams"})


def sweep(text: str) -> dict[str, AnyParams]:
    """The strategies of "FIELD=FIRST:LAST:STEPS", evenly spaced, by names like "temperature=0.5".

    Where the field is not the temperature itself, temperature is that of STRATEGIES' plain "temperature"; beams have none.
    """
    name, _, spec = text.partition("=")
    bounds = spec.split(":")
    field = SWEEPS.get(name.strip().replace("-", "_"))
    if field is None:
        raise ParameterError(f"--sweep takes {', '.join(SWEEPS)}, got {name!r}")
    try:
        first, last, steps = float(bounds[0]), float(bounds[1]), int(bounds[2])
    except (ValueError, IndexError):
        raise ParameterError(f"--sweep takes FIELD=FIRST:LAST:STEPS like temperature=0.1:1.5:8, got {text!r}") from None
    if len(bounds) != 3 or not 2 <= steps <= MOST_STEPS or not np.isfinite([first, last]).all() or first == last:
        raise ParameterError(f"--sweep takes two bounds that differ and 2 to {MOST_STEPS} steps, got {text!r}")
    found: dict[str, AnyParams] = {}
    for value in np.linspace(first, last, steps).tolist():
        given = round(value) if field in _WHOLE else round(value, 6)
        base = BeamParams() if field == "num_beams" else STRATEGIES["temperature"].params
        changed: dict[str, Any] = {field: given}
        try:
            found[f"{field}={given:g}"] = replace(base, **changed)
        except ParameterError as error:
            said = str(error).removeprefix(f"{field} ")
            raise ParameterError(f"--sweep {text}: {name.strip()} {said}") from None
    if len(found) < steps:
        kind = "whole numbers" if field in _WHOLE else "values"
        raise ParameterError(f"--sweep {text} has {len(found)} different {kind}, not {steps}; ask for fewer steps")
    return found
