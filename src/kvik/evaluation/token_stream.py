"""The token ids of a text that comes in pieces, as if the whole of it had been encoded at once.

Chunks that overlap are encoded one after another and joined inside a run of tokens that both have, at the same bytes.
That is exact: where words are cut, the next cut depends on what follows only; and a sequence of byte-pair tokens is the
encoding of its text when each pair of neighbours is the encoding of theirs (van Antwerpen and Neubeck 2024, "So many
tokens, so little time"). Every pair of neighbours in the joined sequence stands in one of the two chunks, and the run
says that neither of them was an artefact of where a chunk begins or ends.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import accumulate
from typing import NamedTuple

from kvik.errors import DataError, ParameterError
from kvik.evaluation.model import TextTokens

__all__ = ["Tokens", "token_stream"]

CHUNK, OVERLAP = 1 << 16, 1 << 11  # characters
_RUN = 8  # tokens that two chunks must have in common
_WIDER = (1, 4, 16)  # overlaps that are tried, times the one that was asked for
_BACK = (0, 1, 2, 3)  # characters before them: a space put in front of a chunk may shift what is merged


class Tokens(NamedTuple):
    """Some of a text's tokens. sizes: the bytes of each."""

    ids: list[int]
    sizes: list[int]


def token_stream(
    tokenizer: TextTokens, pieces: Iterable[str], *, chunk: int = CHUNK, overlap: int = OVERLAP
) -> Iterator[Tokens]:
    """The ids of the text that the pieces make, without tokens around it, and each one's bytes.

    chunk, overlap: characters that are encoded at once, and twice; chunk > overlap >= 1. Memory is a few chunks', unless
    chunks do not agree anywhere: then they grow. Raises what `encode` does.
    """
    if not chunk > overlap >= 1:
        raise ParameterError(f"chunk must be above overlap, and overlap at least 1, got {chunk} and {overlap}")
    source = _Source(pieces)
    left = _Encoded(tokenizer, source.take(chunk), first=True)
    done = 0  # tokens of it that are out, or that the chunk before has otherwise
    wanted = chunk
    while more := source.take(wanted):
        joint = _join(tokenizer, left, done, more, overlap)
        if joint is None:
            grown = _Encoded(tokenizer, left.text + more, left.first)
            if grown.ids[:done] != left.ids[:done]:
                raise DataError("this tokenizer's tokens depend on text too far away to encode it in pieces")
            left, wanted = grown, len(grown.text)
            continue
        yield Tokens(left.ids[done : joint.left], left.sizes[done : joint.left])
        left, done, wanted = joint.right, joint.at, chunk
    if left.ids:
        yield Tokens(left.ids[done:], left.sizes[done:])


class _Source:
    """Text by characters instead of pieces."""

    def __init__(self, pieces: Iterable[str]) -> None:
        self._pieces = iter(pieces)
        self._rest = ""

    def take(self, count: int) -> str:
        """The next characters: so many, or what is left."""
        parts, have = [self._rest], len(self._rest)
        while have < count and (piece := next(self._pieces, None)) is not None:
            parts.append(piece)
            have += len(piece)
        text = "".join(parts)
        self._rest = text[count:]
        return text[:count]


class _Encoded:
    """A chunk: its text, tokens, their bytes, and where each ends in the bytes of all of them."""

    def __init__(self, tokenizer: TextTokens, text: str, first: bool) -> None:
        self.text, self.first = text, first
        self.ids = tokenizer.encode(text, add_special=False, first=first)
        before = [None, *self.ids]
        self.sizes = [len(tokenizer.piece(token, after)) for token, after in zip(self.ids, before, strict=False)]
        self.ends = list(accumulate(self.sizes))

    @property
    def bytes(self) -> int:
        return self.ends[-1] if self.ends else 0


class _Joint(NamedTuple):
    """The tokens before `left` of one chunk go before those from `at` of the next."""

    left: int
    right: _Encoded
    at: int


def _join(tokenizer: TextTokens, left: _Encoded, done: int, more: str, overlap: int) -> _Joint | None:
    """Where to go over from a chunk to one that begins within it and ends with `more`; None: there is no such place."""
    for start in _starts(left, overlap):
        middle = left.text[start:]
        right = _Encoded(tokenizer, middle + more, first=False)
        # Both end alike, so their ends are compared counted from there; normalization may have moved them elsewhere.
        shift = left.bytes - _Encoded(tokenizer, middle, first=False).bytes
        i, j, length = _longest_run(left, done, right, shift)
        if length >= _RUN:
            return _Joint(i + length // 2, right, j + length // 2)
    return None


def _starts(left: _Encoded, overlap: int) -> Iterator[int]:
    """Characters at which the next chunk may begin: where tokens do, if their bytes are the text's."""
    data = left.text.encode()
    exact = len(data) == left.bytes
    for times in _WIDER:
        at = len(left.text) - times * overlap
        if at <= 0:
            return
        if exact:
            wanted = len(left.text[:at].encode())
            at = len(
                data[: next((e for e in reversed(left.ends) if e <= wanted and not _inside(data, e)), wanted)].decode()
            )
        yield from (at - back for back in _BACK if at - back > 0)


def _inside(data: bytes, at: int) -> bool:
    """Whether a place in UTF-8 is within a character."""
    return at < len(data) and data[at] & 0xC0 == 0x80


def _longest_run(left: _Encoded, done: int, right: _Encoded, shift: int) -> tuple[int, int, int]:
    """The longest run of tokens that both have at the same bytes: where it begins in each, and its length.

    shift: bytes of `left` before `right` begins. Tokens of left before `done` do not count.
    """
    best = (0, 0, 0)
    i, j, length = done, 0, 0
    while i < len(left.ids) and j < len(right.ids):
        gap = left.ends[i] - shift - right.ends[j]
        if gap == 0 and left.ids[i] == right.ids[j]:
            i, j, length = i + 1, j + 1, length + 1
            if length > best[2]:
                best = (i - length, j - length, length)
            continue
        length = 0
        if gap <= 0:
            i += 1
        if gap >= 0:
            j += 1
    return best
