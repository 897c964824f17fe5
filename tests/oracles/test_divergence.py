"""Divergence and LongPPL of small random models, against PyTorch on transformers' models."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import tokenizers
import torch
from oracles.random_models import vocabulary
from oracles.random_models.folder import save_folder
from oracles.random_models.model import random_model
from oracles.random_models.shapes import SHAPES

import kvik
from kvik.evaluation.divergence import divergence
from kvik.evaluation.longppl import longppl
from kvik.evaluation.perplexity import perplexity
from kvik.evaluation.rows import compare_rows

pytestmark = pytest.mark.usefixtures("one_torch_thread")

SHAPE = next(shape for shape in SHAPES if shape.name == "untied")
WORDS = ["the", "thin", "one", "her", "in", "an", "error", "on", "there", "hint", "Ångström", "中文", "🥪"]
TEXTS = [" ".join(random.Random(seed).choices(WORDS, k=count)) for seed, count in ((1, 60), (2, 9), (3, 30))]


class Loaded(NamedTuple):
    """folder: of the checkpoint; model: transformers'."""

    folder: Path
    model: Any

    def llm(self, **settings: Any) -> Any:
        return kvik.LLM(
            self.folder, **{"weights": "f32", "kv": "f32", "engine": kvik.EngineParams(threads=2), **settings}
        )


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loaded]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KVIK_HOME", str(tmp_path_factory.mktemp("store")))
        model = random_model(SHAPE)
        yield Loaded(save_folder(model, tmp_path_factory.mktemp("models") / "model"), model)


@pytest.fixture(scope="module")
def llm(loaded: Loaded) -> Any:
    return loaded.llm()


@pytest.fixture(scope="module")
def other(loaded: Loaded, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    """The same weights less some noise, and a tokenizer of the same vocabulary that never merges."""
    model = random_model(SHAPE)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator) * 0.1 * weight.std())
    folder = save_folder(model, tmp_path_factory.mktemp("models") / "other")
    made = tokenizers.Tokenizer(tokenizers.models.BPE({t: i for i, t in enumerate(vocabulary.tokens())}, []))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens([tokenizers.AddedToken(token, special=True) for token in vocabulary.SPECIAL])
    made.save(str(folder / "tokenizer.json"))
    return Loaded(folder, model)


def log_distributions(model: Any, ids: list[int]) -> torch.Tensor:
    return _log_distributions(model, tuple(ids))


@cache
def _log_distributions(model: Any, ids: tuple[int, ...]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].double().log_softmax(-1)


def test_divergence_is_pytorch_s(loaded: Loaded, other: Loaded, llm: Any) -> None:
    found = divergence(other.llm(), llm, TEXTS, window=64)
    kl, same, nll, reference_nll = [], [], [], []
    for text in TEXTS:
        ids = llm.tokenizer.encode(text)
        for start in range(0, len(ids) - 1, 63):
            part = ids[start : start + 64]
            p, q = (log_distributions(each.model, part)[:-1] for each in (loaded, other))
            kl.append(torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1))
            same.append(p.argmax(-1) == q.argmax(-1))
            rows = torch.arange(len(part) - 1)
            reference_nll.append(-p[rows, part[1:]])
            nll.append(-q[rows, part[1:]])
    wanted = torch.cat(kl)
    assert found.tokens == len(wanted) and 0.001 < found.kl_mean < 10
    assert found.kl_mean == pytest.approx(float(wanted.mean()), rel=1e-4)
    assert found.kl_median == pytest.approx(float(wanted.median()), rel=0.02)
    assert found.kl_p99 == pytest.approx(float(wanted.quantile(0.99)), rel=1e-3)
    assert found.kl_max == pytest.approx(float(wanted.max()), rel=1e-3)
    assert abs(found.same_top - float(torch.cat(same).double().mean())) <= 2 / len(wanted)  # ties within rounding
    assert found.perplexity == pytest.approx(math.exp(torch.cat(nll).mean()), rel=1e-4)
    assert found.reference_perplexity == pytest.approx(math.exp(torch.cat(reference_nll).mean()), rel=1e-4)


def test_the_same_windows_as_perplexity(other: Loaded, llm: Any) -> None:
    model = other.llm()
    found = divergence(model, llm, TEXTS, window=50, stride=20)
    one, base = perplexity(llm, TEXTS, window=50, stride=20), divergence(llm, llm, TEXTS, window=50, stride=20)
    assert found.tokens == one.predictions
    assert found.reference_perplexity == base.perplexity == pytest.approx(one.token_perplexity, rel=1e-6)


def test_two_loads_of_one_model_are_the_same(loaded: Loaded, llm: Any) -> None:
    for settings in ({}, {"engine": kvik.EngineParams(threads=1, max_batch_tokens=37)}):
        found = divergence(loaded.llm(**settings), llm, TEXTS, window=100)
        assert (found.kl_mean, found.kl_max, found.same_top, found.perplexity_ratio) == (0, 0, 1, 1)


@pytest.mark.parametrize(
    "settings", [{"weights": "int8"}, {"kv": "f16"}, {"executor": "torch"}, {"weights": "bf16"}], ids=str
)
def test_any_two_settings(loaded: Loaded, llm: Any, settings: dict[str, str]) -> None:
    model = loaded.llm(**settings)
    found = divergence(model, llm, TEXTS[0])
    assert 0 < found.kl_mean < 0.05 and found.same_top > 0.8
    wanted = divergence(model, llm, TEXTS[0], compare=compare_rows)
    assert found.kl_mean == pytest.approx(wanted.kl_mean, rel=1e-6, abs=1e-12)
    assert [flip[:-1] for flip in found.flipped] == [flip[:-1] for flip in wanted.flipped]


def plain_longppl(
    model: Any, ids: list[int], spans: Any, judge: Any, judge_ids: list[int], judge_spans: Any,
    alpha: float, beta: float, window: int, stride: int,
) -> tuple[list[float], list[float]]:  # fmt: skip
    """The nll of key tokens and of all tokens of a text: a judged token at a time, spans in characters."""
    long = log_distributions(judge, judge_ids)
    characters: set[int] = set()
    for at in range(window, len(judge_ids)):
        begin = (at - window) // stride * stride
        with_all = float(long[at - 1, judge_ids[at]])
        if (
            with_all
            - float(log_distributions(judge, judge_ids[begin : begin + window + stride])[at - begin - 1, judge_ids[at]])
            > alpha
            and with_all > beta
        ):
            characters |= set(range(*judge_spans[at]))
    own = log_distributions(model, ids)
    every = [-float(own[at - 1, ids[at]]) for at in range(1, len(ids))]
    return [nll for nll, span in zip(every, spans[1:], strict=True) if set(range(*span)) <= characters], every


@pytest.mark.parametrize(("window", "stride"), [(24, 16), (40, 100)])
@pytest.mark.parametrize("evaluator", ["itself", "same tokens", "other tokens"])
def test_longppl_is_a_plain_reimplementation(
    loaded: Loaded, other: Loaded, llm: Any, evaluator: str, window: int, stride: int
) -> None:
    alpha, beta = 0.5, -6.0
    judge = {"itself": llm, "same tokens": loaded.llm(), "other tokens": other.llm()}[evaluator]
    judge_loaded = other if evaluator == "other tokens" else loaded
    encode, judge_encode = (
        tokenizers.Tokenizer.from_file(str(each.folder / "tokenizer.json")).encode for each in (loaded, judge_loaded)
    )
    keys, every = [], []
    for text in TEXTS:
        own, theirs = encode(text), judge_encode(text)
        found_keys, found = plain_longppl(
            loaded.model,
            own.ids,
            own.offsets,
            judge_loaded.model,
            theirs.ids,
            theirs.offsets,
            alpha,
            beta,
            window,
            stride,
        )
        keys += found_keys
        every += found
    found = longppl(llm, judge, TEXTS, alpha=alpha, beta=beta, window=window, stride=stride)
    assert 5 < len(keys) < len(every) / 2
    assert (found.key_tokens, found.tokens) == (len(keys), len(every))
    assert found.value == pytest.approx(math.exp(np.mean(keys)), rel=1e-4)
    assert found.perplexity == pytest.approx(math.exp(np.mean(every)), rel=1e-4)
    assert [key.nll for key in found.keys] == pytest.approx(keys, abs=1e-3)
