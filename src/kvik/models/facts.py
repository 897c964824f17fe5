"""What a model's source holds and how it would run, from headers and configuration: nothing is packed for it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvik.cache.layout import kv_layout
from kvik.errors import DataError, ParameterError, one_line
from kvik.models import MODELS
from kvik.models.config import ModelConfig
from kvik.models.reading import MAX_JSON_BYTES, Described, describe, said_text
from kvik.models.tensors import open_source, wanted_tensors
from kvik.text.chat_template import ChatTemplate
from kvik.text.tokenizer import Tokenizer
from kvik.weights.dequantize import SUPPORTED
from kvik.weights.gguf import GGUFFile
from kvik.weights.json_text import read_json_object
from kvik.weights.layouts import Layout, Weights, layout_for
from kvik.weights.packed import packed_size
from kvik.weights.packing import Packer, PlannedTensor, WantedTensor
from kvik.weights.sources import model_name
from kvik.weights.tensor_file import TensorFile

__all__ = ["ModelFacts", "TemplateFacts", "TensorGroup", "read_facts"]

UNREADABLE, UNPACKED, VECTOR = "unreadable", "unpacked", "vector"

_MARK = "Kvik asks which roles there are"
_CONVERSATIONS: Mapping[str, tuple[str, ...]] = {
    "system": ("system", "user"),
    "user": ("user",),
    "assistant": ("user", "assistant", "user"),
    "tool": ("user", "assistant", "tool"),
}


@dataclass
class TensorGroup:
    """Tensors of one type that go to one layout.

    Attributes:
        type: as the file calls it.
        layout: "vector" is f32, whatever the matrices are; "unpacked" are buffers, which the definition computes itself;
            "unreadable" are those of a type Kvik does not read; None where the definition is not known.
        tensors, bytes: of the file.
        packed_bytes: in the layout, padding, scales and minimums included.
        exact: whether the layout keeps every weight; None where that is seen only when they are packed.
        largest_error: the largest |packed - file|, where it was packed.
    """

    type: str
    layout: str | None
    tensors: int = 0
    bytes: int = 0
    packed_bytes: int = 0
    exact: bool | None = None
    largest_error: float | None = None


@dataclass(frozen=True)
class TemplateFacts:
    """A chat template: where it begins, and the roles it writes; refused says why it cannot be used."""

    first_line: str
    roles: tuple[str, ...] = ()
    refused: str | None = None


@dataclass(frozen=True)
class ModelFacts:
    """What is known of a source without packing it.

    Attributes:
        name, license, defaults, unused_defaults: as in `Described`.
        path: the source; bytes: of its files with tensors.
        architecture: as the source says it; family: what runs it.
        refused: why it does not run. Where that is known before its sizes are, these and what follows them is missing.
        parameters: weights of all tensors.
        weights: the option the layouts are for.
        groups: the tensors by type and layout.
        packed_bytes: of all layouts together.
        config: the sizes.
        kv_bytes_per_token: keys and values in f16.
        vocabulary: tokens the tokenizer has; config.vocab_size are those the weights have.
    """

    name: str
    path: Path
    bytes: int
    architecture: str | None
    family: str | None
    refused: str | None
    parameters: int
    weights: Weights
    groups: tuple[TensorGroup, ...]
    packed_bytes: int | None
    config: ModelConfig | None = None
    kv_bytes_per_token: int | None = None
    vocabulary: int | None = None
    chat_template: TemplateFacts | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)
    unused_defaults: tuple[str, ...] = ()
    license: str | None = None


def read_facts(path: Path, weights: Weights, errors: Mapping[str, float] | None = None) -> ModelFacts:
    """The facts of a GGUF file or a folder of safetensors.

    errors: by tensor of the model, those above 0, noted when this form was packed; None where it was not.
    Raises DataError where no tensor can be read; what else is wrong or unsupported is told in the facts.
    """
    with open_source(path) as file:
        try:
            said = describe(path)
        except DataError as error:
            return _refused(file, weights, str(error))
        return _described(file, weights, said, errors)


def _refused(file: TensorFile, weights: Weights, reason: str) -> ModelFacts:
    """What can be said of a source that Kvik does not run."""
    said: Mapping[str, object] = file.metadata if isinstance(file, GGUFFile) else {}
    groups = (TensorGroup(name, None, held.tensors, held.nbytes) for name, held in file.types().items())
    return ModelFacts(
        name=said_text(said.get("general.name")) or one_line(model_name(file.path)), path=file.path, bytes=file.size,
        architecture=said_text(said.get("general.architecture")) or _folder_architecture(file.path), family=None,
        refused=reason, parameters=sum(math.prod(tensor.shape) for tensor in file.tensors.values()), weights=weights,
        groups=tuple(groups), packed_bytes=None, license=said_text(said.get("general.license")),
    )  # fmt: skip


def _folder_architecture(folder: Path) -> str | None:
    """What config.json calls the architecture; None where even that cannot be read, which is the reason already."""
    try:
        names = read_json_object(folder / "config.json", MAX_JSON_BYTES).get("architectures")
    except DataError:
        return None
    return said_text(names[0]) if isinstance(names, list) and names else None


def _described(file: TensorFile, weights: Weights, said: Described, errors: Mapping[str, float] | None) -> ModelFacts:
    config = said.config
    specs = MODELS[config.family].tensors(config)
    groups, reason = _groups(file, weights, wanted_tensors(specs, said.base), errors)
    return ModelFacts(
        name=said.name, path=file.path, bytes=file.size, architecture=said.facts.architecture, family=config.family,
        refused=reason, parameters=sum(math.prod(spec.shape) for spec in specs), weights=weights, groups=groups,
        packed_bytes=None if reason else sum(group.packed_bytes for group in groups), config=config,
        kv_bytes_per_token=kv_layout(config, "f16").token_bytes, vocabulary=said.tokenizer.vocab_size,
        chat_template=_template(said.tokenizer), defaults=said.defaults, unused_defaults=said.unused_defaults,
        license=said.license,
    )  # fmt: skip


def _groups(
    file: TensorFile, weights: Weights, wanted: Sequence[WantedTensor], errors: Mapping[str, float] | None
) -> tuple[tuple[TensorGroup, ...], str | None]:
    """The tensors by type and layout, and why the first that does not fit does not."""
    packer = Packer(file, weights, threads=1)
    found: dict[tuple[str, str], TensorGroup] = {}
    used: set[str] = set()
    reason = None
    for want in wanted:
        try:
            plan = packer.plan(want)
        except DataError as error:
            reason = reason or str(error)
            continue
        kind = plan.sources[0].tensor.type.name
        layout = VECTOR if want.vector else plan.layout.name.lower()
        group = found.setdefault((kind, layout), TensorGroup(kind, layout, exact=True))
        names = {source.tensor.name for source in plan.sources}
        group.tensors += len(names - used)
        group.bytes += plan.source_bytes
        group.packed_bytes += packed_size(plan.layout, want.rows, want.columns, want.vector)
        _note_error(group, plan, errors)
        used |= names
    for tensor in file.tensors.values():
        if tensor.name not in used:
            layout = UNPACKED if tensor.type in SUPPORTED else UNREADABLE
            group = found.setdefault((tensor.type.name, layout), TensorGroup(tensor.type.name, layout))
            group.tensors += 1
            group.bytes += tensor.nbytes
    for kind, held in file.types().items():
        if not any(kind == of for of, _ in found):  # of a type that even the list of tensors has no name for
            found[kind, UNREADABLE] = TensorGroup(kind, UNREADABLE, held.tensors, held.nbytes)
    return tuple(found.values()), reason


def _note_error(group: TensorGroup, plan: PlannedTensor, errors: Mapping[str, float] | None) -> None:
    lossless = Layout.F32, layout_for("auto", int(plan.sources[0].tensor.type))
    if plan.layout in lossless:
        return
    if errors is None:
        group.exact = None
        return
    error = errors.get(plan.want.name, 0.0)
    group.exact = group.exact and not error
    group.largest_error = max(error, group.largest_error or 0.0)


def _template(tokenizer: Tokenizer) -> TemplateFacts | None:
    """The template's first line, and the roles whose words it writes, found by asking it."""
    template = ChatTemplate.of(tokenizer)
    if template is None:
        return None
    first = one_line(next((line.strip() for line in template.source.splitlines() if line.strip()), ""))
    try:
        return TemplateFacts(first, tuple(role for role in _CONVERSATIONS if _writes(template, role)))
    except DataError as error:
        return TemplateFacts(first, refused=str(error))


def _writes(template: ChatTemplate, role: str) -> bool:
    messages = [{"role": r, "content": _MARK if r == role else "words"} for r in _CONVERSATIONS[role]]
    try:
        return _MARK in template.render(messages, add_generation_prompt=False)
    except ParameterError:  # the template's own refusal
        return False
