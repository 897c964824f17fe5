"""Engines over small random models, native and by definition."""

from __future__ import annotations

from functools import cache
from typing import Any

from native.tiny import config, grouped, weights

from kvik.cache.layout import kv_layout
from kvik.engine.admission import Model
from kvik.engine.engine import Engine
from kvik.models.config import ModelConfig
from kvik.params import EngineParams
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


def small_engine(
    tokenizer: Tokenizer,
    name: str,
    num_slabs: int = 400,
    *,
    kv: str = "f16",
    layout: Layout = Layout.INT8,
    threads: int = 1,
    definition: bool = False,
    **params: object,
) -> Engine:
    c: ModelConfig = CONFIGS[name]
    executor = grouped(c, weights_of(name, layout), num_slabs=num_slabs, kv=kv, threads=threads, definition=definition)
    model = Model(tokenizer, c.vocab_size, c.context_length)
    bytes_of = kv_layout(c, kv)  # type: ignore[arg-type]
    return Engine(executor, model, bytes_of, num_slabs, EngineParams(**params))  # type: ignore[arg-type]
