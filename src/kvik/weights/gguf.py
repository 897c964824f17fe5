"""A bounded, memory-mapped reader of GGUF files, versions 2 and 3, little-endian.

A model file is data from strangers. Every count and length is compared with the bytes that are left before anything is
made of it, so that any input ends in a `GGUFFile` or in one `DataError` naming file, tensor and byte, in time linear in
the file and within twice its size plus 64 MiB of memory. Layout: the GGUF specification in the ggml project.
"""

from __future__ import annotations

import math
import mmap
import os
import struct
import sys
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
from numpy.typing import NDArray

from kvik.errors import DataError
from kvik.weights.ggml_types import TRAITS, GGMLType
from kvik.weights.tensor_file import StoredTensor, TensorFile, map_file

__all__ = ["GGUFFile", "read_gguf"]

MAX_DIMENSIONS = 4
MAX_KEY_BYTES = 65535  # by the specification
MAX_NAME_BYTES = 1024  # the specification says 64; some writers go beyond
MAX_NESTING = 4
MIN_ALIGNMENT, MAX_ALIGNMENT, DEFAULT_ALIGNMENT = 8, 1 << 21, 32

_MIB = 1 << 20
# What metadata may occupy as Python objects: the file's size and this. The mapped file itself counts once more, and the
# rest of the 64 MiB is for the interpreter's own slack (arenas, dictionaries while they grow).
_OBJECT_BYTES = 48 * _MIB
_DECODE_FACTOR = 7  # worst case while CPython decodes UTF-8 of n bytes: n copied, then 2n and 4n while it widens
_STRING_BYTES = 80  # a short str and its place in a list
_STRING_CHUNK = 8192

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_STRING, _ARRAY, _BOOL = 8, 9, 7


class _Number(NamedTuple):
    struct: struct.Struct
    dtype: str
    object_bytes: int  # of one element in a list; small integers are shared objects


_NUMBERS: dict[int, _Number] = {
    number: _Number(struct.Struct("<" + code), dtype, object_bytes)
    for number, code, dtype, object_bytes in (
        (0, "B", "u1", 8),
        (1, "b", "i1", 40),
        (2, "H", "<u2", 40),
        (3, "h", "<i2", 40),
        (4, "I", "<u4", 40),
        (5, "i", "<i4", 40),
        (6, "f", "<f4", 32),
        (_BOOL, "B", "u1", 8),
        (10, "Q", "<u8", 48),
        (11, "q", "<i8", 48),
        (12, "d", "<f8", 32),
    )
}
_LEAST_BYTES = {**{number: n.struct.size for number, n in _NUMBERS.items()}, _STRING: 8, _ARRAY: 12}


class GGUFFile(TensorFile):
    """An open GGUF file: its metadata and a map of its tensors' bytes. Make one with `read_gguf`.

    Attributes:
        version: 2 or 3.
        metadata: str, int, float, bool or (nested) list values by key.
        tensors: aligned, as the format wants them.
    """

    def __init__(
        self,
        path: Path,
        version: int,
        metadata: dict[str, Any],
        tensors: dict[str, StoredTensor],
        data: NDArray[np.uint8],
    ) -> None:
        super().__init__(path, tensors, {path: data})
        self.version = version
        self.metadata = metadata


def read_gguf(path: str | os.PathLike[str]) -> GGUFFile:
    """Open a GGUF file, check its header and list its tensors; no tensor data is read.

    Raises DataError for whatever is not a readable, regular, well-formed file; never blocks on a FIFO or device.
    A file that someone shortens while it is open ends the process (SIGBUS), as with every memory map: replace model
    files, do not write into them.
    """
    where = Path(path)
    mapped = map_file(where)
    return _Parser(mapped, where).file()


class _Parser:
    """One pass over the header. `position` is the next byte; `left` the bytes that metadata may still occupy."""

    def __init__(self, source: mmap.mmap, path: Path) -> None:
        self.source = source
        self.size = len(source)
        self.path = path
        self.position = 0
        self.left = self.size + _OBJECT_BYTES

    def file(self) -> GGUFFile:
        version, tensor_count, key_count = self.preamble()
        metadata: dict[str, Any] = {}
        for _ in range(key_count):
            self.key_value(metadata)
        tensors: dict[str, StoredTensor] = {}
        for _ in range(tensor_count):
            self.tensor(tensors)
        tensors = self.placed(tensors, self.alignment(metadata))
        return GGUFFile(self.path, version, metadata, tensors, np.frombuffer(self.source, np.uint8))

    def fail(self, message: str, at: int | None = None, tensor: str | None = None) -> NoReturn:
        offset = self.position if at is None else at
        raise DataError(message, path=self.path, tensor=tensor, offset=offset)

    def take(self, count: int, what: str, tensor: str | None = None) -> int:
        """Step over `count` bytes; returns where they begin."""
        begin = self.position
        if count > self.size - begin:
            left = self.size - begin
            self.fail(f"truncated: {what} needs {count} bytes, {left} are left", tensor=tensor)
        self.position = begin + count
        return begin

    def charge(self, count: int, what: str) -> None:
        if count > self.left:
            self.too_large(what)
        self.left -= count

    def too_large(self, what: str) -> NoReturn:
        most = (self.size + _OBJECT_BYTES) // _MIB
        self.fail(
            f"{what} would bring the header's contents over {most} MiB of memory, too much for a file of this size"
        )

    def u32(self, what: str, tensor: str | None = None) -> int:
        value: int = _U32.unpack_from(self.source, self.take(4, what, tensor))[0]
        return value

    def u64(self, what: str, tensor: str | None = None) -> int:
        value: int = _U64.unpack_from(self.source, self.take(8, what, tensor))[0]
        return value

    def text(self, what: str, most: int | None = None) -> str:
        at = self.position
        count = self.u64(f"length of {what}")
        if most is not None and count > most:
            self.fail(f"{what} has {count} bytes, at most {most} are allowed", at)
        begin = self.take(count, what)
        self.charge(_STRING_BYTES + _DECODE_FACTOR * count, what)
        try:
            text = self.source[begin : begin + count].decode("utf-8")
        except UnicodeDecodeError as error:
            self.fail(f"{what} is not UTF-8: {error.reason}", begin + error.start)
        self.left += _STRING_BYTES + _DECODE_FACTOR * count - sys.getsizeof(text) - 24
        return text

    def preamble(self) -> tuple[int, int, int]:
        magic = self.source[: min(4, self.size)]
        if magic != b"GGUF":
            self.fail(f"not a GGUF file: it begins with {magic!r}, not b'GGUF'", 0)
        self.position = 4
        version = self.u32("version")
        if version & 0xFFFF == 0 and version:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
            self.fail(f"big-endian GGUF (version {swapped}) is not supported; convert it to little-endian", 4)
        if version not in (2, 3):
            self.fail(f"GGUF version {version} is not supported, only 2 and 3; convert the model again", 4)
        tensor_count = self.u64("tensor count")
        key_count = self.u64("key count")
        left = self.size - self.position
        if key_count > left // 13:  # a length of 8, a type of 4, a value of 1
            self.fail(f"impossible count of {key_count} keys for the {left} bytes that are left", 16)
        if tensor_count > (left - 13 * key_count) // 32:  # lengths, one dimension, type, offset
            self.fail(f"impossible count of {tensor_count} tensors for the {left} bytes that are left", 8)
        return version, tensor_count, key_count

    def key_value(self, metadata: dict[str, Any]) -> None:
        at = self.position
        key = self.text("key", MAX_KEY_BYTES)
        if not key:
            self.fail("a key is empty", at)
        what = f"key {key!r}" if len(key) <= 80 else f"key {key[:80]!r}…"
        if key in metadata:
            self.fail(f"{what} stands twice", at)
        self.charge(200, "the list of keys")  # its share of a dictionary that is growing
        kind = self.u32(f"type of {what}")
        metadata[key] = self.value(kind, what, 0)

    def value(self, kind: int, what: str, depth: int) -> Any:
        number = _NUMBERS.get(kind)
        if number is not None:
            begin = self.take(number.struct.size, what)
            self.charge(32, what)
            (value,) = number.struct.unpack_from(self.source, begin)
            if kind == _BOOL:
                if value > 1:
                    self.fail(f"{what} is a boolean of value {value}, neither 0 nor 1", begin)
                return bool(value)
            return value
        if kind == _STRING:
            return self.text(what)
        if kind == _ARRAY:
            return self.array(what, depth + 1)
        self.fail(f"{what} has the unknown type {kind}", self.position - 4)

    def array(self, what: str, depth: int) -> list[Any]:
        if depth > MAX_NESTING:
            self.fail(f"{what} nests arrays deeper than {MAX_NESTING}")
        kind = self.u32(f"element type of {what}")
        if kind not in _LEAST_BYTES:
            self.fail(f"{what} has elements of the unknown type {kind}", self.position - 4)
        at = self.position
        count = self.u64(f"length of {what}")
        left = self.size - self.position
        if count > left // _LEAST_BYTES[kind]:
            self.fail(f"{what} has an impossible length of {count} for the {left} bytes that are left", at)
        self.charge(128, what)
        if kind == _STRING:
            return self.strings(count, what)
        if kind == _ARRAY:
            return [self.array(what, depth + 1) for _ in range(count)]
        number = _NUMBERS[kind]
        self.charge(number.object_bytes * count, what)
        begin = self.take(number.struct.size * count, what)
        values = np.frombuffer(self.source, number.dtype, count, begin)
        if kind != _BOOL:
            return list(values.tolist())
        bad = np.flatnonzero(values > 1)
        if bad.size:
            self.fail(f"{what} holds a boolean that is neither 0 nor 1", begin + int(bad[0]))
        return list((values != 0).tolist())

    def strings(self, count: int, what: str) -> list[str]:
        out: list[str] = []
        while len(out) < count:
            chunk = min(_STRING_CHUNK, count - len(out))
            self.charge(_STRING_BYTES * chunk, what)
            part = self.some_strings(chunk, len(out), what)
            self.charge(max(0, sum(map(sys.getsizeof, part)) + 24 * chunk - _STRING_BYTES * chunk), what)
            out += part
        return out

    def some_strings(self, count: int, first: int, what: str) -> list[str]:
        """Decode `count` strings in a row. The tightest loop of a load: a vocabulary and its merges are 98,000."""
        source, unpack = self.source, _U64.unpack_from
        end = position = self.position
        limit = min(self.size, position + self.left // _DECODE_FACTOR + 8 * count)
        out: list[str] = []
        append = out.append
        try:
            for _ in range(count):
                position = end + 8
                end = position + unpack(source, end)[0]
                if end > limit:
                    break
                append(source[position:end].decode())
            else:
                self.position = end
                return out
        except struct.error:  # the length itself lies beyond the end
            end = self.size + 1
            position = self.size
        except UnicodeDecodeError as error:
            self.fail(f"{what}: string {first + len(out)} is not UTF-8: {error.reason}", position + error.start)
        if end > self.size:
            self.fail(f"{what}: string {first + len(out)} reaches beyond the end of the file", position)
        self.position = position
        self.too_large(what)

    def tensor(self, tensors: dict[str, StoredTensor]) -> None:
        """Read one tensor's description; its offset stays relative to the data until `placed`."""
        at = self.position
        name = self.text("tensor name", MAX_NAME_BYTES)
        if not name:
            self.fail("a tensor has no name", at)
        if name in tensors:
            self.fail("stands twice", at, name)
        self.charge(800, "the list of tensors")
        at = self.position
        rank = self.u32("number of dimensions", name)
        if not 1 <= rank <= MAX_DIMENSIONS:
            self.fail(f"has {rank} dimensions, 1 to {MAX_DIMENSIONS} are possible", at, name)
        at = self.position
        shape = tuple(self.u64("dimension", name) for _ in range(rank))[::-1]
        if 0 in shape:
            self.fail(f"has a dimension of 0: {list(shape)}", at, name)
        kind_at = self.position
        number = self.u32("type", name)
        if number not in TRAITS:
            self.fail(f"has the unknown type {number}", kind_at, name)
        kind = GGMLType(number)
        block_elements, block_bytes = TRAITS[kind]
        if shape[-1] % block_elements:
            self.fail(f"rows of {shape[-1]} do not divide into {kind.name} blocks of {block_elements}", at, name)
        nbytes = math.prod(shape) // block_elements * block_bytes
        if nbytes > self.size:
            self.fail(f"shape {list(shape)} of {kind.name} needs {nbytes} bytes, the file has {self.size}", at, name)
        offset = self.u64("offset", name)
        tensors[name] = StoredTensor(name, kind, shape, offset, nbytes, self.path)

    def alignment(self, metadata: dict[str, Any]) -> int:
        value = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        possible = isinstance(value, int) and MIN_ALIGNMENT <= value <= MAX_ALIGNMENT and value & (value - 1) == 0
        if not possible:
            shown = value if isinstance(value, int | float) else type(value).__name__
            bounds = f"a power of two in [{MIN_ALIGNMENT}, {MAX_ALIGNMENT}]"
            raise DataError(f"general.alignment must be {bounds}, got {shown}", path=self.path)
        return int(value)

    def placed(self, tensors: dict[str, StoredTensor], alignment: int) -> dict[str, StoredTensor]:
        """The tensors with offsets from the file's start, checked: aligned, inside the file, none over another."""
        begin = -(-self.position // alignment) * alignment
        placed: dict[str, StoredTensor] = {}
        for name, t in tensors.items():
            offset = begin + t.offset
            if t.offset % alignment:
                self.fail(f"its offset {t.offset} is not a multiple of the alignment {alignment}", offset, name)
            if offset + t.nbytes > self.size:
                self.fail(f"needs {t.nbytes} bytes, the file ends at {self.size}", offset, name)
            placed[name] = StoredTensor(name, t.type, t.shape, offset, t.nbytes, self.path)
        last: StoredTensor | None = None
        for t in sorted(placed.values(), key=lambda t: t.offset):
            if last is not None and t.offset < last.offset + last.nbytes:
                self.fail(f"overlaps tensor {last.name!r}", t.offset, t.name)
            last = t
        return placed
