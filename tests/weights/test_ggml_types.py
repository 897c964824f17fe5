from __future__ import annotations

import gguf
import numpy as np
import pytest
from weights.gguf_files import random_bytes

from kvik.errors import DataError
from kvik.weights.dequantize import SUPPORTED, dequantize, first_nonfinite
from kvik.weights.ggml_types import TRAITS, GGMLType, tensor_bytes

QUANTIZED = sorted(kind for kind in SUPPORTED if TRAITS[kind].block_elements > 1)


def as_bytes(data: bytes) -> np.ndarray:
    return np.frombuffer(data, np.uint8)


def test_numbers_names_and_sizes_agree_with_the_package() -> None:
    for kind, traits in TRAITS.items():
        theirs = gguf.GGMLQuantizationType(int(kind))
        assert theirs.name == kind.name
        if kind != GGMLType.Q8_1:  # the package counts float32 scales, ggml stores halves; no file holds this type
            assert tuple(traits) == gguf.GGML_QUANT_SIZES[theirs]
    assert set(TRAITS) == set(GGMLType)


@pytest.mark.parametrize("kind", sorted(SUPPORTED), ids=lambda kind: kind.name)
@pytest.mark.parametrize("blocks", [(1,), (3, 2), (2, 3, 3)])
def test_dequantize_is_bit_equal_to_the_package(kind: GGMLType, blocks: tuple[int, ...]) -> None:
    shape = (*blocks[:-1], blocks[-1] * max(32, TRAITS[kind].block_elements))
    data = as_bytes(random_bytes(kind, shape, np.random.default_rng(7)))
    ours = dequantize(data, kind, shape)
    theirs = gguf.dequantize(data, gguf.GGMLQuantizationType(int(kind))).reshape(shape)
    assert ours.dtype == np.float32 and ours.shape == shape
    assert np.array_equal(ours.view(np.uint32), theirs.astype(np.float32).view(np.uint32))


@pytest.mark.parametrize("kind", QUANTIZED, ids=lambda kind: kind.name)
def test_any_bytes_dequantize_as_in_the_package(kind: GGMLType) -> None:
    """Every bit pattern of scales too: subnormal, infinite and NaN."""
    blocks = np.random.default_rng(3).integers(0, 256, (4096, TRAITS[kind].block_bytes), dtype=np.uint8)
    at = 208 if kind == GGMLType.Q6_K else 0
    blocks[:, at : at + 2] = np.arange(0, 65536, 16, dtype="<u2").view(np.uint8).reshape(-1, 2)
    shape = (4096, TRAITS[kind].block_elements)
    ours = dequantize(blocks.reshape(-1), kind, shape)
    with np.errstate(all="ignore"):
        theirs = gguf.dequantize(blocks.reshape(-1), gguf.GGMLQuantizationType(int(kind))).reshape(shape)
    assert np.array_equal(ours, theirs, equal_nan=True)


def test_a_tensor_larger_than_one_chunk() -> None:
    shape = (70_000, 32)
    data = as_bytes(random_bytes(GGMLType.Q4_1, shape, np.random.default_rng(0)))
    whole = dequantize(data, GGMLType.Q4_1, shape)
    last = dequantize(data[-20:], GGMLType.Q4_1, (1, 32))
    assert np.array_equal(whole[-1:], last)


def test_order_of_nibbles() -> None:
    block = np.array([1.0, 0.5], np.float16).tobytes() + bytes(range(0x10, 0x20))
    values = dequantize(as_bytes(block), GGMLType.Q4_1, (32,))
    assert values.tolist() == [i + 0.5 for i in range(16)] + [1.5] * 16


def test_sizes() -> None:
    assert tensor_bytes(GGMLType.Q4_1, (3, 64)) == 120
    assert tensor_bytes(GGMLType.BF16, (5,)) == 10
    with pytest.raises(DataError, match="rows of 33 elements do not divide into Q4_0 blocks of 32"):
        tensor_bytes(GGMLType.Q4_0, (32, 33))


def test_refusals_name_the_type() -> None:
    known = "F32, F16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K, Q6_K, BF16"
    with pytest.raises(DataError, match=f"type Q3_K is not supported; supported: {known}"):
        dequantize(np.zeros(110, np.uint8), GGMLType.Q3_K, (256,))
    with pytest.raises(DataError, match=r"Q4_0 of shape \[64\] needs 36 bytes, got 18"):
        dequantize(np.zeros(18, np.uint8), GGMLType.Q4_0, (64,))
    with pytest.raises(DataError, match="Q8_0 needs whole blocks of 34 bytes"):
        dequantize(np.zeros(35, np.uint8), GGMLType.Q8_0, (32,))
    with pytest.raises(DataError, match="needs whole blocks"):
        first_nonfinite(np.zeros((2, 34), np.uint8), GGMLType.Q8_0)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    ("kind", "offset", "dtype", "what", "element"),
    [
        (GGMLType.F32, 4 * 300_000, "<f4", "weight", 300_000),
        (GGMLType.F16, 2 * 77, "<f2", "weight", 77),
        (GGMLType.BF16, 2 * 77, "bf16", "weight", 77),
        (GGMLType.Q4_0, 18 * 9, "<f2", "scale", 288),
        (GGMLType.Q4_1, 20 * 9, "<f2", "scale", 288),
        (GGMLType.Q4_1, 20 * 60_000 + 2, "<f2", "minimum", 1_920_000),
        (GGMLType.Q8_0, 34 * 9, "<f2", "scale", 288),
        (GGMLType.Q5_0, 22 * 9, "<f2", "scale", 288),
        (GGMLType.Q5_1, 24 * 9 + 2, "<f2", "minimum", 288),
        (GGMLType.Q4_K, 144 * 9, "<f2", "scale", 2304),
        (GGMLType.Q5_K, 176 * 7_000 + 2, "<f2", "minimum", 1_792_000),
        (GGMLType.Q6_K, 210 * 9 + 208, "<f2", "scale", 2304),
    ],
)
def test_finds_what_is_not_finite(kind: GGMLType, offset: int, dtype: str, what: str, element: int, bad: float) -> None:
    shape = (70_400, 32) if TRAITS[kind].block_elements < 256 else (8_800, 256)
    data = bytearray(random_bytes(kind, shape, np.random.default_rng(5)))
    assert first_nonfinite(as_bytes(bytes(data)), kind) is None
    raw = np.float32(bad).tobytes()[2:] if dtype == "bf16" else np.array(bad, dtype).tobytes()
    data[offset : offset + len(raw)] = raw
    found = first_nonfinite(as_bytes(bytes(data)), kind)
    assert found is not None
    assert (found.what, found.element, found.offset) == (what, element, offset)
    assert np.array_equal(found.value, bad, equal_nan=True)
    with np.errstate(invalid="ignore"):
        values = dequantize(as_bytes(bytes(data)), kind, shape).reshape(-1)
    block = values[element : element + TRAITS[kind].block_elements]
    assert not np.isfinite(block).all()
