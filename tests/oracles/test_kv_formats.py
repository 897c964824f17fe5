"""Formats of keys and values: the torch executor against what is written down, and the native one against it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from oracles.small_caches import Held, Space, pass_of

from kvik.errors import ParameterError
from kvik.models.config import ModelConfig
from kvik.ops import Observation, RopeTable
from kvik.ops.pages import CacheLayout, PageFormat, is_packed
from kvik.ops.torch_cache import TorchCache
from kvik.ops.torch_ops import TorchOps
from kvik.ops.torch_pages import FULL, code_keys, code_values, from_bytes, hadamard, to_bytes
from kvik.params import KV_FORMATS, KVFormat
from kvik.weights.layouts import Layout
from native import tiny

pytestmark = pytest.mark.usefixtures("one_torch_thread")

Array = np.ndarray[Any, Any]


# ---- numbers


def step(x: Array, scale: np.float16) -> Array:
    return np.zeros_like(x) if scale == 0 else np.rint(x / np.float32(scale))


def written_down(x: Array, kv: KVFormat, *, zero: bool) -> Array:
    """What a line of float32 (a channel of a group, or with `zero` a token) is read as."""
    if kv == "int8":
        scale = np.float16(np.abs(x).max() / np.float32(127))
        return np.clip(step(x, scale), -127, 127) * np.float32(scale)
    if not zero:
        minimum = np.float16(x.min())
        scale = np.float16((x.max() - np.float32(minimum)) / np.float32(15))
        return np.clip(step(x - np.float32(minimum), scale), 0, 15) * np.float32(scale) + np.float32(minimum)
    low, high = min(x.min(), np.float32(0)), max(x.max(), np.float32(0))
    scale = np.float16((high - low) / np.float32(15))
    middle = np.clip(step(-low[None], scale), 0, 15)
    return (np.clip(step(x, scale) + middle, 0, 15) - middle) * np.float32(scale)


def some_numbers(rng: np.random.Generator, tokens: int, size: int) -> Array:
    """Of very different sizes; whole channels and tokens of zeros, of one number, of one sign."""
    x = rng.normal(size=(tokens, size)) * 10.0 ** rng.integers(-3, 3, (tokens, 1)) * 10.0 ** rng.integers(-2, 2, size)
    x[:, 0], x[:, 1], x[:, 2], x[:, 3] = 0.0, 0.3, np.abs(x[:, 2]), -np.abs(x[:, 3])
    x[0], x[1], x[2], x[3] = 0.0, -7.25, np.abs(x[2]), -np.abs(x[3])
    return x.astype(np.float32)


@pytest.mark.parametrize("kv", ["int8", "int4"])
@pytest.mark.parametrize("tokens", [16, 64])
def test_integers_are_as_written_down(kv: KVFormat, tokens: int) -> None:
    x = some_numbers(np.random.default_rng(tokens), tokens, 24)
    keys, values = code_keys(torch.from_numpy(x), kv), code_values(torch.from_numpy(x), kv)
    low, high = (-127, 127) if kv == "int8" else (0, 15)
    for coded in (keys, values):
        assert coded.numbers.min() >= low and coded.numbers.max() <= high
    for channel in range(24):
        np.testing.assert_array_equal(keys.floats()[:, channel], written_down(x[:, channel], kv, zero=False))
    for token in range(tokens):
        np.testing.assert_array_equal(values.floats()[token], written_down(x[token], kv, zero=True))
    largest = np.abs(x).max(0) if kv == "int8" else np.ptp(x, 0) / 2
    steps = {"int8": 127, "int4": 7.5}[kv]
    error = np.abs(keys.floats().numpy() - x).max(0)
    assert (error <= 0.51 * largest / steps + 1e-3 * np.abs(x).max(0)).all()


@pytest.mark.parametrize("kv", KV_FORMATS)
@pytest.mark.parametrize("value", [0.0, 1.0, -3.5, 6e-8])
def test_constant_tensors_have_no_nan(kv: KVFormat, value: float) -> None:
    x = torch.full((2, 16, 8), value)
    for coded in (code_keys(x, kv), code_values(x, kv)):
        got = coded.floats()
        assert torch.isfinite(got).all()
        assert (got - x).abs().max() <= max(abs(value) / 250, 6e-8)


@pytest.mark.parametrize("size", [16, 64, 80, 128, 256])
def test_pages_have_the_bytes_the_formula_says(size: int) -> None:
    rng = np.random.default_rng(size)
    for k, v, tokens in product(KV_FORMATS, KV_FORMATS, (16, 128)):
        page = PageFormat(k, v, tokens)
        x, y = (torch.from_numpy(rng.normal(size=(2, 3, tokens, size)).astype(np.float32)) for _ in "kv")
        stored = code_keys(x, k), code_values(y, v)
        shares = to_bytes(page, *stored)
        assert shares.dtype == torch.uint8 and shares.shape == (2, 3, page.share_bytes(size))
        for got, put in zip(from_bytes(page, size, shares), stored, strict=True):
            for a, b in zip(got, put, strict=True):
                assert (a is None) == (b is None)
                assert a is None or (a.dtype == b.dtype and torch.equal(a, b))


def test_hadamard_is_its_own_inverse_and_flat() -> None:
    for size, width in ((16, 16), (80, 16), (96, 32), (128, 128), (6, 2)):
        eye = torch.eye(size)
        turned = hadamard(eye)
        blocks = np.kron(np.eye(size // width), np.full((width, width), width**-0.5))
        for got, expected in ((hadamard(turned), eye), (turned, turned.T), (turned.abs(), blocks)):
            np.testing.assert_allclose(got, expected, atol=1e-6)


# ---- attention


def rotated(x: Array, position: int, inv_freq: Array) -> Array:
    """x [..., D] in float64."""
    a, b = np.split(x.astype(np.float64), 2, -1)
    c, s = np.cos(position * inv_freq), np.sin(position * inv_freq)
    return np.concatenate((a * c - b * s, b * c + a * s), -1)


class Reference:
    """Attention row by row in float64 over one KV head, from the layout's words alone. keys, values: full numbers by slot."""

    def __init__(self, layout: CacheLayout, window: int | None, table: RopeTable | None) -> None:
        self.layout, self.table = layout, table
        self.window = (window or 0) or layout.window
        self.sinks = 0 if window else layout.sinks
        self.keys: list[Array] = []
        self.values: list[Array] = []
        self.groups: dict[int, tuple[Array, Array]] = {}

    def append(self, k: Array, v: Array) -> None:
        """k: rotated by position."""
        k = hadamard(torch.from_numpy(k)[None]).numpy()[0] if self.layout.rotate else k
        for x, kv, kept in ((k, self.layout.full.k, self.keys), (v, self.layout.full.v, self.values)):
            kept.append(torch.from_numpy(x).to(FULL[kv]).float().numpy())

    def packed(self, group: int) -> tuple[Array, Array]:
        """Keys and values of a group as its packed page gives them back."""
        page = self.layout.packed
        assert page is not None
        part = slice(group * page.tokens, (group + 1) * page.tokens)
        if group not in self.groups:
            keys, values = np.stack(self.keys[part]), np.stack(self.values[part])
            if is_packed(page.k):
                keys = np.stack([written_down(x, page.k, zero=False) for x in keys.T], -1)
            if is_packed(page.v):
                values = np.stack([written_down(x, page.v, zero=True) for x in values])
            self.groups[group] = keys, values
        return self.groups[group]

    def read(self, slot: int) -> tuple[Array, Array]:
        """Keys and values [n, D] as the row at the slot reads them."""
        keys, values = np.stack(self.keys[: slot + 1]), np.stack(self.values[: slot + 1])
        each = self.layout.packed.tokens if self.layout.packed else 0
        for j in range(self.layout.keep, self.layout.packed_end(slot)):
            keys[j], values[j] = (x[j % each] for x in self.packed(j // each))
        return keys, values

    def query(self, q: Array, position: int) -> Array:
        turned = q.astype(np.float64) if self.table is None else rotated(q, position, self.table.inv_freq)
        return hadamard(torch.from_numpy(turned)[None]).numpy()[0] if self.layout.rotate else turned

    def attend(self, q: Array, slot: int, scale: float) -> tuple[Array, Array]:
        """Of a query [D], not rotated: the sum [D] and the probabilities [n]."""
        keys, values = self.read(slot)
        scores = keys @ self.query(q, slot) * scale
        if self.window:
            scores[: max(0, slot + 1 - self.window)] = -np.inf
        far = self.query(q, min(slot, self.sinks + self.window - 1))
        scores[: self.sinks] = (keys @ far * scale)[: self.sinks]
        p = np.exp(scores - scores.max())
        return p / p.sum() @ values, p / p.sum()


LAYOUTS: dict[str, dict[str, Any]] = {
    "f32": {"k": "f32", "v": "f32"}, "f16": {}, "bf16": {"k": "bf16", "v": "f32"},
    "int8": {"k": "int8", "v": "int8", "group_size": 16, "keep": 16},
    "int4": {"k": "int4", "v": "int4", "group_size": 32, "rotate": True},
    "k8v4": {"k": "int8", "v": "int4", "group_size": 16},
    "k16v8": {"k": "f16", "v": "int8", "group_size": 64, "keep": 16},
    "k4v16": {"k": "int4", "v": "bf16", "group_size": 16, "by": "layer"},
    "by-head": {"k": "int4", "v": "int8", "group_size": 16, "by": "head", "keep": 32},
    "sinks": {"sinks": 3, "window": 20},
    "sinks-int8": {"k": "int8", "v": "int8", "group_size": 16, "keep": 16, "sinks": 5, "window": 50, "rotate": True},
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "window"),
    [*((name, None) for name in LAYOUTS), ("f16", 20), ("int8", 45), ("k8v4", 20), ("by-head", 45), ("sinks-int8", 45)],
)
def test_attention_is_as_written_down(name: str, window: int | None) -> None:
    """In chunks of random sizes; what is observed of probabilities and queries, too."""
    c = tiny.config(num_layers=2, num_heads=4, num_kv_heads=2, head_size=16)
    layout = tiny.cache_layout(c, **LAYOUTS[name])
    rng = np.random.default_rng(5)
    total, first, end = 130, 80, 120
    cache = TorchCache(c, 1 << 20, torch.device("cpu"))
    held = Held.of(Space(c), layout, cache.register(layout), total)
    table = RopeTable(100.0 ** -(np.arange(8) / 8))
    q, k, v = (rng.normal(size=(total, 2, heads * 16)).astype(np.float32) for heads in (4, 2, 2))
    sums, queries = np.zeros((2, 2, total), np.int64), np.zeros((2, end - first, 64), np.float32)
    observation = Observation(0, first, end, sums, queries)
    out, keys, at = np.zeros_like(q), np.zeros_like(k), 0
    while at < total:
        part = slice(at, at + int(rng.choice([1, 3, 40])))
        rows = len(q[part])
        ops = TorchOps(pass_of([(held, [0] * rows)], observations=[observation]), {}, {}, cache)
        for layer in range(2):
            x, y, z = (torch.from_numpy(a[part, layer].copy()) for a in (q, k, v))
            turned = ops.rope(y, 2, table)
            keys[part, layer] = turned
            out[part, layer] = ops.attend(ops.rope(x, 4, table), turned, z, layer, window, 0.5)
        at += rows
    errors = []
    for layer, head in np.ndindex(2, 2):
        reference, columns = Reference(layout, window, table), slice(head * 16, head * 16 + 16)
        for slot in range(total):
            reference.append(keys[slot, layer, columns], v[slot, layer, columns])
        expected_sums = np.zeros(total)
        for slot in [*range(0, first, 7), *range(first, total)]:
            for h in (2 * head, 2 * head + 1):
                mine = slice(h * 16, h * 16 + 16)
                expected, p = reference.attend(q[slot, layer, mine], slot, 0.5)
                errors.append(np.abs(out[slot, layer, mine] - expected).max())
                expected_sums[: slot + 1] += p * (first <= slot < end)
        np.testing.assert_allclose(sums[layer, head] / 2.0**24, expected_sums, atol=1e-3)
    # a number just between two that the format has may be rounded to either
    assert max(errors) < 1e-3 and np.mean(errors) < 1e-5
    np.testing.assert_array_equal(queries, q[first:end].transpose(1, 0, 2))
    np.testing.assert_allclose(
        keys[total - 1, 0, :16], rotated(k[total - 1, 0, :16], total - 1, table.inv_freq), atol=1e-6
    )


# ---- both executors

EXECUTORS = {"torch": tiny.definition, "native": tiny.executor}
IDS = tiny.tokens(97, 210, 1)
SIZES = ((16, 4, 2), (64, 2, 1), (80, 3, 3), (128, 4, 1), (256, 1, 1))
"""Head size, heads, KV heads."""


def model_of(size: int, heads: int, kv_heads: int, windows: tuple[int | None, ...] = (None, None)) -> ModelConfig:
    return tiny.config(
        num_layers=2, hidden_size=64, intermediate_size=64, num_heads=heads, num_kv_heads=kv_heads, head_size=size,
        windows=windows,
    )  # fmt: skip


def run_executor(
    kind: str, c: ModelConfig, layout: CacheLayout, chunks: Sequence[int], observed: tuple[int, int] = (0, 0)
) -> tuple[Array, Observation, Callable[[int, int, str], Array]]:
    """Logits of the tokens in chunks, what was observed, and the cache's reader."""
    executor = EXECUTORS[kind](c, tiny.weights(c, Layout.F32), kv=layout, num_blocks=512)
    total = sum(chunks)
    held, at = Held.of(Space(c), layout, 0, total), 0
    sums = np.zeros((2, c.num_kv_heads, total), np.int64)
    queries = np.zeros((2, observed[1] - observed[0], c.num_heads * c.head_size), np.float32)
    observation, logits = Observation(0, *observed, sums, queries), []
    for count in chunks:
        logits.append(executor.run(pass_of([(held, IDS[at : at + count])], observations=[observation])).copy())
        at += count
    return np.concatenate(logits), observation, lambda *what: executor.read(held.view, *what)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", EXECUTORS)
@pytest.mark.parametrize(
    ("sizes", "kv", "group_size"),
    [
        (SIZES[0], "int8", 16), (SIZES[1], "int8", 128), (SIZES[2], "int8", 32), (SIZES[4], "int8", 64),
        (SIZES[0], "int4", 128), (SIZES[2], "int4", 16), (SIZES[3], "int4", 64), (SIZES[4], "int4", 32),
    ],
    ids=str,
)  # fmt: skip
def test_pages_hold_what_is_written_down(kind: str, sizes: tuple[int, int, int], kv: KVFormat, group_size: int) -> None:
    """Integers of the very numbers that the same executor keeps in full blocks, to the bit."""
    c = model_of(*sizes)
    full = run_executor(kind, c, tiny.cache_layout(c), (100, 80))[2]
    layout = tiny.cache_layout(c, kv, group_size=group_size, keep=16)
    read = run_executor(kind, c, layout, (100, 80))[2]
    end = layout.packed_end(179)
    for head in range(c.num_kv_heads):
        keys, values = full(0, head, "keys"), full(0, head, "values")
        for start in range(0, end, group_size):
            part = slice(start, start + group_size)
            keys[part] = np.stack([written_down(x, kv, zero=False) for x in keys[part].T], -1)
            values[part] = np.stack([written_down(x, kv, zero=True) for x in values[part]])
        for what, expected in (("keys", keys), ("values", values)):
            exact = full(0, head, what)
            expected[:16] = exact[:16]
            np.testing.assert_array_equal(read(0, head, what), expected)


NATIVE_CASES = [
    (LAYOUTS[name], SIZES[i % len(SIZES)], windows)
    for i, (name, windows) in enumerate(
        [
            *((name, (None, None)) for name in LAYOUTS),
            ("k8v4", (20, None)),
            ("int4", (45, 70)),
            ("sinks-int8", (45, None)),
        ]
    )
]


@pytest.mark.parametrize(("options", "sizes", "windows"), NATIVE_CASES, ids=str)
def test_native_equals_its_definition(
    options: Any, sizes: tuple[int, int, int], windows: tuple[int | None, ...]
) -> None:
    c = model_of(*sizes, windows)
    layout = tiny.cache_layout(c, **options)
    (ours, seen, read), (theirs, expected, define) = (
        run_executor(kind, c, layout, (130, 1, 20, 1, 1), (100, 140)) for kind in ("native", "torch")
    )
    # a number just between two that the format has may be rounded to either: of int4 a large step, but seldom
    finest = layout.packed or layout.full
    most = max({"f32": 1e-5, "int8": 5e-3, "int4": 2e-2}.get(kv, 1e-3) for kv in (finest.k, finest.v))
    errors, largest = np.abs(ours - theirs), np.abs(theirs).max()
    assert errors.max() <= most * largest and errors.mean() <= 2e-4 * largest
    assert seen.sums is not None and expected.sums is not None and seen.queries is not None
    assert abs(seen.sums - expected.sums).max() <= 3 * most * 2**24
    np.testing.assert_allclose(seen.sums.sum(-1), expected.sums.sum(-1), rtol=1e-6)
    np.testing.assert_allclose(seen.queries, expected.queries, atol=most)
    for layer, head, what in product(range(2), range(c.num_kv_heads), ("keys", "values")):
        got, want = read(layer, head, what), define(layer, head, what)
        errors, largest = np.abs(got - want), np.abs(want).max()
        assert errors.max() <= 10 * most * largest and errors.mean() <= 5e-4 * largest


@pytest.mark.parametrize("name", ["f16", "k8v4", "sinks-int8"])
def test_chunks_make_no_difference(name: str) -> None:
    """To the definition, but for the order of its sums."""
    c = model_of(16, 4, 2, (None, 45))
    layout = tiny.cache_layout(c, **LAYOUTS[name])
    whole, pieces = (run_executor("torch", c, layout, chunks)[0] for chunks in ((150,), (33, 1, 70, 1, 1, 44)))
    assert np.abs(whole - pieces).max() <= 1e-3 * np.abs(whole).max()


@pytest.mark.parametrize(
    ("size", "change", "message"),
    [
        (15, {"packed": PageFormat("int4", "int8", 16)}, "int4 needs an even head size, got 15"),
        (15, {"rotate": True}, "rotate needs an even head size, got 15"),
        (16, {"full": PageFormat("int8", "f16", 16)}, "full blocks"),
        (16, {"full": PageFormat("f16", "f61", 16)}, "v must be one of f32, f16, bf16, int8, int4, got 'f61'"),
        (16, {"packed": PageFormat("f16", "f16", 16)}, "packed pages"),
        (16, {"packed": PageFormat("f32", "int8", 16)}, "what is not packed has one format"),
        (16, {"packed": PageFormat("int8", "int8", 24)}, "groups of 16 tokens"),
        (16, {"group_of": ((0, 0), (0,))}, "group_of must name 2 layers of 2 KV heads"),
        (16, {"group_of": ((0, 2), (0, 2))}, "without gaps"),
        (16, {"keep": 8}, "keep must be a multiple of 16, got 8"),
        (16, {"sinks": 4}, "sinks need a window"),
        (16, {"packed": PageFormat("int8", "int8", 16), "sinks": 4, "window": 9}, "sinks are read in full"),
    ],
)  # fmt: skip
def test_layouts_that_do_not_fit_are_refused(size: int, change: dict[str, Any], message: str) -> None:
    c = model_of(size, 4, 2)
    executor = TorchCache(c, 64, torch.device("cpu"))
    assert executor.register(tiny.cache_layout(c)) == executor.register(tiny.cache_layout(c)) == 0
    with pytest.raises(ParameterError, match=message):
        executor.register(replace(tiny.cache_layout(c), **change))
