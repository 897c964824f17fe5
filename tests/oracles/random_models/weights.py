"""A model's weights as Kvik's definition wants them, put together from what its checkpoint or GGUF file holds.

A second, plain reading of `Piece` and `TensorSpec`, against which the loader is not needed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from oracles.random_models.folder import save_checkpoint
from safetensors.numpy import load_file

from kvik.models import MODELS
from kvik.models.config import ModelConfig, Piece, TensorSpec
from kvik.models.gguf_config import config_from_gguf
from kvik.models.hf_config import config_from_hf

Array = np.ndarray[Any, Any]


def hf_config(model: Any) -> dict[str, Any]:
    """config.json as a file would hold it."""
    config: dict[str, Any] = model.config.to_dict()
    return config | {"architectures": [type(model).__name__]}


def config_of_model(model: Any) -> ModelConfig:
    return config_from_hf(hf_config(model), "config.json")


def saved_state(model: Any) -> dict[str, Array]:
    """The tensors by the names of a checkpoint on disk, which for experts are not those in memory."""
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(model, Path(folder))
        return load_file(Path(folder) / "model.safetensors")


def kvik_weights(model: Any) -> dict[str, Array]:
    """The weights by the names of Kvik's definition, from a checkpoint."""
    state, config = saved_state(model), config_of_model(model)
    specs = MODELS[config.family].tensors(config)
    return {spec.name: assembled(spec.hf, state, spec.shape) + spec.hf_offset for spec in specs}


def read_gguf(path: Path) -> tuple[ModelConfig, dict[str, Array]]:
    """Configuration and weights of a GGUF file, read with the `gguf` package."""
    reader = gguf.GGUFReader(path)
    metadata = {name: f.contents() for name, f in reader.fields.items()}
    tensors = {t.name: np.array(gguf.dequantize(t.data, t.tensor_type), np.float32) for t in reader.tensors}
    divisors = tensors.get("rope_freqs.weight")
    config = config_from_gguf(metadata, {n: t.shape for n, t in tensors.items()}, path, rope_divisors=divisors)
    specs = MODELS[config.family].tensors(config)
    return config, {spec.name: _paired(spec, assembled(spec.gguf, tensors, spec.shape)) for spec in specs}


def assembled(where: str | Piece | tuple[Piece, ...], state: Mapping[str, Array], shape: tuple[int, ...]) -> Array:
    """The pieces' rows, one after another."""
    if isinstance(where, str):
        where = Piece(where)
    parts, found = [where] if isinstance(where, Piece) else where, []
    for part in parts:
        tensor = state[part.name].T if part.transposed else state[part.name]
        if tensor.ndim == 3:  # experts
            tensor = tensor.reshape(-1, tensor.shape[-1])
        found.append(tensor[part.begin : part.end])
    whole = np.concatenate(found)
    assert whole.shape == shape, parts
    return whole


def _paired(spec: TensorSpec, weight: Array) -> Array:
    """Rows 2i and 2i + 1 of each head back to i and i + D / 2, where the file interleaves them."""
    if not spec.permuted_heads:
        return weight
    half = weight.shape[0] // spec.permuted_heads // 2
    return weight.reshape(spec.permuted_heads, half, 2, -1).swapaxes(1, 2).reshape(weight.shape)
