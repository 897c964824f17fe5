"""Every strategy with every format, eviction policy and feature: it runs and says what the request says alone, or is refused
by name.

Whole: strategies x features in f16 and f32; strategies x formats, formats x features, policies x features,
policies x strategies, policies x formats. Further axes of these go round. `make test-all` runs many more.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest
from engine.small_engines import small_engine
from models.small_models import write_gguf

from kvik.engine.engine import Engine
from kvik.engine.request import Chunk
from kvik.errors import ParameterError
from kvik.params import PRESETS, BeamParams, CacheParams, Grammar, SamplingParams, beam_params
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
FORMATS: dict[str, dict[str, Any]] = {
    "f16": {},
    "f32": {"k": "f32", "v": "f32"},
    "bf16": {"k": "bf16", "v": "bf16"},
    "int8": {"k": "int8", "v": "int8", "group_size": 16},
    "int4": {"k": "int4", "v": "int4", "group_size": 16},
    "k8v4": {"k": "int8", "v": "int4", "group_size": 32},
    "rotated int4": {"k": "int4", "v": "int4", "group_size": 16, "rotate": True},
}
PLAIN = ("f16", "f32")
POLICIES: dict[str, dict[str, Any]] = {
    "none": {},
    "streamingllm": {"policy": "streamingllm:sinks=4,window=20"},
    "h2o": {"policy": "h2o:budget=50%,every=8"},
    "snapkv": {"policy": "snapkv:budget=50%,window=8"},
    "tova": {"policy": "tova:budget=24,every=8"},
    "keydiff": {"policy": "keydiff:budget=60%,every=16"},
    "expectedattention": {"policy": "expectedattention:budget=50%,window=16,every=16"},
    "pyramid": {"policy": "snapkv:budget=40%,window=4,every=16", "layers": "pyramid"},
    "ada": {"policy": "h2o:budget=50%,every=16", "heads": "ada"},
    "both": {"policy": "keydiff:budget=40%,every=8", "layers": "pyramid", "heads": "ada"},
}
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


Wanted = SamplingParams | BeamParams
Asked = tuple[tuple[int, ...], Wanted] | tuple[tuple[int, ...], Wanted, CacheParams | None]


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


def run_all(made: Engine, requests: list[Asked]) -> list[list[Chunk]]:
    heard: list[list[Chunk]] = [[] for _ in requests]
    for (prompt, params, *own), chunks in zip(requests, heard, strict=True):
        made.add(made.request(prompt, params, cache=own[0] if own else None), chunks.append)
    while made.step():
        made.scheduler.check_integrity()
    assert made.scheduler.pool.num_held == 0
    return heard


def cache_of(kv: str, policy: str) -> CacheParams:
    return CacheParams(**FORMATS[kv], **POLICIES[policy])


Cell = tuple[str, str, str, str, str]


def around(*axes: Any) -> Iterator[Cell]:
    """Each of (strategy, feature, model, kv, policy) a name, or the names it goes through while the named ones are whole."""
    whole = [axis if isinstance(axis, list) else [None] for axis in axes]
    for count, names in enumerate(itertools.product(*whole)):
        yield tuple(  # type: ignore[misc]
            name
            if name is not None
            else axis
            if isinstance(axis, str)
            else tuple(axis)[(count * step + count // len(axis)) % len(axis)]
            for step, (name, axis) in enumerate(zip(names, axes, strict=True), 1)
        )


PACKED = tuple(kv for kv in FORMATS if kv not in PLAIN)
EVICTING = tuple(policy for policy in POLICIES if policy != "none")
CELLS: dict[Cell, None] = dict.fromkeys(
    [
        *around([*STRATEGIES], [*FEATURES], [*MODELS], [*PLAIN], "none"),
        *around([*MORE], [*FEATURES], MODELS[0], PLAIN[0], "none"),
        *around([*STRATEGIES], FEATURES, MODELS, [*PACKED], "none"),
        *around(STRATEGIES, [*FEATURES], MODELS, [*PACKED], "none"),
        *around(STRATEGIES, [*FEATURES], MODELS, FORMATS, [*EVICTING]),
        *around([*STRATEGIES], FEATURES, MODELS, PLAIN, [*EVICTING]),
        *around(STRATEGIES, FEATURES, MODELS, [*FORMATS], [*EVICTING]),
    ]
)
LONG = [
    pytest.param(*cell, marks=pytest.mark.slow)
    for cell in around(["greedy", "beam 4", "combined"], [*FEATURES], MODELS, [*FORMATS], [*POLICIES])
    if cell not in CELLS
]


@pytest.mark.parametrize(("strategy", "feature", "model", "kv", "policy"), [*CELLS, *LONG])
def test_cell(tokenizer: Tokenizer, strategy: str, feature: str, model: str, kv: str, policy: str) -> None:
    what, cache = FEATURES[feature], cache_of(kv, policy)
    strategies = (STRATEGIES | MORE)[strategy]
    drawn = {} if "num_beams" in strategies else {"seed": 11}
    settings = {"max_tokens": 30, "ignore_eos": True} | drawn | strategies | what.get("params", {})
    if (strategy, feature) in REFUSED:
        with pytest.raises(ParameterError, match=REFUSED[strategy, feature]):
            params_of(settings)
        return
    params, mixed = params_of(settings), kv not in PLAIN or policy != "none"
    alone = small_engine(tokenizer, model, cache=cache, any_format=mixed, prefix_sharing=False)
    (want,) = run_all(alone, [(PROMPT, params, cache)])
    machine = dict(what.get("engine", {}))
    if "num_slabs" in machine:  # at least what the request needs by itself
        machine["num_slabs"] = slabs_of(alone, params, mixed)
    made = small_engine(tokenizer, model, cache=None if mixed else cache, any_format=mixed, **machine)
    for _ in range(what.get("before", 0)):
        run_all(made, [(PROMPT, params, cache)])
    mates: list[Asked] = [
        (PROMPT[i : i + 25], SamplingParams(max_tokens=60, seed=i, ignore_eos=True), None)
        for i in range(what.get("mates", 0))
    ]
    *_, got = run_all(made, [*mates, (PROMPT, params, cache)])
    assert said(got, params.num_answers) == said(want, params.num_answers)
    assert not any("error" in reasons for *_, reasons in said(got, params.num_answers))
    happens = what.get("happens", "steps")
    crowded = mixed and isinstance(params, BeamParams)  # in a larger pool, and what is kept in its slabs is soon taken
    if not crowded and (happens != "prefix_hit_tokens" or cache.scorer is None):
        assert getattr(made.stats, happens) > 0
    assert (alone.stats.evictions > 0) == (cache.scorer is not None)
    if "stop" in settings:
        assert all(stop not in text for text, *_ in said(got, params.num_answers) for stop in params.stop)


def slabs_of(alone: Engine, params: SamplingParams | BeamParams, mixed: bool) -> int:
    """Of a pool in which the request fits by itself, and those beside it do not all."""
    needs = alone.admission.slabs(len(PROMPT), 30, params.num_sequences)
    mate = alone.admission.slabs(25, 60, 1, CacheParams())
    return max(needs, 3 * mate if mixed else 10)


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


SCORED_CELLS = [
    *((*cell, "none") for cell in itertools.product(SCORED, BESIDE, MODELS, PLAIN)),
    *around([*SCORED], BESIDE, MODELS, [*PACKED], "none"),
    *around(SCORED, [*BESIDE], MODELS, FORMATS, [*EVICTING]),
]


@pytest.mark.parametrize(("how", "feature", "model", "kv", "policy"), SCORED_CELLS)
def test_scored_cell(tokenizer: Tokenizer, how: str, feature: str, model: str, kv: str, policy: str) -> None:
    what, cache = FEATURES[feature], cache_of(kv, policy)
    asked, mixed = SCORED[how] | {"cache": cache}, kv not in PLAIN or policy != "none"
    first = asked.get("first", 1)
    if cache.scorer is not None:  # evicts in the text, the same wherever it is scored from
        first = asked["first"] = 20
    own = kv if kv in PLAIN else "f16"
    alone = small_engine(tokenizer, model, kv=own, any_format=mixed, prefix_sharing=False)
    want = scored_beside(
        alone, {"reduce": False, "top": 3, "cache": cache} | ({"first": 20} if cache.scorer is not None else {}), 0
    )
    made = small_engine(tokenizer, model, kv=own, any_format=mixed, **what.get("engine", {}))
    for _ in range(what.get("before", 0)):
        scored_beside(made, {"cache": cache, "first": first}, 0)
    got = scored_beside(made, asked, what.get("mates", 0))
    begin = 20 if cache.scorer is not None else 1
    assert np.array_equal(got.logprobs, want.logprobs[first - begin :])
    assert np.array_equal(got.logsumexp, want.logsumexp[first - begin :])
    assert got.top == (want.top if "top" in asked else ())
    if asked.get("reduce", True):
        assert got.logits is None
    else:
        assert np.array_equal(got.logits, want.logits[first - begin :])
    happens = what.get("happens", "steps")
    hit = first > 16 and cache.scorer is None  # a row that is wanted is computed
    if (happens != "prefix_hit_tokens" or hit) and not (happens == "preemptions" and mixed):
        assert getattr(made.stats, happens) > 0
    assert (alone.stats.evictions > 0) == (cache.scorer is not None)


def test_a_text_without_a_prompt_has_no_event_at_its_end(tokenizer: Tokenizer) -> None:
    made = small_engine(tokenizer, "grouped heads")
    with pytest.raises(ParameterError, match="snapkv evicts at the prompt's length, and a text has none"):
        made.score_request(PROMPT, cache=cache_of("f16", "snapkv"))
