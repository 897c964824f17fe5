"""The file of packed weights: every byte comes back, every damaged byte is found."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kvik.errors import DataError
from kvik.weights.layouts import Layout, packed_bytes
from kvik.weights.packed import PackedWriter, read_packed

SHAPES = [("a", Layout.INT4_MIN, 16, 4096, False), ("b", Layout.F32, 1, 50, True), ("c", Layout.F32, 32, 512, False)]


def write(path: Path) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    writer, data = PackedWriter(), []
    for name, layout, rows, columns, vector in SHAPES:
        writer.plan(name, layout, rows, columns, vector)
        size = 256 if vector else packed_bytes(layout, rows, columns)
        data.append(rng.integers(1, 256, size, np.uint8))
    writer.write(path, iter(data), {"weights": "auto"})
    return data


def test_every_byte_comes_back(tmp_path: Path) -> None:
    data = write(tmp_path / "w.kvik")
    assert data[2].nbytes % 4096 == 0  # the last tensor fills its pages
    for verify in (True, False):
        packed = read_packed(tmp_path / "w.kvik", verify)
        assert packed.notes == {"weights": "auto"} and list(packed.tensors) == ["a", "b", "c"]
        for tensor, want in zip(packed.tensors.values(), data, strict=True):
            assert np.array_equal(tensor.data, want)
            assert tensor.data.ctypes.data % 4096 == 0
    assert packed.nbytes == sum(d.nbytes for d in data)


def test_every_kind_of_damage_is_found(tmp_path: Path) -> None:
    path = tmp_path / "w.kvik"
    write(path)
    good = path.read_bytes()
    packed = read_packed(path)
    starts = [t.data.ctypes.data - packed.tensors["a"].data.ctypes.data for t in packed.tensors.values()]
    first = len(good) - starts[-1] - packed.tensors["c"].nbytes
    places = [0, 9, 13, 20, 30, 200, first, first + 7, first + starts[1] + 100, first + starts[2], len(good) - 1]
    for at in places:
        path.unlink()
        path.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        with pytest.raises(DataError):
            read_packed(path)
    for length in (0, 10, 100, first, len(good) - 4096):
        path.unlink()
        path.write_bytes(good[:length])
        with pytest.raises(DataError):
            read_packed(path)


def test_bytes_of_a_step_leave_out_an_embedding_that_is_no_head(tmp_path: Path) -> None:
    matrix, vector = np.zeros(16 * 32 * 4, np.uint8), np.zeros(32 * 4, np.uint8)
    for names, expected in ((("embed", "layers.0.q"), 2), (("embed", "layers.0.q", "head"), 2)):
        writer = PackedWriter()
        for name in (*names, "norm"):
            writer.plan(name, Layout.F32, 1 if name == "norm" else 16, 32, name == "norm")
        writer.write(tmp_path / "w.kvik", [*[matrix] * len(names), vector], {})
        packed = read_packed(tmp_path / "w.kvik")
        assert packed.matrix_bytes == expected * matrix.nbytes
        assert packed.bytes_by_layout() == {"f32": len(names) * matrix.nbytes, "vector": vector.nbytes}
