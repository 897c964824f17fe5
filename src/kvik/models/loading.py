"""From a reference to a model ready to run: configuration, packed weights, tokenizer, defaults.

The first start reads the GGUF file or the folder and writes what it made to the model store; later starts read that and
parse nothing.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

from kvik.errors import DataError, StorageError
from kvik.files import remove, storage_errors
from kvik.models import MODELS
from kvik.models.config import ModelConfig, RopeConfig
from kvik.models.tensors import SourceFacts, open_source, wanted_tensors
from kvik.text.tokenizer import Tokenizer
from kvik.weights.fetch import Progress
from kvik.weights.layouts import Weights
from kvik.weights.loader import load_packed, read_json, save_json
from kvik.weights.packed import PackedWeights
from kvik.weights.store import ModelStore

__all__ = ["LoadedModel", "load_model"]

FORMAT = 6
"""Of model.json; another number there means it is written anew."""


@dataclass(frozen=True)
class LoadedModel:
    """Everything of a model but an executor.

    Attributes:
        name: as the file calls it, else the file's stem or the folder's name.
        path: the source: a file, or a folder of safetensors.
        weights: tensors in native layouts.
        defaults: the model's own generation defaults, by the names of SamplingParams; often empty.
        unused_defaults: those of its defaults that Kvik does not follow, as "name=value".
        license: the source's licence field, or None.
        parameters: number of weights.
        source: what the files are.
    """

    name: str
    path: Path
    config: ModelConfig
    weights: PackedWeights
    tokenizer: Tokenizer
    defaults: Mapping[str, Any]
    unused_defaults: tuple[str, ...]
    license: str | None
    parameters: int
    source: SourceFacts

    @property
    def digest(self) -> str:
        """Of the packed weights and the configuration: two models with the same one compute the same."""
        return blake2b(f"{self.weights.digest} {self.config}".encode(), digest_size=16).hexdigest()

    @property
    def matrix_bytes(self) -> int:
        """Of the matrices one decode step reads for one sequence; of experts those that it goes through."""
        c = self.config
        return self.weights.matrix_bytes(c.experts_used / c.num_experts if c.num_experts else 1.0)


def load_model(
    ref: str | os.PathLike[str], weights: Weights, progress: Progress, store: ModelStore | None = None
) -> LoadedModel:
    """Find, read or pack a model. Raises ParameterError, DataError or StorageError in one line."""
    store = store or ModelStore()
    path = store.resolve(ref, progress).path
    folder = store.folder_for(path)
    new = not folder.exists()
    try:
        return _load(path, folder, weights, progress, store)
    except (DataError, StorageError) as error:
        # A refused source, or a first start that failed, leaves nothing in the store, unless there are weights or
        # another process is writing some.
        if (new or isinstance(error, DataError)) and not (any(folder.glob("*.kvik")) or any(folder.glob(".*.tmp"))):
            shutil.rmtree(folder, ignore_errors=True)
        raise


def _load(path: Path, folder: Path, weights: Weights, progress: Progress, store: ModelStore) -> LoadedModel:
    noted = read_json(folder / "model.json")
    if not isinstance(noted, dict) or noted.get("format") != FORMAT:
        noted = _read_source(path, store)
    try:
        config, facts = _config(noted["config"]), _facts(noted["source"])
        tokenizer = Tokenizer.load(folder / "tokenizer")
    except (DataError, KeyError, TypeError):  # damaged by someone: made again
        noted = _read_source(path, store)
        config, facts = _config(noted["config"]), _facts(noted["source"])
        tokenizer = Tokenizer.load(folder / "tokenizer")
    wanted = wanted_tensors(MODELS[config.family].tensors(config), noted["base"])
    packed = load_packed(folder / f"weights-{weights}.kvik", lambda: open_source(path), wanted, weights, progress)
    return LoadedModel(
        noted["name"], path, config, packed, tokenizer,
        defaults=noted["defaults"], unused_defaults=tuple(noted["unused_defaults"]), license=noted["license"],
        parameters=noted["parameters"], source=facts,
    )  # fmt: skip


def _read_source(path: Path, store: ModelStore) -> dict[str, Any]:
    """Read the source's configuration and tokenizer and keep them in the store. A refused one leaves nothing there."""
    from kvik.models.reading import describe

    found = describe(path)
    _clear(store.folder_for(path))
    folder = store.make_folder(path)
    found.tokenizer.save(folder / "tokenizer")
    specs = MODELS[found.config.family].tensors(found.config)
    noted = {
        "format": FORMAT,
        "name": found.name,
        "license": found.license,
        "parameters": sum(math.prod(spec.shape) for spec in specs),
        "config": asdict(found.config),
        "defaults": found.defaults,
        "unused_defaults": found.unused_defaults,
        "base": found.base,
        "source": asdict(found.facts),
    }
    save_json(folder / "model.json", noted)
    return noted


def _clear(folder: Path) -> None:
    """Remove what stands where _read_source writes and is of another kind: folders for files, a file for the folder."""
    tokenizer = folder / "tokenizer"
    with storage_errors(folder):
        if not tokenizer.is_dir():
            remove(tokenizer)
        for path in (folder / "model.json", folder / "source.json", *tokenizer.glob("*")):
            if path.is_dir():
                remove(path)


def _config(plain: Mapping[str, Any]) -> ModelConfig:
    """A configuration out of JSON, which has lists for tuples."""
    restored = {
        "rope": _rope(plain["rope"]),
        "rope_local": _rope(plain["rope_local"]),
        "windows": tuple(plain["windows"]),
    }
    return ModelConfig(**{**plain, **restored})


def _rope(plain: Mapping[str, Any] | None) -> RopeConfig | None:
    if plain is None:
        return None
    divisors = plain["divisors"]
    return RopeConfig(**{**plain, "divisors": None if divisors is None else tuple(divisors)})


def _facts(plain: Mapping[str, Any]) -> SourceFacts:
    types = {name: (count, nbytes) for name, (count, nbytes) in plain["tensor_types"].items()}
    return SourceFacts(**{**plain, "tensor_types": types})
