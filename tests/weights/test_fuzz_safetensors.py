"""Damaged and hostile safetensors folders: one DataError or a result, soon, within twice the files and 64 MiB."""

from __future__ import annotations

import json
import random
import re
import shutil
import struct
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import safetensors
from hypothesis import given, settings
from hypothesis import strategies as st
from weights.safetensors_files import INDEX, entry, file_of, whole, write_folder
from weights.test_fuzz import MIB, alarm

from kvik.errors import DataError
from kvik.weights.packing import Packer, Part, WantedTensor
from kvik.weights.safetensors import SafetensorsFolder, read_safetensors

COUNT = 4_000
Files = dict[str, bytes]

_EXTREMES = (0, 1, -1, 2, 7, 8, 2**31, 2**32, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 32, 2**64 - 2, 2**64, 10**40)
_TOKENS = (
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b":",
    b'"',
    b"\\",
    b"null",
    b"true",
    b"1.5",
    b"-1",
    b'"F32"',
    b'"F64"',
    b"\xff",
)
_NUMBERS = (b"\x00\x7c", b"\x01\x7e", b"\x00\x00\x80\x7f", b"\x00\x00\xc0\xff", b"\x80\x7f")


def seeds(folder: Path) -> list[Files]:
    """Well-formed folders that between them use every part of the format."""
    rng = np.random.default_rng(1)
    tensors = {f"t.{i}": rng.standard_normal((i + 1, 3)).astype(np.float32) for i in range(4)}
    metadata = {"__metadata__": {"format": "pt", "é\\": '"'}}
    mixed = {"a": entry("F16", [2, 2], 0, 8), "b": entry("BF16", [3], 8, 14), "c": entry("I64", [1], 14, 22)}
    made = [
        {"model.safetensors": file_of(tensors)},
        {"model.safetensors": whole(metadata | mixed, bytes(14) + b"\1" * 8)},
        {"model.safetensors": whole({"s": entry("F32", [], 0, 4), "e": entry("BF16", [0, 3], 4, 4)}, bytes(4))},
        {"model.safetensors": whole("{}")},
    ]
    for shards, dtype in ((2, "F32"), (3, "BF16")):
        write_folder(folder / dtype, tensors, shards, dtype)
        made.append({p.name: p.read_bytes() for p in sorted((folder / dtype).iterdir())})
    return made


def _flip(r: random.Random, data: bytearray) -> None:
    for _ in range(r.choice((1, 1, 2, 8))):
        data[r.randrange(len(data))] ^= 1 << r.randrange(8)


def _length(r: random.Random, data: bytearray) -> None:
    (true,) = struct.unpack_from("<Q", data.ljust(8))
    new = r.choice((true + r.randrange(-9, 10), r.randrange(2 * len(data)), 2**56, 2**64 - 1, 10**8))
    data[:8] = struct.pack("<Q", new % 2**64)


def _number(r: random.Random, data: bytearray) -> None:
    """Another number in the text, with the header's length kept true."""
    places = list(re.finditer(rb"\d+", data[8:]))
    if places:
        found = r.choice(places)
        old = int(found.group()[:18])
        new = str(r.choice((*_EXTREMES, old + 1, old - 1, old + 4, old * 2))).encode()
        _replace(data, 8 + found.start(), 8 + found.end(), new)


def _token(r: random.Random, data: bytearray) -> None:
    at = r.randrange(len(data))
    _replace(data, at, at + r.choice((0, 1, 1, 5)), r.choice(_TOKENS))


def _replace(data: bytearray, begin: int, end: int, new: bytes) -> None:
    before = len(data)
    data[begin:end] = new
    if len(data) >= 8:
        (length,) = struct.unpack_from("<Q", data)
        if 8 <= begin < 8 + length:
            data[:8] = struct.pack("<Q", max(0, length + len(data) - before) % 2**64)


def _truncate(r: random.Random, data: bytearray) -> None:
    del data[r.randrange(len(data)) :]


def _append(r: random.Random, data: bytearray) -> None:
    data += r.randbytes(r.randrange(1, 50))


def _poison(r: random.Random, data: bytearray) -> None:
    """Numbers that are not finite where tensors lie."""
    begin = 8 + (struct.unpack_from("<Q", data)[0] if len(data) >= 8 else 0)
    if begin < len(data):
        piece = r.choice(_NUMBERS)
        at = r.randrange(begin, len(data))
        data[at : at + len(piece)] = piece[: len(data) - at]


_MUTATIONS = (_flip, _length, _number, _number, _token, _truncate, _append, *[_poison] * 5)


def mutants(seed: int, count: int, originals: list[Files]) -> Iterator[Files]:
    """`count` damaged folders; the same ones for the same seed."""
    r = random.Random(seed)
    for _ in range(count):
        files = dict(r.choice(originals))
        for _ in range(r.choice((1, 1, 1, 2))):
            name = r.choice(sorted(files))
            data = bytearray(files[name])
            if data:
                r.choice(_MUTATIONS)(r, data)
            files[name] = bytes(data)
        if len(files) > 1 and r.random() < 0.1:
            del files[r.choice(sorted(files))]
        yield files


def put(folder: Path, files: Files) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)


def walk(folder: Path) -> tuple[bool, int]:
    """Read all there is. Returns whether the headers were accepted, and how many tensors were refused."""
    try:
        file = read_safetensors(folder)
    except DataError as error:
        assert "\n" not in str(error) and str(folder) in str(error) and len(str(error)) < 600
        return False, 0
    bad = 0
    with file:
        for name, tensor in file.tensors.items():
            assert file.data(name).size == tensor.nbytes
            assert file.dequantize(name).shape == tensor.shape
            try:
                file.check_finite(name)
            except DataError as error:
                assert error.tensor == name and error.offset is not None and "\n" not in str(error)
                bad += 1
                with pytest.raises(DataError, match="every one must be finite"):
                    pack(file, name)
            else:
                pack(file, name)
        assert sum(held.tensors for held in file.types().values()) >= len(file.tensors)
    return True, bad


def pack(file: SafetensorsFolder, name: str) -> None:
    """Through the native packing too, where the shape is one that a model could have."""
    shape = file.tensors[name].shape
    if len(shape) in (1, 2) and 0 not in shape:
        packer = Packer(file, "auto", 1, 1)
        want = WantedTensor(name, (Part(name),), shape)
        assert sum(chunk.source_bytes for chunk in packer.chunks(packer.plan(want))) == file.tensors[name].nbytes
    else:
        file.check_finite(name)


def test_thousands_of_mutants(tmp_path: Path) -> None:
    """What we accept of a single file, the reference implementation accepts too, with the same bytes."""
    originals, folder = seeds(tmp_path), tmp_path / "mutant"
    past, refused, slowest = 0, 0, 0.0
    with alarm(120):
        for files in mutants(0, COUNT, originals):
            put(folder, files)
            begin = time.perf_counter()
            accepted, bad = walk(folder)
            slowest = max(slowest, time.perf_counter() - begin)
            past += accepted
            refused += bad > 0
            if accepted and list(files) == ["model.safetensors"]:
                agree(folder, files["model.safetensors"])
    assert 0.15 * COUNT <= past <= 0.9 * COUNT, f"{past} of {COUNT} mutants get past the headers"
    assert refused >= 0.02 * COUNT, f"only {refused} mutants have tensor data to refuse"
    assert slowest < 2.0


def agree(folder: Path, data: bytes) -> None:
    try:
        theirs = dict(safetensors.deserialize(data))
    except safetensors.SafetensorError as error:
        assert "unknown variant" in str(error), error  # a dtype nobody knows: we list it
        return
    with read_safetensors(folder) as ours:
        for name, tensor in ours.tensors.items():
            assert list(tensor.shape) == theirs[name]["shape"] and ours.data(name).tobytes() == theirs[name]["data"]
        assert sum(held.tensors for held in ours.types().values()) == len(theirs)


def test_memory_of_mutants(tmp_path: Path) -> None:
    originals, folder = seeds(tmp_path), tmp_path / "mutant"
    tracemalloc.start()
    try:
        for files in mutants(1, 500, originals):
            put(folder, files)
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            walk(folder)
            assert tracemalloc.get_traced_memory()[1] - before <= MIB
    finally:
        tracemalloc.stop()


small = st.integers(0, 6)
entries = st.builds(
    lambda dtype, shape, begin, size: entry(dtype, shape, begin, begin + size),
    st.sampled_from(["F32", "F16", "BF16", "U8", "F64", "BOOL"]), st.lists(small, max_size=3), small, st.integers(-2, 24),
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.text(min_size=1, max_size=3), entries, max_size=3), st.integers(0, 40), st.booleans())
def test_the_reference_implementation_agrees(
    tmp_path_factory: pytest.TempPathFactory, header: dict[str, object], size: int, fit: bool
) -> None:
    """Of small files that are right in all but their numbers: the same are accepted."""
    if fit:  # one after another, sizes as shapes want them
        size = 0
        for e in header.values():
            bits = {"F32": 32, "F16": 16, "BF16": 16, "U8": 8, "F64": 64, "BOOL": 8}[e["dtype"]]  # type: ignore[index]
            end = size + int(np.prod(e["shape"])) * bits // 8  # type: ignore[index]
            e["data_offsets"] = [size, end]  # type: ignore[index]
            size = end
    data = whole(header, bytes(size))
    folder = tmp_path_factory.mktemp("one")
    (folder / "model.safetensors").write_bytes(data)
    try:
        safetensors.deserialize(data)
        accepted = True
    except safetensors.SafetensorError:
        accepted = False
    assert walk(folder)[0] == accepted


# --- large headers made to cost much more memory than they have bytes


def _escapes() -> bytes:
    return whole('{"__metadata__":{"a":"' + "\\n" * (8 * MIB) + '"}}')


def _metadata() -> bytes:
    return whole('{"__metadata__":{' + ",".join(f'"{i:x}":""' for i in range(500_000)) + "}}")


def _wide() -> bytes:
    return whole('{"__metadata__":{"' + "a" * 100 + "😀" + '":"' + "é" * (8 * MIB) + '"}}')


def _brackets() -> bytes:
    return whole('{"a":' + "[" * (24 * MIB))


def _objects() -> bytes:
    return whole('{"a":' + '{"a":' * (4 * MIB))


def _names() -> bytes:
    return whole('{"' + "n" * (24 * MIB) + '":{}}')


def _tensors() -> bytes:
    return whole("{" + ",".join(f'"{i:x}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for i in range(200_000)))


MEASURE = """
import sys
from pathlib import Path
from kvik.errors import DataError
from kvik.weights.safetensors import read_safetensors
def peak():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
before = peak()
try:
    read_safetensors(Path(sys.argv[1]))
    outcome = "read"
except DataError as error:
    outcome = str(error)
print(peak() - before, outcome)
"""


def measured(folder: Path) -> str:
    size = sum(p.stat().st_size for p in folder.iterdir())
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, str(folder)], capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 0, result.stderr
    peak, said = result.stdout.strip().split(" ", 1)
    assert int(peak) <= 2 * size + 64 * MIB, f"{int(peak) / MIB:.0f} MiB for {size / MIB:.0f} MiB: {said}"
    return said


@pytest.mark.parametrize("make", [_escapes, _metadata, _wide, _brackets, _objects, _names, _tensors])
def test_memory_of_hostile_headers(make: Callable[[], bytes], tmp_path: Path) -> None:
    """Measured as the process's peak, with the mapped pages of the file in it."""
    (tmp_path / "model.safetensors").write_bytes(make())
    said = measured(tmp_path)
    assert (said == "read") == (make in (_escapes, _metadata, _wide)), said


def test_memory_of_a_hostile_index(tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {f"{i:x}": "a.safetensors" for i in range(400_000)}}))
    assert "too many tensors for a file of this size" in measured(tmp_path)
