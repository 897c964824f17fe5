"""Every strategy with every format and feature: it runs and says what the request says alone, or is refused by name."""

from __future__ import annotations

import itertools
from functools import cache
from typing import Any

import numpy as np
import pytest
from engine.small_engines import small_engine
from models.small_models import write_gguf

from kvik.engine.engine import Engine
from kvik.engine.request import Chunk
from kvik.errors import ParameterError
from kvik.params import PRESETS, BeamParams, Grammar, SamplingParams, beam_params
from kvik.text.tokenizer import Tokenizer
from kvik.weights.gguf import read_gguf

STRATEGIES: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "temperature": {"temperature": 0.7},
    "top-k": {"top_k": 12},
    "top-p": {"top_p": 0.8},
    "min-p": {"min_p": 0.1},
    "beam 4": {"num_beams": 4},
    "beam groups": {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5, "length_penalty": 0.5},
    "combined": {"temperature": 1.4, "top_k": 40, "top_p": 0.95, "min_p": 0.02},
}
# Those whose filters and penalties are nothing to a model or a cache, on the first model and format only.
MORE: dict[str, dict[str, Any]] = {
    "typical": {"typical_p": 0.8},
    "epsilon": {"epsilon_cutoff": 0.005},
    "eta": {"eta_cutoff": 0.01},
    "top-n-sigma": {"top_n_sigma": 1.5},
    "xtc": {"xtc_probability": 0.5, "xtc_threshold": 0.01},
    "logit bias": {"logit_bias": {5: 3.0, 70: -100.0}},
    "bad words": {"bad_words": ("a", "Qx", "7 7")},
    "repetition": {"repetition_penalty": 1.3, "temperature": 0.0},
    "presence and frequency": {"presence_penalty": 0.6, "frequency_penalty": 0.4},
    "no repeated n-gram": {"no_repeat_ngram_size": 2, "temperature": 0.0},
    "dry": {"dry_multiplier": 2.0, "dry_allowed_length": 1, "temperature": 0.0},
    "factual": PRESETS["factual"],
    "balanced": PRESETS["balanced"],
    "creative": PRESETS["creative"],
}
FORMATS = ("f16", "f32")
MODELS = ("grouped heads", "windows")
# params: of the request; engine: of the engine it runs in; mates: requests beside it; before: requests that ended before.
FEATURES: dict[str, dict[str, Any]] = {
    "alone": {},
    "n": {"params": {"n": 3}},
    "stop strings": {"params": {"stop": ("ab", "Q", "7")}},
    "logprobs": {"params": {"logprobs": 3}},
    "processed logprobs": {"params": {"logprobs": 2, "logprobs_mode": "processed"}},
    "min_tokens": {"params": {"min_tokens": 20, "ignore_eos": False}},
    "grammar": {"params": {"grammar": Grammar.regex("[a-zA-Z]{2,3}(-[0-9]{3,9}){2,20}"), "ignore_eos": False}},
    "seed": {"params": {"seed": 2**64 - 1}},
    "batch mates": {"mates": 5},
    "chunks": {"engine": {"max_batch_tokens": 5}, "mates": 1},
    "two threads": {"engine": {"threads": 2}},
    "preemption": {"engine": {"num_slabs": 10}, "mates": 9, "happens": "preemptions"},
    "prefix hit": {"before": 1, "happens": "prefix_hit_tokens"},
}
REFUSED: dict[tuple[str, str], str] = {  # (strategy, feature): what the refusal says
    (strategy, feature): f"{name} cannot go with num_beams"
    for strategy in ("beam 4", "beam groups")
    for feature, name in (("processed logprobs", "logprobs_mode"), ("seed", "seed"))
}
PROMPT = tuple(i * 7 % 96 for i in range(40))


@cache
def tokenizer_of(folder: Any) -> Tokenizer:
    with read_gguf(write_gguf(folder / "small.gguf")) as file:
        return Tokenizer.from_gguf(file.metadata)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return tokenizer_of(tmp_path_factory.mktemp("matrix"))


def params_of(settings: dict[str, Any]) -> SamplingParams | BeamParams:
    return beam_params(settings) if "num_beams" in settings else SamplingParams(**settings)


def said(chunks: list[Chunk], n: int) -> list[Any]:
    """Of each sample: text, tokens, log-probabilities and the reasons of its chunks that have one."""
    samples = [[c for c in chunks if c.index == index] for index in range(n)]
    return [
        ("".join(c.text for c in mine), [t for c in mine for t in c.token_ids],
         [x for c in mine for x in c.logprobs or ()], [c.finish_reason for c in mine if c.finish_reason])
        for mine in samples
    ]  # fmt: skip


def run_all(made: Engine, requests: list[tuple[tuple[int, ...], SamplingParams | BeamParams]]) -> list[list[Chunk]]:
    heard: list[list[Chunk]] = [[] for _ in requests]
    for (prompt, params), chunks in zip(requests, heard, strict=True):
        made.add(made.request(prompt, params), chunks.append)
    while made.step():
        made.scheduler.check_integrity()
    assert made.scheduler.pool.num_held == 0
    return heard


CELLS = [
    *itertools.product(STRATEGIES, FEATURES, MODELS, FORMATS),
    *itertools.product(MORE, FEATURES, MODELS[:1], FORMATS[:1]),
]


@pytest.mark.parametrize(("strategy", "feature", "model", "kv"), CELLS)
def test_cell(tokenizer: Tokenizer, strategy: str, feature: str, model: str, kv: str) -> None:
    what = FEATURES[feature]
    strategies = (STRATEGIES | MORE)[strategy]
    drawn = {} if "num_beams" in strategies else {"seed": 11}
    settings = {"max_tokens": 30, "ignore_eos": True} | drawn | strategies | what.get("params", {})
    if (strategy, feature) in REFUSED:
        with pytest.raises(ParameterError, match=REFUSED[strategy, feature]):
            params_of(settings)
        return
    params = params_of(settings)
    alone = small_engine(tokenizer, model, kv=kv, prefix_sharing=False)
    (want,) = run_all(alone, [(PROMPT, params)])
    machine = dict(what.get("engine", {}))
    if "num_slabs" in machine:  # at least what the request needs by itself
        machine["num_slabs"] = max(machine["num_slabs"], alone.admission.slabs(len(PROMPT), 30, params.num_sequences))
    made = small_engine(tokenizer, model, kv=kv, **machine)
    for _ in range(what.get("before", 0)):
        run_all(made, [(PROMPT, params)])
    mates: list[tuple[tuple[int, ...], SamplingParams | BeamParams]] = [
        (PROMPT[i : i + 25], SamplingParams(max_tokens=60, seed=i, ignore_eos=True))
        for i in range(what.get("mates", 0))
    ]
    *_, got = run_all(made, [*mates, (PROMPT, params)])
    assert said(got, params.num_answers) == said(want, params.num_answers)
    assert getattr(made.stats, what.get("happens", "steps")) > 0
    if "stop" in settings:
        assert all(stop not in text for text, *_ in said(got, params.num_answers) for stop in params.stop)


SCORED: dict[str, dict[str, Any]] = {
    "reduced": {},
    "kept": {"reduce": False},
    "best tokens": {"top": 3},
    "from a token on": {"first": 37},
    "kept from a token on": {"reduce": False, "first": 37},
}
BESIDE = ("alone", "batch mates", "chunks", "two threads", "preemption", "prefix hit")


def scored_beside(made: Engine, asked: dict[str, Any], mates: int) -> Any:
    """The text's figures, beside requests that began before and texts that are scored too."""
    for i in range(mates):
        params = SamplingParams(max_tokens=60, seed=i, ignore_eos=True)
        made.add(made.request(PROMPT[i : i + 25], params), lambda chunk: None)
    groups = [made.add_score(made.score_request(PROMPT[i:], top=i)) for i in range(min(mates, 3))]
    groups.append(made.add_score(made.score_request(PROMPT, **asked)))
    while made.step():
        made.scheduler.check_integrity()
    assert made.scheduler.pool.num_held == 0
    results = [group.samples[0].result() for group in groups]
    return results[-1]


@pytest.mark.parametrize(("how", "feature", "model", "kv"), [*itertools.product(SCORED, BESIDE, MODELS, FORMATS)])
def test_scored_cell(tokenizer: Tokenizer, how: str, feature: str, model: str, kv: str) -> None:
    what, asked = FEATURES[feature], SCORED[how]
    alone = small_engine(tokenizer, model, kv=kv, prefix_sharing=False)
    first = asked.get("first", 1)
    want = scored_beside(alone, {"reduce": False, "top": 3}, 0)
    made = small_engine(tokenizer, model, kv=kv, **what.get("engine", {}))
    for _ in range(what.get("before", 0)):
        scored_beside(made, {}, 0)
    got = scored_beside(made, asked, what.get("mates", 0))
    assert np.array_equal(got.logprobs, want.logprobs[first - 1 :])
    assert np.array_equal(got.logsumexp, want.logsumexp[first - 1 :])
    assert got.top == (want.top if "top" in asked else ())
    if asked.get("reduce", True):
        assert got.logits is None
    else:
        assert np.array_equal(got.logits, want.logits[first - 1 :])
    happens = what.get("happens", "steps")
    if happens != "prefix_hit_tokens" or first > 16:  # a row that is wanted is computed
        assert getattr(made.stats, happens) > 0
