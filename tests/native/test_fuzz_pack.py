"""Ten thousand damaged tensors through the native packing, built with AddressSanitizer and UndefinedBehaviorSanitizer."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest

from kvik.weights.dequantize import SUPPORTED
from kvik.weights.ggml_types import TRAITS
from kvik.weights.layouts import Layout

NATIVE = Path(__file__).resolve().parents[2] / "native"
TYPES = sorted(SUPPORTED)
COUNT = 10_000
ROUNDABLE = [Layout.F32, Layout.F16, Layout.BF16, Layout.INT8, Layout.INT8_MIN, Layout.INT4_MIN]


def record(rng: np.random.Generator) -> bytes:
    """A tensor with random bytes: half of them of the right length, the others off in one field."""
    kind = TYPES[rng.integers(len(TYPES))]
    elements, size = TRAITS[kind]
    n, k = int(rng.integers(1, 40)), int(rng.integers(1, 5)) * elements if elements > 1 else int(rng.integers(1, 100))
    length = n * (k // elements) * size
    heads, layout, number = (
        int(rng.choice([0, 0, 1, 2, 3])),
        int(rng.choice(ROUNDABLE if rng.integers(2) else list(Layout))),
        int(kind),
    )
    match int(rng.integers(12)):
        case 0:
            length += int(rng.integers(-3, 4))
        case 1:
            k += int(rng.integers(-40, 40))
        case 2:
            n = int(rng.choice([-1, 0, 2**31 - 1, n + 1]))
        case 3:
            k = int(rng.choice([-32, 0, 2**31 - 1, 2**30]))
        case 4:
            number = int(rng.integers(-1, 40))
        case 5:
            heads = int(rng.choice([-1, 7, 2**31 - 1]))
    length = max(length, 0)
    data = rng.integers(0, 256, length, np.uint8)
    if rng.integers(2):
        data &= 0x3B  # no exponent is all ones: every weight and scale is finite
    return struct.pack("<6i", number, n, k, heads, layout, length) + data.tobytes()


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_no_read_or_write_leaves_its_buffer(tmp_path: Path) -> None:
    program = tmp_path / "fuzz_pack"
    subprocess.run(
        ["g++", "-std=c++20", "-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined",
         "-I", str(NATIVE), "-o", str(program), str(Path(__file__).with_name("fuzz_pack.cpp")),
         str(NATIVE / "pack.cpp"), str(NATIVE / "ggml_blocks.cpp"), "-pthread"],
        check=True,
    )  # fmt: skip
    rng = np.random.default_rng(20)
    records = b"".join(record(rng) for _ in range(COUNT))
    # a preloaded library would make the sanitizer refuse to start
    environment = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
    done = subprocess.run([program], input=records, capture_output=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    packed, not_finite, refused = map(int, done.stdout.split())
    assert packed + not_finite + refused == COUNT
    assert packed > COUNT // 10 and not_finite > COUNT // 10 and refused > COUNT // 10
