"""Random Llama and Mistral models through the public API, on both executors, against transformers."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracles.random_models import (
    FILE_TYPES,
    SHAPES,
    SHARPNESS,
    Shape,
    oracle_logits,
    quantize_model,
    random_model,
    random_tokens,
    sharpness,
    write_gguf,
)

import kvik

EXECUTORS = ("native", "torch")
TOLERANCE = 1e-4
TOKENS = 150


@pytest.fixture(scope="module", autouse=True)
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Packed weights go to a folder of this module's own. The torch executor sets PyTorch's threads for good."""
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KVIK_HOME", str(tmp_path_factory.mktemp("store")))
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@cache
def model_of(shape: Shape, file_type: str = "F32") -> Any:
    model = random_model(shape)
    quantize_model(model, file_type)
    return model


def file_of(folder: Path, shape: Shape, file_type: str = "F32") -> Path:
    path = folder / f"{shape}.{file_type}.gguf"
    if not path.exists():
        write_gguf(model_of(shape, file_type), path, file_type)
    return path


def open_llm(path: Path, executor: str, *, max_batch_tokens: int = 512, weights: str = "f32", kv: str = "f32") -> Any:
    threads = 2 if executor == "native" else 1  # models this small lose more than they gain from PyTorch's second
    engine = kvik.EngineParams(threads=threads, max_batch_tokens=max_batch_tokens)
    return kvik.LLM(path, weights=weights, kv=kv, executor=executor, engine=engine)


def logits_of(llm: Any, ids: Any) -> Any:
    return llm.score([ids.tolist()], return_logits=True)[0].logits


def relative_error(ours: Any, oracle: Any) -> float:
    assert ours.shape == oracle.shape
    return float(np.abs(ours - oracle).max() / np.abs(oracle).max())


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_prefill_and_decode_logits(shape: Shape, executor: str, folder: Path) -> None:
    """A prompt at once, in chunks that end anywhere in a block, and one token at a time."""
    model, ids = model_of(shape), random_tokens(TOKENS, shape.seed + 100)
    assert sharpness(model, shape.seed) >= SHARPNESS
    assert shape.window is None or 2 * shape.window < TOKENS
    oracle = oracle_logits(model, ids)
    for max_batch_tokens in (512, 37, 1):
        llm = open_llm(file_of(folder, shape), executor, max_batch_tokens=max_batch_tokens)
        assert relative_error(logits_of(llm, ids), oracle) <= TOLERANCE, max_batch_tokens


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("file_type", [t for t in FILE_TYPES if t != "F32"])
def test_file_types_are_read_exactly(file_type: str, executor: str, folder: Path) -> None:
    shape, ids = SHAPES[0], random_tokens(60, 7)
    oracle = oracle_logits(model_of(shape, file_type), ids)
    llm = open_llm(file_of(folder, shape, file_type), executor)
    assert relative_error(logits_of(llm, ids), oracle) <= TOLERANCE


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_greedy_generation(shape: Shape, executor: str, folder: Path) -> None:
    """Each token is the oracle's best (within the tolerance), past the window, with its log-probability."""
    model, prompt = model_of(shape), random_tokens(50, shape.seed + 200)
    llm = open_llm(file_of(folder, shape), executor)
    params = kvik.SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True, logprobs=0)
    done = llm.generate([prompt.tolist()], params)[0]
    choice = done.choices[0]
    assert list(done.prompt_tokens) == prompt.tolist()
    assert len(choice.token_ids) == 40 and choice.finish_reason == "length"
    logits = oracle_logits(model, np.concatenate([prompt, choice.token_ids]).astype(np.int32))[len(prompt) - 1 : -1]
    chosen = logits[np.arange(40), choice.token_ids]
    scale = float(np.abs(logits).max())
    assert (logits.max(-1) - chosen <= 2 * TOLERANCE * scale).all()
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    logprobs = shifted[np.arange(40), choice.token_ids] - np.log(np.exp(shifted).sum(-1))
    assert choice.cumulative_logprob == pytest.approx(float(logprobs.sum()), abs=40 * 2 * TOLERANCE * scale)


@pytest.mark.parametrize("file_type", ["Q4_0", "Q4_1", "Q8_0"])
def test_executors_agree_on_integer_layouts(file_type: str, folder: Path) -> None:
    """With int8 activations both executors round alike; what differs is the order of float sums."""
    shape, ids = SHAPES[0], random_tokens(100, 11)
    path = file_of(folder, shape, file_type)
    native, definition = (logits_of(open_llm(path, executor, weights="auto"), ids) for executor in EXECUTORS)
    oracle = oracle_logits(model_of(shape, file_type), ids)
    rounding = relative_error(definition, oracle)
    assert relative_error(native, definition) < 0.5 * rounding
    assert rounding < 0.1
