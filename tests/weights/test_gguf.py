from __future__ import annotations

import os
import struct
import time
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from weights.gguf_files import (
    ARRAY,
    BOOL,
    F32,
    F64,
    I8,
    I16,
    I32,
    I64,
    STRING,
    U8,
    U16,
    U32,
    U64,
    Array,
    Built,
    Key,
    Tensor,
    block_width,
    build,
    tensor,
    write_with_package,
)

from kvik.errors import DataError
from kvik.weights.dequantize import SUPPORTED
from kvik.weights.ggml_types import GGMLType
from kvik.weights.gguf import GGUFFile, read_gguf

RNG = np.random.default_rng(11)
NAME = Key("general.architecture", STRING, "llama")
ONE = Tensor("w", GGMLType.F32, (2, 8), np.arange(16, dtype=np.float32).tobytes())


def write(folder: Path, data: bytes | Built) -> Path:
    path = folder / "model.gguf"
    path.write_bytes(data if isinstance(data, bytes) else data.data)
    return path


def refused(
    folder: Path, data: bytes | Built, message: str, *, offset: int | None = None, name: str | None = None
) -> None:
    path = write(folder, data)
    with pytest.raises(DataError, match=message) as caught:
        read_gguf(path)
    text = str(caught.value)
    assert text.startswith(f"{path}: ") and "\n" not in text and len(text) < 400
    assert caught.value.exit_code == 65
    if offset is not None:
        assert caught.value.offset == offset
        assert text.endswith(f"(at byte {offset})")
    assert caught.value.tensor == name


# --- what is well-formed


def test_every_kind_of_value(tmp_path: Path) -> None:
    nested = Array(ARRAY, [Array(U8, [1, 255]), Array(STRING, ["x"]), Array(ARRAY, [])])
    keys = [
        *(Key("u8", U8, 255), Key("i8", I8, -128), Key("u16", U16, 65535), Key("i16", I16, -(2**15))),
        *(Key("u32", U32, 2**32 - 1), Key("i32", I32, -(2**31)), Key("u64", U64, 2**64 - 1), Key("i64", I64, -(2**63))),
        *(Key("f32", F32, 0.5), Key("f64", F64, 0.1), Key("yes", BOOL, 1), Key("no", BOOL, 0)),
        *(Key("text", STRING, "日本 é\n\0"), Key("empty", STRING, ""), Key("nested", ARRAY, nested)),
        *(Key("numbers", ARRAY, Array(I16, [-1, 2])), Key("flags", ARRAY, Array(BOOL, [1, 0]))),
        *(Key("floats", ARRAY, Array(F64, [0.1, -3.0])), Key("none", ARRAY, Array(STRING, []))),
    ]
    with read_gguf(write(tmp_path, build(keys))) as file:
        m = file.metadata
    expected = {key.name: key.value for key in keys if key.kind not in (ARRAY, BOOL)}
    assert {key: m[key] for key in expected} == expected
    assert m["yes"] is True and m["no"] is False
    assert m["nested"] == [[1, 255], ["x"], []]
    assert m["numbers"] == [-1, 2] and m["flags"] == [True, False] and m["floats"] == [0.1, -3.0] and m["none"] == []
    assert type(m["numbers"][0]) is int and type(m["flags"][0]) is bool and type(m["floats"][0]) is float
    assert list(m) == [key.name for key in keys]


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("alignment", [8, 32, 64, 4096])
def test_tensors_where_they_were_put(tmp_path: Path, version: int, alignment: int) -> None:
    tensors = [tensor(f"t{kind.name}", kind, (3, block_width(kind)), RNG) for kind in sorted(SUPPORTED)]
    tensors.append(tensor("four", GGMLType.F16, (2, 3, 4, 5), RNG))
    keys = [NAME, Key("general.alignment", U32, alignment)]
    built = build(keys, tensors, version=version, alignment=alignment)
    path = write(tmp_path, built)
    with read_gguf(path) as file:
        assert (file.version, file.path, file.size) == (version, path, len(built.data))
        assert list(file.tensors) == [t.name for t in tensors]
        for t in tensors:
            found = file.tensors[t.name]
            assert (found.type, found.shape, found.nbytes) == (t.type, t.shape, len(t.data))
            assert found.offset == built.data_offsets[t.name] and found.offset % alignment == 0
            assert file.data(t.name).tobytes() == t.data
            assert file.dequantize(t.name).shape == t.shape
            file.check_finite(t.name)


def test_reads_what_the_package_writes(tmp_path: Path) -> None:
    keys = {"a.text": "é", "a.int": -5, "a.float": 0.25, "a.flag": True, "a.list": ["x", "yy", ""], "a.ints": [1, 2, 3]}
    tensors = [tensor(kind.name, kind, (4, 2 * block_width(kind)), RNG) for kind in sorted(SUPPORTED)]
    path = tmp_path / "theirs.gguf"
    write_with_package(path, keys, tensors)
    with read_gguf(path) as file:
        assert {key: file.metadata[key] for key in keys} == keys
        assert file.metadata["general.architecture"] == "llama"
        for t in tensors:
            assert file.tensors[t.name].shape == t.shape
            assert file.data(t.name).tobytes() == t.data


def test_the_package_reads_what_the_helper_writes(tmp_path: Path) -> None:
    """Else the files of these tests could be wrong in the same way as the reader."""
    built = build([NAME, Key("n", U32, 3)], [ONE, tensor("q", GGMLType.Q4_1, (2, 32), RNG)])
    theirs = gguf.GGUFReader(write(tmp_path, built))
    assert theirs.fields["n"].contents() == 3
    assert [(t.name, t.shape.tolist(), t.data_offset) for t in theirs.tensors] == [
        ("w", [8, 2], built.data_offsets["w"]),
        ("q", [32, 2], built.data_offsets["q"]),
    ]


VALUES: st.SearchStrategy[tuple[int, Any]] = st.recursive(
    st.one_of(
        st.tuples(st.just(STRING), st.text(max_size=20)),
        st.tuples(st.just(I64), st.integers(-(2**63), 2**63 - 1)),
        st.tuples(st.just(U8), st.integers(0, 255)),
        st.tuples(st.just(F64), st.floats(allow_nan=False)),
    ),
    lambda inner: inner.flatmap(
        lambda one: st.lists(st.just(one[1]), max_size=5).map(lambda items: (ARRAY, Array(one[0], items)))
    ),
    max_leaves=3,
)


def plain(value: Any) -> Any:
    return [plain(item) for item in value.values] if isinstance(value, Array) else value


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.text(min_size=1, max_size=12), VALUES, max_size=6))
def test_any_metadata_comes_back(tmp_path: Path, entries: dict[str, tuple[int, Any]]) -> None:
    built = build([Key(name, kind, value) for name, (kind, value) in entries.items()])
    with read_gguf(write(tmp_path, built)) as file:
        assert file.metadata == {name: plain(value) for name, (_, value) in entries.items()}


def test_default_model(default_model_gguf: Path) -> None:
    seconds = []
    for _ in range(3):
        begin = time.perf_counter()
        file = read_gguf(default_model_gguf)
        seconds.append(time.perf_counter() - begin)
    assert min(seconds) < 0.15
    m = file.metadata
    assert (len(file.tensors), len(m), m["llama.block_count"]) == (272, 33, 30)
    assert (len(m["tokenizer.ggml.tokens"]), len(m["tokenizer.ggml.merges"])) == (49152, 48900)
    assert m["tokenizer.ggml.tokens"][:3] == ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    head = file.tensors["token_embd.weight"]
    assert (head.type, head.shape, head.offset) == (GGMLType.Q8_0, (49152, 576), 1785664)
    used = sum(t.nbytes for t in file.tensors.values())
    assert 0 <= file.size - head.offset - used < 272 * 32
    for name in ("token_embd.weight", "blk.0.attn_q.weight", "blk.29.ffn_down.weight", "output_norm.weight"):
        file.check_finite(name)
    ours = file.dequantize("blk.0.attn_q.weight")
    theirs = gguf.dequantize(file.data("blk.0.attn_q.weight"), gguf.GGMLQuantizationType.Q4_1)
    assert np.array_equal(ours, theirs.reshape(ours.shape))


def test_strings_beyond_one_chunk(tmp_path: Path) -> None:
    words = [f"w{i}" * (i % 3) for i in range(20_000)]
    with read_gguf(write(tmp_path, build([Key("words", ARRAY, Array(STRING, words))]))) as file:
        assert file.metadata["words"] == words


def test_views_are_read_only_and_outlive_close(tmp_path: Path) -> None:
    file = read_gguf(write(tmp_path, build([NAME], [ONE])))
    view = file.data("w")
    assert not view.flags.writeable and view.dtype == np.uint8
    file.close()
    assert view.tobytes() == ONE.data
    with pytest.raises(DataError, match="tensor 'w': the file was closed"):
        file.data("w")


def test_missing_tensor(tmp_path: Path) -> None:
    file = read_gguf(write(tmp_path, build([NAME], [ONE])))
    for ask in (file.data, file.dequantize, file.check_finite):
        with pytest.raises(DataError, match="tensor 'v': is missing; there are 1 tensors"):
            ask("v")


def test_types_that_are_listed_but_not_read(tmp_path: Path) -> None:
    file = read_gguf(write(tmp_path, build([NAME], [Tensor("k", GGMLType.Q3_K, (2, 256), bytes(220)), ONE])))
    assert (file.tensors["k"].type, file.tensors["k"].nbytes) == (GGMLType.Q3_K, 220)
    for ask in (file.data, file.dequantize, file.check_finite):
        with pytest.raises(DataError, match="tensor 'k': type Q3_K is not supported; supported: F32") as caught:
            ask("k")
        assert caught.value.offset == file.tensors["k"].offset
    assert file.dequantize("w")[1, 7] == 15.0


def test_not_finite(tmp_path: Path) -> None:
    raw = bytearray(ONE.data)
    raw[12:16] = struct.pack("<f", float("nan"))
    file = read_gguf(write(tmp_path, build([NAME], [ONE._replace(data=bytes(raw))])))
    with pytest.raises(DataError, match="tensor 'w': the weight of element 3 is nan") as caught:
        file.check_finite("w")
    assert caught.value.offset == file.tensors["w"].offset + 12


# --- what is not a file


def test_not_a_file(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo.gguf"
    os.mkfifo(fifo)
    for path, message in [
        (tmp_path / "none.gguf", "no such file"),
        (tmp_path, "is a folder, not a file"),
        (fifo, "is a FIFO, not a file"),
        (Path("/dev/zero"), "is a device, not a file"),
        (Path("/dev/null"), "is a device, not a file"),
        (write(tmp_path, b"") / "below", "cannot be read: Not a directory"),
        (tmp_path / ("n" * 300), "cannot be read: File name too long"),
        (tmp_path / "nul\0", "cannot be read: embedded null byte"),
        (write(tmp_path, b""), "the file is empty"),
    ]:
        with pytest.raises(DataError, match=message) as caught:
            read_gguf(path)
        assert "\n" not in str(caught.value) and "\0" not in str(caught.value)


def test_a_loop_of_links(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises(DataError, match="cannot be read: Too many levels"):
        read_gguf(tmp_path / "a")


def test_an_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, build([NAME], [ONE]))

    def denied(*args: object, **options: object) -> int:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "open", denied)  # the tests may run as root, whom no mode bits stop
    with pytest.raises(DataError, match="cannot be read: Permission denied"):
        read_gguf(path)


def test_no_descriptor_stays_open(tmp_path: Path) -> None:
    good, bad = tmp_path / "good.gguf", tmp_path / "bad.gguf"
    good.write_bytes(build([NAME], [ONE]).data)
    bad.write_bytes(b"GGUF")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        read_gguf(good).close()
        for path in (bad, tmp_path):
            with pytest.raises(DataError):
                read_gguf(path)
    assert len(os.listdir("/proc/self/fd")) == before


# --- what is damaged or hostile


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    keys = [NAME, Key("t", ARRAY, Array(STRING, ["a", "bb"])), Key("n", ARRAY, Array(U16, [1, 2])), Key("b", BOOL, 1)]
    data = build(keys, [ONE]).data
    for length in range(len(data)):
        path = write(tmp_path, data[:length])
        with pytest.raises(DataError) as caught:
            read_gguf(path)
        assert caught.value.path == path and (caught.value.offset is not None or length == 0)


def test_preamble(tmp_path: Path) -> None:
    built = build([NAME], [ONE])
    refused(tmp_path, b"GGU", r"not a GGUF file: it begins with b'GGU', not b'GGUF'", offset=0)
    refused(tmp_path, b"\x7fELF" + built.data[4:], "not a GGUF file", offset=0)
    refused(tmp_path, b"GGUF\3\0", "truncated: version needs 4 bytes, 2 are left", offset=4)
    refused(tmp_path, built.put("version", 0, 1), "GGUF version 1 is not supported, only 2 and 3", offset=4)
    refused(tmp_path, built.put("version", 0, 4), "GGUF version 4 is not supported", offset=4)
    refused(tmp_path, built.put("version", 0, 0), "GGUF version 0 is not supported", offset=4)
    refused(tmp_path, built.put("version", 0, 3 << 24), r"big-endian GGUF \(version 3\) is not supported", offset=4)


@pytest.mark.parametrize("count", [20, 2**31, 2**32, 2**63, 2**64 - 1])
def test_impossible_counts(tmp_path: Path, count: int) -> None:
    built = build([NAME, Key("t", ARRAY, Array(STRING, ["a"])), Key("n", ARRAY, Array(U32, [1]))], [ONE])
    refused(tmp_path, built.put("count", 0, count), f"impossible count of {count} tensors for the", offset=8)
    refused(tmp_path, built.put("count", 1, count), f"impossible count of {count} keys for the", offset=16)
    if count > 20:  # lengths in order: key, text, key, array, string, key, array, tensor name
        refused(tmp_path, built.put("length", 3, count), rf"key 't' has an impossible length of {count}")
        refused(tmp_path, built.put("length", 4, count), "key 't': string 0 reaches beyond the end of the file")
        refused(tmp_path, built.put("length", 6, count), rf"key 'n' has an impossible length of {count}")


def test_keys(tmp_path: Path) -> None:
    refused(tmp_path, build([Key(b"\xff\xfe", U8, 1)]), "key is not UTF-8: invalid start byte", offset=32)  # type: ignore[arg-type]
    refused(tmp_path, build([Key("", U8, 1)]), "a key is empty", offset=24)
    refused(tmp_path, build([NAME, NAME]), "key 'general.architecture' stands twice")
    refused(tmp_path, build([Key("k" * 65536, U8, 1)]), "key has 65536 bytes, at most 65535 are allowed", offset=24)
    refused(tmp_path, build([Key("k" * 60000, BOOL, 2)]), "key 'k+'… is a boolean of value 2, neither 0 nor 1")
    refused(tmp_path, build([Key("k\nl", BOOL, 2)]), r"key 'k\\nl' is a boolean")
    refused(
        tmp_path, build([Key("k", ARRAY, Array(BOOL, [0, 1, 9]))]), "key 'k' holds a boolean that is neither", offset=51
    )


def test_values(tmp_path: Path) -> None:
    refused(tmp_path, build([Key("k", STRING, b"ab\xff")]), "key 'k' is not UTF-8", offset=47)
    texts = Array(STRING, ["a", b"b\xc3"])
    refused(
        tmp_path, build([Key("k", ARRAY, texts)]), "key 'k': string 1 is not UTF-8: unexpected end of data", offset=67
    )
    built = build([Key("k", U32, 1), Key("a", ARRAY, Array(U8, [1]))])
    refused(tmp_path, built.put("type", 0, 13), "key 'k' has the unknown type 13", offset=33)
    refused(tmp_path, built.put("type", 2, 99), "key 'a' has elements of the unknown type 99")
    value = Array(U8, [])
    for depth in range(1, 7):
        path = write(tmp_path, build([Key("k", ARRAY, value)]))
        if depth <= 4:
            assert read_gguf(path).metadata["k"] is not None
        else:
            refused(tmp_path, path.read_bytes(), "key 'k' nests arrays deeper than 4")
        value = Array(ARRAY, [value])


@pytest.mark.parametrize(
    ("kind", "value", "shown"),
    [
        *((U32, 0, "0"), (U32, 4, "4"), (U32, 33, "33"), (U32, 2**31, "2147483648"), (I32, -32, "-32")),
        *((F32, 32.0, "32.0"), (STRING, "32", "str"), (BOOL, 1, "True"), (ARRAY, Array(U32, [32]), "list")),
        (U64, 2**63, "9223372036854775808"),
    ],
)
def test_alignment(tmp_path: Path, kind: int, value: Any, shown: str) -> None:
    message = rf"general.alignment must be a power of two in \[8, 2097152\], got {shown}$"
    refused(tmp_path, build([Key("general.alignment", kind, value)], [ONE]), message)


def test_shapes(tmp_path: Path) -> None:
    built = build([NAME], [ONE])
    rank_at, dim_at = built.at("rank").offset, built.at("dim").offset
    refused(
        tmp_path, built.put("rank", 0, 0), "tensor 'w': has 0 dimensions, 1 to 4 are possible", offset=rank_at, name="w"
    )
    refused(tmp_path, built.put("rank", 0, 5), "tensor 'w': has 5 dimensions, 1 to 4 are possible", name="w")
    refused(tmp_path, built.put("dim", 0, 0), r"tensor 'w': has a dimension of 0: \[2, 0\]", offset=dim_at, name="w")
    for size in (2**20, 2**61, 2**63, 2**64 - 1):
        message = rf"shape \[2, {size}\] of F32 needs {8 * size} bytes, the file has {len(built.data)}"
        refused(tmp_path, built.put("dim", 0, size), message, offset=dim_at, name="w")
    wraps = build([NAME], [ONE._replace(shape=(2**32, 2**32, 2**32, 2**32))])
    refused(tmp_path, wraps, "needs 1361129467683753853853498429727072845824 bytes", name="w")
    whole = build([NAME], [ONE._replace(type=GGMLType.Q4_0)])
    refused(tmp_path, whole, "tensor 'w': rows of 8 do not divide into Q4_0 blocks of 32", name="w")


@pytest.mark.parametrize("number", [4, 5, 31, 40, 255, 2**31, 2**32 - 1])
def test_unknown_tensor_types(tmp_path: Path, number: int) -> None:
    built = build([NAME], [ONE])
    where = len([f for f in built.fields if f.what == "type"]) - 1
    at = built.at("type", where).offset
    refused(
        tmp_path, built.put("type", where, number), f"tensor 'w': has the unknown type {number}", offset=at, name="w"
    )


def test_names(tmp_path: Path) -> None:
    refused(tmp_path, build([NAME], [ONE, ONE]), "tensor 'w': stands twice", name="w")
    refused(tmp_path, build([NAME], [ONE._replace(name="")]), "a tensor has no name")
    refused(tmp_path, build([NAME], [ONE._replace(name="n" * 1025)]), "tensor name has 1025 bytes, at most 1024")


def test_places(tmp_path: Path) -> None:
    built = build([NAME], [ONE, ONE._replace(name="v")])
    begin = built.data_offsets["w"]
    end = len(built.data)
    message = "tensor 'v': its offset 8 is not a multiple of the alignment 32"
    refused(tmp_path, built.put("offset", 1, 8), message, offset=begin + 8, name="v")
    refused(tmp_path, built.put("offset", 1, 32), "tensor 'v': overlaps tensor 'w'", offset=begin + 32, name="v")
    refused(tmp_path, built.put("offset", 1, 0), "overlaps tensor", name="v")
    for offset in (96, 2**40, 2**64 - 32):
        message = f"tensor 'v': needs 64 bytes, the file ends at {end}"
        refused(tmp_path, built.put("offset", 1, offset), message, offset=begin + offset, name="v")
    swapped = built.put("offset", 0, 64)
    where = built.at("offset", 1)
    swapped = swapped[: where.offset] + bytes(8) + swapped[where.offset + 8 :]
    with read_gguf(write(tmp_path, swapped)) as file:  # any order is fine
        assert isinstance(file, GGUFFile) and file.tensors["w"].offset == begin + 64


def test_a_file_of_no_tensors_needs_no_data(tmp_path: Path) -> None:
    built = build([NAME])
    file = read_gguf(write(tmp_path, built.data[: built.header_bytes]))
    assert file.tensors == {} and file.metadata == {"general.architecture": "llama"}
