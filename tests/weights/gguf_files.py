"""Small GGUF files for tests: written by hand with every field's place known, and by the `gguf` package."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kvik.weights.ggml_types import TRAITS, GGMLType

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
CODES = {U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "B", U64: "Q", I64: "q", F64: "d"}


class Array(NamedTuple):
    """Value of an ARRAY: the elements' type, and the elements (Arrays themselves when kind is ARRAY)."""

    kind: int
    values: Sequence[Any]


class Key(NamedTuple):
    name: str
    kind: int
    value: Any


class Tensor(NamedTuple):
    """shape in numpy order; data as many bytes as it needs (not checked: tests also want wrong ones)."""

    name: str
    type: int
    shape: tuple[int, ...]
    data: bytes


class Field(NamedTuple):
    """Where a number of the header stands. what: magic, version, count, length, type, rank, dim, offset or value."""

    what: str
    offset: int
    size: int


@dataclass
class Built:
    data: bytes = b""
    fields: list[Field] = field(default_factory=list)
    header_bytes: int = 0
    data_offsets: dict[str, int] = field(default_factory=dict)

    def at(self, what: str, index: int = 0) -> Field:
        return [f for f in self.fields if f.what == what][index]

    def put(self, what: str, index: int, value: int) -> bytes:
        """The file with one field changed."""
        where = self.at(what, index)
        return self.data[: where.offset] + value.to_bytes(where.size, "little") + self.data[where.offset + where.size :]


class _Writer:
    def __init__(self) -> None:
        self.out = bytearray()
        self.fields: list[Field] = []

    def number(self, what: str, code: str, value: Any) -> None:
        self.fields.append(Field(what, len(self.out), struct.calcsize(code)))
        self.out += struct.pack("<" + code, value)

    def text(self, text: str | bytes) -> None:
        raw = text.encode() if isinstance(text, str) else text
        self.number("length", "Q", len(raw))
        self.out += raw

    def value(self, kind: int, value: Any) -> None:
        if kind == STRING:
            self.text(value)
        elif kind == ARRAY:
            self.number("type", "I", value.kind)
            self.number("length", "Q", len(value.values))
            for item in value.values:
                self.value(value.kind, item)
        else:
            self.number("value", CODES[kind], value)


def build(keys: Sequence[Key] = (), tensors: Sequence[Tensor] = (), *, version: int = 3, alignment: int = 32) -> Built:
    """A GGUF file by hand. An alignment other than 32 needs a `general.alignment` among the keys to be well-formed."""
    w = _Writer()
    w.number("magic", "4s", b"GGUF")
    w.number("version", "I", version)
    w.number("count", "Q", len(tensors))
    w.number("count", "Q", len(keys))
    for key in keys:
        w.text(key.name)
        w.number("type", "I", key.kind)
        w.value(key.kind, key.value)
    relative = 0
    offsets = []
    for tensor in tensors:
        w.text(tensor.name)
        w.number("rank", "I", len(tensor.shape))
        for size in reversed(tensor.shape):
            w.number("dim", "Q", size)
        w.number("type", "I", int(tensor.type))
        w.number("offset", "Q", relative)
        offsets.append(relative)
        relative += -(-len(tensor.data) // alignment) * alignment
    header_bytes = len(w.out)
    w.out += bytes(-len(w.out) % alignment)
    begin = len(w.out)
    for tensor, offset in zip(tensors, offsets, strict=True):
        w.out += bytes(begin + offset - len(w.out)) + tensor.data
    places = {tensor.name: begin + offset for tensor, offset in zip(tensors, offsets, strict=True)}
    return Built(bytes(w.out), w.fields, header_bytes, places)


WITH_MINIMUM = (GGMLType.Q4_1, GGMLType.Q5_1, GGMLType.Q4_K, GGMLType.Q5_K)


def random_bytes(kind: GGMLType, shape: tuple[int, ...], rng: np.random.Generator) -> bytes:
    """Random data of a supported type: standard normal weights, or random quants with finite scales and minimums."""
    elements = int(np.prod(shape))
    values = rng.standard_normal(elements).astype(np.float32)
    if kind == GGMLType.F32:
        return values.tobytes()
    if kind == GGMLType.F16:
        return values.astype(np.float16).tobytes()
    if kind == GGMLType.BF16:
        return (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    block_elements, block_bytes = TRAITS[kind]
    blocks = rng.integers(0, 256, (elements // block_elements, block_bytes), dtype=np.uint8)
    numbers = 2 if kind in WITH_MINIMUM else 1
    scales = rng.standard_normal((len(blocks), numbers)).astype(np.float16)
    at = 208 if kind == GGMLType.Q6_K else 0
    blocks[:, at : at + 2 * numbers] = scales.view(np.uint8)
    return blocks.tobytes()


def block_width(kind: GGMLType) -> int:
    """The least width of a row, at least 32, that every type has whole blocks in."""
    return max(32, TRAITS[kind].block_elements)


def tensor(name: str, kind: GGMLType, shape: tuple[int, ...], rng: np.random.Generator) -> Tensor:
    return Tensor(name, kind, shape, random_bytes(kind, shape, rng))


def write_with_package(path: Path, keys: Mapping[str, Any], tensors: Sequence[Tensor]) -> None:
    """The same through `gguf.GGUFWriter`: the keys get the types it infers."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    for name, value in keys.items():
        kind = gguf.GGUFValueType.get_type(value)
        sub = gguf.GGUFValueType.get_type(value[0]) if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, value, kind, sub)
    for t in tensors:
        block_elements, block_bytes = TRAITS[GGMLType(t.type)]
        row_bytes = t.shape[-1] // block_elements * block_bytes
        raw = np.frombuffer(t.data, np.uint8).reshape(*t.shape[:-1], row_bytes)
        writer.add_tensor(t.name, raw, raw_dtype=gguf.GGMLQuantizationType(int(t.type)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
