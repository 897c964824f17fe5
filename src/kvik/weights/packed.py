"""The file of packed weights in the model store: tensors ready to compute with, memory-mapped, then their directory.

::

    magic "KVIKPACK", version u32, directory length u32, directory checksum u64, directory offset u64, zeros to 4096,
    tensors each at a multiple of 4096, JSON directory

The bytes between the first page and the directory carry a checksum for every block of 4 MiB, computed while they are
written and compared by several threads at load: a damaged file is found and packed again.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from kvik import _native
from kvik.errors import DataError
from kvik.files import atomic_write
from kvik.weights.fetch import Progress
from kvik.weights.layouts import Layout, packed_bytes
from kvik.weights.tensor_file import map_file

__all__ = ["PackedTensor", "PackedWeights", "PackedWriter", "read_packed"]

MAGIC = b"KVIKPACK"
VERSION = 4
ALIGNMENT = 4096
BLOCK = 1 << 22
_PREFIX = struct.Struct("<8sIIQQ")
_MAX_DIRECTORY = 1 << 26
_MAX_THREADS = 8  # more do not read faster


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
    """Tensors by name, and what was noted when they were packed: "weights" as asked for, "largest_error" by tensor.

    digest: of the file's directory, which has the checksums of all bytes.
    """

    tensors: Mapping[str, PackedTensor]
    notes: Mapping[str, Any]
    digest: str = ""

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors.values())

    def matrix_bytes(self, expert_share: float = 1.0) -> int:
        """Of the matrices one decode step reads: all but tables of which it reads a row.

        Those are the learned positions, and the embedding where it is not also the output head. expert_share: the part
        of the experts that one token goes through.
        """
        tables = {"positions", "embed"} if "head" in self.tensors else {"positions"}
        read = 0.0
        for name, tensor in self.tensors.items():
            if not tensor.vector and name not in tables:
                read += tensor.nbytes * (expert_share if ".experts_" in name else 1.0)
        return round(read)

    def bytes_by_layout(self) -> dict[str, int]:
        """Bytes by the layouts' names; "vector" for what is none of them."""
        found: dict[str, int] = {}
        for tensor in self.tensors.values():
            name = "vector" if tensor.vector else tensor.layout.name.lower()
            found[name] = found.get(name, 0) + tensor.nbytes
        return found


def packed_size(layout: Layout, rows: int, columns: int, vector: bool) -> int:
    return -(-columns // 32) * 128 if vector else packed_bytes(layout, rows, columns)


class PackedWriter:
    """Collects the directory of a packed file, then writes it as a stream."""

    def __init__(self) -> None:
        self._entries: list[dict[str, Any]] = []
        self._end = ALIGNMENT

    def plan(self, name: str, layout: Layout, rows: int, columns: int, vector: bool) -> None:
        """Reserve a tensor's place."""
        size = packed_size(layout, rows, columns, vector)
        entry = {"name": name, "layout": int(layout), "rows": rows, "columns": columns, "vector": vector}
        self._entries.append(entry | {"offset": self._end})
        self._end += -(-size // ALIGNMENT) * ALIGNMENT

    def write(self, path: Path, chunks: Iterable[NDArray[np.uint8]], notes: Mapping[str, Any]) -> None:
        """Write the file. chunks: the bytes of the planned tensors in order, each tensor's in one piece or more.

        A chunk is written while the next is made. notes are read after the last chunk.
        """
        with atomic_write(path, need=self._end) as file:
            file.seek(ALIGNMENT)
            sums = _Sums()
            self._write_tensors(file, sums, iter(chunks))
            checksums = sums.finish()
            entry = {"tensors": self._entries, "checksums": checksums, "notes": dict(notes)}
            directory = json.dumps(entry).encode()
            checksum = _native.checksum(np.frombuffer(directory, np.uint8))
            file.write(directory)
            file.seek(0)
            file.write(_PREFIX.pack(MAGIC, VERSION, len(directory), checksum, self._end).ljust(ALIGNMENT, b"\0"))

    def _write_tensors(self, file: IO[bytes], sums: _Sums, chunks: Iterator[NDArray[np.uint8]]) -> None:
        writing = _Behind()
        try:
            for e in self._entries:
                left = packed_size(Layout(e["layout"]), e["rows"], e["columns"], e["vector"])
                padding = -left % ALIGNMENT
                while left:
                    data = next(chunks, None)
                    if data is None or data.nbytes > left:
                        raise ValueError(f"{e['name']} has {left} bytes left to write, got {data}")
                    left -= data.nbytes
                    writing.start(file, sums, data)
                writing.start(file, sums, np.zeros(padding, np.uint8))
        finally:
            writing.wait()
        if next(chunks, None) is not None:
            raise ValueError("there are more bytes than planned")
        writing.check()


class _Behind:
    """Writes one chunk in a thread while the caller makes the next."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, file: IO[bytes], sums: _Sums, data: NDArray[np.uint8]) -> None:
        self.wait()
        self.check()
        thread = threading.Thread(target=self._write, args=(file, sums, data))
        try:
            thread.start()
            self._thread = thread
        except RuntimeError:  # the system gives no more threads
            self._write(file, sums, data)

    def _write(self, file: IO[bytes], sums: _Sums, data: NDArray[np.uint8]) -> None:
        try:
            sums.add(data)
            file.write(data.data)
        except BaseException as error:  # raised again by the caller's thread in `check`
            self._error = error

    def wait(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def check(self) -> None:
        if self._error is not None:
            raise self._error


class _Sums:
    """The checksum of every block of a stream, whatever the chunks it comes in."""

    def __init__(self) -> None:
        self._sums: list[str] = []
        self._carry = np.empty(BLOCK, np.uint8)
        self._held = 0

    def add(self, data: NDArray[np.uint8]) -> None:
        while data.size:
            if not self._held and data.size >= BLOCK:
                self._sums.append(_checksum(data[:BLOCK]))
                data = data[BLOCK:]
                continue
            part = data[: BLOCK - self._held]
            self._carry[self._held : self._held + part.size] = part
            self._held += part.size
            data = data[part.size :]
            if self._held == BLOCK:
                self._sums.append(_checksum(self._carry))
                self._held = 0

    def finish(self) -> list[str]:
        if self._held:
            self._sums.append(_checksum(self._carry[: self._held]))
            self._held = 0
        return self._sums


def _checksum(data: NDArray[np.uint8]) -> str:
    return f"{_native.checksum(data):016x}"


def read_packed(path: Path, verify: bool = True, progress: Progress | None = None) -> PackedWeights:
    """Map a packed file. DataError where it is damaged, of another version, or not there.

    verify: read every byte and compare the checksums, on several cores; progress hears of it as stage "load".
    """
    mapped = map_file(path)
    whole = np.frombuffer(mapped, np.uint8)
    if whole.size < ALIGNMENT:
        raise DataError("packed weights are truncated", path=path)
    magic, version, length, checksum, end = _PREFIX.unpack_from(mapped)
    if magic != MAGIC or version != VERSION:
        raise DataError("not packed weights of this version", path=path)
    if length > _MAX_DIRECTORY or end < ALIGNMENT or end + length != whole.size:
        raise DataError("packed weights are truncated", path=path)
    if _native.checksum(whole[end:]) != checksum or whole[_PREFIX.size : ALIGNMENT].any():
        raise DataError("the directory of the packed weights is damaged", path=path)
    directory = json.loads(whole[end:].tobytes())
    tensors = {}
    for e in directory["tensors"]:
        layout, begin = Layout(e["layout"]), e["offset"]
        data = whole[begin : begin + packed_size(layout, e["rows"], e["columns"], e["vector"])]
        tensors[e["name"]] = PackedTensor(e["name"], layout, e["rows"], e["columns"], e["vector"], data)
    if verify:
        mapped.madvise(mmap.MADV_WILLNEED)
        bad = _first_damage(whole[ALIGNMENT:end], directory["checksums"], progress)
        if bad is not None:
            at = ALIGNMENT + bad
            names = [e["name"] for e in directory["tensors"] if e["offset"] < at + BLOCK]
            raise DataError("packed weights are damaged", path=path, tensor=names[-1] if names else None, offset=at)
    return PackedWeights(tensors, directory["notes"], blake2b(whole[end:].data, digest_size=16).hexdigest())


def _first_damage(data: NDArray[np.uint8], checksums: list[str], progress: Progress | None) -> int | None:
    """Where the first block begins that has another checksum; None where all are right."""
    if len(checksums) != -(-data.size // BLOCK):
        return 0
    blocks = iter(range(len(checksums)))
    bad: list[int] = []

    def compare(report: bool) -> None:
        for i in blocks:  # the threads share it: each block goes to one
            if _checksum(data[i * BLOCK : (i + 1) * BLOCK]) != checksums[i]:
                bad.append(i * BLOCK)
            if report and progress is not None:
                progress("load", min((i + 1) * BLOCK, data.size), data.size)

    threads = min(len(os.sched_getaffinity(0)), _MAX_THREADS, len(checksums))
    helpers = [threading.Thread(target=compare, args=(False,)) for _ in range(threads - 1)]
    started = []
    try:
        for helper in helpers:
            helper.start()
            started.append(helper)
    except RuntimeError:
        pass  # the system gives no more threads: those that started and this one do it all
    compare(True)
    for helper in started:
        helper.join()
    if progress is not None:
        progress("load", data.size, data.size)
    return min(bad, default=None)
