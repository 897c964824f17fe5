"""Every family through the loader, from a folder and from GGUF, against a plain reading of the same files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from oracles.random_models.folder import save_folder
from oracles.random_models.gguf_file import write_gguf
from oracles.random_models.model import random_model
from oracles.random_models.shapes import FAMILIES, LLAMAS, Shape
from oracles.random_models.weights import config_of_model, kvik_weights

from kvik.models.loading import load_model
from kvik.weights.layouts import Layout

SHAPES = [*(shape for shape in LLAMAS if shape.name in ("untied", "llama3")), *FAMILIES]


@pytest.fixture(autouse=True)
def own_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVIK_HOME", str(tmp_path / "store"))


def check(path: Path, model: Any, true: dict[str, Any]) -> None:
    found = load_model(path, "auto", lambda *_: None)
    assert list(found.weights.tensors) == list(true)
    for name, tensor in found.weights.tensors.items():
        # assembled with one addition in f32 either way; a GGUF writer may add Gemma's 1 itself
        np.testing.assert_allclose(tensor.floats(), true[name], rtol=0, atol=1e-6, err_msg=name)
        assert tensor.layout is Layout.F32
    assert found.parameters == sum(values.size for values in true.values())
    c = found.config
    if c.num_experts:
        experts = sum(t.nbytes for n, t in found.weights.tensors.items() if ".experts_" in n)
        unused = experts * (c.num_experts - c.experts_used) // c.num_experts
        assert experts and found.matrix_bytes == found.weights.matrix_bytes() - unused


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_folder_and_a_gguf_file_of_each_family(shape: Shape, tmp_path: Path) -> None:
    model = random_model(shape)
    true = kvik_weights(model)
    folder = save_folder(model, tmp_path / "m")
    check(folder, model, true)
    assert load_model(folder, "auto", lambda *_: None).config == config_of_model(model)
    if shape.in_gguf:
        check(write_gguf(model, tmp_path / "m.gguf"), model, true)
