"""From a model file to weights ready to compute with: packed once into the model store, mapped from then on."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvik import _native
from kvik.errors import DataError, StorageError
from kvik.weights.fetch import Progress
from kvik.weights.gguf import GGUFFile
from kvik.weights.layouts import Layout, Weights, layout_for
from kvik.weights.packed import PackedWeights, PackedWriter, read_packed

__all__ = ["WantedTensor", "load_packed"]


class WantedTensor(NamedTuple):
    """A tensor the model's definition names, as it is in the file."""

    name: str
    file_name: str
    shape: tuple[int, ...]
    permuted_heads: int


class _Source:
    """Checks one tensor after the other against what the model wants, and packs it."""

    def __init__(self, file: GGUFFile, weights: Weights, threads: int) -> None:
        self._file, self._weights, self._threads = file, weights, threads
        self.largest_error: dict[str, float] = {}

    def layout(self, want: WantedTensor) -> Layout:
        tensor = self._file.tensors.get(want.file_name)
        if tensor is None:
            raise DataError("is missing", path=self._file.path, tensor=want.file_name)
        if tensor.shape != want.shape:
            raise DataError(
                f"has shape {list(tensor.shape)}, the model's configuration says {list(want.shape)}",
                path=self._file.path, tensor=want.file_name, offset=tensor.offset,
            )  # fmt: skip
        layout = Layout.F32 if len(want.shape) == 1 else layout_for(self._weights, int(tensor.type))
        if layout is None:
            raise DataError(
                f"has type {tensor.type.name}, which cannot be read yet", path=self._file.path, tensor=want.file_name
            )
        return layout

    def pack(self, want: WantedTensor, layout: Layout) -> NDArray[np.uint8]:
        if len(want.shape) == 1:
            return self._vector(want)
        tensor = self._file.tensors[want.file_name]
        rows, columns = want.shape
        target = np.empty(_native.packed_bytes(int(layout), rows, columns), np.uint8)
        bad_row, error = _native.pack(
            int(tensor.type), self._file.data(want.file_name), rows, columns, want.permuted_heads, int(layout),
            target, self._threads,
        )  # fmt: skip
        if bad_row >= 0:
            self._file.check_finite(want.file_name)  # names the element and its offset
            raise DataError(
                f"row {bad_row} has weights outside the range of {layout.name.lower()}",
                path=self._file.path, tensor=want.file_name,
            )  # fmt: skip
        if error:
            self.largest_error[want.name] = error
        return target

    def _vector(self, want: WantedTensor) -> NDArray[np.uint8]:
        self._file.check_finite(want.file_name)
        padded = np.zeros(-(-want.shape[0] // 32) * 32, np.float32)
        padded[: want.shape[0]] = self._file.dequantize(want.file_name)
        return padded.view(np.uint8)


def load_packed(
    path: Path,
    open_source: Callable[[], GGUFFile],
    wanted: list[WantedTensor],
    weights: Weights,
    progress: Progress,
) -> PackedWeights:
    """The packed weights at `path`, made from the source when they are not there or damaged.

    Raises DataError for a source that does not fit what is wanted, StorageError when the store cannot be written.
    """
    if path.exists():
        try:
            return _checked(read_packed(path, progress=progress), wanted, path)
        except (DataError, ValueError, KeyError, TypeError):
            _remove(path)  # damaged or of another version: made again below
    with open_source() as file:
        _pack(path, file, wanted, weights, progress)
    return _checked(read_packed(path, verify=False), wanted, path)


def _remove(path: Path) -> None:
    import shutil

    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _checked(packed: PackedWeights, wanted: list[WantedTensor], path: Path) -> PackedWeights:
    for want in wanted:
        tensor = packed.tensors.get(want.name)
        rows = want.shape[0] if len(want.shape) == 2 else 1
        if tensor is None or (tensor.rows, tensor.columns) != (rows, want.shape[-1]):
            raise DataError("packed weights do not fit the model", path=path, tensor=want.name)
    return packed


def _pack(
    path: Path,
    file: GGUFFile,
    wanted: list[WantedTensor],
    weights: Weights,
    progress: Progress,
) -> None:
    source = _Source(file, weights, len(os.sched_getaffinity(0)))
    layouts = [source.layout(want) for want in wanted]
    writer = PackedWriter()
    for want, layout in zip(wanted, layouts, strict=True):
        rows = want.shape[0] if len(want.shape) == 2 else 1
        writer.plan(want.name, layout, rows, want.shape[-1], len(want.shape) == 1)
    total = sum(file.tensors[want.file_name].nbytes for want in wanted)

    def packed() -> Iterator[NDArray[np.uint8]]:
        done = 0
        progress("pack", 0, total)
        for want, layout in zip(wanted, layouts, strict=True):
            yield source.pack(want, layout)
            done += file.tensors[want.file_name].nbytes
            progress("pack", done, total)

    writer.write(path, packed(), {"weights": weights, "largest_error": source.largest_error})


def save_json(path: Path, value: Any) -> None:
    """Write a small JSON file atomically, with a checksum of what it says."""
    from kvik.weights.files import atomic_write

    with atomic_write(path) as file:
        file.write(json.dumps({"crc32": _json_checksum(value), "value": value}).encode())


def read_json(path: Path) -> Any:
    """What `save_json` wrote, or None where the file is missing or damaged."""
    try:
        whole = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError, RecursionError):
        return None
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror}") from error
    if not isinstance(whole, dict) or whole.get("crc32") != _json_checksum(whole.get("value")):
        return None
    return whole["value"]


def _json_checksum(value: Any) -> int:
    return zlib.crc32(json.dumps(value).encode())
