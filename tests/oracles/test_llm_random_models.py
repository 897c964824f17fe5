"""Random models of every family through the public API, on both executors and from both kinds of file, against
transformers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from oracles.random_models.folder import save_folder
from oracles.random_models.gguf_file import write_gguf
from oracles.random_models.model import (
    KINDS,
    SHARPNESS,
    oracle_logits,
    random_model,
    random_tokens,
    relative_error,
    sharpness,
)
from oracles.random_models.quantize import FILE_TYPES, Rounding, quantize_model
from oracles.random_models.shapes import SHAPES, Shape, wide
from safetensors.numpy import load_file, save_file

import kvik

EXECUTORS = ("native", "torch")
TOLERANCE = 1e-4
TOKENS = 150
IN_GGUF = [shape for shape in SHAPES if shape.in_gguf]
ONE_OF_EACH_KIND = list({shape.kind: shape for shape in reversed(SHAPES)}.values())
QUANTIZED = [name for name in FILE_TYPES if name.startswith("Q")]
DIAGONAL = [(kind, file_type) for i, kind in enumerate(KINDS) for file_type in list(FILE_TYPES)[i :: len(KINDS)]]


@pytest.fixture(scope="module", autouse=True)
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Packed weights go to a folder of this module's own. The torch executor sets PyTorch's threads for good."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KVIK_HOME", str(tmp_path_factory.mktemp("store")))
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


class Rounded(NamedTuple):
    model: Any
    rounding: Rounding


@cache
def model_of(shape: Shape, file_type: str = "F32") -> Rounded:
    model = random_model(shape)
    return Rounded(model, quantize_model(model, file_type))


def gguf_of(folder: Path, shape: Shape, file_type: str = "F32") -> Path:
    path = folder / f"{shape}.{file_type}.gguf"
    return (
        path
        if path.exists()
        else write_gguf(model_of(shape, file_type).model, path, model_of(shape, file_type).rounding)
    )


def hub_of(folder: Path, shape: Shape) -> Path:
    path = folder / f"{shape}"
    return path if path.exists() else save_folder(model_of(shape).model, path)


def open_llm(path: Path, executor: str, *, max_batch_tokens: int = 512, weights: str = "f32", kv: str = "f32") -> Any:
    threads = 2 if executor == "native" else 1  # models this small lose more than they gain from PyTorch's second
    engine = kvik.EngineParams(threads=threads, max_batch_tokens=max_batch_tokens)
    return kvik.LLM(path, weights=weights, kv=kv, executor=executor, engine=engine)


def logits_of(llm: Any, ids: Any) -> Any:
    return llm.score([ids.tolist()], reduce=False)[0].logits


def check_logits(path: Path, shape: Shape, executor: str, chunks: tuple[int, ...]) -> None:
    """A prompt at once, in chunks that end anywhere in a block, and one token at a time."""
    model, ids = model_of(shape).model, random_tokens(TOKENS, shape.seed + 100)
    assert sharpness(model, shape.seed) >= SHARPNESS
    assert shape.window is None or 2 * shape.window < TOKENS
    oracle = oracle_logits(model, ids)
    for max_batch_tokens in chunks:
        llm = open_llm(path, executor, max_batch_tokens=max_batch_tokens)
        assert relative_error(logits_of(llm, ids), oracle) <= TOLERANCE, max_batch_tokens


@pytest.mark.parametrize("shape", IN_GGUF, ids=str)
def test_gguf_files_on_the_native_executor(shape: Shape, folder: Path) -> None:
    check_logits(gguf_of(folder, shape), shape, "native", (512, 37, 1))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_folders_on_the_native_executor(shape: Shape, folder: Path) -> None:
    check_logits(hub_of(folder, shape), shape, "native", (512,) if shape.in_gguf else (512, 37, 1))


@pytest.mark.parametrize("shape", ONE_OF_EACH_KIND, ids=str)
def test_gguf_files_on_the_torch_executor(shape: Shape, folder: Path) -> None:
    check_logits(gguf_of(folder, shape), shape, "torch", (512,))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_folders_on_the_torch_executor(shape: Shape, folder: Path) -> None:
    check_logits(hub_of(folder, shape), shape, "torch", (37,))


@pytest.mark.slow
@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_both_kinds_of_file_in_every_way(shape: Shape, executor: str, folder: Path) -> None:
    check_logits(hub_of(folder, shape), shape, executor, (512, 37, 1))
    if shape.in_gguf:
        check_logits(gguf_of(folder, shape), shape, executor, (512, 37, 1))


def check_file_type(folder: Path, kind: str, file_type: str, executor: str) -> None:
    shape, ids = wide(kind), random_tokens(60, 7)
    oracle = oracle_logits(model_of(shape, file_type).model, ids)
    llm = open_llm(gguf_of(folder, shape, file_type), executor)
    assert relative_error(logits_of(llm, ids), oracle) <= TOLERANCE


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize(("kind", "file_type"), DIAGONAL)
def test_file_types_are_read_exactly(kind: str, file_type: str, executor: str, folder: Path) -> None:
    check_file_type(folder, kind, file_type, executor)


@pytest.mark.slow
@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("file_type", FILE_TYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_family_in_every_file_type(kind: str, file_type: str, executor: str, folder: Path) -> None:
    check_file_type(folder, kind, file_type, executor)


@pytest.mark.parametrize(
    ("shape", "executor"), [(s, "native") for s in SHAPES] + [(s, "torch") for s in ONE_OF_EACH_KIND], ids=str
)
def test_greedy_generation(shape: Shape, executor: str, folder: Path) -> None:
    """Each token is the oracle's best (within the tolerance), past the window, with its log-probability."""
    model, prompt = model_of(shape).model, random_tokens(50, shape.seed + 200)
    llm = open_llm(gguf_of(folder, shape) if shape.in_gguf else hub_of(folder, shape), executor)
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


def test_a_checkpoint_without_its_head_s_prefix(tmp_path: Path) -> None:
    """As GPT-2's on the hub: names without the model's, and the masks that old versions saved."""
    shape = next(s for s in SHAPES if s.name == "gpt2")
    path, ids = save_folder(model_of(shape).model, tmp_path / "gpt2"), random_tokens(40, 12)
    bare = {name.removeprefix("transformer."): w for name, w in load_file(path / "model.safetensors").items()}
    bare["h.0.attn.bias"] = np.ones((1, 1, 8, 8), np.float32)
    save_file(bare, path / "model.safetensors")
    logits = logits_of(open_llm(path, "native"), ids)
    assert relative_error(logits, oracle_logits(model_of(shape).model, ids)) <= TOLERANCE


def test_the_text_model_of_a_multimodal_gemma3(tmp_path: Path) -> None:
    shape = next(s for s in SHAPES if s.name == "gemma3-linear")
    path, ids = save_folder(model_of(shape).model, tmp_path / "gemma3"), random_tokens(80, 13)
    whole = {"language_model." + name: w for name, w in load_file(path / "model.safetensors").items()}
    whole["vision_tower.embeddings.patch_embedding.bias"] = np.ones(8, np.float32)
    save_file(whole, path / "model.safetensors")
    text = json.loads((path / "config.json").read_text())
    architecture = {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": text, "vision_config": {}}
    (path / "config.json").write_text(json.dumps(architecture))
    logits = logits_of(open_llm(path, "native"), ids)
    assert relative_error(logits, oracle_logits(model_of(shape).model, ids)) <= TOLERANCE


def test_both_kinds_of_file_read_text_alike(folder: Path) -> None:
    shape, text = SHAPES[0], "then on the other hand, 3 <|im_end|>?"
    ids = [
        list(open_llm(path, "native").generate([text], kvik.SamplingParams(max_tokens=1))[0].prompt_tokens)
        for path in (gguf_of(folder, shape), hub_of(folder, shape))
    ]
    assert ids[0] == ids[1]
    assert max(ids[0]) > 257 and len(ids[0]) < len(text)  # merges are made


@pytest.mark.parametrize(
    ("kind", "file_type"),
    [("llama", file_type) for file_type in QUANTIZED] + [("qwen2", "Q4_K"), ("gemma3", "Q6_K"), ("gpt2", "Q5_K")],
)
def test_executors_agree_on_integer_layouts(kind: str, file_type: str, folder: Path) -> None:
    """With int8 activations both executors round alike; what differs is the order of float sums."""
    shape, ids = wide(kind), random_tokens(100, 11)
    path = gguf_of(folder, shape, file_type)
    native, definition = (logits_of(open_llm(path, executor, weights="auto"), ids) for executor in EXECUTORS)
    oracle = oracle_logits(model_of(shape, file_type).model, ids)
    rounding = float(np.square(definition - oracle).mean() ** 0.5)
    assert float(np.square(native - definition).mean() ** 0.5) < 0.4 * rounding
    assert 1e-3 < rounding / float(np.square(oracle).mean() ** 0.5) < 0.05
