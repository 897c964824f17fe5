"""Where a text's tokens lie in it, by whole characters: what makes tokens of two tokenizers comparable."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvik.evaluation.model import TextTokens

__all__ = ["TokenizedText", "inside", "joined", "shortened", "tokenized"]

Ints = NDArray[np.int64]


class TokenizedText(NamedTuple):
    """ids: with the token in front that the model's texts begin with; front: whether that is there.

    spans [N, 2]: of each other token, the bytes of the characters that it is of, whole ones: tokens that share a character
    have all of it. data: the bytes of all tokens together; normalization may make them others than the text's.
    """

    ids: list[int]
    front: bool
    spans: Ints
    data: bytes


def tokenized(tokenizer: TextTokens, text: str) -> TokenizedText:
    """A text's tokens and their places. Raises what `encode` does."""
    front = [tokenizer.bos_id] if tokenizer.add_bos and tokenizer.bos_id is not None else []
    ids = tokenizer.encode(text, add_special=False)
    pieces = [tokenizer.piece(token, after) for token, after in zip(ids, [None, *ids], strict=False)]
    data = b"".join(pieces)
    ends = np.cumsum([len(piece) for piece in pieces], dtype=np.int64)
    starts = np.concatenate([[0], ends[:-1]]).astype(np.int64) if ids else ends
    codes = np.frombuffer(data, np.uint8)
    begins = np.append(codes & 0xC0 != 0x80, True)  # of a character, and the end of all
    begins[0] = True
    places = np.arange(len(begins))
    before = np.maximum.accumulate(np.where(begins, places, 0))
    after = np.minimum.accumulate(np.where(begins, places, len(codes))[::-1])[::-1]
    spans = np.stack([before[starts], after[ends]], axis=1) if ids else np.empty((0, 2), np.int64)
    return TokenizedText(front + ids, bool(front), spans, data)


def joined(spans: Ints) -> Ints:
    """Spans [K, 2] in ascending order, those that touch or overlap made one."""
    found: list[list[int]] = []
    for start, end in spans.tolist():
        if found and start <= found[-1][1]:
            found[-1][1] = max(found[-1][1], end)
        else:
            found.append([start, end])
    return np.array(found, np.int64).reshape(-1, 2)


def inside(spans: Ints, runs: Ints) -> NDArray[np.bool_]:
    """Of spans [N, 2], which lie wholly in one of the runs [R, 2], as `joined` gives them; one of no bytes lies in none."""
    if not len(runs):
        return np.zeros(len(spans), np.bool_)
    run = np.searchsorted(runs[:, 0], spans[:, 0], side="right") - 1
    found: NDArray[np.bool_] = (run >= 0) & (spans[:, 1] <= runs[run, 1]) & (spans[:, 0] < spans[:, 1])
    return found


def shortened(tokenizer: TextTokens, text: str, tokens: int) -> str:
    """The longest beginning of a text, by whole characters, that makes at most so many tokens, front included.

    Nearly the longest: where a cut changes the tokens before it, a few characters more are left out.
    """
    take = 8 * tokens
    while take < len(text) and len(tokenized(tokenizer, text[:take]).ids) <= tokens:
        take *= 2
    text = text[:take]
    while len((found := tokenized(tokenizer, text)).ids) > tokens:
        end = int(found.spans[tokens - found.front - 1, 1]) if tokens > found.front else 0
        kept = found.data[:end].decode(errors="ignore")
        text = text[: min(len(kept), len(text) - 1)]
    return text
