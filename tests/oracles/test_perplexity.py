"""Perplexity in windows against transformers, and against the log-probabilities of `LLM.score`."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from oracles.random_models.folder import save_folder
from oracles.random_models.model import random_model
from oracles.random_models.shapes import SHAPES

import kvik
from kvik.evaluation.perplexity import difference, perplexity

pytestmark = pytest.mark.usefixtures("one_torch_thread")

SHAPE = next(shape for shape in SHAPES if shape.name == "untied")
WORDS = ["the", "thin", "one", "her", "in", "an", "error", "on there", "hint", "Ångström", "中文", "🥪"]
TEXTS = [" ".join(random.Random(seed).choices(WORDS, k=count)) for seed, count in ((1, 150), (2, 9), (3, 60))]


@pytest.fixture(scope="module")
def model() -> Any:
    return random_model(SHAPE)


@pytest.fixture(scope="module")
def llm(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KVIK_HOME", str(tmp_path_factory.mktemp("store")))
        path = save_folder(model, tmp_path_factory.mktemp("models") / "model")
        yield kvik.LLM(path, weights="f32", kv="f32", engine=kvik.EngineParams(threads=2))


def losses_of(model: Any, ids: list[int], window: int, stride: int) -> list[float]:
    """One text, one window after another: each predicts what the ones before it did not."""
    found: list[float] = []
    done = 1
    for begin in range(0, len(ids), stride):
        part = torch.tensor([ids[begin : begin + window]])
        with torch.no_grad():
            logits = model(part).logits[0].double()
        losses = torch.nn.functional.cross_entropy(logits[:-1], part[0, 1:], reduction="none").tolist()
        end = begin + part.shape[1]
        found += losses[len(losses) - (end - done) :] if end > done else []
        done = max(done, end)
        if end == len(ids):
            return found
    raise AssertionError("no window reaches the end")


@pytest.mark.parametrize(("window", "stride"), [(64, 63), (64, 32), (100, 7)])
def test_sliding_windows_are_those_of_transformers(model: Any, llm: Any, window: int, stride: int) -> None:
    losses = [
        loss for text in TEXTS for loss in losses_of(model, llm.tokenizer.encode(text), window, stride)
    ]  # fmt: skip
    found = perplexity(llm, TEXTS, window=window, stride=stride)
    assert found.predictions == len(losses) == sum(len(llm.tokenizer.encode(text)) - 1 for text in TEXTS)
    assert found.nll == pytest.approx(np.mean(losses), rel=1e-5)
    assert found.token_perplexity == pytest.approx(math.exp(np.mean(losses)), rel=1e-5)
    assert found.byte_perplexity == pytest.approx(math.exp(sum(losses) / found.bytes), rel=1e-5)


def test_one_window_is_the_text_as_it_is_scored(llm: Any) -> None:
    ids = llm.tokenizer.encode(TEXTS[1])
    (scored,) = llm.score([ids])
    found = perplexity(llm, TEXTS[1])
    assert found.window == 512 and found.predictions == len(ids) - 1
    assert found.token_perplexity == pytest.approx(math.exp(-scored.logprobs.mean()), rel=1e-12)


def test_the_same_whatever_runs_beside_it(llm: Any) -> None:
    """Grouping and batching change nothing, so that a difference of a model to itself is 0."""
    alone = [perplexity(llm, [text], window=50) for text in TEXTS]
    together = perplexity(llm, TEXTS, window=50)
    assert math.fsum(p.nll * p.predictions for p in alone) / together.predictions == pytest.approx(
        together.nll, rel=1e-13
    )
    again = perplexity(llm, TEXTS, window=50)
    assert again == together and difference(again, together).bits_per_byte.value == 0
