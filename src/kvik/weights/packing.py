"""The tensors a model's definition names, out of a file's tensors and into native layouts, a bounded chunk at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvik import _native
from kvik.errors import DataError
from kvik.weights.ggml_types import TRAITS
from kvik.weights.layouts import Layout, Weights, layout_for
from kvik.weights.tensor_file import StoredTensor, TensorFile

__all__ = ["CHUNK_BYTES", "Chunk", "Packer", "Part", "PlannedTensor", "WantedTensor", "check_used_whole"]

CHUNK_BYTES = 1 << 25
"""Of source or packed rows, whichever are more: what a chunk may have beyond the least number of rows it must have."""

_ROWS = 16  # that a layout interleaves


class Part(NamedTuple):
    """Rows `begin` to `end` of a file's tensor, or elements of a vector; end None is its last.

    Three dimensions and more count as rows of the last one. transposed: the file has [columns, rows] instead.
    """

    name: str
    begin: int = 0
    end: int | None = None
    transposed: bool = False


class WantedTensor(NamedTuple):
    """A tensor the model's definition names: the rows of `parts`, one after another.

    shape: of a vector or matrix. permuted_heads: rows of each head come with rotary pairs interleaved and are put back;
    0 where they do not. offset: added to a vector's values. keep_f32: packed in f32 whatever is asked for.
    """

    name: str
    parts: tuple[Part, ...]
    shape: tuple[int, ...]
    permuted_heads: int = 0
    offset: float = 0.0
    keep_f32: bool = False

    @property
    def vector(self) -> bool:
        return len(self.shape) == 1

    @property
    def rows(self) -> int:
        return 1 if self.vector else self.shape[0]

    @property
    def columns(self) -> int:
        return self.shape[-1]


class _Rows(NamedTuple):
    """A part that was found and fits: rows (or elements) begin to end of `tensor`, row_bytes each."""

    tensor: StoredTensor
    begin: int
    end: int
    transposed: bool
    row_bytes: int


class PlannedTensor(NamedTuple):
    """A wanted tensor, where its rows come from and the layout they go to."""

    want: WantedTensor
    layout: Layout
    sources: tuple[_Rows, ...]

    @property
    def source_bytes(self) -> int:
        return sum((s.end - s.begin) * s.row_bytes for s in self.sources)


class Chunk(NamedTuple):
    """Packed bytes that follow those before, and how many bytes of the file they were made of."""

    data: NDArray[np.uint8]
    source_bytes: int


class Packer:
    """Packs the tensors of one source."""

    def __init__(self, file: TensorFile, weights: Weights, threads: int, chunk_bytes: int = CHUNK_BYTES) -> None:
        self._file, self._weights, self._threads, self._chunk_bytes = file, weights, threads, chunk_bytes
        self.largest_error: dict[str, float] = {}

    def plan(self, want: WantedTensor) -> PlannedTensor:
        """Check a tensor against the file. Raises DataError with file, tensor and byte."""
        sources = tuple(self._find(want, part) for part in want.parts)
        have, need = sum(s.end - s.begin for s in sources), want.shape[0]
        first = sources[0].tensor
        if have != need:
            if len(sources) == 1:
                raise self._misfit(first, want)
            what = (
                f"{len(sources)} parts of {want.name} have {have} rows together, the model's configuration says {need}"
            )
            raise DataError(what, path=first.path, tensor=first.name, offset=first.offset)
        if want.vector:
            return PlannedTensor(want, Layout.F32, sources)
        for source in sources:
            if source.tensor.type != first.type:
                what = f"has type {source.tensor.type.name}, {first.name!r} of the same matrix has {first.type.name}"
                raise DataError(what, path=source.tensor.path, tensor=source.tensor.name, offset=source.tensor.offset)
        layout = layout_for(self._weights, int(first.type), want.name)
        if layout is None:
            what = f"has type {first.type.name}, which cannot be read yet"
            raise DataError(what, path=first.path, tensor=first.name, offset=first.offset)
        return PlannedTensor(want, Layout.F32 if want.keep_f32 else layout, sources)

    def chunks(self, planned: PlannedTensor) -> Iterator[Chunk]:
        """The packed bytes of a tensor, in order. Raises DataError for a weight or scale that is not finite."""
        if planned.want.vector:
            yield Chunk(self._vector(planned), planned.source_bytes)
            return
        want, step = planned.want, self._chunk_rows(planned)
        for begin in range(0, want.rows, step):
            yield self._matrix(planned, begin, min(begin + step, want.rows))

    def _find(self, want: WantedTensor, part: Part) -> _Rows:
        tensor = self._file.tensor(part.name)
        shape = tensor.shape
        if len(shape) < len(want.shape) or (len(shape) > 1 and want.vector) or (part.transposed and len(shape) != 2):
            raise self._misfit(tensor, want)
        if want.vector:
            count, columns = shape[0], want.columns
        elif part.transposed:
            columns, count = shape
        else:
            count, columns = math.prod(shape[:-1]), shape[-1]
        end = count if part.end is None else part.end
        if columns != want.columns or not 0 <= part.begin < end <= count:
            raise self._misfit(tensor, want)
        traits = TRAITS[tensor.type]
        if traits.block_elements > 1 and (part.transposed or want.vector):
            kind = "vector" if want.vector else "transposed matrix"
            what = f"has type {tensor.type.name}; a {kind} must be F32, F16 or BF16"
            raise DataError(what, path=tensor.path, tensor=tensor.name, offset=tensor.offset)
        row_bytes = traits.block_bytes if want.vector else columns // traits.block_elements * traits.block_bytes
        return _Rows(tensor, part.begin, end, part.transposed, row_bytes)

    def _misfit(self, tensor: StoredTensor, want: WantedTensor) -> DataError:
        part = next(p for p in want.parts if p.name == tensor.name)
        wanted = list(want.shape[::-1] if part.transposed else want.shape)
        whole = len(want.parts) == 1 and part.begin == 0 and part.end is None
        rows = "" if whole else f" of {want.name}"
        return DataError(
            f"has shape {list(tensor.shape)}, the model's configuration says {wanted}{rows}",
            path=tensor.path, tensor=tensor.name, offset=tensor.offset,
        )  # fmt: skip

    def _chunk_rows(self, planned: PlannedTensor) -> int:
        """Rows of a chunk: what the layout interleaves stays together, and so do the rows of a head."""
        want = planned.want
        unit = _ROWS
        if want.permuted_heads:
            unit = math.lcm(_ROWS, want.rows // want.permuted_heads)
        packed = _native.packed_bytes(int(planned.layout), _ROWS, want.columns) // _ROWS
        row_bytes = max(planned.sources[0].row_bytes, packed)
        return max(unit, self._chunk_bytes // row_bytes // unit * unit)

    def _matrix(self, planned: PlannedTensor, begin: int, end: int) -> Chunk:
        want, layout = planned.want, planned.layout
        source = self._gather(planned.sources, begin, end)
        heads = want.permuted_heads * (end - begin) // want.rows
        target = np.empty(_native.packed_bytes(int(layout), end - begin, want.columns), np.uint8)
        bad_row, error = _native.pack(
            int(planned.sources[0].tensor.type),
            source,
            end - begin,
            want.columns,
            heads,
            int(layout),
            target,
            self._threads,
        )
        if bad_row >= 0:
            raise self._unpackable(planned, begin + bad_row)
        if error:
            self.largest_error[want.name] = max(error, self.largest_error.get(want.name, 0.0))
        return Chunk(target, source.nbytes)

    def _gather(self, sources: Sequence[_Rows], begin: int, end: int) -> NDArray[np.uint8]:
        """Rows begin to end of all the sources' rows: a view of the file where that can be."""
        pieces = []
        for source in sources:
            count = source.end - source.begin
            first, last = max(begin, 0), min(end, count)
            if first < last:
                pieces.append(self._rows(source, source.begin + first, source.begin + last))
            begin, end = begin - count, end - count
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def _rows(self, source: _Rows, begin: int, end: int) -> NDArray[np.uint8]:
        data = self._file.data(source.tensor.name)
        if not source.transposed:
            return data[begin * source.row_bytes : end * source.row_bytes]
        element_bytes = TRAITS[source.tensor.type].block_bytes
        stored = data.view(f"u{element_bytes}").reshape(source.tensor.shape)
        return np.ascontiguousarray(stored[:, begin:end].T).view(np.uint8).ravel()

    def _unpackable(self, planned: PlannedTensor, row: int) -> DataError:
        """Why a row was refused: the number that is not finite, or a range that the layout does not have."""
        for source in planned.sources:
            self._file.check_finite(source.tensor.name)  # raises: names the element and its byte
        at = row
        for source in planned.sources:
            if at < source.end - source.begin:
                break
            at -= source.end - source.begin
        what = f"row {row} of {planned.want.name} has weights outside the range of {planned.layout.name.lower()}"
        return DataError(what, path=source.tensor.path, tensor=source.tensor.name, offset=source.tensor.offset)

    def _vector(self, planned: PlannedTensor) -> NDArray[np.uint8]:
        want = planned.want
        padded = np.zeros(-(-want.columns // 32) * 32, np.float32)
        at = 0
        for source in planned.sources:
            self._file.check_finite(source.tensor.name)
            count = source.end - source.begin
            padded[at : at + count] = self._file.dequantize(source.tensor.name)[source.begin : source.end]
            at += count
        if want.offset:
            padded[: want.columns] += np.float32(want.offset)
        return padded.view(np.uint8)


def check_used_whole(plans: Sequence[PlannedTensor]) -> None:
    """Every tensor that is used must be used to its last row: what a file has beyond them the model would not compute."""
    used: dict[str, list[_Rows]] = {}
    for plan in plans:
        for source in plan.sources:
            used.setdefault(source.tensor.name, []).append(source)
    for name, rows in used.items():
        tensor = rows[0].tensor
        count = tensor.nbytes // rows[0].row_bytes
        end = 0
        for source in sorted(rows, key=lambda r: r.begin):
            if source.begin > end:
                break
            end = max(end, source.end)
        if end < count:
            what = f"has shape {list(tensor.shape)}, of which the model's configuration uses only {end} of {count} rows"
            raise DataError(what, path=tensor.path, tensor=name, offset=tensor.offset)
