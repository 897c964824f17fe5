"""Engines over small random models, native and by definition."""

from __future__ import annotations

from functools import cache
from typing import Any

from native.tiny import config, weights

from kvik import _native
from kvik.cache.layout import kv_layout
from kvik.cache.storage import PoolSize, allocate_cache, choose_slab_bytes, usual_layouts
from kvik.engine.admission import Model
from kvik.engine.engine import Engine
from kvik.engine.executors import input_roundings
from kvik.models import llama
from kvik.models.config import ModelConfig
from kvik.models.rope import rope_table
from kvik.ops import Executor
from kvik.ops.native_ops import NativeExecutor
from kvik.ops.torch_ops import TorchExecutor
from kvik.params import CacheParams, EngineParams, cache_params
from kvik.text.tokenizer import Tokenizer
from kvik.weights.layouts import Layout

SIZES = {"vocab_size": 98, "hidden_size": 64, "intermediate_size": 96, "num_heads": 4, "num_kv_heads": 2}
CONFIGS = {
    "grouped heads": config(**SIZES, num_layers=2, windows=(None, None)),
    "windows": config(**SIZES, num_layers=3, windows=(20, None, 20)),
}


@cache
def weights_of(name: str, layout: Layout) -> Any:
    return weights(CONFIGS[name], layout, 3)


def pool_of(name: str, num_slabs: int, kv: str, any_format: bool = False) -> PoolSize:
    """So many slabs of whole blocks of the format, or of any."""
    c = CONFIGS[name]
    layouts = (*usual_layouts(c), kv_layout(c, "int8/f32")) if any_format else (kv_layout(c, kv),)
    return PoolSize(num_slabs, choose_slab_bytes(layouts, 0))


def small_engine(
    tokenizer: Tokenizer,
    name: str,
    num_slabs: int = 400,
    *,
    kv: str = "f16",
    cache: CacheParams | None = None,
    any_format: bool = False,
    layout: Layout = Layout.INT8,
    threads: int = 1,
    definition: bool = False,
    **params: object,
) -> Engine:
    """any_format: slabs have room for blocks of all formats; else they are whole blocks of the engine's own."""
    c: ModelConfig = CONFIGS[name]
    own = cache_params(kv, None, CacheParams()) if cache is None else cache
    size, tensors = pool_of(name, num_slabs, own.kv, any_format), weights_of(name, layout)
    made: Executor
    if definition:
        floats = {n: t.floats() for n, t in tensors.items()}
        made = TorchExecutor(c, llama.forward, floats, kv_bytes=size.nbytes, rounding=input_roundings(tensors))
    else:
        pool, storage = _native.Pool(threads), allocate_cache(size.nbytes)
        made = NativeExecutor(c, llama.forward, tensors, pool=pool, kv=storage, max_rows=512)
    assert c.rope is not None
    model = Model(tokenizer, c, rope=rope_table(c.rope, c.head_size, c.context_length))
    return Engine(made, model, own, size, EngineParams(**params))  # type: ignore[arg-type]
