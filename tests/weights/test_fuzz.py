"""Damaged and hostile files: one DataError or a result, soon, within twice the file and 64 MiB."""

from __future__ import annotations

import signal
import struct
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from weights.gguf_files import ARRAY, STRING, U8, Array, Key, build
from weights.mutants import mutants, seeds

from kvik.errors import DataError
from kvik.weights.dequantize import SUPPORTED
from kvik.weights.gguf import read_gguf

COUNT = 10_000
MIB = 1 << 20


@contextmanager
def alarm(seconds: int) -> Iterator[None]:
    """Ends what hangs with a failure."""

    def late(*_: object) -> None:
        raise TimeoutError(f"hangs: not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def walk(path: Path) -> tuple[bool, int]:
    """Read all there is. Returns whether the header was accepted, and how many tensors were refused."""
    try:
        file = read_gguf(path)
    except DataError as error:
        assert "\n" not in str(error) and str(path) in str(error)
        return False, 0
    bad = 0
    with file:
        for name, tensor in file.tensors.items():
            try:
                data = file.data(name)
                assert data.size == tensor.nbytes
                data.max()  # touches every byte
                assert file.dequantize(name).shape == tensor.shape
                file.check_finite(name)
            except DataError as error:
                assert error.tensor == name and (error.offset is not None) and "\n" not in str(error)
                bad += 1
    return True, bad


def test_seeds_are_well_formed(tmp_path: Path) -> None:
    path = tmp_path / "seed.gguf"
    kinds = set()
    for built in seeds():
        path.write_bytes(built.data)
        assert walk(path) == (True, 0)
        kinds |= {t.type for t in read_gguf(path).tensors.values()}
        assert len(built.data) < 2200
    assert kinds == SUPPORTED


def test_mutants_are_the_same_each_time_and_differ() -> None:
    first = list(mutants(3, 500))
    assert first == list(mutants(3, 500)) and first != list(mutants(4, 500))
    assert len(set(first)) > 450
    originals = {built.data for built in seeds()}
    assert sum(data in originals for data in first) < 20


def test_ten_thousand_mutants(tmp_path: Path) -> None:
    path = tmp_path / "mutant.gguf"
    past, refused, slowest = 0, 0, 0.0
    with alarm(120):
        for data in mutants(0, COUNT):
            path.unlink(missing_ok=True)  # writing over a file makes some file systems wait for the disk
            path.write_bytes(data)
            begin = time.perf_counter()
            accepted, bad = walk(path)
            slowest = max(slowest, time.perf_counter() - begin)
            past += accepted
            refused += bad > 0
    assert past >= 0.3 * COUNT, f"only {past} of {COUNT} mutants get past the header"
    assert past <= 0.9 * COUNT, f"{past} of {COUNT} mutants get past the header: too few damage it"
    assert refused >= 0.05 * COUNT, f"only {refused} mutants have tensor data to refuse"
    assert slowest < 2.0


def test_memory_of_mutants(tmp_path: Path) -> None:
    path = tmp_path / "mutant.gguf"
    tracemalloc.start()
    try:
        for data in mutants(1, 1_000):
            path.unlink(missing_ok=True)
            path.write_bytes(data)
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            walk(path)
            assert tracemalloc.get_traced_memory()[1] - before <= 2 * len(data) + MIB
    finally:
        tracemalloc.stop()


# --- large files made to cost much more memory than they have bytes


def _long(kind: int, count: int, payload: bytes) -> bytes:
    """One key holding an array of `count` elements, whose bytes follow."""
    head = build([Key("k", ARRAY, Array(kind, []))]).data[: 24 + 8 + 1 + 4 + 4]
    return head + struct.pack("<Q", count) + payload


def _short_strings() -> bytes:
    text = struct.pack("<Q", 2) + b"ab"
    return _long(STRING, 2_400_000, text * 2_400_000)


def _widening_strings() -> bytes:
    text = b"a" * 99_996 + "😀".encode()
    return _long(STRING, 240, (struct.pack("<Q", len(text)) + text) * 240)


def _one_widening_string() -> bytes:
    text = "a" * (24 * MIB) + "😀"
    return build([Key("k", STRING, text)]).data


def _small_numbers() -> bytes:
    return _long(U8, 24 * MIB, b"\1" * (24 * MIB))


def _large_numbers() -> bytes:
    return _long(3, 12 * MIB, b"\1\2" * (12 * MIB))


def _empty_arrays() -> bytes:
    return _long(ARRAY, 2_000_000, struct.pack("<IQ", U8, 0) * 2_000_000)


def _keys() -> bytes:
    pieces = (struct.pack("<Q4sIB", 4, b"%04x" % i, U8, 1) for i in range(65_536))
    wide = (struct.pack("<Q8sIB", 8, b"%08x" % i, U8, 1) for i in range(900_000))
    return struct.pack("<4sIQQ", b"GGUF", 3, 0, 965_536) + b"".join(pieces) + b"".join(wide)


def _tensors() -> bytes:
    pieces = (struct.pack("<Q6sIQQQQIQ", 6, b"%06x" % i, 4, 1, 1, 1, 1, 0, 0) for i in range(380_000))
    return struct.pack("<4sIQQ", b"GGUF", 3, 380_000, 0) + b"".join(pieces)


MEASURE = """
import sys
from kvik.errors import DataError
from kvik.weights.gguf import read_gguf
def peak():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
before = peak()
try:
    read_gguf(sys.argv[1])
    outcome = "read"
except DataError as error:
    outcome = str(error)
print(peak() - before, outcome)
"""


@pytest.mark.parametrize(
    "make",
    [
        _short_strings,
        _widening_strings,
        _one_widening_string,
        _small_numbers,
        _large_numbers,
        _empty_arrays,
        _keys,
        _tensors,
    ],
)
def test_memory_of_hostile_files(make: Callable[[], bytes], tmp_path: Path) -> None:
    """Measured as the process's peak, with the mapped pages of the file in it."""
    path = tmp_path / "hostile.gguf"
    path.write_bytes(make())
    size = path.stat().st_size
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, str(path)], capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 0, result.stderr
    peak, said = result.stdout.strip().split(" ", 1)
    assert int(peak) <= 2 * size + 64 * MIB, f"{int(peak) / MIB:.0f} MiB for a file of {size / MIB:.0f} MiB: {said}"
    assert "too much for a file of this size" in said
