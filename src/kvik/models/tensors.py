"""What a source's files are, and where they keep the tensors of a model's definition."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from kvik.errors import DataError
from kvik.models.config import ModelConfig, Piece, TensorSpec
from kvik.weights.packing import Part, WantedTensor
from kvik.weights.tensor_file import TensorFile

__all__ = [
    "SourceFacts",
    "SourceKind",
    "base_of",
    "has_own_head",
    "open_source",
    "refuse_unused",
    "source_kind",
    "wanted_tensors",
]

SourceKind = Literal["gguf", "safetensors"]

# Buffers that old files keep and definitions compute themselves.
_BUFFERS = re.compile(r".*\.\d+\.(self_attn\.rotary_emb\.inv_freq|attn\.(masked_)?bias|attn_rot_embd\.weight)")
_HEAD = "lm_head."


@dataclass(frozen=True)
class SourceFacts:
    """What the files themselves are, before Kvik makes anything of them.

    Attributes:
        architecture: as the source says it (general.architecture, or config.json's architectures).
        kind: "gguf" or "safetensors".
        tensor_types: for each type, how many tensors there are and their bytes.
        nbytes: of the files with tensors.
    """

    architecture: str
    kind: SourceKind
    tensor_types: Mapping[str, tuple[int, int]]
    nbytes: int


def source_kind(path: Path) -> SourceKind:
    """A folder is one of safetensors, a file GGUF: the model store resolves to no other."""
    return "safetensors" if path.is_dir() else "gguf"


def open_source(path: Path) -> TensorFile:
    """The source's tensors. Raises DataError."""
    if source_kind(path) == "safetensors":
        from kvik.weights.safetensors import read_safetensors

        return read_safetensors(path)
    from kvik.weights.gguf import read_gguf

    return read_gguf(path)


def wanted_tensors(specs: Iterable[TensorSpec], base: str | None) -> list[WantedTensor]:
    """Where the source keeps the tensors of a definition. base: None for GGUF, else that of a safetensors folder.

    The rule for names of a folder: what stands before the embedding's own name in the files stands there in place of
    what the definition has before it, in every name that begins so. Checkpoints of a bare model lack the prefix
    ("wte.weight" for "transformer.wte.weight"), those of a larger one have more of it. Where that is only more in front
    ("language_model.model." for "model."), the other names, the head's, have the same in front.
    """
    specs = list(specs)
    if base is None:
        return [WantedTensor(s.name, _parts(s.gguf), s.shape, s.permuted_heads, keep_f32=s.keep_f32) for s in specs]
    own, _ = _embedding_name(specs)
    outer = _outer(base, own)

    def renamed(part: Part) -> Part:
        return part._replace(name=base + part.name[len(own) :] if part.name.startswith(own) else outer + part.name)

    return [
        WantedTensor(
            s.name, tuple(renamed(p) for p in _parts(s.hf)), s.shape, offset=s.hf_offset, keep_f32=s.keep_f32
        )
        for s in specs
    ]  # fmt: skip


def _parts(where: str | Piece | tuple[Piece, ...]) -> tuple[Part, ...]:
    if isinstance(where, str):
        return (Part(where),)
    pieces = (where,) if isinstance(where, Piece) else where
    return tuple(Part(*piece) for piece in pieces)


def _embedding_name(specs: Sequence[TensorSpec]) -> tuple[str, str]:
    """The definition's base prefix ("model.") and the embedding's name after it."""
    name = next(_parts(s.hf)[0].name for s in specs if s.name == "embed")
    base, dot, rest = name.partition(".")
    return base + dot, rest


def _outer(base: str, own: str) -> str:
    return base.removesuffix(own) if base.endswith("." + own) else ""


def base_of(names: Iterable[str], specs: Sequence[TensorSpec], path: Path) -> str:
    """What stands before the embedding's own name in a folder; DataError where there are several embeddings."""
    own, rest = _embedding_name(specs)
    found = [n[: len(n) - len(rest)] for n in names if n == rest or n.endswith("." + rest)]
    if own in found or not found:  # with no embedding at all, packing names what is missing
        return own
    if len(found) > 1:
        raise DataError(f"has several embeddings: {', '.join(base + rest for base in found[:4])}", path=path)
    return found[0]


def has_own_head(file: TensorFile, specs: Sequence[TensorSpec], base: str) -> bool:
    """Whether a folder keeps an output head with other values than the embedding's.

    transformers 5 does not tie such a model, whatever its configuration says, and neither does Kvik.
    """
    own, rest = _embedding_name(specs)
    head, embedding = _outer(base, own) + _HEAD + "weight", base + rest
    if head not in file.tensors or embedding not in file.tensors:
        return False
    one, other = file.tensors[head], file.tensors[embedding]
    if one.type != other.type or one.shape != other.shape:  # of another shape it is then refused as a misfit
        return True
    return not np.array_equal(file.data(head), file.data(embedding))


def refuse_unused(file: TensorFile, specs: Sequence[TensorSpec], config: ModelConfig, base: str | None) -> None:
    """DataError for a tensor of the model that its definition does not name: a bias, a norm, a layer more.

    The answers would be others than the model's. Left alone are buffers, the copy that a tied head is of the embedding
    and, in a folder, what is outside the base: the other parts of a larger model (of a vision tower, say).
    """
    used = {part.name for want in wanted_tensors(specs, base) for part in want.parts}
    if config.rope is not None and config.rope.divisors is not None:
        used.add("rope_freqs.weight")
    inside: tuple[str, ...] = ("",)
    if base is not None:
        head = _outer(base, _embedding_name(specs)[0]) + _HEAD
        inside = (base, head)
        if config.tied_embeddings:
            used.add(head + "weight")
    for name, (path, offset) in file.places().items():
        if name not in used and name.startswith(inside) and not _BUFFERS.fullmatch(name):
            what = f"has no place in a {config.family} model of {config.num_layers} layers, and would be ignored"
            raise DataError(what, path=path, tensor=name, offset=offset)
