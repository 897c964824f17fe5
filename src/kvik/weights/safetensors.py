"""A bounded, memory-mapped reader of safetensors folders: one model.safetensors, or shards that an index names.

A file is 8 bytes that give the header's length (little-endian), the header (JSON), and the tensors' bytes, which must
cover the rest of the file exactly. Like GGUF files these come from strangers: any folder ends in a `SafetensorsFolder`
or in one `DataError` naming file, tensor and byte, in time linear in the headers and within twice the files' size plus
64 MiB of memory. Nothing is unpickled and nothing is run. Format: the README of the safetensors project.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvik.errors import DataError
from kvik.weights.ggml_types import GGMLType
from kvik.weights.json_text import Scanner
from kvik.weights.sources import INDEX, SINGLE
from kvik.weights.tensor_file import Held, StoredTensor, TensorFile, map_file

__all__ = ["SafetensorsFolder", "read_safetensors", "shards_of"]

MAX_HEADER_BYTES = 100_000_000  # by the reference implementation
MAX_INDEX_BYTES = 1 << 26
MAX_SHARDS = 4096
MAX_NAME_BYTES = 1024
MAX_DIMENSIONS = 8
MAX_ELEMENTS = 1 << 48

_OBJECT_BYTES = 48 << 20  # what a header may cost as Python objects, beside as much as its file has
_TENSOR_BYTES = 800
_ENTRY_BYTES = 300

_LENGTH = struct.Struct("<Q")
_TYPES = {"F32": GGMLType.F32, "F16": GGMLType.F16, "BF16": GGMLType.BF16}
_BITS = {
    "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32,
    "C64": 64, "U64": 64, "I64": 64, "F64": 64,
}  # fmt: skip


class _Other(NamedTuple):
    """A tensor of a dtype that Kvik does not read: listed, and refused where a model needs it."""

    dtype: str
    path: Path
    offset: int
    nbytes: int


class SafetensorsFolder(TensorFile):
    """The open files of a folder. Make one with `read_safetensors`; `tensors` are those of types that Kvik reads."""

    def __init__(
        self,
        path: Path,
        tensors: Mapping[str, StoredTensor],
        others: Mapping[str, _Other],
        maps: Mapping[Path, NDArray[np.uint8]],
    ) -> None:
        super().__init__(path, tensors, maps)
        self._others = others

    def tensor(self, name: str) -> StoredTensor:
        other = self._others.get(name)
        if other is not None:
            raise self._unreadable(name, other.dtype, other.path, other.offset)
        return super().tensor(name)

    def places(self) -> dict[str, tuple[Path, int]]:
        return super().places() | {name: (other.path, other.offset) for name, other in self._others.items()}

    def _missing(self, name: str) -> DataError:
        index = self.path / INDEX
        named = index if index.exists() and not (self.path / SINGLE).exists() else self.path / SINGLE
        return DataError(f"is missing; there are {len(self.tensors)} tensors", path=named, tensor=name)

    def types(self) -> dict[str, Held]:
        held = super().types()
        for other in self._others.values():
            before = held.get(other.dtype, Held(0, 0))
            held[other.dtype] = Held(before.tensors + 1, before.nbytes + other.nbytes)
        return held

    def readable(self) -> list[str]:
        return list(_TYPES)


def read_safetensors(folder: str | os.PathLike[str]) -> SafetensorsFolder:
    """Open a folder's model.safetensors or, where it has none, the shards its index names. No tensor data is read.

    Links are followed (the hub's own cache is made of them) to regular files only. Raises DataError. As with every
    memory map, a file that is shortened while it is open ends the process.
    """
    where = Path(folder)
    if os.path.lexists(where / SINGLE):
        shards = {SINGLE: set[str]()}
    elif os.path.lexists(where / INDEX):
        shards = {}
        for name, shard in shards_of(where / INDEX).items():
            shards.setdefault(shard, set()).add(name)
    else:
        raise DataError(f"holds neither {SINGLE} nor {INDEX}", path=where)
    tensors: dict[str, StoredTensor] = {}
    others: dict[str, _Other] = {}
    maps: dict[Path, NDArray[np.uint8]] = {}
    for shard, promised in shards.items():
        path = where / shard
        if shard != SINGLE and not os.path.lexists(path):
            raise DataError(f"the shard is missing, which {INDEX} names", path=path)
        parser = _Parser(path)
        parser.read()
        for name in promised:
            if name not in parser.tensors and name not in parser.others:
                raise DataError(f"{INDEX} says it is here, and it is not", path=path, tensor=name)
        for name, found in (parser.tensors | parser.others).items():
            before = tensors.get(name) or others.get(name)
            if before is not None:
                raise DataError(f"stands in {before.path.name} too", path=path, tensor=name, offset=found.offset)
        tensors |= parser.tensors
        others |= parser.others
        maps[path] = np.frombuffer(parser.source, np.uint8)
    return SafetensorsFolder(where, tensors, others, maps)


def shards_of(index: Path) -> dict[str, str]:
    """The file of each tensor, as an index says. Every file name is checked to be a plain name in the same folder."""
    source = map_file(index)
    if len(source) > MAX_INDEX_BYTES:
        raise DataError(f"has {len(source)} bytes, at most {MAX_INDEX_BYTES} are allowed", path=index)
    scanner = Scanner(source, index, 0, len(source), "the index")
    found: dict[str, str] | None = None
    for key, at in scanner.members():
        if key == "weight_map":
            if found is not None:
                scanner.fail("weight_map stands twice", at)
            found = _weight_map(scanner)
        else:
            scanner.skip_value()
    scanner.finish()
    if not found:
        raise DataError("has no weight_map with a tensor in it", path=index)
    return found


def _weight_map(scanner: Scanner) -> dict[str, str]:
    found: dict[str, str] = {}
    shards: dict[str, str] = {}  # one string a shard, however many tensors name it
    left = len(scanner.source) + _OBJECT_BYTES
    for name, at in scanner.members():
        _check_name(scanner, name, at)
        if name in found:
            scanner.fail("stands twice", at, name)
        left -= _ENTRY_BYTES + len(name)
        if left < 0:
            scanner.fail("names too many tensors for a file of this size", at)
        if scanner.next() != b'"':
            scanner.fail("its shard must be the name of a file", tensor=name)
        value_at = scanner.position
        shard = scanner.string()
        plain = "/" not in shard and "\\" not in shard and "\0" not in shard and len(shard) <= 255
        if not plain or shard.startswith(".") or not shard.endswith(".safetensors"):
            shown = repr(shard[:80])
            scanner.fail(f"its shard {shown} is no name of a .safetensors file in this folder", value_at, name)
        found[name] = shards.setdefault(shard, shard)
        if len(shards) > MAX_SHARDS:
            scanner.fail(f"names more than {MAX_SHARDS} shards", value_at)
    return found


def _check_name(scanner: Scanner, name: str, at: int) -> None:
    if not name:
        scanner.fail("a tensor has no name", at)
    if len(name) > MAX_NAME_BYTES:
        scanner.fail(f"a tensor's name has {len(name)} characters, at most {MAX_NAME_BYTES} are allowed", at)


class _Place(NamedTuple):
    """Where a tensor lies in the data, and where the header says so."""

    begin: int
    end: int
    name: str
    at: int


class _Parser:
    """One pass over one file's header."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.source = map_file(path)
        self.tensors: dict[str, StoredTensor] = {}
        self.others: dict[str, _Other] = {}
        self._places: list[_Place] = []
        self._left = len(self.source) + _OBJECT_BYTES

    def read(self) -> None:
        size = len(self.source)
        if size < _LENGTH.size:
            raise DataError(f"truncated: has {size} bytes, the header's length alone takes 8", path=self.path, offset=0)
        (length,) = _LENGTH.unpack_from(self.source)
        if length > MAX_HEADER_BYTES:
            message = f"the header has {length} bytes, at most {MAX_HEADER_BYTES} are allowed"
            raise DataError(message, path=self.path, offset=0)
        self._data = _LENGTH.size + length
        if self._data > size:
            message = f"truncated: the header has {length} bytes, {size - _LENGTH.size} are left"
            raise DataError(message, path=self.path, offset=0)
        scanner = Scanner(self.source, self.path, _LENGTH.size, self._data, "the header")
        if self.source[8 : min(9, self._data)] != b"{":
            scanner.fail("the header does not begin with '{'")
        metadata = False
        for name, at in scanner.members():
            if name != "__metadata__":
                self._tensor(scanner, name, at)
                continue
            if metadata:
                scanner.fail("__metadata__ stands twice", at)
            metadata = True
            self._skip_metadata(scanner)
        scanner.finish()
        self._check_places(size - self._data)

    def _skip_metadata(self, scanner: Scanner) -> None:
        """Text by text; nothing in it is needed."""
        for _ in scanner.members():
            if scanner.next() != b'"':
                scanner.fail("__metadata__ must hold text by text")
            scanner.skip_string()

    def _tensor(self, scanner: Scanner, name: str, at: int) -> None:
        _check_name(scanner, name, at)
        if name in self.tensors or name in self.others:
            scanner.fail("stands twice", at, name)
        self._left -= _TENSOR_BYTES + len(name)
        if self._left < 0:
            scanner.fail("the header names too many tensors for a file of this size", at)
        entry = scanner.small_object()
        if set(entry) != {"dtype", "shape", "data_offsets"}:
            scanner.fail(f"has the fields {sorted(entry)}, must have dtype, shape and data_offsets", at, name)
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or not 0 < len(dtype) <= 32 or not dtype.isprintable():
            scanner.fail(f"its dtype must be a name, got {repr(dtype)[:60]}", at, name)
        if not _counts(shape) or len(shape) > MAX_DIMENSIONS:
            message = f"its shape must be at most {MAX_DIMENSIONS} numbers of 0 or more, got {repr(shape)[:80]}"
            scanner.fail(message, at, name)
        if not _counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
            message = f"its data_offsets must be a begin and an end not before it, got {repr(offsets)[:80]}"
            scanner.fail(message, at, name)
        begin, end = offsets
        data_bytes = len(self.source) - self._data
        if end > data_bytes:
            scanner.fail(f"ends at {end} of the data, which has {data_bytes} bytes: truncated or wrong", at, name)
        if math.prod(max(n, 1) for n in shape) > MAX_ELEMENTS:
            scanner.fail(f"its shape {shape} is impossibly large", at, name)
        bits = _BITS.get(dtype)
        if bits is not None and math.prod(shape) * bits != 8 * (end - begin):
            need = f"{math.prod(shape) * bits / 8:g}"
            message = f"shape {shape} of {dtype} needs {need} bytes, its data_offsets hold {end - begin}"
            scanner.fail(message, at, name)
        offset = self._data + begin
        if dtype in _TYPES:
            self.tensors[name] = StoredTensor(name, _TYPES[dtype], tuple(shape), offset, end - begin, self.path)
        else:
            self.others[name] = _Other(dtype, self.path, offset, end - begin)
        self._places.append(_Place(begin, end, name, at))

    def _check_places(self, data_bytes: int) -> None:
        """The tensors must cover the data from its first byte to its last, each byte once."""
        end, last = 0, None
        for place in sorted(self._places):
            offset = self._data + place.begin
            if place.begin < end:
                raise DataError(f"overlaps tensor {last!r}", path=self.path, tensor=place.name, offset=offset)
            if place.begin > end:
                message = f"begins {place.begin - end} bytes after what is before it: the data has a hole"
                raise DataError(message, path=self.path, tensor=place.name, offset=offset)
            end, last = place.end, place.name
        if end != data_bytes:
            message = f"{data_bytes - end} bytes after the last tensor belong to none"
            raise DataError(message, path=self.path, offset=self._data + end)


def _counts(value: object) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 1 << 64 for n in value)
