"""What a source says of its model: configuration, tokenizer, defaults, licence. One function a kind of source."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from kvik.errors import DataError, ParameterError, one_line
from kvik.files import open_regular
from kvik.models import MODELS
from kvik.models.config import ModelConfig
from kvik.models.gguf_config import config_from_gguf
from kvik.models.hf_config import config_from_hf
from kvik.models.tensors import SourceFacts, SourceKind, base_of, has_own_head, refuse_unused, source_kind
from kvik.params import SamplingParams
from kvik.text.tokenizer import Tokenizer
from kvik.weights.gguf import read_gguf
from kvik.weights.json_text import read_json_object
from kvik.weights.safetensors import read_safetensors
from kvik.weights.sources import model_name
from kvik.weights.tensor_file import TensorFile

__all__ = ["Described", "describe", "said_text"]

MAX_JSON_BYTES = 1 << 20
MAX_README_BYTES = 1 << 16

_GGUF_SAMPLING = {
    "general.sampling.temp": "temperature", "general.sampling.top_k": "top_k",
    "general.sampling.top_p": "top_p", "general.sampling.min_p": "min_p",
}  # fmt: skip
_HUB_PENALTIES = {name: name for name in ("repetition_penalty", "no_repeat_ngram_size")}
_HUB_FILTERS = ("temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
_HUB_SAMPLING = {name: name for name in _HUB_FILTERS} | _HUB_PENALTIES
_HUB_NEUTRAL: Mapping[str, object] = {"num_beams": 1, "penalty_alpha": 0.0, "guidance_scale": 1.0}


class Described(NamedTuple):
    """All that is read of a source but its weights.

    base: what stands before the names of a safetensors folder's tensors (see `wanted_tensors`). unused_defaults: of its
    generation defaults those that Kvik does not follow, as "name=value".
    """

    name: str
    license: str | None
    config: ModelConfig
    tokenizer: Tokenizer
    defaults: dict[str, Any]
    unused_defaults: tuple[str, ...]
    base: str | None
    facts: SourceFacts


def describe(path: Path) -> Described:
    """Read a source's configuration, tokenizer and defaults. Raises DataError naming file and key or tensor."""
    return _describe_folder(path) if source_kind(path) == "safetensors" else _describe_gguf(path)


def _describe_gguf(path: Path) -> Described:
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
        _check_vocabulary(tokenizer, config, path)
        refuse_unused(file, MODELS[config.family].tensors(config), config, None)
        name, licence = file.metadata.get("general.name"), file.metadata.get("general.license")
        return Described(
            said_text(name) or one_line(model_name(path)), said_text(licence),
            config, tokenizer, _defaults(file.metadata, _GGUF_SAMPLING, path), (), None,
            _facts(file, str(file.metadata["general.architecture"]), "gguf"),
        )  # fmt: skip


def _describe_folder(folder: Path) -> Described:
    # config.json's auto_map names Python files of the folder. They are never run, nor needed: an architecture that is
    # known here has its definition here, and another one is refused.
    plain = read_json_object(folder / "config.json", MAX_JSON_BYTES)
    config = config_from_hf(plain, folder / "config.json")
    generation: dict[str, Any] = {}
    if os.path.lexists(folder / "generation_config.json"):
        generation = read_json_object(folder / "generation_config.json", MAX_JSON_BYTES)
    defaults, unused = _hub_defaults(generation, folder / "generation_config.json")
    tokenizer = Tokenizer.from_hub(folder)
    _check_vocabulary(tokenizer, config, folder / "tokenizer.json")
    specs = MODELS[config.family].tensors(config)
    licence = _readme_licence(folder / "README.md") or plain.get("license")
    with read_safetensors(folder) as file:
        base = base_of(file.tensors, specs, folder)
        if config.tied_embeddings and has_own_head(file, specs, base):
            config = replace(config, tied_embeddings=False)
            specs = MODELS[config.family].tensors(config)
        refuse_unused(file, specs, config, base)
        facts = _facts(file, str(plain["architectures"][0]), "safetensors")
    return Described(
        one_line(model_name(folder)), said_text(licence),
        config, tokenizer, defaults, unused, base, facts,
    )  # fmt: skip


def said_text(value: object) -> str | None:
    """A name or licence that a file says, fit to be printed; None where it says none."""
    return one_line(value) if isinstance(value, str) and value else None


def _facts(file: TensorFile, architecture: str, kind: SourceKind) -> SourceFacts:
    types = {name: (held.tensors, held.nbytes) for name, held in file.types().items()}
    return SourceFacts(architecture, kind, types, file.size)


def _check_vocabulary(tokenizer: Tokenizer, config: ModelConfig, path: Path) -> None:
    if tokenizer.vocab_size > config.vocab_size:
        raise DataError(f"has {tokenizer.vocab_size} tokens but the model weights for {config.vocab_size}", path=path)


def _defaults(values: Mapping[str, object], names: Mapping[str, str], path: Path) -> dict[str, Any]:
    """Generation defaults by the names of SamplingParams, each checked; names: theirs by the source's."""
    defaults: dict[str, Any] = {}
    for key, name in names.items():
        value: Any = values.get(key)
        if value is None:
            continue
        if name == "top_k" and isinstance(value, int) and value < 0:
            value = 0  # "every token" in llama.cpp and vLLM
        try:
            SamplingParams(**{name: value})
        except ParameterError as error:
            raise DataError(f"{key}: {error}", path=path) from None
        defaults[name] = value
    return defaults


def _hub_defaults(values: Mapping[str, object], path: Path) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Of generation_config.json: the defaults, and those that would change the text and that Kvik does not follow.

    Where it says not to sample, the penalties stay and the filters do nothing.
    """
    sampled = values.get("do_sample")
    if sampled is not None and not isinstance(sampled, bool):
        raise DataError(f"do_sample must be true or false, got {repr(sampled)[:60]}", path=path)
    defaults = _defaults(values, _HUB_SAMPLING, path)
    unused = tuple(
        f"{key}={repr(values[key])[:40]}"
        for key, neutral in _HUB_NEUTRAL.items()
        if values.get(key) is not None and values[key] != neutral
    )
    if sampled is False:
        defaults = {"temperature": 0.0} | {name: defaults[name] for name in _HUB_PENALTIES if name in defaults}
    return defaults, unused


def _readme_licence(path: Path) -> str | None:
    """The licence in the front matter of a model card, as `license: apache-2.0` or a list of one; None without.

    A card that cannot be read says no licence: the model runs without it.
    """
    try:
        with open(open_regular(path), "rb") as file:
            text = file.read(MAX_README_BYTES).decode("utf-8", "replace")
    except (DataError, OSError):
        return None
    front = re.match(r"---\r?\n(.*?)\n---", text, re.DOTALL)
    found = (
        re.search(r"^license:[ \t]*(?:\r?\n[ \t]*-[ \t]*)?([\w.+-]{1,64})[ \t]*\r?$", front[1], re.M) if front else None
    )
    return found[1] if found else None
