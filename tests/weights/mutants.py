"""Damaged GGUF files, the same for the same seed: for fuzzing the reader and whatever reads its bytes after it."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import numpy as np
from weights.gguf_files import (
    ARRAY,
    BOOL,
    F32,
    F64,
    I8,
    STRING,
    U8,
    U16,
    U32,
    U64,
    Array,
    Built,
    Key,
    block_width,
    build,
    tensor,
)

from kvik.weights.dequantize import SUPPORTED
from kvik.weights.ggml_types import GGMLType

_EXTREMES = (0, 1, 2, 3, 7, 31, 32, 33, 255, 2**15, 2**16, 2**24, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40)
_EXTREMES += (2**61, 2**62, 2**63 - 1, 2**63, 2**64 - 32, 2**64 - 1)
_NUMBERS = (b"\x00\x7c", b"\x00\xfc", b"\x01\x7e", b"\xff\xff", b"\x00\x00\x80\x7f", b"\x00\x00\xc0\xff", b"\xff\x7b")


def seeds() -> list[Built]:
    """Well-formed files of 300 to 2,200 bytes that between them use every part of the format."""
    rng = np.random.default_rng(1)
    name = Key("general.architecture", STRING, "llama")
    tokens = Key("tokenizer.ggml.tokens", ARRAY, Array(STRING, ["a", "bc", "é", "", "日本", "<|end|>"]))
    scores = Key("tokenizer.ggml.scores", ARRAY, Array(F32, [0.5, -1.0, 2.0]))
    nested = Key("nested", ARRAY, Array(ARRAY, [Array(U8, [1, 2]), Array(STRING, ["x"]), Array(ARRAY, [])]))
    numbers = [Key("n.u16", U16, 7), Key("n.i8", I8, -3), Key("n.u64", U64, 2**40), Key("n.f64", F64, 0.25)]
    flags = [Key("flag", BOOL, 1), Key("flags", ARRAY, Array(BOOL, [0, 1, 1]))]
    one_each = [tensor(f"blk.0.{kind.name}", kind, (1, block_width(kind)), rng) for kind in sorted(SUPPORTED)]
    wide = [tensor("norm", GGMLType.F32, (5,), rng), tensor("cube", GGMLType.F16, (2, 3, 4), rng)]
    quantized = [tensor("w", GGMLType.Q4_1, (3, 64), rng), tensor("head", GGMLType.Q8_0, (2, 2, 32), rng)]
    return [
        build([name, tokens, scores], wide),
        build([name, nested, *numbers, *flags], quantized, version=2),
        build([name, Key("general.alignment", U32, 64)], one_each, alignment=64),
        build([], [tensor("only", GGMLType.Q4_0, (1, 1, 1, 32), rng)]),
        build([name, tokens], []),
    ]


def _flip(r: random.Random, data: bytearray, built: Built) -> None:
    for _ in range(r.choice((1, 1, 2, 8))):
        data[r.randrange(len(data))] ^= 1 << r.randrange(8)


def _field(r: random.Random, data: bytearray, built: Built) -> None:
    where = r.choice(built.fields)
    old = int.from_bytes(data[where.offset : where.offset + where.size], "little")
    new = r.choice(
        (r.choice(_EXTREMES), old + 1, old - 1, old * 2, old ^ (1 << r.randrange(8 * where.size)), len(data))
    )
    data[where.offset : where.offset + where.size] = (new % (1 << 8 * where.size)).to_bytes(where.size, "little")


def _type(r: random.Random, data: bytearray, built: Built) -> None:
    where = r.choice([f for f in built.fields if f.what in ("type", "rank")])
    data[where.offset : where.offset + 4] = r.randrange(45).to_bytes(4, "little")


def _offset(r: random.Random, data: bytearray, built: Built) -> None:
    fields = [f for f in built.fields if f.what in ("offset", "dim")]
    if fields:
        where = r.choice(fields)
        new = r.choice((32 * r.randrange(64), r.randrange(1, 65), 2**64 - 32 * r.randrange(1, 9)))
        data[where.offset : where.offset + 8] = new.to_bytes(8, "little")


def _truncate(r: random.Random, data: bytearray, built: Built) -> None:
    del data[r.randrange(len(data)) :]


def _splice(r: random.Random, data: bytearray, built: Built) -> None:
    begin = r.randrange(len(data))
    piece = data[begin : begin + r.randrange(1, 64)]
    at = r.randrange(len(data))
    data[at : at + r.choice((0, 0, len(piece), r.randrange(64)))] = r.choice((piece, piece, b""))


def _numbers(r: random.Random, data: bytearray, built: Built) -> None:
    """Extreme numbers where tensors lie: NaN, infinities, the largest half."""
    if built.header_bytes < len(data):
        for _ in range(r.choice((1, 8))):
            piece = r.choice(_NUMBERS)
            at = r.randrange(built.header_bytes // 2, (len(data) + 1) // 2) * 2  # where halves and floats begin
            data[at : at + len(piece)] = piece


def _append(r: random.Random, data: bytearray, built: Built) -> None:
    data += r.randbytes(r.randrange(1, 200))


_MUTATIONS: tuple[Callable[[random.Random, bytearray, Built], None], ...] = (
    _flip,
    _field,
    _field,
    _type,
    _offset,
    _truncate,
    _splice,
    _numbers,
    _numbers,
    _numbers,
    _numbers,
    _append,
)


def mutants(seed: int, count: int) -> Iterator[bytes]:
    """`count` damaged files of at most a few kilobytes; the same ones for the same seed."""
    r = random.Random(seed)
    originals = seeds()
    for _ in range(count):
        built = r.choice(originals)
        data = bytearray(built.data)
        for _ in range(r.choice((1, 1, 1, 2, 3))):
            if data:
                r.choice(_MUTATIONS)(r, data, built)
        yield bytes(data)
