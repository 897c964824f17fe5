"""The safetensors reader: what it reads, and each thing it refuses with file, tensor and byte."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from weights.safetensors_files import INDEX, bf16, entry, file_of, whole, write_folder

from kvik.errors import DataError
from kvik.weights.ggml_types import GGMLType
from kvik.weights.json_text import read_json_object
from kvik.weights.safetensors import read_safetensors, shards_of

RNG = np.random.default_rng(0)
A = RNG.standard_normal((3, 5)).astype(np.float32)
B = RNG.standard_normal(7).astype(np.float32)


def one(tmp_path: Path, data: bytes) -> Path:
    (tmp_path / "model.safetensors").write_bytes(data)
    return tmp_path


def refused(
    folder: Path, match: str, file: str = "model.safetensors", tensor: str | None = None, offset: bool = True
) -> None:
    with pytest.raises(DataError, match=match) as caught:
        read_safetensors(folder)
    error = caught.value
    assert "\n" not in str(error) and len(str(error)) < 400 + len(str(folder))
    assert str(error.path) == str(folder / file) if file else str(folder)
    assert error.tensor == tensor and (error.offset is not None) == offset


# --- what it reads


def test_reads_what_the_package_writes(tmp_path: Path) -> None:
    values = {
        "a": A,
        "b": B.astype(np.float16),
        "scalar": np.array(3, np.float32),
        "none": np.zeros((0, 4), np.float32),
    }
    safetensors.numpy.save_file(values, tmp_path / "model.safetensors", {"format": "pt", "é": '"{}\\'})
    with read_safetensors(tmp_path) as file:
        assert file.path == tmp_path and file.size == (tmp_path / "model.safetensors").stat().st_size
        for name, array in values.items():
            assert np.array_equal(file.dequantize(name), array.astype(np.float32))
            assert file.data(name).tobytes() == array.tobytes()
            file.check_finite(name)
            assert file.tensors[name].shape == array.shape
        assert file.types() == {"F32": (3, 4 * 16), "F16": (1, 14)}


def test_the_package_reads_what_the_helper_writes(tmp_path: Path) -> None:
    """Else the files of these tests could be wrong in the same way as the reader."""
    one(tmp_path, file_of({"a": A, "b": B}, b="F16"))
    theirs = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    assert np.array_equal(theirs["a"], A) and np.array_equal(theirs["b"], B.astype(np.float16))


def test_bfloat16_is_the_upper_half_of_f32(tmp_path: Path) -> None:
    with read_safetensors(one(tmp_path, file_of({"a": A}, "BF16"))) as file:
        assert file.tensors["a"].type is GGMLType.BF16
        assert np.array_equal(file.dequantize("a").view(np.uint32), A.view(np.uint32) & 0xFFFF0000)


def test_headers_need_no_alignment_and_no_order(tmp_path: Path) -> None:
    header = {"__metadata__": {}, "b": entry("F32", [7], 60, 88), "a": entry("F32", [3, 5], 0, 60)}
    for padding in range(5):
        text = json.dumps(header).encode() + b" " * padding
        with read_safetensors(one(tmp_path, whole(text, A.tobytes() + B.tobytes()))) as file:
            assert list(file.tensors) == ["b", "a"]
            assert np.array_equal(file.dequantize("a"), A) and np.array_equal(file.dequantize("b"), B)
            assert file.data("b").tobytes() == B.tobytes()


@pytest.mark.parametrize("count", [2, 3])
def test_shards(tmp_path: Path, count: int) -> None:
    tensors = {f"t{i}": RNG.standard_normal((2, i + 1)).astype(np.float32) for i in range(5)}
    with read_safetensors(write_folder(tmp_path, tensors, count)) as file:
        assert set(file.tensors) == set(tensors)
        for name, values in tensors.items():
            assert np.array_equal(file.dequantize(name), values)
            assert file.tensors[name].path.name.startswith("model-0000")
        sizes = sum(p.stat().st_size for p in tmp_path.glob("*.safetensors"))
        assert file.size == sizes and file.types() == {"F32": (5, 4 * 2 * 15)}


def test_one_file_comes_before_an_index(tmp_path: Path) -> None:
    write_folder(tmp_path, {"a": A, "b": B}, 2)
    one(tmp_path, file_of({"a": A}))
    assert list(read_safetensors(tmp_path).tensors) == ["a"]


def test_links_are_followed_to_files(tmp_path: Path) -> None:
    """The hub's cache is folders of links."""
    blob = tmp_path / "blob"
    blob.write_bytes(file_of({"a": A}))
    folder = tmp_path / "snapshot"
    folder.mkdir()
    (folder / "model.safetensors").symlink_to(blob)
    assert np.array_equal(read_safetensors(folder).dequantize("a"), A)


def test_views_outlive_close(tmp_path: Path) -> None:
    file = read_safetensors(one(tmp_path, file_of({"a": A})))
    view = file.data("a")
    file.close()
    assert view.tobytes() == A.tobytes() and not view.flags.writeable
    with pytest.raises(DataError, match=r"model\.safetensors: tensor 'a': the file was closed"):
        file.data("a")


def test_other_dtypes_are_listed_and_refused_when_they_are_needed(tmp_path: Path) -> None:
    data = A.tobytes() + bytes(range(6)) + bytes(3)
    header = {"a": entry("F32", [3, 5], 0, 60), "f8": entry("F8_E4M3", [6], 60, 66), "new": entry("F2", [12], 66, 69)}
    file = read_safetensors(one(tmp_path, whole(header, data)))
    assert list(file.tensors) == ["a"] and file.types() == {"F32": (1, 60), "F8_E4M3": (1, 6), "F2": (1, 3)}
    for name, dtype in (("f8", "F8_E4M3"), ("new", "F2")):
        for ask in (file.data, file.dequantize, file.check_finite):
            with pytest.raises(DataError, match=f"type {dtype} is not supported; supported: F32, F16, BF16") as caught:
                ask(name)
            assert caught.value.tensor == name and caught.value.offset is not None
            assert str(caught.value.path).endswith("model.safetensors")
    with pytest.raises(DataError, match="tensor 'gone': is missing; there are 1 tensors"):
        file.data("gone")


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_found(tmp_path: Path, dtype: str, poison: float) -> None:
    values = A.copy()
    values[1, 2] = poison
    file = read_safetensors(one(tmp_path, file_of({"b": B, "a": values}, dtype)))
    size = 4 if dtype == "F32" else 2
    with pytest.raises(DataError, match=f"the weight of element 7 is {poison}") as caught:
        file.check_finite("a")
    assert caught.value.tensor == "a" and caught.value.offset == file.tensors["a"].offset + 7 * size
    file.check_finite("b")


# --- headers


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"\0" * 7, "truncated: has 7 bytes"),
        (whole("{}", length=2**56), f"the header has {2**56} bytes, at most 100000000"),
        (whole("{}", length=2**64 - 1), "at most 100000000 are allowed"),
        (whole("{}", length=3), "truncated: the header has 3 bytes, 2 are left"),
        (whole(""), "does not begin with '{'"),
        (whole("[]"), "does not begin with '{'"),
        (whole(" {}"), "does not begin with '{'"),
        (whole("{"), "is not JSON: its end where"),
        (whole("{}x"), "goes on after its end"),
        (whole("{}\0"), "goes on after its end"),
        (whole('{"a"}'), "is not JSON"),
        (whole('{"a":}'), r"is not JSON: no value begins here \(at byte 13\)"),
        (whole('{"a":{"é":1 2}}'), r"is not JSON: Expecting ',' delimiter \(at byte 21\)"),
        (whole('{"a":{"dtype":'), r"is not JSON: no value begins here \(at byte 22\)"),
        (whole('{"a":{"b":{}}}'), r"an object of at most 4096 bytes, without objects in it, belongs here \(at byte 13\)"),
        (whole('{a:{}}'), "is not JSON: 'a' where"),
        (whole('{"a":{},}'), "has the fields"),
        (whole('{"a\n":{}}'), "a string does not end"),
        (whole('{"\\x":{}}'), "a string does not end"),
        (whole('{"\\ud800":{}}'), "half a surrogate pair"),
        (whole('{"":{}}'), "has no name"),
        (whole({"n" * 1025: {}}), "has 1025 characters"),
        (whole(b'{"\xff":{}}'), "is not UTF-8: invalid start byte"),
        (whole(b'{"a":"' + b"x" * 70000 + b"\xc3"), "is not UTF-8"),
        (whole('{"__metadata__":[]}'), "is not JSON: '\\[' where '{' belongs"),
        (whole('{"__metadata__":{"a":5}}'), "must hold text by text"),
        (whole('{"__metadata__":{},"__metadata__":{}}'), "__metadata__ stands twice"),
        (whole('{"__metadata__":{"a":' + "[" * 100000), "must hold text by text"),
        (whole('{"a":' + '{"b":' * 100000), "nested deeper than 32"),
    ],
)  # fmt: skip
def test_headers_that_are_refused(tmp_path: Path, data: bytes, match: str) -> None:
    tensor = "a" if "fields" in match else None
    refused(one(tmp_path, data), match, tensor=tensor)


def test_where_a_byte_is_no_utf8(tmp_path: Path) -> None:
    """Also where a character is cut by the pieces that are decoded."""
    for at in (65530, 65535, 65536, 65537, 131072):
        text = b'{"' + b"x" * (at - 2 - 8) + b"\xe2\x82" + b'":0}'
        with pytest.raises(DataError, match=rf"is not UTF-8.*\(at byte {at}\)"):
            read_safetensors(one(tmp_path, whole(text)))


def test_an_empty_file(tmp_path: Path) -> None:
    refused(one(tmp_path, b""), "the file is empty", offset=False)


GOOD = entry("F32", [2], 0, 8)


@pytest.mark.parametrize(
    ("entries", "match"),
    [
        ([], "an object of at most"),
        ({}, "has the fields"),
        ({"dtype": "F32", "shape": [2]}, r"has the fields \['dtype', 'shape'\]"),
        (GOOD | {"more": 1}, "has the fields"),
        (GOOD | {"dtype": 5}, "its dtype must be a name"),
        (GOOD | {"dtype": "F" * 40}, "its dtype must be a name"),
        (GOOD | {"shape": 2}, "its shape must be"),
        (GOOD | {"shape": [-2]}, "its shape must be"),
        (GOOD | {"shape": [2.0]}, "its shape must be"),
        (GOOD | {"shape": ["2"]}, "its shape must be"),
        (GOOD | {"shape": [True, 2]}, "its shape must be"),
        (GOOD | {"shape": [None]}, "its shape must be"),
        (GOOD | {"shape": [[2]]}, "its shape must be"),
        (GOOD | {"shape": [1] * 8 + [2]}, "its shape must be"),
        (GOOD | {"shape": [10**30]}, "its shape must be"),
        (GOOD | {"shape": [2, 2**64 - 2]}, "is impossibly large"),
        (GOOD | {"shape": [0, 2**63, 2**63]}, "is impossibly large"),
        (GOOD | {"shape": [2**32, 2**32]}, "is impossibly large"),
        (GOOD | {"shape": [3]}, r"shape \[3\] of F32 needs 12 bytes, its data_offsets hold 8"),
        (GOOD | {"shape": []}, "needs 4 bytes, its data_offsets hold 8"),
        (GOOD | {"dtype": "F64"}, "F64 needs 16 bytes"),
        (GOOD | {"dtype": "F4"}, "F4 needs 1 bytes"),
        (entry("F4", [3], 0, 8), "F4 needs 1.5 bytes"),
        (entry("F32", [2], 8, 0), "its data_offsets must be"),
        (entry("F32", [2], -8, 0), "its data_offsets must be"),
        (entry("F32", [2], 0.0, 8), "its data_offsets must be"),
        (GOOD | {"data_offsets": [0, 8, 16]}, "its data_offsets must be"),
        (GOOD | {"data_offsets": {}}, "an object of at most 4096 bytes, without objects"),
        (entry("F32", [4], 0, 16), "ends at 16 of the data, which has 8 bytes"),
        (entry("F32", [2], 2**63, 2**63 + 8), "ends at 9223372036854775816 of the data"),
    ],
)
def test_tensors_that_are_refused(tmp_path: Path, entries: Any, match: str) -> None:
    tensor = None if "an object" in match else "t"
    refused(one(tmp_path, whole({"t": entries}, bytes(8))), match, tensor=tensor)


def test_keys_that_stand_twice(tmp_path: Path) -> None:
    text = json.dumps(GOOD)
    refused(one(tmp_path, whole(f'{{"t":{text},"t":{text}}}', bytes(8))), "stands twice", tensor="t")
    refused(one(tmp_path, whole(f'{{"t":{text},"\\u0074":{text}}}', bytes(8))), "stands twice", tensor="t")
    doubled = text.replace('"dtype": "F32"', '"dtype": "F32", "dtype": "F16"')
    refused(one(tmp_path, whole(f'{{"t":{doubled}}}', bytes(8))), "key 'dtype' stands twice")


@pytest.mark.parametrize(
    ("a", "b", "match", "tensor"),
    [
        ((0, 8), (4, 12), "overlaps tensor 'a'", "b"),
        ((0, 8), (0, 8), "overlaps tensor 'a'", "b"),
        ((0, 8), (12, 20), "begins 4 bytes after what is before it: the data has a hole", "b"),
        ((4, 12), (12, 20), "begins 4 bytes after", "a"),
        ((0, 8), (8, 16), "4 bytes after the last tensor belong to none", None),
    ],
)
def test_the_data_is_covered_once(
    tmp_path: Path, a: tuple[int, int], b: tuple[int, int], match: str, tensor: str | None
) -> None:
    header = {"a": entry("F32", [2], *a), "b": entry("F32", [2], *b)}
    refused(one(tmp_path, whole(header, bytes(20))), match, tensor=tensor)


def test_too_many_tensors_for_the_file(tmp_path: Path) -> None:
    header = "{" + ",".join(f'"{i}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for i in range(70_000)) + "}"
    refused(one(tmp_path, whole(header)), "names too many tensors for a file of this size")


# --- files of a folder


def test_what_is_in_place_of_a_file(tmp_path: Path) -> None:
    model = tmp_path / "model.safetensors"
    model.mkdir()
    refused(tmp_path, "is a folder, not a file", offset=False)
    model.rmdir()
    os.mkfifo(model)
    refused(tmp_path, "is a FIFO, not a file", offset=False)
    model.unlink()
    model.symlink_to("gone")
    refused(tmp_path, "no such file", offset=False)
    model.unlink()
    model.symlink_to("model.safetensors")
    refused(tmp_path, "cannot be read", offset=False)
    model.unlink()
    refused(tmp_path, "holds neither model.safetensors nor", file="", offset=False)


def test_a_missing_shard(tmp_path: Path) -> None:
    write_folder(tmp_path, {"a": A, "b": B}, 2)
    shard = "model-00002-of-00002.safetensors"
    (tmp_path / shard).unlink()
    refused(tmp_path, "the shard is missing, which model.safetensors.index.json names", shard, offset=False)
    (tmp_path / shard).symlink_to("/dev/null")
    refused(tmp_path, "is a device, not a file", shard, offset=False)


@pytest.mark.parametrize(
    "name",
    [
        "../model.safetensors", "/etc/x.safetensors", "a/b.safetensors", "a\\b.safetensors", "..", ".", "",
        "..safetensors", ".hidden.safetensors", "x\0.safetensors", "model.bin", "x" * 300 + ".safetensors",
    ],
)  # fmt: skip
def test_names_of_shards_that_are_no_names(tmp_path: Path, name: str) -> None:
    one(tmp_path, file_of({"a": A}))  # what "../" would find
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    refused(folder, "is no name of a .safetensors file in this folder", INDEX, "a")


def test_a_tensor_its_shard_lacks(tmp_path: Path) -> None:
    write_folder(tmp_path, {"a": A, "b": B}, 2)
    index = json.loads((tmp_path / INDEX).read_text())
    index["weight_map"]["c"] = "model-00002-of-00002.safetensors"
    (tmp_path / INDEX).write_text(json.dumps(index))
    shard = "model-00002-of-00002.safetensors"
    refused(tmp_path, "says it is here, and it is not", shard, "c", offset=False)


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    write_folder(tmp_path, {"a": A, "b": B}, 2)
    shard = "model-00002-of-00002.safetensors"
    (tmp_path / shard).write_bytes(file_of({"b": B, "a": A}))
    refused(tmp_path, "stands in model-00001-of-00002.safetensors too", shard, "a")


@pytest.mark.parametrize(
    ("text", "match", "tensor"),
    [
        ("{}", "has no weight_map", None),
        ('{"weight_map":{}}', "has no weight_map with a tensor", None),
        ('{"weight_map":[]}', "is not JSON", None),
        ('{"weight_map":{"a":5}}', "its shard must be the name of a file", "a"),
        ('{"weight_map":{"a":"a.safetensors","a":"a.safetensors"}}', "stands twice", "a"),
        ('{"weight_map":{"a":"a.safetensors"},"weight_map":{}}', "weight_map stands twice", None),
        ('{"metadata":' + "[" * 50000 + "]" * 50000 + "}", "nested deeper than 32", None),
        ('{"metadata":{"a":[1,2,{"b":"c"}],"d":-1.5e3},"weight_map":nul}', "is not JSON", None),
        ("", "the file is empty", None),
        ("\ufeff{}", "begins with a byte order mark", None),
    ],
)
def test_indices_that_are_refused(tmp_path: Path, text: str, match: str, tensor: str | None) -> None:
    (tmp_path / INDEX).write_text(text)
    offset = "weight_map with" not in match and "has no" not in match and "empty" not in match
    refused(tmp_path, match, INDEX, tensor, offset)


def test_an_index_of_many_tensors_names_each_file_once(tmp_path: Path) -> None:
    weight_map = {f"model.layers.{i}.x": f"model-{i % 3}.safetensors" for i in range(3000)}
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {"total_size": 5}, "weight_map": weight_map}, indent=2))
    found = shards_of(tmp_path / INDEX)
    assert found == weight_map and len({id(shard) for shard in found.values()}) == 3
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {str(i): f"{i}.safetensors" for i in range(5000)}}))
    with pytest.raises(DataError, match="names more than 4096 shards"):
        shards_of(tmp_path / INDEX)


# --- JSON files


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("[]", "must hold a JSON object"),
        ("5", "must hold a JSON object"),
        ('{"a":1,}', "is not JSON"),
        ('{"a":01}', "is not JSON"),
        ('{"a":1 "b":2}', "is not JSON"),
        ('{"a":[1,2', "is not JSON"),
        ('{"a":1}{', "goes on after its end"),
        ('{"a":1,"b":{"c":1,"c":2}}', "key 'c' stands twice"),
        ('{"a":' + "[" * 40 + "]" * 40 + "}", "nested deeper than 32"),
        ('{"a":' + "9" * 5000 + "}", "a number of the file has over 4300 digits"),
        ('{"a":"' + "x" * 1000 + '"}', "has 1008 bytes, at most 1000 are allowed"),
    ],
)
def test_json_files_that_are_refused(tmp_path: Path, text: str, match: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(DataError, match=match) as caught:
        read_json_object(path, 10_000 if "9" * 100 in text else 1000)
    assert caught.value.path == path and "\n" not in str(caught.value)


def test_json_files(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    value = {"a": [1, -2.5e-3, True, None, {'é\n\\"': "\u20ac"}], "b": {}, "c": [], "d": " x ", "e": [[]]}
    for indent in (None, 2):
        path.write_text(json.dumps(value, indent=indent))
        assert read_json_object(path, 1000) == value
    path.write_text('{"limit": [0.0, Infinity]}')  # as Python writes it
    assert read_json_object(path, 1000) == {"limit": [0.0, float("inf")]}


def test_bytes_of_the_helper() -> None:
    assert bf16(np.array([1.0, -2.0], np.float32)) == struct.pack("<HH", 0x3F80, 0xC000)
