"""Tiny random models in native layouts, without a file: for tests of the native core."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from weights.gguf_files import random_bytes

from kvik import _native
from kvik.cache.layout import kv_layout
from kvik.cache.storage import allocate_cache
from kvik.models import llama
from kvik.models.config import ModelConfig, RopeConfig
from kvik.ops import Pass
from kvik.ops.native_ops import NativeExecutor
from kvik.weights.ggml_types import GGMLType
from kvik.weights.layouts import Layout
from kvik.weights.packed import PackedTensor

F32 = 0  # GGUF's number of the type


def pack(weights: NDArray[np.float32], layout: Layout, name: str = "w") -> PackedTensor:
    """A matrix [n, k], or a vector, in a native layout."""
    if weights.ndim == 1:
        padded = np.zeros(-(-len(weights) // 32) * 32, np.float32)
        padded[: len(weights)] = weights
        return PackedTensor(name, Layout.F32, 1, len(weights), True, padded.view(np.uint8))
    n, k = weights.shape
    data = np.empty(_native.packed_bytes(int(layout), n, k), np.uint8)
    source = np.ascontiguousarray(weights, np.float32).view(np.uint8).ravel()
    bad, _ = _native.pack(F32, source, n, k, 0, int(layout), data, 1)
    assert bad == -1
    return PackedTensor(name, layout, n, k, False, data)


EXACT = {
    Layout.INT4: GGMLType.Q4_0, Layout.INT5: GGMLType.Q5_0, Layout.INT5_MIN: GGMLType.Q5_1, Layout.INT4_K: GGMLType.Q4_K,
    Layout.INT5_K: GGMLType.Q5_K, Layout.INT6_K: GGMLType.Q6_K,
}  # fmt: skip
"""What layouts that nothing is rounded to are made from."""


def random_matrix(n: int, k: int, layout: Layout, rng: np.random.Generator) -> PackedTensor:
    """Standard normal weights, or of layouts that only files have, random blocks of about that size."""
    if layout not in EXACT:
        return pack(rng.standard_normal((n, k), dtype=np.float32), layout)
    kind = EXACT[layout]
    source = np.frombuffer(random_bytes(kind, (n, k), rng), np.uint8)
    data = np.empty(_native.packed_bytes(int(layout), n, k), np.uint8)
    assert _native.pack(int(kind), source, n, k, 0, int(layout), data, 1) == (-1, 0.0)
    return PackedTensor("w", layout, n, k, False, data)


def config(**changes: object) -> ModelConfig:
    sizes = {
        "family": "llama", "vocab_size": 97, "hidden_size": 96, "intermediate_size": 160, "num_layers": 3,
        "num_heads": 6, "num_kv_heads": 2, "head_size": 16, "context_length": 512, "norm_eps": 1e-5,
        "rope": RopeConfig(), "tied_embeddings": False, "windows": (None,) * 3,
    }  # fmt: skip
    return ModelConfig(**{**sizes, **changes})  # type: ignore[arg-type]


def weights(c: ModelConfig, layout: Layout, seed: int = 0) -> dict[str, PackedTensor]:
    rng = np.random.default_rng(seed)
    made = {}
    for spec in llama.tensors(c):
        if len(spec.shape) == 1:
            values = 1 + 0.1 * rng.standard_normal(spec.shape, dtype=np.float32)
        else:
            values = rng.standard_normal(spec.shape, dtype=np.float32) * np.float32(1.5 / np.sqrt(spec.shape[1]))
        made[spec.name] = pack(values, layout, spec.name)
    return made


def executor(
    c: ModelConfig,
    tensors: Mapping[str, PackedTensor],
    *,
    threads: int = 2,
    isa: str = "auto",
    kv: str = "f16",
    num_blocks: int = 64,
    max_rows: int = 256,
) -> NativeExecutor:
    layout = kv_layout(c, kv)  # type: ignore[arg-type]
    return NativeExecutor(
        c, llama.forward, tensors, pool=_native.Pool(threads),
        kv=allocate_cache(num_blocks * layout.block_bytes), kv_format=kv, num_blocks=num_blocks, max_rows=max_rows, isa=isa,
    )  # fmt: skip


def make_pass(sequences: Sequence[tuple[Sequence[int], int, Sequence[int]]], every_row: bool = True) -> Pass:
    """A pass of (tokens, first slot, blocks) for each sequence; logits of every row or of each sequence's last."""
    tokens, slots, spans, blocks, block_spans, rows = [], [], [0], [], [0], []
    for ids, start, table in sequences:
        tokens += list(ids)
        slots += range(start, start + len(ids))
        spans.append(len(tokens))
        blocks += list(table)
        block_spans.append(len(blocks))
        rows += range(spans[-2], spans[-1]) if every_row else [len(tokens) - 1]
    places = np.array(slots, np.int32)
    i32 = lambda x: np.array(x, np.int32)  # noqa: E731
    return Pass(i32(tokens), places, places, i32(spans), i32(blocks), i32(block_spans), i32(rows))
