"""The default model over more than 4,000 tokens of English against transformers on the dequantized weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracles.real_model import WINDOW, Comparison, Difference, RealModel, english, load_real_model
from transformers import LlamaForCausalLM

import kvik

LEAST_TOKENS = 4000
STARTS = (20_000, 50_000)

Logits = Callable[[list[int]], torch.Tensor]


@pytest.fixture(scope="session")
def real_model(default_model_gguf: Path) -> RealModel:
    return load_real_model(default_model_gguf)


@pytest.fixture(scope="session")
def reference(default_model_gguf: Path, real_model: RealModel) -> list[tuple[list[int], torch.Tensor]]:
    """Windows of token ids with their log-probabilities [T, V] in float32."""
    ids = kvik.LLM(default_model_gguf).tokenizer.encode(english())
    windows = [ids[start : start + WINDOW] for start in STARTS]
    assert sum(len(window) for window in windows) >= LEAST_TOKENS
    logits = logits_of(real_model.transformers(torch.float32))
    return [(window, logits(window).log_softmax(-1)) for window in windows]


def logits_of(model: LlamaForCausalLM) -> Logits:
    def compute(ids: list[int]) -> torch.Tensor:
        with torch.inference_mode():
            return model(torch.tensor([ids])).logits[0]

    return compute


def kvik_logits(path: Path, **options: Any) -> Logits:
    llm = kvik.LLM(path, **options)

    def compute(ids: list[int]) -> torch.Tensor:
        logits = llm.score([ids], reduce=False)[0].logits
        assert logits is not None
        return torch.tensor(np.asarray(logits))

    return compute


def compare(reference: list[tuple[list[int], torch.Tensor]], logits: Logits) -> Difference:
    comparison = Comparison()
    for ids, log_probabilities in reference:
        comparison.add(ids, log_probabilities, logits(ids))
    return comparison.result()


@pytest.fixture(scope="session")
def bf16(reference: Any, real_model: RealModel) -> Difference:
    """What transformers in bfloat16 loses."""
    return compare(reference, logits_of(real_model.transformers(torch.bfloat16)))


def test_f32_weights_agree_with_transformers(default_model_gguf: Path, reference: Any) -> None:
    got = compare(reference, kvik_logits(default_model_gguf, weights="f32", kv="f32"))
    assert got.agreement >= 0.999, got
    assert got.mean_kl <= 1e-6, got


def test_default_layout_is_as_good_as_bf16(default_model_gguf: Path, reference: Any, bf16: Difference) -> None:
    got = compare(reference, kvik_logits(default_model_gguf))
    assert abs(got.perplexity_ratio - 1.0) <= 0.005, got
    assert got.mean_kl <= 1.2 * bf16.mean_kl, (got, bf16)


def test_reference_reads_the_text_well(reference: Any, bf16: Difference) -> None:
    """Guards the comparison itself: wrong weights or ids would give a perplexity far above this text's 11 to 12."""
    assert 8.0 < bf16.reference_perplexity < 16.0
    assert 1e-4 < bf16.mean_kl < 1e-2


@pytest.mark.slow
def test_definition_agrees_with_transformers(default_model_gguf: Path, reference: Any) -> None:
    got = compare(reference, kvik_logits(default_model_gguf, weights="f32", kv="f32", executor="torch"))
    assert got.agreement >= 0.999 and got.mean_kl <= 1e-6, got


@pytest.mark.slow
def test_default_layout_of_the_definition_is_as_good(
    default_model_gguf: Path, reference: Any, bf16: Difference
) -> None:
    got = compare(reference, kvik_logits(default_model_gguf, executor="torch"))
    assert abs(got.perplexity_ratio - 1.0) <= 0.005, got
    assert got.mean_kl <= 1.2 * bf16.mean_kl, (got, bf16)
