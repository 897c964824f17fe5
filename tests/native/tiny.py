"""Tiny random models in native layouts, without a file: for tests of the native core."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from weights.gguf_files import random_bytes

from kvik import _native
from kvik.cache.layout import kv_layout
from kvik.cache.storage import allocate_cache
from kvik.engine.executors import input_roundings
from kvik.models import llama
from kvik.models.config import ModelConfig, RopeConfig
from kvik.ops import Executor, Ops, Pass
from kvik.ops.native_ops import NativeExecutor
from kvik.ops.pages import ADDRESS_BYTES, BLOCK_TOKENS, CacheLayout, PageFormat, is_packed
from kvik.ops.torch_ops import TorchExecutor
from kvik.params import KVFormat
from kvik.weights.ggml_types import GGMLType
from kvik.weights.layouts import Layout
from kvik.weights.packed import PackedTensor

F32 = 0  # GGUF's number of the type
STEP = 4096
"""From block to block of tests that number their blocks, in the unit of addresses: more than any block they have."""


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


def random_tensors(
    shapes: Mapping[str, tuple[int, ...]], layout: Layout, seed: int = 0, kept: Collection[str] = ()
) -> dict[str, PackedTensor]:
    """Vectors near 1 or, of biases, 0; matrices that keep the size of their inputs. kept: in f32 whatever the layout."""
    rng = np.random.default_rng(seed)
    made = {}
    for name, shape in shapes.items():
        if len(shape) == 1:
            values = 0.1 * rng.standard_normal(shape, dtype=np.float32) + (0 if name.endswith("bias") else 1)
        else:
            values = rng.standard_normal(shape, dtype=np.float32) * np.float32(1.5 / np.sqrt(shape[1]))
        made[name] = pack(values, Layout.F32 if name in kept else layout, name)
    return made


def weights(c: ModelConfig, layout: Layout, seed: int = 0) -> dict[str, PackedTensor]:
    return random_tensors({spec.name: spec.shape for spec in llama.tensors(c)}, layout, seed)


def cache_layout(
    c: ModelConfig,
    k: KVFormat = "f16",
    v: KVFormat | None = None,
    group_size: int = 64,
    *,
    by: str = "",
    keep: int = 0,
    rotate: bool = False,
    sinks: int = 0,
    window: int = 0,
) -> CacheLayout:
    """Formats of keys and values (None: as keys). by: "layer" or "head" for tables of each, else all units are one group."""
    v = v or k
    full: tuple[KVFormat, ...] = tuple("f16" if is_packed(kv) else kv for kv in (k, v))
    packed = PageFormat(k, v, group_size) if is_packed(k) or is_packed(v) else None
    groups = [
        tuple({"layer": i, "head": i * c.num_kv_heads + h}.get(by, 0) for h in range(c.num_kv_heads))
        for i in range(c.num_layers)
    ]
    return CacheLayout(PageFormat(*full, BLOCK_TOKENS), packed, tuple(groups), keep, rotate, sinks, window)


def executor(
    c: ModelConfig,
    tensors: Mapping[str, PackedTensor],
    forward: Callable[[Ops[Any], ModelConfig], None] = llama.forward,
    *,
    threads: int = 2,
    isa: str = "auto",
    kv: KVFormat | CacheLayout = "f16",
    num_blocks: int = 64,
    max_rows: int = 256,
) -> NativeExecutor:
    """Its layout 0 is what `kv` says, without more all layers in one group, whatever their windows."""
    made = NativeExecutor(
        c, forward, tensors, pool=_native.Pool(threads), kv=allocate_cache(num_blocks * STEP * ADDRESS_BYTES),
        max_rows=max_rows, isa=isa,
    )  # fmt: skip
    assert made.register(kv if isinstance(kv, CacheLayout) else cache_layout(c, kv)) == 0
    return made


def grouped(
    c: ModelConfig,
    tensors: Mapping[str, PackedTensor],
    *,
    num_slabs: int,
    kv: str = "f16",
    threads: int = 2,
    max_rows: int = 512,
    definition: bool = False,
) -> Executor:
    """The Llama-like model over slabs of the cache's own layout; natively or by its definition."""
    storage = allocate_cache(num_slabs * kv_layout(c, kv).slab_bytes)  # type: ignore[arg-type]
    if definition:
        floats = {n: t.floats() for n, t in tensors.items()}
        return TorchExecutor(c, llama.forward, floats, kv_bytes=len(storage), rounding=input_roundings(tensors))
    return NativeExecutor(c, llama.forward, tensors, pool=_native.Pool(threads), kv=storage, max_rows=max_rows)


def definition(
    c: ModelConfig,
    tensors: Mapping[str, PackedTensor],
    forward: Callable[[Ops[Any], ModelConfig], None] = llama.forward,
    *,
    kv: KVFormat | CacheLayout = "f16",
    num_blocks: int = 64,
) -> TorchExecutor[ModelConfig]:
    """The same model on the executor that defines it."""
    floats = {n: t.floats() for n, t in tensors.items()}
    made = TorchExecutor(
        c, forward, floats, kv_bytes=num_blocks * STEP * ADDRESS_BYTES, rounding=input_roundings(tensors)
    )
    assert made.register(kv if isinstance(kv, CacheLayout) else cache_layout(c, kv)) == 0
    return made


def address(block: int) -> int:
    """Of a block of `executor` or `definition` by number; what is negative stays."""
    return block * STEP if block >= 0 else block


def make_pass(sequences: Sequence[tuple[Sequence[int], int, Sequence[int]]], every_row: bool = True) -> Pass:
    """A pass of (tokens, first slot, blocks by number) for each sequence of the first layout, which has one table.

    Logits of every row or of each sequence's last.
    """
    tokens, slots, spans, blocks, block_spans, rows = [], [], [0], [], [0], []
    for ids, start, table in sequences:
        tokens += list(ids)
        slots += range(start, start + len(ids))
        spans.append(len(tokens))
        blocks += [address(block) for block in table]
        block_spans.append(len(blocks))
        rows += range(spans[-2], spans[-1]) if every_row else [len(tokens) - 1]
    places, none = np.array(slots, np.int32), np.zeros(len(sequences), np.int32)
    i32 = lambda x: np.array(x, np.int32)  # noqa: E731
    return Pass(i32(tokens), places, places, i32(spans), none, i32(blocks), i32(block_spans), none, i32(rows))


def tokens(vocab_size: int, count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, vocab_size, count).tolist()


def assert_invariant(build: Callable[..., NativeExecutor], vocab_size: int, length: int = 200) -> None:
    """The same bits in chunks, in other blocks, beside another sequence, with any threads and instruction set."""
    ids, other = tokens(vocab_size, length), tokens(vocab_size, 120, 5)
    table, elsewhere = list(range(13)), list(range(40, 53))[::-1]
    whole = build().run(make_pass([(ids, 0, table)])).copy()
    assert np.isfinite(whole).all()
    rng = np.random.default_rng(11)
    for isa in _native.isa_available():
        for threads in (1, 3):
            runner = build(isa=isa, threads=threads)
            rows, at, beside = [], 0, 0
            while at < len(ids):
                # of every size that is planned differently: one or two rows, a few, many
                count = min(int(rng.choice([1, 2, 3, 20, 60])), len(ids) - at)
                sequences = [(ids[at : at + count], at, elsewhere)]
                guest = min(int(rng.choice([0, 0, 1, 30])), len(other) - beside)
                if guest:
                    sequences.insert(int(rng.integers(0, 2)), (other[beside : beside + guest], beside, list(range(8))))
                    beside += guest
                logits = runner.run(make_pass(sequences))
                first = guest if guest and sequences[1][2] is elsewhere else 0
                rows.append(logits[first : first + count].copy())
                at += count
            assert np.array_equal(np.concatenate(rows), whole), (isa, threads)
