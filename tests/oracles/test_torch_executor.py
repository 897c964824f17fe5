"""The definition of the ops against transformers on random models."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from native.tiny import cache_layout
from oracles.random_models.model import (
    SHARPNESS,
    oracle_logits,
    random_model,
    random_tokens,
    relative_error,
    sharpness,
)
from oracles.random_models.shapes import DEFAULT_ROPE, SHAPES, VOCAB, Shape
from oracles.random_models.weights import config_of_model, kvik_weights

from kvik.errors import ParameterError
from kvik.models import MODELS
from kvik.models.config import ModelConfig, RopeConfig
from kvik.ops import Experts, Pass, Rounding
from kvik.ops.pages import ADDRESS_BYTES
from kvik.ops.torch_cache import TorchCache
from kvik.ops.torch_ops import TorchExecutor, TorchOps
from kvik.ops.torch_rounding import round_to_bf16, round_to_int8
from kvik.params import KVFormat

pytestmark = pytest.mark.usefixtures("one_torch_thread")

TOLERANCE = 1e-4
LENGTHS = (150, 61, 97)
DECODED = 12


@cache
def model_of(shape: Shape) -> Any:
    return random_model(shape)


@cache
def weights_of(shape: Shape) -> dict[str, Any]:
    return kvik_weights(model_of(shape))


def config_of(shape: Shape) -> ModelConfig:
    return config_of_model(model_of(shape))


def executor_of(
    shape: Shape, changes: dict[str, Any] | None = None, *, k: KVFormat = "f32", blocks: int = 32, **options: Any
) -> TorchExecutor[ModelConfig]:
    """With one layout, number 0, whose blocks lie one after another: see `make_pass`."""
    return build(replace(config_of(shape), **(changes or {})), weights_of(shape), k=k, blocks=blocks, **options)


def build(
    config: ModelConfig, weights: dict[str, Any], *, k: KVFormat = "f32", blocks: int = 32, **options: Any
) -> TorchExecutor[ModelConfig]:
    layout = cache_layout(config, k, k)
    kv_bytes = blocks * layout.units[0] * layout.full.share_bytes(config.head_size)
    executor = TorchExecutor(config, MODELS[config.family].forward, weights, kv_bytes=kv_bytes, **options)
    assert executor.register(layout) == 0
    return executor


def make_pass(
    config: ModelConfig, chunks: list[tuple[Any, int]], tables: list[Any], logit_rows: Any = None, k: KVFormat = "f32"
) -> Pass:
    """A pass of (tokens, first slot) per sequence, positions equal to slots. tables: numbers of blocks."""
    layout = cache_layout(config, k, k)
    steps = layout.units[0] * layout.full.share_bytes(config.head_size) // ADDRESS_BYTES
    spans = np.cumsum([0] + [len(tokens) for tokens, _ in chunks])
    slots = np.concatenate([np.arange(first, first + len(tokens)) for tokens, first in chunks])
    rows = np.arange(spans[-1]) if logit_rows is None else logit_rows
    fields = (
        np.concatenate([tokens for tokens, _ in chunks]),
        slots,
        slots,
        spans,
        np.zeros(len(chunks)),
        np.concatenate(tables) * steps,
        np.cumsum([0] + [len(table) for table in tables]),
        np.zeros(len(chunks)),
        rows,
    )
    return Pass(*(np.asarray(x, dtype=np.int32) for x in fields))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_prefill_in_chunks_then_decode_of_mixed_sequences(shape: Shape) -> None:
    """Three sequences of different length share each pass, in chunks of random size, over shuffled blocks."""
    model, executor = model_of(shape), executor_of(shape)
    assert sharpness(model, shape.seed) >= SHARPNESS
    rng = np.random.default_rng(shape.seed)
    sequences = [random_tokens(n, shape.seed + n) for n in LENGTHS]
    assert shape.window is None or max(LENGTHS) >= 2 * shape.window
    ids = rng.permutation(32)
    tables = np.split(ids[:21], [10, 14])  # 160, 64 and 112 slots
    done, got = [0] * 3, [[] for _ in sequences]  # type: list[int], list[list[Any]]
    while any(d < len(s) for d, s in zip(done, sequences, strict=True)):
        live = [i for i in rng.permutation(3) if done[i] < len(sequences[i])]
        chunks = []
        for i in live:
            prompt_left = len(sequences[i]) - DECODED - done[i]
            size = min(int(rng.integers(1, 50)), prompt_left) if prompt_left > 0 else 1
            chunks.append((sequences[i][done[i] : done[i] + size], done[i]))
        logits = executor.run(make_pass(config_of(shape), chunks, [tables[i] for i in live])).copy()
        for i, (chunk, _) in zip(live, chunks, strict=True):
            got[i].append(logits[: len(chunk)])
            logits = logits[len(chunk) :]
            done[i] += len(chunk)
    for tokens, parts in zip(sequences, got, strict=True):
        assert relative_error(np.concatenate(parts), oracle_logits(model, tokens)) <= TOLERANCE


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("window", {"windows": (25,) * 3}),
        ("yarn", {"rope": RopeConfig(DEFAULT_ROPE["rope_theta"])}),
        ("qwen2-late-windows", {"windows": (None,) * 3}),
        ("qwen3-late-windows", {"windows": (40,) * 3}),
        ("gemma3", {"windows": (32,) * 7}),
        ("gemma3", {"rope_local": None}),
        ("gemma3", {"embedding_scale": 1.0}),
        ("gemma3-linear", {"attention_scale": None}),
        ("gemma3-linear", {"rope": RopeConfig(1e6)}),
        ("mixtral", {"normalize_experts": False}),
        ("mixtral", {"experts_used": 3}),
        ("mixtral-window", {"windows": (34, 34)}),
        ("qwen3-moe", {"experts_used": 2}),
        ("qwen3-moe-unnormalized", {"normalize_experts": True}),
    ],
)  # fmt: skip
def test_every_feature_matters(name: str, changes: dict[str, Any]) -> None:
    """The models are sharp enough that leaving a feature out fails the tolerance by far."""
    shape = next(s for s in SHAPES if s.name == name)
    executor, tokens = executor_of(shape, changes, blocks=10), random_tokens(150, 3)
    logits = executor.run(make_pass(config_of(shape), [(tokens, 0)], [np.arange(10)]))
    assert relative_error(logits, oracle_logits(model_of(shape), tokens)) > 100 * TOLERANCE


@pytest.mark.parametrize("shape", [s for s in SHAPES if s.seed in (21, 24, 26, 28, 30, 32)], ids=str)
def test_every_tensor_matters(shape: Shape) -> None:
    """Each vector and matrix of the first layer and of the ends, had it other values, would be noticed."""
    weights, tokens = weights_of(shape), random_tokens(60, 3)
    config, oracle = config_of(shape), oracle_logits(model_of(shape), tokens)
    for name in weights:
        if name.startswith("layers.") and not name.startswith("layers.0."):
            continue
        if config.rope is None and name.endswith("k_bias"):  # adds the same to every score of a row
            continue
        changed = weights | {name: weights[name][::-1].copy()}
        executor = build(config, changed, blocks=4)
        logits = executor.run(make_pass(config, [(tokens, 0)], [np.arange(4)]))
        assert relative_error(logits, oracle) > 100 * TOLERANCE, name


def test_only_the_asked_rows_get_logits() -> None:
    executor, tokens = executor_of(SHAPES[0]), random_tokens(40, 1)
    everything = executor.run(make_pass(config_of(SHAPES[0]), [(tokens, 0)], [np.arange(3)])).copy()
    some = executor.run(make_pass(config_of(SHAPES[0]), [(tokens, 0)], [np.arange(3)], [7, 39]))
    assert some.shape == (2, VOCAB) and some.dtype == np.float32
    np.testing.assert_allclose(some, everything[[7, 39]], atol=1e-5)
    assert executor.run(make_pass(config_of(SHAPES[0]), [(tokens, 0)], [np.arange(3)], [])).shape == (0, VOCAB)


def test_positions_drive_rotation_and_slots_drive_memory() -> None:
    """Rotary attention is relative: the same slots at later positions give the same logits."""
    executor, tokens = executor_of(SHAPES[0]), random_tokens(40, 2)
    work = make_pass(config_of(SHAPES[0]), [(tokens, 0)], [np.arange(3)])
    plain = executor.run(work).copy()
    shifted = executor.run(work._replace(positions=work.positions + 200))
    assert relative_error(shifted, plain) <= TOLERANCE
    stretched = executor.run(work._replace(positions=work.positions * 2))
    assert relative_error(stretched, plain) > 100 * TOLERANCE


def test_round_to_int8_is_as_written_down() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(5, 96)).astype(np.float32) * 10.0 ** rng.integers(-6, 6, (5, 1)).astype(np.float32)
    x[2, 32:64] = 0.0
    got = round_to_int8(torch.from_numpy(x)).numpy().reshape(5, 3, 32)
    for row, group in np.ndindex(5, 3):
        values = x[row, 32 * group : 32 * group + 32]
        largest = np.abs(values).max()
        if largest == 0.0:
            assert (got[row, group] == 0.0).all()
            continue
        integers = np.rint(values * (np.float32(127.0) / largest))  # half to even
        assert np.abs(integers).max() == 127
        np.testing.assert_array_equal(got[row, group], integers * (largest / np.float32(127.0)))


def test_fine_rounding_adds_a_second_term() -> None:
    x = torch.from_numpy(np.random.default_rng(1).normal(size=(4, 64)).astype(np.float32))
    scale = x.reshape(4, 2, 32).abs().amax(-1, keepdim=True) / 127.0
    coarse, fine = (round_to_int8(x, fine=f) for f in (False, True))
    terms = ((fine - coarse).reshape(4, 2, 32) / scale * 256.0).numpy()
    np.testing.assert_allclose(terms, np.rint(terms), atol=2e-2)
    assert 100 < np.abs(terms).max() < 127.1
    errors = [float(((y - x).reshape(4, 2, 32) / scale).abs().max()) for y in (coarse, fine)]
    assert 0.4 < errors[0] <= 0.501 and errors[1] <= 1.501 / 256
    assert torch.equal(round_to_int8(torch.zeros(2, 32), fine=True), torch.zeros(2, 32))


def test_round_to_int8_halves_go_to_even() -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -2.5] + [0.0] * 26])
    assert round_to_int8(x)[0, :6].tolist() == [127.0, 0.0, 2.0, 2.0, 0.0, -2.0]


@pytest.mark.parametrize(("kind", "least", "most"), [("int8", 1e-4, 0.2), ("bf16", 1e-5, 0.05)])
def test_rounding_applies_to_the_named_weights_only(kind: Any, least: float, most: float) -> None:
    tokens = random_tokens(20, 5)
    work = make_pass(config_of(SHAPES[0]), [(tokens, 0)], [np.arange(2)])
    exact = executor_of(SHAPES[0]).run(work).copy()
    head = executor_of(SHAPES[0], rounding={"head": Rounding(kind, False)}).run(work).copy()
    every = [n for n, w in weights_of(SHAPES[0]).items() if w.ndim == 2 and n != "embed"]
    all_fine = executor_of(SHAPES[0], rounding=dict.fromkeys(every, Rounding(kind, True))).run(work).copy()
    all_rounded = executor_of(SHAPES[0], rounding=dict.fromkeys(every, Rounding(kind, False))).run(work)
    assert least < relative_error(head, exact) < relative_error(all_rounded, exact) < most
    assert 0.0 < relative_error(all_fine, exact) < 0.02 * relative_error(all_rounded, exact)


def test_round_to_bf16_keeps_eight_bits_and_finely_sixteen() -> None:
    x = torch.from_numpy(np.random.default_rng(2).normal(size=(4, 40)).astype(np.float32))
    coarse, fine = (round_to_bf16(x, fine=f) for f in (False, True))
    assert torch.equal(coarse, x.bfloat16().float())
    assert 2.0**-10 < float(((coarse - x) / x).abs().max()) <= 2.0**-8
    assert float(((fine - x) / x).abs().max()) <= 2.0**-16


def test_times_are_of_the_last_pass() -> None:
    executor = executor_of(SHAPES[0])
    assert executor.times() == (0.0, 0.0, 0.0)
    executor.run(make_pass(config_of(SHAPES[0]), [(random_tokens(20, 5), 0)], [np.arange(2)]))
    assert all(0.0 < seconds < 10.0 for seconds in executor.times())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": [VOCAB] * 20}, "tokens"),
        ({"tokens": [-1] * 20}, "tokens"),
        ({"blocks": [0, 32 << 10]}, "blocks"),
        ({"slots": range(13, 33)}, "slots of sequence 0"),
        ({"positions": [0]}, "positions"),
        ({"spans": [0, 19]}, "spans"),
        ({"spans": [0, 0, 20]}, "spans"),
        ({"block_spans": [0, 1]}, "block_spans"),
        ({"logit_rows": [20]}, "logit_rows"),
    ],
)
def test_a_pass_that_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    work = make_pass(config_of(SHAPES[0]), [(random_tokens(20, 5), 0)], [np.arange(2)])
    broken = work._replace(**{name: np.asarray(value, dtype=np.int32) for name, value in change.items()})
    with pytest.raises(ParameterError, match=message):
        executor_of(SHAPES[0]).run(broken)


def test_options_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ParameterError, match="nowhere"):
        executor_of(SHAPES[0], rounding={"nowhere": Rounding("bf16", False)})
    with pytest.raises(ParameterError, match="kv_bytes must be at least 64, got 0"):
        executor_of(SHAPES[0], blocks=0)


def test_positions_outside_the_learned_table_are_refused() -> None:
    shape = next(s for s in SHAPES if s.name == "gpt2-untied")
    work = make_pass(config_of(shape), [(random_tokens(20, 5), 0)], [np.arange(2)])
    executor_of(shape).run(work._replace(positions=work.positions + 160))
    for shift in (161, -1):
        with pytest.raises(ParameterError, match=r"positions must lie in \[0, 180\)"):
            executor_of(shape).run(work._replace(positions=work.positions + np.int32(shift)))


@pytest.mark.parametrize("normalize", [True, False])
def test_experts_are_as_written_down(normalize: bool) -> None:
    """Against a loop over rows and experts; equal scores go to the lower experts."""
    count, used, inner, width, rows = 5, 3, 6, 8, 7
    rng = np.random.default_rng(0)
    weights = {
        "gate": rng.normal(size=(count * inner, width)), "up": rng.normal(size=(count * inner, width)),
        "down": rng.normal(size=(count * width, inner)),
    }  # fmt: skip
    x, scores = rng.normal(size=(rows, width)), rng.normal(size=(rows, count))
    scores[2] = 0.0
    scores[3, 1:4] = scores[3].max() + 1.0
    experts = Experts("gate", "up", "down", count, used, normalize, "silu")
    tensors = {name: torch.from_numpy(w) for name, w in weights.items()}
    cache = TorchCache(config_of(SHAPES[0]), 1 << 20, torch.device("cpu"))
    cache.register(cache_layout(config_of(SHAPES[0])))
    ops = TorchOps(make_pass(config_of(SHAPES[0]), [([0] * rows, 0)], [[0]]), tensors, {}, cache)
    got = ops.experts(torch.from_numpy(x), torch.from_numpy(scores), experts).numpy()
    for t in range(rows):
        p = np.exp(scores[t]) / np.exp(scores[t]).sum()
        best = sorted(range(count), key=lambda e: (-scores[t, e], e))[:used]
        expected = np.zeros(width)
        for e in best:
            g, u = (weights[n][e * inner : (e + 1) * inner] @ x[t] for n in ("gate", "up"))
            down = weights["down"][e * width : (e + 1) * width]
            expected += p[e] / (p[best].sum() if normalize else 1.0) * (down @ (g / (1 + np.exp(-g)) * u))
        np.testing.assert_allclose(got[t], expected, rtol=1e-9, atol=1e-12)
    assert best != list(range(used))


def test_experts_no_row_uses_are_not_computed() -> None:
    shape = next(s for s in SHAPES if s.name == "mixtral")
    weights, tokens = weights_of(shape), random_tokens(1, 8)
    used = set()
    for expert in range(5):
        changed = dict(weights)
        inner = config_of(shape).intermediate_size
        spoilt = weights["layers.0.experts_gate"].copy()
        spoilt[expert * inner : (expert + 1) * inner] = np.nan
        changed["layers.0.experts_gate"] = spoilt
        executor = build(config_of(shape), changed, blocks=1)
        if np.isnan(executor.run(make_pass(config_of(shape), [(tokens, 0)], [np.arange(1)]))).any():
            used.add(expert)
    assert len(used) == 2
