"""A model whose tokens are a few bytes each, and whose log-probabilities follow from the token and the one before."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

BOS = 1  # no token of a text


class Scored(NamedTuple):
    first: int
    logprobs: Any


@dataclass(frozen=True)
class Info:
    name: str = "fake"
    digest: str = "f00d"
    context_length: int = 64


class ByteTokens:
    """Each token is `width` bytes of the text, the last one what is left; ids are their checksums."""

    def __init__(self, width: int = 1, add_bos: bool = False) -> None:
        self.width, self.add_bos, self.bos_id = width, add_bos, BOS if add_bos else None
        self._pieces: dict[int, bytes] = {}

    def encode(self, text: str, *, add_special: bool = True, first: bool = True) -> list[int]:
        data = text.encode()
        ids = []
        for start in range(0, len(data), self.width):
            piece = data[start : start + self.width]
            ids.append(1000 + zlib.crc32(piece))
            self._pieces[ids[-1]] = piece
        return ids

    def piece(self, token: int, after: int | None = None) -> bytes:
        return self._pieces[token]


def logprob(before: int, token: int) -> float:
    return -0.05 - (before * 31 + token * 17) % 97 / 20


class FakeModel:
    """calls: the inputs of each call of score. fails_at: the call that fails, with what it raises."""

    def __init__(self, width: int = 1, add_bos: bool = False, context: int = 64, shift: float = 0.0) -> None:
        self.tokenizer = ByteTokens(width, add_bos)
        self.info = Info(context_length=context)
        self.shift = shift
        self.calls: list[list[list[int]]] = []
        self.fails_at: tuple[int, BaseException] | None = None

    def score(
        self, inputs: Sequence[Sequence[int]], *, reduce: bool = True, top: int = 0, first: int | Sequence[int] = 1
    ) -> list[Scored]:
        assert reduce and top == 0
        if self.fails_at is not None and len(self.calls) == self.fails_at[0]:
            raise self.fails_at[1]
        firsts = [first] * len(inputs) if isinstance(first, int) else list(first)
        self.calls.append([list(ids) for ids in inputs])
        assert all(
            len(ids) <= self.info.context_length and 1 <= f < len(ids) for ids, f in zip(inputs, firsts, strict=True)
        )
        return [
            Scored(f, np.array([logprob(ids[i - 1], ids[i]) + self.shift for i in range(f, len(ids))]))
            for ids, f in zip(inputs, firsts, strict=True)
        ]
