"""Turns tokens into text as they come."""

from __future__ import annotations

import codecs
from collections.abc import Iterable
from copy import copy

from kvik.text.tokenizer import Tokenizer

__all__ = ["Detokenizer"]


class Detokenizer:
    """Gives out the text of a growing list of tokens, never half a character.

    All of it together equals `tokenizer.decode` of all the ids. Bytes that are no UTF-8 become U+FFFD as soon as no
    further byte could make them whole. Each token costs the same however long the text is.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True, after: int | None = None) -> None:
        """
        Args:
            tokenizer: whose ids they are.
            skip_special: leave special tokens out of the text.
            after: the id before the first one, for text that continues a prompt; see `Tokenizer.decode_bytes`.
        """
        self._piece = tokenizer.piece
        self._hidden = tokenizer.special_ids if skip_special else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._after = after

    def fork(self) -> Detokenizer:
        """Another at the same place."""
        other = copy(self)
        other._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        other._decoder.setstate(self._decoder.getstate())
        return other

    def add(self, ids: Iterable[int]) -> str:
        """The text that these further ids complete; may be empty. ParameterError for an id outside the vocabulary."""
        text, decode = "", self._decoder.decode
        for token in ids:
            piece = self._piece(token, self._after)
            if token not in self._hidden:
                text += decode(piece)
            self._after = token
        return text

    def finish(self) -> str:
        """What is left of an unfinished character: U+FFFD or nothing."""
        return self._decoder.decode(b"", True)
