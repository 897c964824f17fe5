"""Words as a model's tokens: what `bad_words` and `dry_breakers` are to one that sees token ids only."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from kvik.text.tokenizer import Tokenizer

__all__ = ["Pieces", "bad_word_ids", "breaker_ids"]

Tokens = npt.NDArray[np.int64]

# as llama.cpp bounds them
MAX_BREAKER_BYTES, MAX_BREAKER_TAIL = 40, 20


def bad_word_ids(tokenizer: Tokenizer, word: str) -> tuple[tuple[int, ...], ...]:
    """The word as tokens: as it begins a text, as it goes on with one, and after a space. None is empty."""
    made = (
        tokenizer.encode(word, add_special=False),
        tokenizer.encode(word, add_special=False, first=False),
        tokenizer.encode(" " + word, add_special=False, first=False),
    )
    return tuple(dict.fromkeys(tuple(ids) for ids in made if ids))


class Pieces:
    """The bytes of every token, as they are searched; made once for a tokenizer, in a tenth of a second or so."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        pieces = [tokenizer.piece(token, token) for token in range(tokenizer.vocab_size)]
        self._sizes = np.array([len(piece) for piece in pieces], np.int64)
        self._ends = self._sizes.cumsum()  # piece t is bytes[ends[t] - sizes[t] : ends[t]]
        self._bytes = np.frombuffer(b"".join(pieces), np.uint8)
        some = np.flatnonzero(self._sizes)
        last = self._bytes[self._ends[some] - 1]
        self._ending: list[Tokens] = [some[last == byte] for byte in range(256)]

    def containing(self, wanted: bytes) -> Tokens:
        """Tokens, ascending, whose text has `wanted` in it, which is not empty."""
        begins = np.flatnonzero(self._bytes[: max(0, len(self._bytes) - len(wanted) + 1)] == wanted[0])
        for place, byte in enumerate(wanted[1:], 1):
            begins = begins[self._bytes[begins + place] == byte]
        tokens = np.searchsorted(self._ends, begins, side="right")
        found: Tokens = np.unique(tokens[begins + len(wanted) <= self._ends[tokens]])
        return found

    def ending(self, wanted: bytes) -> Tokens:
        """Tokens, ascending, whose text ends with `wanted`, which is not empty."""
        tokens: Tokens = self._ending[wanted[-1]]
        tokens = tokens[self._sizes[tokens] >= len(wanted)]
        for back, byte in enumerate(wanted[-2::-1], 2):
            tokens = tokens[self._bytes[self._ends[tokens] - back] == byte]
        return tokens


def breaker_ids(pieces: Pieces, breakers: Iterable[str]) -> tuple[tuple[int, ...], ...]:
    """The sequences of tokens that end a repetition, as llama.cpp finds them.

    A token whose text has a breaker in it; and one whose text ends with a breaker's beginning, followed by the tokens of
    its rest, where it ends there.
    """
    found: dict[tuple[int, ...], None] = {}
    for text in dict.fromkeys(breakers):
        wanted = text.encode()[:MAX_BREAKER_BYTES]
        whole = pieces.containing(wanted)
        found |= dict.fromkeys((token,) for token in whole.tolist())
        for size in range(1, len(wanted)):
            tokens = np.setdiff1d(pieces.ending(wanted[:size]), whole, assume_unique=True)
            if not len(tokens):
                continue
            rest = wanted[size:].decode(errors="ignore")
            tail = pieces.tokenizer.encode(rest, add_special=False, first=False)[:MAX_BREAKER_TAIL]
            if tail:
                found |= dict.fromkeys((token, *tail) for token in tokens.tolist())
    return tuple(found)
