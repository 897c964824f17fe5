"""The file of packed weights: every byte comes back, every damaged byte is found."""

from __future__ import annotations

import errno
from pathlib import Path

import numpy as np
import pytest

from kvik.errors import DataError, StorageError
from kvik.weights.layouts import Layout, packed_bytes
from kvik.weights.packed import PackedWriter, read_packed

SHAPES = [("a", Layout.INT4_MIN, 16, 4096, False), ("b", Layout.F32, 1, 50, True), ("c", Layout.F32, 32, 512, False)]


def write(path: Path, chunk: int = 1 << 30) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    writer, data = PackedWriter(), []
    for name, layout, rows, columns, vector in SHAPES:
        writer.plan(name, layout, rows, columns, vector)
        size = 256 if vector else packed_bytes(layout, rows, columns)
        data.append(rng.integers(1, 256, size, np.uint8))
    pieces = (d[at : at + chunk] for d in data for at in range(0, d.nbytes, chunk))
    writer.write(path, pieces, {"weights": "auto"})
    return data


def test_every_byte_comes_back(tmp_path: Path) -> None:
    data = write(tmp_path / "w.kvik")
    assert data[2].nbytes % 4096 == 0  # a tensor that fills its pages
    for verify in (True, False):
        packed = read_packed(tmp_path / "w.kvik", verify)
        assert packed.notes == {"weights": "auto"} and list(packed.tensors) == ["a", "b", "c"]
        for tensor, want in zip(packed.tensors.values(), data, strict=True):
            assert np.array_equal(tensor.data, want)
            assert tensor.data.ctypes.data % 4096 == 0
    assert packed.nbytes == sum(d.nbytes for d in data)


def test_chunks_and_their_blocks_of_checksums_do_not_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvik.weights.packed.BLOCK", 5000)
    write(tmp_path / "w.kvik")
    whole = (tmp_path / "w.kvik").read_bytes()
    for size in (999, 4999, 5000, 5001, 12345):
        write(tmp_path / "w.kvik", size)
        assert (tmp_path / "w.kvik").read_bytes() == whole
    read_packed(tmp_path / "w.kvik")


def test_as_many_bytes_as_planned(tmp_path: Path) -> None:
    for chunks in ([np.zeros(100, np.uint8)], [np.zeros(257, np.uint8)], [np.zeros(256, np.uint8)] * 2):
        writer = PackedWriter()
        writer.plan("v", Layout.F32, 1, 50, True)
        with pytest.raises(ValueError, match="bytes"):
            writer.write(tmp_path / "w.kvik", chunks, {})
        assert list(tmp_path.iterdir()) == []


def test_an_error_while_writing_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr("kvik.weights.packed._Sums.add", full)
    with pytest.raises(StorageError, match="no space left"):
        write(tmp_path / "w.kvik")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("block", [4096, 100_000, 1 << 22])
def test_every_kind_of_damage_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr("kvik.weights.packed.BLOCK", block)
    path = tmp_path / "w.kvik"
    write(path)
    good = path.read_bytes()
    packed = read_packed(path)
    begins = [4096 + t.data.ctypes.data - packed.tensors["a"].data.ctypes.data for t in packed.tensors.values()]
    end = begins[-1] + packed.tensors["c"].nbytes
    places = [
        0,
        9,
        13,
        20,
        28,
        40,
        4095,
        4096,
        begins[1],
        begins[1] + 300,
        begins[2] - 1,
        begins[2],
        end - 1,
        end,
        end + 40,
    ]
    for at in [*places, len(good) - 1]:
        path.unlink()
        path.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        with pytest.raises(DataError) as caught:
            read_packed(path)
        if 4096 <= at < end:
            assert caught.value.offset is not None and caught.value.offset <= at < caught.value.offset + block
    for length in (0, 10, 100, 4096, end, len(good) - 1):
        path.unlink()
        path.write_bytes(good[:length])
        with pytest.raises(DataError):
            read_packed(path)


def test_of_experts_a_step_reads_those_it_uses(tmp_path: Path) -> None:
    writer = PackedWriter()
    for name in ("embed", "layers.0.router", "layers.0.experts_gate"):
        writer.plan(name, Layout.F32, 16, 32, False)
    writer.write(tmp_path / "w.kvik", [np.zeros(2048, np.uint8)] * 3, {})
    packed = read_packed(tmp_path / "w.kvik")
    assert packed.matrix_bytes() == 3 * 2048 and packed.matrix_bytes(0.25) == 2 * 2048 + 512


def test_progress_of_loading_ends_at_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvik.weights.packed.BLOCK", 4096)
    write(tmp_path / "w.kvik")
    seen: list[tuple[str, int, int]] = []
    read_packed(tmp_path / "w.kvik", progress=lambda *step: seen.append(step))
    assert seen[-1][1] == seen[-1][2] and [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)


def test_bytes_of_a_step_leave_out_an_embedding_that_is_no_head(tmp_path: Path) -> None:
    matrix, vector = np.zeros(16 * 32 * 4, np.uint8), np.zeros(32 * 4, np.uint8)
    forms = [(("embed", "layers.0.q"), 2), (("embed", "layers.0.q", "head"), 2), (("embed", "positions"), 1)]
    for names, expected in forms:
        writer = PackedWriter()
        for name in (*names, "norm"):
            writer.plan(name, Layout.F32, 1 if name == "norm" else 16, 32, name == "norm")
        writer.write(tmp_path / "w.kvik", [*[matrix] * len(names), vector], {})
        packed = read_packed(tmp_path / "w.kvik")
        assert packed.matrix_bytes() == expected * matrix.nbytes
        assert packed.bytes_by_layout() == {"f32": len(names) * matrix.nbytes, "vector": vector.nbytes}
