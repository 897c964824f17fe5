"""From a model file to weights ready to compute with: packed once into the model store, mapped from then on."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvik.errors import DataError, StorageError
from kvik.files import remove
from kvik.weights.fetch import Progress
from kvik.weights.layouts import Weights
from kvik.weights.packed import PackedWeights, PackedWriter, read_packed
from kvik.weights.packing import CHUNK_BYTES, Packer, WantedTensor, check_used_whole
from kvik.weights.tensor_file import TensorFile

__all__ = ["load_packed", "pack", "read_json", "save_json"]


def load_packed(
    path: Path,
    open_source: Callable[[], TensorFile],
    wanted: Sequence[WantedTensor],
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
            remove(path)  # damaged or of another version: made again below
    with open_source() as file:
        pack(path, file, wanted, weights, progress)
    return _checked(read_packed(path, verify=False), wanted, path)


def _checked(packed: PackedWeights, wanted: Sequence[WantedTensor], path: Path) -> PackedWeights:
    for want in wanted:
        tensor = packed.tensors.get(want.name)
        if tensor is None or (tensor.rows, tensor.columns) != (want.rows, want.columns):
            raise DataError("packed weights do not fit the model", path=path, tensor=want.name)
    return packed


def pack(
    path: Path,
    file: TensorFile,
    wanted: Sequence[WantedTensor],
    weights: Weights,
    progress: Progress,
    chunk_bytes: int = CHUNK_BYTES,
) -> None:
    """Pack the wanted tensors of a file into a new file at `path`, on every core this process may use.

    Everything is checked against the file before anything is packed. Beside the mapped source this takes a few times
    chunk_bytes of memory, whatever the tensors' sizes; the bytes that result do not depend on it.
    """
    packer = Packer(file, weights, len(os.sched_getaffinity(0)), chunk_bytes)
    plans = [packer.plan(want) for want in wanted]
    check_used_whole(plans)
    writer = PackedWriter()
    for want, layout, _ in plans:
        writer.plan(want.name, layout, want.rows, want.columns, want.vector)
    total = sum(plan.source_bytes for plan in plans)

    def chunks() -> Iterator[NDArray[np.uint8]]:
        done = 0
        progress("pack", 0, total)
        for plan in plans:
            for data, source_bytes in packer.chunks(plan):
                yield data
                done += source_bytes
                progress("pack", done, total)

    writer.write(path, chunks(), {"weights": weights, "largest_error": packer.largest_error})


def save_json(path: Path, value: Any) -> None:
    """Write a small JSON file atomically, with a checksum of what it says."""
    from kvik.files import atomic_write

    with atomic_write(path) as file:
        file.write(json.dumps({"crc32": _json_checksum(value), "value": value}).encode())


def read_json(path: Path) -> Any:
    """What `save_json` wrote, or None where the file is missing, damaged or no file."""
    try:
        whole = json.loads(path.read_bytes())
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError, ValueError, RecursionError):
        return None
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror}") from error
    if not isinstance(whole, dict) or whole.get("crc32") != _json_checksum(whole.get("value")):
        return None
    return whole["value"]


def _json_checksum(value: Any) -> int:
    return zlib.crc32(json.dumps(value).encode())
