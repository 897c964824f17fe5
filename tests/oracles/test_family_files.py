"""GGUF files of every family, written as llama.cpp's converter does, against transformers.

What is read is put together here, with the `gguf` package: the definitions and the names without the loader.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from native.tiny import cache_layout
from oracles.random_models.gguf_file import write_gguf
from oracles.random_models.model import oracle_logits, random_model, random_tokens, relative_error
from oracles.random_models.shapes import SHAPES, Shape
from oracles.random_models.weights import kvik_weights, read_gguf
from oracles.small_caches import Held, Space, pass_of

from kvik.models import MODELS
from kvik.models.config import ModelConfig
from kvik.ops.torch_ops import TorchExecutor

pytestmark = pytest.mark.usefixtures("one_torch_thread")

TOLERANCE = 1e-4


def logits_of(config: ModelConfig, weights: dict[str, Any], ids: Any) -> Any:
    executor = TorchExecutor(config, MODELS[config.family].forward, weights, kv_bytes=4 << 20)
    layout = cache_layout(config, "f32", "f32")
    held = Held.of(Space(config), layout, executor.register(layout), len(ids))
    return executor.run(pass_of([(held, ids)]))


@pytest.mark.parametrize("shape", [s for s in SHAPES if s.in_gguf], ids=str)
def test_a_gguf_file_holds_the_model(shape: Shape, tmp_path: Path) -> None:
    model, ids = random_model(shape), random_tokens(150, shape.seed + 300)
    config, weights = read_gguf(write_gguf(model, tmp_path / "m.gguf"))
    assert relative_error(logits_of(config, weights, ids), oracle_logits(model, ids)) <= TOLERANCE
    checkpoint = kvik_weights(model)
    assert list(weights) == list(checkpoint)
    for name, weight in weights.items():
        np.testing.assert_allclose(weight, checkpoint[name], rtol=0, atol=1e-6, err_msg=name)
