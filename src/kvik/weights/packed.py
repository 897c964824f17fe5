"""The file of packed weights in the model store: a checked header, then tensors ready to compute with, memory-mapped.

::

    magic "KVIKPACK", version u32, header length u32, header checksum u64, JSON header, padding to 4096, tensors each at
    a multiple of 4096

Every tensor carries a checksum: a damaged file is found at load and packed again.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvik import _native
from kvik.errors import DataError
from kvik.weights.fetch import Progress
from kvik.weights.files import atomic_write, open_regular
from kvik.weights.layouts import Layout, packed_bytes

__all__ = ["PackedTensor", "PackedWeights", "PackedWriter", "read_packed"]

MAGIC = b"KVIKPACK"
VERSION = 3
ALIGNMENT = 4096
_PREFIX = struct.Struct("<8sIIQ")
_MAX_HEADER = 1 << 26


@dataclass(frozen=True)
class PackedTensor:
    """A matrix [rows, columns] in a native layout, or a vector [1, columns] in f32 padded to 32."""

    name: str
    layout: Layout
    rows: int
    columns: int
    vector: bool
    data: NDArray[np.uint8]

    @property
    def nbytes(self) -> int:
        return self.data.nbytes

    def floats(self) -> NDArray[np.float32]:
        """The weights as the layout means them: [rows, columns], or [columns] of a vector."""
        if self.vector:
            return self.data.view(np.float32)[: self.columns]
        out = np.empty((self.rows, -(-self.columns // 32) * 32), np.float32)
        _native.unpack(int(self.layout), self.data, self.columns, out)
        return out[:, : self.columns]


@dataclass(frozen=True)
class PackedWeights:
    """Tensors by name, and what was noted when they were packed."""

    tensors: Mapping[str, PackedTensor]
    notes: Mapping[str, Any]

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors.values())

    @property
    def matrix_bytes(self) -> int:
        """Of the matrices one decode step reads: all but an embedding table that is not also the output head."""
        untied = "head" in self.tensors
        return sum(t.nbytes for n, t in self.tensors.items() if not t.vector and not (untied and n == "embed"))

    def bytes_by_layout(self) -> dict[str, int]:
        """Bytes by the layouts' names; "vector" for what is none of them."""
        found: dict[str, int] = {}
        for tensor in self.tensors.values():
            name = "vector" if tensor.vector else tensor.layout.name.lower()
            found[name] = found.get(name, 0) + tensor.nbytes
        return found


def _size(layout: Layout, rows: int, columns: int, vector: bool) -> int:
    return -(-columns // 32) * 128 if vector else packed_bytes(layout, rows, columns)


class PackedWriter:
    """Collects the directory of a packed file, then writes it tensor by tensor."""

    def __init__(self) -> None:
        self._entries: list[dict[str, Any]] = []
        self._end = 0

    def plan(self, name: str, layout: Layout, rows: int, columns: int, vector: bool) -> None:
        """Reserve a tensor's place. Offsets count from the end of the header."""
        size = _size(layout, rows, columns, vector)
        entry = {"name": name, "layout": int(layout), "rows": rows, "columns": columns, "vector": vector}
        self._entries.append(entry | {"offset": self._end, "checksum": ""})
        self._end += -(-size // ALIGNMENT) * ALIGNMENT

    def write(self, path: Path, tensors: Any, notes: Mapping[str, Any]) -> None:
        """Write the file. tensors yields the planned tensors' bytes in order; notes may be filled until the last of them.

        Notes must stay below about 64 bytes a tensor more than they are at the start.
        """
        room = len(json.dumps({"tensors": self._entries, "notes": dict(notes)})) + 64 * len(self._entries) + 4096
        start = -(-(room + _PREFIX.size) // ALIGNMENT) * ALIGNMENT
        with atomic_write(path, need=start + self._end) as file:
            for entry, data in zip(self._entries, tensors, strict=True):
                file.seek(start + entry["offset"])
                file.write(data)
                entry["checksum"] = f"{_native.checksum(data):016x}"
            file.truncate(start + self._end)  # the last tensor's padding
            header = json.dumps({"tensors": self._entries, "notes": dict(notes), "start": start}).encode()
            checksum = _native.checksum(np.frombuffer(header, np.uint8))
            file.seek(0)
            file.write(_PREFIX.pack(MAGIC, VERSION, len(header), checksum) + header)


def read_packed(path: Path, verify: bool = True, progress: Progress | None = None) -> PackedWeights:
    """Map a packed file. DataError where it is damaged, of another version, or not there.

    verify: read every tensor and compare its checksum; progress hears of it as stage "load".
    """
    descriptor = open_regular(path)
    try:
        size = os.fstat(descriptor).st_size
        if size < _PREFIX.size:
            raise DataError("packed weights are truncated", path=path)
        mapped = mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
    finally:
        os.close(descriptor)
    whole = np.frombuffer(mapped, np.uint8)
    magic, version, length, checksum = _PREFIX.unpack_from(mapped)
    if magic != MAGIC or version != VERSION:
        raise DataError("not packed weights of this version", path=path)
    if length > min(_MAX_HEADER, size - _PREFIX.size):
        raise DataError("packed weights are truncated", path=path)
    header = whole[_PREFIX.size : _PREFIX.size + length]
    if _native.checksum(header) != checksum:
        raise DataError("the header of the packed weights is damaged", path=path)
    parsed = json.loads(header.tobytes())
    tensors = {}
    for e in parsed["tensors"]:
        if progress is not None:
            progress("load", parsed["start"] + e["offset"], size)
        layout, begin = Layout(e["layout"]), parsed["start"] + e["offset"]
        data = whole[begin : begin + _size(layout, e["rows"], e["columns"], e["vector"])]
        damaged = data.nbytes != _size(layout, e["rows"], e["columns"], e["vector"])
        if damaged or (verify and f"{_native.checksum(data):016x}" != e["checksum"]):
            raise DataError("packed weights are damaged", path=path, tensor=e["name"], offset=begin)
        tensors[e["name"]] = PackedTensor(e["name"], layout, e["rows"], e["columns"], e["vector"], data)
    if progress is not None:
        progress("load", size, size)
    return PackedWeights(tensors, parsed["notes"])
