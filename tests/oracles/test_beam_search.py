"""Beam search against transformers' `generate`: sequences and scores, for every setting; in groups against the paper."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracles.random_models.folder import save_folder
from oracles.random_models.model import random_model, random_tokens
from oracles.random_models.shapes import SHAPES
from oracles.tables import TableModel, generate

import kvik
from kvik.decoding.beam import BeamSearch
from kvik.decoding.best import Best, best_rows_by_definition
from kvik.decoding.state import DecodingState
from kvik.params import BeamParams

pytestmark = pytest.mark.usefixtures("one_torch_thread")

TOKENS, VOCABULARY = 64, 50
PROMPT = [5, 6, 7, 5, 6]
BEAMS = (2, 4, 8)
ENDS: list[tuple[tuple[int, ...], float]] = [((3,), 2.5), ((3, 9, 21), 1.5), ((), 0.0)]
LENGTHS = (0.0, 1.0, -1.0, 2.0)
STOPPING = (True, False, "never")
MORE: dict[str, dict[str, Any]] = {
    "min_tokens": {"min_tokens": 20},
    "n-grams": {"no_repeat_ngram_size": 2},
    "single tokens": {"no_repeat_ngram_size": 1},  # until there are none: 45 of them
    "repetition": {"repetition_penalty": 1.4},
    "rewarded repetition": {"repetition_penalty": 0.8},
    "few answers": {"num_return_sequences": 2},
    "all at once": {"min_tokens": 7, "no_repeat_ngram_size": 3, "repetition_penalty": 1.2},
}

Answers = list[tuple[list[int], float]]


def ours(model: TableModel, ends: tuple[int, ...], params: BeamParams) -> Answers:
    """The search by itself, with the states of its beams and the definition of the best rows."""
    assert params.max_tokens is not None
    search = BeamSearch(params, params.max_tokens, len(ends))
    beams = [list(PROMPT)]
    states = [DecodingState(params, PROMPT, VOCABULARY, end_ids=ends)]
    while not search.done:
        rows = np.stack([model.row(beam) for beam in beams])
        best = best_rows_by_definition(rows, [state.edits() for state in states], min(search.wanted, VOCABULARY))
        count = len(search.beams) // len(beams)
        found = Best(*(np.repeat(of, count, 0) for of in best))
        chosen = search.step(found, lambda beam, token: token in ends)
        states = [states[one.parent // count].fork() for one in chosen]
        beams = [[*beams[one.parent // count], one.node.token] for one in chosen]
        for state, one in zip(states, chosen, strict=True):
            state.accept(one.node.token)
    return [([node.token for node in one.node.path()], one.score) for one in search.best()]


def theirs(model: Any, prompt: list[int], ends: tuple[int, ...], params: BeamParams) -> Answers:
    """The same settings by transformers' names."""
    given: dict[str, Any] = {
        "num_beams": params.num_beams, "num_return_sequences": params.num_return_sequences,
        "max_new_tokens": params.max_tokens, "length_penalty": params.length_penalty,
        "early_stopping": params.early_stopping,
    }  # fmt: skip
    if params.min_tokens:
        given["min_new_tokens"] = params.min_tokens
    if params.no_repeat_ngram_size:
        given["no_repeat_ngram_size"] = params.no_repeat_ngram_size
    if params.repetition_penalty != 1.0:
        given["repetition_penalty"] = params.repetition_penalty
    return generate(model, prompt, ends, **given)


def assert_equal(ours: Answers, theirs: Answers, tolerance: float) -> None:
    assert [tokens for tokens, _ in ours] == [tokens for tokens, _ in theirs]
    assert [score for _, score in ours] == pytest.approx([score for _, score in theirs], rel=tolerance, abs=tolerance)


@pytest.mark.parametrize("beams", BEAMS)
@pytest.mark.parametrize("ends", ENDS, ids=str)
def test_the_search_by_itself(beams: int, ends: tuple[tuple[int, ...], float]) -> None:
    lengths = set()
    for seed, penalty, stopping in itertools.product(range(2), LENGTHS, STOPPING):
        model = TableModel(VOCABULARY, seed, *ends)
        params = BeamParams(
            num_beams=beams,
            num_return_sequences=beams,
            max_tokens=TOKENS,
            length_penalty=penalty,
            early_stopping=stopping,
        )
        answers = ours(model, ends[0], params)
        assert_equal(answers, theirs(model, PROMPT, ends[0], params), 1e-5)
        lengths |= {len(tokens) for tokens, _ in answers}
    assert lengths == {TOKENS} if not ends[0] else len(lengths) > 3  # ends are reached, early and late


@pytest.mark.parametrize("beams", BEAMS)
@pytest.mark.parametrize("more", MORE)
def test_further_settings(beams: int, more: str) -> None:
    for seed, (ends, rise), stopping in itertools.product(range(2), ENDS[:2], STOPPING):
        model = TableModel(VOCABULARY, 10 + seed, ends, rise)
        tokens = 30 if more == "single tokens" else TOKENS
        params = BeamParams(num_beams=beams, max_tokens=tokens, early_stopping=stopping, **MORE[more])
        assert_equal(ours(model, ends, params), theirs(model, PROMPT, ends, params), 1e-5)


# ---- through the engine


@pytest.fixture(scope="module", params=["untied", "window"])
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, kvik.LLM]]:
    """A random model in transformers and in Kvik, in float32. Some tokens that end are made likely."""
    model = random_model(next(shape for shape in SHAPES if shape.name == request.param))
    with torch.no_grad():
        head = model.get_output_embeddings().weight
        if not model.config.tie_word_embeddings:
            head[ENGINE_ENDS[0]] += 0.6 * head.mean(0) + 0.6 * head[100]
            head[ENGINE_ENDS[1]] = 0.8 * head[200]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KVIK_HOME", str(tmp_path_factory.mktemp("store")))
        path: Path = save_folder(model, tmp_path_factory.mktemp("models") / "model")
        yield model, kvik.LLM(path, weights="f32", kv="f32", engine=kvik.EngineParams(threads=1, max_batch_tokens=48))


ENGINE_ENDS = (50, 70)
SETTINGS: list[dict[str, Any]] = [
    {"num_beams": 4},
    {"num_beams": 2, "early_stopping": True},
    {"num_beams": 8, "early_stopping": "never", "length_penalty": 2.0},
    {"num_beams": 4, "early_stopping": True, "length_penalty": -1.0, "min_tokens": 12},
    {"num_beams": 4, "length_penalty": 0.0, "no_repeat_ngram_size": 2, "early_stopping": "never"},
    {"num_beams": 8, "repetition_penalty": 1.3, "early_stopping": True},
    {"num_beams": 3, "repetition_penalty": 1.2, "no_repeat_ngram_size": 3, "min_tokens": 5},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_through_the_engine(both: tuple[Any, kvik.LLM], settings: dict[str, Any]) -> None:
    model, llm = both
    for seed in range(2):
        prompt = random_tokens(60, seed).tolist()
        params = BeamParams(
            num_return_sequences=settings["num_beams"], max_tokens=TOKENS, stop_token_ids=ENGINE_ENDS, ignore_eos=True,
            **settings,
        )  # fmt: skip
        (done,) = llm.generate([prompt], params)
        answers = [(list(choice.token_ids), choice.score) for choice in done.choices]
        assert_equal(answers, theirs(model, prompt, ENGINE_ENDS, params), 1e-4)  # type: ignore[arg-type]


def test_one_beam_is_greedy(both: tuple[Any, kvik.LLM]) -> None:
    _, llm = both
    prompt = random_tokens(60, 5).tolist()
    greedy, searched = llm.generate(
        [prompt, prompt],
        [kvik.SamplingParams(temperature=0.0, max_tokens=40), BeamParams(num_beams=1, max_tokens=40)],
    )
    assert searched.choices[0].token_ids == greedy.choices[0].token_ids
    assert searched.choices[0].cumulative_logprob == pytest.approx(greedy.choices[0].cumulative_logprob, abs=1e-4)


# ---- groups


def diverse(model: TableModel, ends: tuple[int, ...], params: BeamParams) -> Answers:
    """Algorithm 1 of Vijayakumar et al. 2018 with Hamming diversity, on whole sequences and whole vocabularies.

    In each step the groups go one after another; a group's log-probabilities are less by the penalty for every beam of
    the groups before it that has just taken the token. Each group finishes answers as a beam search by itself does.
    """
    groups, size = params.num_beam_groups, params.num_beams // params.num_beam_groups
    beams: list[list[tuple[list[int], float]]] = [[([], 0.0)] for _ in range(groups)]
    finished: list[Answers] = [[] for _ in range(groups)]
    for length in range(1, TOKENS + 1):
        taken = np.zeros(VOCABULARY)
        for g in range(groups):
            if not beams[g]:
                continue
            extended = []
            for tokens, total in beams[g]:
                row = model.row(PROMPT + tokens).astype(np.float64)
                logprobs = row - row.max() - np.log(np.exp(row - row.max()).sum()) - params.diversity_penalty * taken
                extended += [([*tokens, token], total + logprobs[token]) for token in range(VOCABULARY)]
            extended.sort(key=lambda one: -one[1])
            going = []
            for rank, (tokens, total) in enumerate(extended[: max(2, 1 + len(ends)) * size]):
                if tokens[-1] in ends or length == TOKENS:
                    if rank < size:
                        finished[g].append((tokens, total / length**params.length_penalty))
                elif len(going) < size:
                    going.append((tokens, total))
            finished[g] = sorted(finished[g], key=lambda one: -one[1])[:size]
            for tokens, _ in going:
                taken[tokens[-1]] += 1
            beams[g] = going
            if going and len(finished[g]) == size:
                hoped = TOKENS if params.early_stopping == "never" and params.length_penalty > 0 else length
                if params.early_stopping is True or going[0][1] / hoped**params.length_penalty <= finished[g][-1][1]:
                    beams[g] = []
    merged = sorted((one for group in finished for one in group), key=lambda one: -one[1])
    return merged[: params.num_return_sequences]


@pytest.mark.parametrize(("beams", "groups"), [(2, 2), (4, 2), (6, 3), (8, 4), (8, 2)])
@pytest.mark.parametrize("ends", ENDS, ids=str)
def test_groups(beams: int, groups: int, ends: tuple[tuple[int, ...], float]) -> None:
    for seed, penalty, stopping in itertools.product(range(2), (0.0, 0.5, 3.0), STOPPING):
        model = TableModel(VOCABULARY, 20 + seed, *ends)
        params = BeamParams(
            num_beams=beams, num_beam_groups=groups, diversity_penalty=penalty, num_return_sequences=beams,
            max_tokens=TOKENS, early_stopping=stopping,
        )  # fmt: skip
        assert_equal(ours(model, ends[0], params), diverse(model, ends[0], params), 1e-4)


def test_groups_say_different_things() -> None:
    model = TableModel(VOCABULARY, 30)
    firsts = []
    for penalty in (0.0, 5.0):
        params = BeamParams(
            num_beams=4, num_beam_groups=4, diversity_penalty=penalty, num_return_sequences=4, max_tokens=TOKENS
        )
        firsts.append({tuple(tokens) for tokens, _ in ours(model, (), params)})
    assert len(firsts[0]) == 1 and len(firsts[1]) == 4
