"""From a reference to a model ready to run: configuration, packed weights, tokenizer, defaults.

The first start reads the GGUF file and writes what it made to the model store; later starts read that and parse nothing.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kvik.errors import DataError, ParameterError
from kvik.models import MODELS
from kvik.models.config import ModelConfig, RopeConfig
from kvik.params import SamplingParams
from kvik.text.tokenizer import Tokenizer
from kvik.weights.fetch import Progress
from kvik.weights.layouts import Weights
from kvik.weights.loader import WantedTensor, load_packed, read_json, save_json
from kvik.weights.packed import PackedWeights
from kvik.weights.store import ModelStore

__all__ = ["LoadedModel", "load_model"]

FORMAT = 3
"""Of model.json; another number there means it is written anew."""

_SAMPLING_KEYS = {"temp": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p"}


@dataclass(frozen=True)
class LoadedModel:
    """Everything of a model but an executor.

    Attributes:
        name: as the file calls it, else the file's stem.
        path: the source file.
        weights: tensors in native layouts.
        defaults: the model's own generation defaults, by the names of SamplingParams; often empty.
        license: the file's licence field, or None.
        parameters: number of weights.
    """

    name: str
    path: Path
    config: ModelConfig
    weights: PackedWeights
    tokenizer: Tokenizer
    defaults: Mapping[str, Any]
    license: str | None
    parameters: int


def load_model(
    ref: str | os.PathLike[str], weights: Weights, progress: Progress, store: ModelStore | None = None
) -> LoadedModel:
    """Find, read or pack a model. Raises ParameterError, DataError or StorageError in one line."""
    store = store or ModelStore()
    path = store.resolve(ref, progress).path
    folder = store.folder_for(path)
    noted = read_json(folder / "model.json")
    if not isinstance(noted, dict) or noted.get("format") != FORMAT:
        noted = _read_source(path, store)
    try:
        config = _config(noted["config"])
        tokenizer = Tokenizer.load(folder / "tokenizer")
    except (DataError, KeyError, TypeError):  # damaged by someone: made again
        noted = _read_source(path, store)
        config, tokenizer = _config(noted["config"]), Tokenizer.load(folder / "tokenizer")
    specs = MODELS[config.family].tensors(config)
    wanted = [WantedTensor(s.name, s.gguf_name, s.shape, s.permuted_heads) for s in specs]

    def source() -> Any:
        from kvik.weights.gguf import read_gguf

        return read_gguf(path)

    try:
        packed = load_packed(folder / f"weights-{weights}.kvik", source, wanted, weights, progress)
    except DataError:
        if not any(folder.glob("weights-*.kvik")):  # a refused file leaves nothing in the store
            shutil.rmtree(folder, ignore_errors=True)
        raise
    return LoadedModel(
        noted["name"], path, config, packed, tokenizer, noted["defaults"], noted["license"], noted["parameters"]
    )


def _config(plain: Mapping[str, Any]) -> ModelConfig:
    rope = dict(plain["rope"])
    if rope["divisors"] is not None:
        rope["divisors"] = tuple(rope["divisors"])
    return ModelConfig(**{**plain, "rope": RopeConfig(**rope)})


def _read_source(path: Path, store: ModelStore) -> dict[str, Any]:
    """Read the file's configuration and tokenizer and keep them in the store. A refused file leaves nothing there."""
    from kvik.models.gguf_config import config_from_gguf
    from kvik.weights.gguf import read_gguf

    with read_gguf(path) as file:
        shapes = {name: tensor.shape for name, tensor in file.tensors.items()}
        divisors = None
        if "rope_freqs.weight" in shapes:
            file.check_finite("rope_freqs.weight")
            divisors = tuple(float(x) for x in file.dequantize("rope_freqs.weight"))
        config = config_from_gguf(file.metadata, shapes, path, rope_divisors=divisors)
        try:
            tokenizer = Tokenizer.from_gguf(file.metadata)
        except DataError as error:  # knows the key, not the file
            raise DataError(str(error), path=path) from None
        if tokenizer.vocab_size > config.vocab_size:
            raise DataError(f"has {tokenizer.vocab_size} tokens but weights for {config.vocab_size}", path=path)
        defaults = _defaults(file.metadata, path)
        folder = store.make_folder(path)
        tokenizer.save(folder / "tokenizer")
        name, licence = file.metadata.get("general.name"), file.metadata.get("general.license")
        noted = {
            "format": FORMAT,
            "name": name if isinstance(name, str) and name else path.stem,
            "license": licence if isinstance(licence, str) else None,
            "parameters": sum(_elements(shape) for shape in shapes.values()),
            "config": asdict(config),
            "defaults": defaults,
        }
    save_json(folder / "model.json", noted)
    return noted


def _elements(shape: tuple[int, ...]) -> int:
    count = 1
    for n in shape:
        count *= n
    return count


def _defaults(metadata: Mapping[str, Any], path: Path) -> dict[str, Any]:
    defaults: dict[str, Any] = {}
    for key, name in _SAMPLING_KEYS.items():
        value = metadata.get(f"general.sampling.{key}")
        if value is None:
            continue
        if name == "top_k" and isinstance(value, int) and value < 0:
            value = 0  # llama.cpp's "every token"
        try:
            SamplingParams(**{**defaults, name: value})
        except ParameterError as error:
            raise DataError(f"general.sampling.{key}: {error}", path=path) from None
        defaults[name] = value
    return defaults
