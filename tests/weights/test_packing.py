"""From files of either kind to packed weights: pieces, chunks, what is refused and where."""

from __future__ import annotations

import tracemalloc
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from weights.gguf_files import STRING, Key, Tensor, block_width, build, random_bytes, tensor
from weights.safetensors_files import write_folder

from kvik.errors import DataError
from kvik.weights.dequantize import SUPPORTED
from kvik.weights.ggml_types import TRAITS, GGMLType
from kvik.weights.gguf import read_gguf
from kvik.weights.layouts import Layout
from kvik.weights.loader import load_packed, pack
from kvik.weights.packed import PackedTensor, PackedWeights, read_packed
from kvik.weights.packing import Packer, Part, WantedTensor, check_used_whole
from kvik.weights.safetensors import read_safetensors
from kvik.weights.tensor_file import TensorFile

RNG = np.random.default_rng(0)
NAME = Key("general.architecture", STRING, "llama")


def quiet(*_: object) -> None:
    """Progress that nobody watches."""


def folder_of(path: Path, dtype: str = "F32", **tensors: NDArray[Any]) -> TensorFile:
    return read_safetensors(write_folder(path / "folder", tensors, dtype=dtype))


def gguf_of(path: Path, *tensors: Tensor) -> TensorFile:
    (path / "m.gguf").write_bytes(build([NAME], tensors).data)
    return read_gguf(path / "m.gguf")


def packed(
    path: Path, file: TensorFile, *wanted: WantedTensor, weights: str = "auto", chunk: int = 1 << 25
) -> PackedWeights:
    pack(path / "w.kvik", file, wanted, weights, quiet, chunk)  # type: ignore[arg-type]
    return read_packed(path / "w.kvik")


def floats(path: Path, file: TensorFile, want: WantedTensor, **options: Any) -> NDArray[np.float32]:
    return packed(path, file, want, **options).tensors[want.name].floats()


def whole(name: str, shape: tuple[int, ...], **more: Any) -> WantedTensor:
    return WantedTensor("w", (Part(name),), shape, **more)


# --- pieces


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_safetensors_keep_what_they_have(tmp_path: Path, dtype: str) -> None:
    values = RNG.standard_normal((37, 50)).astype(np.float32)
    file = folder_of(tmp_path, dtype, m=values, v=values[0])
    found = packed(tmp_path, file, whole("m", (37, 50)), WantedTensor("v", (Part("v"),), (50,)))
    assert np.array_equal(found.tensors["w"].floats(), file.dequantize("m"))
    assert found.tensors["w"].layout.name == dtype and found.notes["largest_error"] == {}
    assert np.array_equal(found.tensors["v"].floats(), file.dequantize("v")) and found.tensors["v"].vector


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("chunk", [1, 4000, 1 << 25])
def test_transposed_pieces_of_one_matrix(tmp_path: Path, dtype: str, chunk: int) -> None:
    """GPT-2's checkpoints: [inputs, outputs], queries, keys and values side by side."""
    stored = RNG.standard_normal((24, 3 * 40)).astype(np.float32)
    file = folder_of(tmp_path, dtype, c=stored)
    whole_matrix = file.dequantize("c").T
    wanted = [WantedTensor(n, (Part("c", 40 * i, 40 * (i + 1), True),), (40, 24)) for i, n in enumerate("qkv")]
    found = packed(tmp_path, file, *wanted, chunk=chunk)
    for i, name in enumerate("qkv"):
        assert np.array_equal(found.tensors[name].floats(), whole_matrix[40 * i : 40 * (i + 1)])


def test_pieces_of_vectors_and_their_offset(tmp_path: Path) -> None:
    file = folder_of(tmp_path, b=np.arange(90, dtype=np.float32), n=np.linspace(-1, 1, 5).astype(np.float32))
    wanted = [WantedTensor(n, (Part("b", 30 * i, 30 * (i + 1)),), (30,)) for i, n in enumerate("qkv")]
    norm = WantedTensor("norm", (Part("n"),), (5,), offset=1.0)
    joined = WantedTensor("joined", (Part("n", 3), Part("n", 0, 3)), (5,))
    found = packed(tmp_path, file, *wanted, norm, joined).tensors
    assert [found[n].floats().tolist() for n in "qkv"] == [list(range(30 * i, 30 * i + 30)) for i in range(3)]
    assert found["norm"].floats().tolist() == [0.0, 0.5, 1.0, 1.5, 2.0]
    assert not found["norm"].data.view(np.float32)[5:].any(), "the padding stays zero"
    assert found["joined"].floats().tolist() == [0.5, 1.0, -1.0, -0.5, 0.0]


@pytest.mark.parametrize("rows", [16, 7])
@pytest.mark.parametrize("chunk", [1, 5000, 1 << 25])
def test_experts_are_stacked_by_rows(tmp_path: Path, rows: int, chunk: int) -> None:
    """As tensors of their own, or as the third dimension of one."""
    values = RNG.standard_normal((5, rows, 64)).astype(np.float32)
    apart = folder_of(tmp_path, **{f"e{i}": v for i, v in enumerate(values)})
    parts = tuple(Part(f"e{i}") for i in range(5))
    found = floats(tmp_path, apart, WantedTensor("w", parts, (5 * rows, 64)), chunk=chunk)
    assert np.array_equal(found, values.reshape(-1, 64))
    one = gguf_of(tmp_path, Tensor("e", GGMLType.F32, (5, rows, 64), values.tobytes()))
    assert np.array_equal(floats(tmp_path, one, whole("e", (5 * rows, 64)), chunk=chunk), found)
    some = WantedTensor("w", (Part("e", rows, 3 * rows), Part("e", 0, rows), Part("e", 3 * rows)), (5 * rows, 64))
    order = values[[1, 2, 0, 3, 4]].reshape(-1, 64)
    assert np.array_equal(floats(tmp_path, one, some, chunk=chunk), order)


@pytest.mark.parametrize("kind", sorted(SUPPORTED))
def test_quantized_experts_and_permuted_heads(tmp_path: Path, kind: GGMLType) -> None:
    width = 2 * block_width(kind)
    file = gguf_of(tmp_path, tensor("e", kind, (3, 20, width), RNG), tensor("q", kind, (60, width), RNG))
    true = file.dequantize("e").reshape(60, width)
    for chunk in (1, 1 << 25):
        got = packed(
            tmp_path, file, whole("e", (60, width)), WantedTensor("q", (Part("q"),), (60, width), 3), chunk=chunk
        )
        assert np.allclose(got.tensors["w"].floats(), true, rtol=0, atol=1e-5)
        halves = file.dequantize("q").reshape(3, 10, 2, width).swapaxes(1, 2).reshape(60, width)
        assert np.allclose(got.tensors["q"].floats(), halves, rtol=0, atol=1e-5)


def test_keep_f32_whatever_is_asked_for(tmp_path: Path) -> None:
    values = RNG.standard_normal((8, 64)).astype(np.float32)
    file = folder_of(tmp_path, "BF16", r=values, m=values)
    router = WantedTensor("router", (Part("r"),), (8, 64), keep_f32=True)
    for weights in ("auto", "int4", "f32"):
        found = packed(tmp_path, file, router, whole("m", (8, 64)), weights=weights)
        assert found.tensors["router"].layout is Layout.F32
        assert np.array_equal(found.tensors["router"].floats(), file.dequantize("r"))
        assert list(found.notes["largest_error"]) == (["w"] if weights == "int4" else [])


@st.composite
def matrices(draw: st.DrawFn) -> tuple[list[NDArray[np.float32]], list[Part]]:
    """Matrices as a file has them, and parts that cover each of them, in any order."""
    width, stored, parts = draw(st.integers(1, 40)), [], []
    for i in range(draw(st.integers(1, 3))):
        rows, transposed = draw(st.integers(1, 50)), draw(st.booleans())
        values = np.random.default_rng(i).standard_normal((width, rows) if transposed else (rows, width))
        stored.append(values.astype(np.float32))
        cuts = sorted({0, rows, *draw(st.lists(st.integers(0, rows), max_size=3))})
        parts += [Part(str(i), b, e, transposed) for b, e in pairwise(cuts)]
    return stored, draw(st.permutations(parts))


@settings(max_examples=60, deadline=None)
@given(matrices(), st.sampled_from([1, 500, 3000, 1 << 25]), st.sampled_from(["F32", "F16"]))
def test_any_pieces_against_numpy(
    tmp_path_factory: pytest.TempPathFactory,
    drawn: tuple[list[NDArray[np.float32]], list[Part]],
    chunk: int,
    dtype: str,
) -> None:
    stored, parts = drawn
    file = folder_of(tmp_path_factory.mktemp("m"), dtype, **{str(i): m for i, m in enumerate(stored)})
    pieces = [file.dequantize(p.name) for p in parts]
    true = np.concatenate([(m.T if p.transposed else m)[p.begin : p.end] for m, p in zip(pieces, parts, strict=True)])
    packer = Packer(file, "auto", 2, chunk)
    plan = packer.plan(WantedTensor("w", tuple(parts), true.shape))
    check_used_whole([plan])
    data = np.concatenate([c.data for c in packer.chunks(plan)])
    assert np.array_equal(PackedTensor("w", plan.layout, *true.shape, False, data).floats(), true)


# --- chunks


@pytest.mark.parametrize("weights", ["auto", "f32", "bf16", "int8", "int4"])
@pytest.mark.parametrize("kind", sorted(SUPPORTED))
def test_the_bytes_do_not_depend_on_the_chunks(tmp_path: Path, kind: GGMLType, weights: str) -> None:
    width = 2 * block_width(kind)
    file = gguf_of(
        tmp_path, tensor("m", kind, (83, width), RNG), tensor("q", kind, (96, width), RNG), tensor("n", GGMLType.F32, (50,), RNG)
    )  # fmt: skip
    wanted = [
        whole("m", (83, width)), WantedTensor("q", (Part("q"),), (96, width), 4), WantedTensor("n", (Part("n"),), (50,)),
    ]  # fmt: skip
    seen = set()
    for chunk in (1, 3000, 7777, 1 << 25):
        packed(tmp_path, file, *wanted, weights=weights, chunk=chunk)
        seen.add((tmp_path / "w.kvik").read_bytes())
    assert len(seen) == 1


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("weights", ["auto", "f32"])
def test_memory_while_packing_is_a_few_chunks(tmp_path: Path, transposed: bool, weights: str) -> None:
    """However large the tensor is: 16 MB here, against chunks of 256 KiB."""
    shape, chunk = (8192, 1024), 1 << 18
    stored = np.zeros(shape[::-1] if transposed else shape, np.float32)
    file = folder_of(tmp_path, "BF16", big=stored)
    want = WantedTensor("w", (Part("big", transposed=transposed),), shape)
    packer = Packer(file, weights, 2, chunk)  # type: ignore[arg-type]
    sizes = [(c.data.nbytes, c.source_bytes) for c in packer.chunks(packer.plan(want))]
    assert max(max(size) for size in sizes) <= chunk and sum(s for _, s in sizes) == 2 * stored.size
    tracemalloc.start()
    try:
        pack(tmp_path / "w.kvik", file, [want], weights, quiet, chunk)  # type: ignore[arg-type]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak <= 4 * chunk + (5 << 20)  # and the block of 4 MiB that checksums are made of


def test_a_chunk_keeps_heads_and_interleaved_rows_together(tmp_path: Path) -> None:
    file = folder_of(tmp_path, m=np.zeros((800, 32), np.float32))
    packer = Packer(file, "auto", 1, 1)
    for heads, rows in ((0, 16), (10, 80), (50, 16), (8, 400)):
        want = WantedTensor("w", (Part("m"),), (800, 32), heads)
        assert {c.data.nbytes for c in packer.chunks(packer.plan(want))} == {rows * 32 * 4}


def test_progress_is_by_bytes(tmp_path: Path) -> None:
    file = folder_of(tmp_path, m=np.zeros((64, 32), np.float32), v=np.zeros(8, np.float32))
    seen: list[tuple[str, int, int]] = []
    wanted = [whole("m", (64, 32)), WantedTensor("v", (Part("v"),), (8,))]
    pack(tmp_path / "w.kvik", file, wanted, "auto", lambda *step: seen.append(step), 1)
    total = 64 * 32 * 4 + 32
    assert seen == [("pack", done, total) for done in (0, 2048, 4096, 6144, 8192, total)]


# --- what is refused


def refused(tmp_path: Path, file: TensorFile, match: str, *wanted: WantedTensor, offset: bool = True) -> None:
    for chunk in (1, 1 << 25):
        with pytest.raises(DataError, match=match) as caught:
            pack(tmp_path / "w.kvik", file, wanted, "auto", quiet, chunk)
        assert caught.value.tensor is not None and (caught.value.offset is not None) == offset
        assert "folder" in str(caught.value.path) and not (tmp_path / "w.kvik").exists()


def test_shapes_that_do_not_fit(tmp_path: Path) -> None:
    file = folder_of(
        tmp_path, m=np.zeros((6, 4), np.float32), v=np.zeros(6, np.float32), c=np.zeros((2, 3, 4), np.float32)
    )
    says = r"tensor 'm': has shape \[6, 4\], the model's configuration says "
    refused(tmp_path, file, says + r"\[4, 6\]", whole("m", (4, 6)))
    refused(tmp_path, file, says + r"\[7, 4\]", whole("m", (7, 4)))
    refused(tmp_path, file, says + r"\[24\]", whole("m", (24,)))
    refused(tmp_path, file, says + r"\[4, 6\]", WantedTensor("w", (Part("m", transposed=True),), (6, 4)))
    refused(tmp_path, file, r"says \[6, 1\]", whole("v", (6, 1)))
    refused(tmp_path, file, r"says \[5\]", whole("v", (5,)))
    refused(tmp_path, file, r"says \[4, 6\]", WantedTensor("w", (Part("c", transposed=True),), (6, 4)))
    refused(tmp_path, file, r"says \[9, 4\] of w", WantedTensor("w", (Part("m", 0, 9),), (9, 4)))
    refused(
        tmp_path,
        file,
        r"2 parts of w have 8 rows together.*says 9",
        WantedTensor("w", (Part("m"), Part("m", 4)), (9, 4)),
    )
    refused(tmp_path, file, "tensor 'x': is missing; there are 3 tensors", whole("x", (1, 1)), offset=False)


def test_rows_that_nobody_uses(tmp_path: Path) -> None:
    """Three of four fused matrices would be a wrong model, not a smaller one."""
    file = folder_of(tmp_path, m=np.zeros((8, 4), np.float32))
    q, k, v = (WantedTensor(n, (Part("m", 2 * i, 2 * i + 2),), (2, 4)) for i, n in enumerate("qkv"))
    refused(tmp_path, file, r"has shape \[8, 4\], of which .* uses only 6 of 8 rows", q, k, v)
    refused(tmp_path, file, "uses only 2 of 8 rows", q, v)
    packed(tmp_path, file, q, k, v, WantedTensor("rest", (Part("m", 6),), (2, 4)))


def test_parts_of_different_types(tmp_path: Path) -> None:
    file = gguf_of(tmp_path, tensor("a", GGMLType.F16, (16, 32), RNG), tensor("b", GGMLType.Q8_0, (16, 32), RNG))
    with pytest.raises(DataError, match="'b': has type Q8_0, 'a' of the same matrix has F16"):
        packed(tmp_path, file, WantedTensor("w", (Part("a"), Part("b")), (32, 32)))
    with pytest.raises(DataError, match="has type Q8_0; a transposed matrix must be F32, F16 or BF16"):
        packed(tmp_path, file, WantedTensor("w", (Part("b", transposed=True),), (32, 16)))


def test_types_that_cannot_be_read(tmp_path: Path) -> None:
    file = gguf_of(tmp_path, Tensor("t", GGMLType.IQ2_XS, (2, 256), bytes(148)))
    with pytest.raises(DataError, match="'t': type IQ2_XS is not supported") as caught:
        packed(tmp_path, file, whole("t", (2, 256)))
    assert caught.value.offset == file.tensors["t"].offset


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite(tmp_path: Path, poison: float) -> None:
    bad = np.zeros((100, 32), np.float32)
    bad[77, 3] = poison
    file = folder_of(tmp_path, good=np.zeros((8, 32), np.float32), bad=bad, t=bad.T.copy(), v=bad[77])
    element = f"the weight of element {{}} is {poison}; every one must be finite"
    refused(tmp_path, file, "'bad': " + element.format(77 * 32 + 3), whole("bad", (100, 32)))
    refused(
        tmp_path,
        file,
        "'bad': " + element.format(77 * 32 + 3),
        WantedTensor("w", (Part("good"), Part("bad")), (108, 32)),
    )
    refused(
        tmp_path, file, "'t': " + element.format(300 + 77), WantedTensor("w", (Part("t", transposed=True),), (100, 32))
    )
    refused(tmp_path, file, "'v': " + element.format(3), whole("v", (32,)))


def test_weights_outside_the_range_of_a_layout(tmp_path: Path) -> None:
    values = np.zeros((40, 32), np.float32)
    values[33] = np.linspace(-1e30, 1e30, 32)
    file = folder_of(tmp_path, a=np.zeros((24, 32), np.float32), b=values)
    want = WantedTensor("w", (Part("a"), Part("b")), (64, 32))
    for chunk in (1, 1 << 25):
        with pytest.raises(DataError, match="tensor 'b': row 57 of w has weights outside the range of int8"):
            packed(tmp_path, file, want, weights="int8", chunk=chunk)
    assert np.isfinite(floats(tmp_path, file, want)).all()


QUANTIZED = sorted(kind for kind in SUPPORTED if TRAITS[kind].block_elements > 1)


@pytest.mark.parametrize("kind", QUANTIZED)
@pytest.mark.parametrize("scale", [np.inf, -np.inf, np.nan])
def test_scales_that_are_not_finite(tmp_path: Path, kind: GGMLType, scale: float) -> None:
    elements, block = TRAITS[kind]
    width = 2 * elements
    raw = bytearray(random_bytes(kind, (40, width), RNG))
    at = 61 * block + (208 if kind is GGMLType.Q6_K else 0)
    raw[at : at + 2] = np.float16(scale).tobytes()
    file = gguf_of(tmp_path, Tensor("q", kind, (40, width), bytes(raw)))
    for weights in ("auto", "f32", "int8"):
        with pytest.raises(DataError, match=f"the scale of element {61 * elements} is {scale}") as caught:
            packed(tmp_path, file, whole("q", (40, width)), weights=weights, chunk=1)
        assert (caught.value.tensor, caught.value.path) == ("q", file.path)
        assert caught.value.offset == file.tensors["q"].offset + at


@pytest.mark.parametrize("weights", ["auto", "f32", "bf16", "int8", "int4"])
@pytest.mark.parametrize("kind", QUANTIZED)
def test_scales_of_zero_are_groups_of_zeros(tmp_path: Path, kind: GGMLType, weights: str) -> None:
    """Legal, whatever the quants say: pruned weights look so. Nothing is divided by them."""
    width = 2 * TRAITS[kind].block_elements
    zeros = bytes(32 * width // TRAITS[kind].block_elements * TRAITS[kind].block_bytes)
    ones = b"\x11" * (len(zeros) // 32)
    row = TRAITS[kind].block_bytes
    raw = bytearray(zeros)
    if kind in (GGMLType.Q4_0, GGMLType.Q4_1, GGMLType.Q8_0):  # quants that are not zero under a scale that is
        raw[row - 8 : row] = ones[:8]
    file = gguf_of(tmp_path, Tensor("q", kind, (32, width), bytes(raw)))
    found = packed(tmp_path, file, whole("q", (32, width)), weights=weights)
    assert not found.tensors["w"].floats().any() and found.notes["largest_error"] == {}


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_rows_of_zeros_are_rounded_to_zeros(tmp_path: Path, weights: str) -> None:
    values = RNG.standard_normal((40, 64)).astype(np.float32)
    values[3], values[10, :32], values[20] = 0, 0, 0.25
    found = floats(tmp_path, folder_of(tmp_path, m=values), whole("m", (40, 64)), weights=weights)
    assert not found[3].any() and not found[10, :32].any() and found[10, 32:].any()
    assert np.isfinite(found).all() and np.abs(found[20] - 0.25).max() < 1e-3


# --- the store's copy


def test_packed_weights_are_made_once_and_again_when_damaged(tmp_path: Path) -> None:
    file = folder_of(tmp_path, m=RNG.standard_normal((32, 32)).astype(np.float32))
    wanted, opened, path = [whole("m", (32, 32))], [], tmp_path / "w.kvik"

    def source() -> TensorFile:
        opened.append(1)
        return read_safetensors(file.path)

    first = load_packed(path, source, wanted, "auto", quiet)
    good = path.read_bytes()
    assert np.array_equal(load_packed(path, source, wanted, "auto", quiet).tensors["w"].data, first.tensors["w"].data)
    assert len(opened) == 1
    for damaged in (good[:5000], good[:4100] + b"\xff" + good[4101:], good[:9] + b"\x03" + good[10:], b""):
        path.unlink()
        path.write_bytes(damaged)
        load_packed(path, source, wanted, "auto", quiet)
        assert path.read_bytes() == good
    with pytest.raises(DataError, match=r"configuration says \[16, 64\]"):
        load_packed(path, source, [whole("m", (16, 64))], "auto", quiet)
    assert len(opened) == 6
