"""Log-probabilities in OpenAI's two formats."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from typing import Any

from kvik.engine.request import ScoreResult, TokenLogprob, TokenLogprobs
from kvik.text.tokenizer import Tokenizer

__all__ = ["TokenTable", "chat_logprobs"]

LEAST = -9999.0
"""Stands for what is less, minus infinity too, which JSON cannot say; so does OpenAI."""


def _finite(logprob: float) -> float:
    return max(float(logprob), LEAST)


def chat_logprobs(tokenizer: Tokenizer, noted: Iterable[TokenLogprobs]) -> dict[str, Any]:
    """The `logprobs` of a chat choice."""

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        piece = tokenizer.piece(token_id, token_id)
        return {"token": piece.decode("utf-8", "replace"), "logprob": _finite(logprob), "bytes": list(piece)}

    return {
        "content": [
            {
                **entry(one.token_id, one.logprob),
                "top_logprobs": [entry(other.token_id, other.logprob) for other in one.top],
            }
            for one in noted
        ]
    }


class TokenTable:
    """The `logprobs` of a completion's choice, token after token.

    `take` gives what was added since, so that a stream's pieces joined are the whole. Offsets count characters of the
    text from its beginning, the echoed prompt included; a special token, which is no text, takes none.

    Args:
        tokenizer: the model's.
        top: of how many best tokens; 0 leaves `top_logprobs` null.
    """

    def __init__(self, tokenizer: Tokenizer, top: int) -> None:
        self._tokenizer, self._top = tokenizer, top
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._last: int | None = None
        self._offset = 0
        self._clear()

    def _clear(self) -> None:
        self._tokens: list[str] = []
        self._logprobs: list[float | None] = []
        self._tops: list[dict[str, float] | None] = []
        self._offsets: list[int] = []

    def skip(self, token_ids: Sequence[int]) -> None:
        """Tokens that come before and are not told of."""
        if token_ids:
            self._last = token_ids[-1]

    def prompt(self, scored: ScoreResult) -> None:
        """The echoed prompt; its first token has no log-probability."""
        tops = scored.top or ((),) * len(scored.logprobs)
        self._add(scored.token_ids[0], None, ())
        for token, logprob, top in zip(scored.token_ids[1:], scored.logprobs.tolist(), tops, strict=True):
            self._add(token, logprob, top)

    def generated(self, noted: Iterable[TokenLogprobs]) -> None:
        """Tokens that were drawn."""
        for one in noted:
            self._add(one.token_id, one.logprob, one.top)

    def _add(self, token: int, logprob: float | None, top: Sequence[TokenLogprob]) -> None:
        text = self.name(token)
        self._tokens.append(text)
        self._offsets.append(self._offset)
        if token not in self._tokenizer.special_ids:
            self._offset += len(self._decoder.decode(self._tokenizer.piece(token, self._last)))
        self._last = token
        self._logprobs.append(None if logprob is None else _finite(logprob))
        if logprob is None or not self._top:
            self._tops.append(None)
            return
        best: dict[str, float] = {}
        for other in top:
            best.setdefault(self.name(other.token_id), _finite(other.logprob))
        best.setdefault(text, _finite(logprob))
        self._tops.append(best)

    def name(self, token: int) -> str:
        r"""A token's text; "bytes:\xf0\x9f" where its bytes are no whole UTF-8, so that different tokens differ."""
        piece = self._tokenizer.piece(token, token)
        try:
            return piece.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)

    def take(self) -> dict[str, Any]:
        """What was added since the last time."""
        found = {
            "tokens": self._tokens, "token_logprobs": self._logprobs, "top_logprobs": self._tops if self._top else None,
            "text_offset": self._offsets,
        }  # fmt: skip
        self._clear()
        return found
