"""What every kind of model file is to the loader: tensors by name, and their bytes, mapped."""

from __future__ import annotations

import mmap
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from kvik.errors import DataError
from kvik.files import open_regular
from kvik.weights.dequantize import SUPPORTED, dequantize, first_nonfinite
from kvik.weights.ggml_types import GGMLType

__all__ = ["Held", "StoredTensor", "TensorFile", "map_file"]


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor's place in its file.

    shape is in numpy order: rows first, the contiguous dimension last. offset counts from the start of `path`.
    """

    name: str
    type: GGMLType
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    path: Path


class Held(NamedTuple):
    """How many tensors of one type there are, and their bytes."""

    tensors: int
    nbytes: int


class TensorFile:
    """Open model files and a map of their tensors' bytes.

    Attributes:
        path: where they were read from, a file or a folder.
        tensors: by name, in the files' order; all lie inside their file, without overlap.
        size: bytes of the files.
    """

    def __init__(self, path: Path, tensors: Mapping[str, StoredTensor], maps: Mapping[Path, NDArray[np.uint8]]) -> None:
        """maps: the whole of each file, by the paths that the tensors name."""
        self.path = path
        self.tensors = tensors
        self.size = sum(int(whole.size) for whole in maps.values())
        self._maps: Mapping[Path, NDArray[np.uint8]] | None = maps

    def tensor(self, name: str) -> StoredTensor:
        """The tensor of that name. Raises DataError where there is none, or where its type is one Kvik does not read."""
        found = self.tensors.get(name)
        if found is None:
            raise self._missing(name)
        if found.type not in SUPPORTED:
            raise self._unreadable(found.name, found.type.name, found.path, found.offset)
        return found

    def places(self) -> dict[str, tuple[Path, int]]:
        """Where every tensor begins, those of types Kvik does not read among them: file and byte, by name."""
        return {tensor.name: (tensor.path, tensor.offset) for tensor in self.tensors.values()}

    def types(self) -> dict[str, Held]:
        """What the files hold by the types' names, in the order these are met."""
        held: dict[str, Held] = {}
        for tensor in self.tensors.values():
            before = held.get(tensor.type.name, Held(0, 0))
            held[tensor.type.name] = Held(before.tensors + 1, before.nbytes + tensor.nbytes)
        return held

    def data(self, name: str) -> NDArray[np.uint8]:
        """The tensor's bytes: uint8 [nbytes], a read-only view of the mapped file, valid after `close` too.

        Raises as `tensor` does.
        """
        found = self.tensor(name)
        if self._maps is None:
            raise DataError("the file was closed", path=found.path, tensor=name)
        return self._maps[found.path][found.offset : found.offset + found.nbytes]

    def dequantize(self, name: str) -> NDArray[np.float32]:
        """The tensor's values: float32 of its shape, a copy. Raises as `data` does."""
        found = self.tensor(name)
        return dequantize(self.data(name), found.type, found.shape or (1,)).reshape(found.shape)

    def check_finite(self, name: str) -> None:
        """Raise DataError with tensor and byte when a weight, scale or minimum is NaN or infinite, else as `data`."""
        found = self.tensor(name)
        bad = first_nonfinite(self.data(name), found.type)
        if bad is not None:
            message = f"the {bad.what} of element {bad.element} is {bad.value}; every one must be finite"
            raise DataError(message, path=found.path, tensor=name, offset=found.offset + bad.offset)

    def close(self) -> None:
        """Let go of the files. A map itself ends when the last view that `data` gave out does."""
        self._maps = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _missing(self, name: str) -> DataError:
        return DataError(f"is missing; there are {len(self.tensors)} tensors", path=self.path, tensor=name)

    def _unreadable(self, name: str, type_name: str, path: Path, offset: int) -> DataError:
        known = ", ".join(self.readable())
        return DataError(
            f"type {type_name} is not supported; supported: {known}", path=path, tensor=name, offset=offset
        )

    def readable(self) -> list[str]:
        """The names of the types this kind of file may have and Kvik reads."""
        return [t.name for t in sorted(SUPPORTED)]


def map_file(path: Path) -> mmap.mmap:
    """The whole of a regular file, mapped for reading. Raises DataError for one that is empty, missing or no file."""
    descriptor = open_regular(path)
    try:
        if os.fstat(descriptor).st_size == 0:
            raise DataError("the file is empty", path=path)
        return mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise DataError(f"cannot be mapped: {error.strerror}", path=path) from error
    finally:
        os.close(descriptor)
