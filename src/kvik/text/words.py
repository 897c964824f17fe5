"""Words as a model's tokens: what `bad_words` and `dry_breakers` are to one that sees token ids only."""

from __future__ import annotations

from collections.abc import Iterable

from kvik.text.tokenizer import Tokenizer

__all__ = ["bad_word_ids", "breaker_ids"]

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


def breaker_ids(tokenizer: Tokenizer, breakers: Iterable[str]) -> tuple[tuple[int, ...], ...]:
    """The sequences of tokens that end a repetition, as llama.cpp finds them.

    A token whose text has a breaker in it; and one whose text ends with a breaker's beginning, followed by the tokens of
    its rest, where it ends there. Looks at each token of the vocabulary.
    """
    found: dict[tuple[int, ...], None] = {}
    pieces = [tokenizer.piece(token, token) for token in range(tokenizer.vocab_size)]
    for text in breakers:
        wanted = text.encode()[:MAX_BREAKER_BYTES]
        tails: dict[int, tuple[int, ...]] = {}
        for token, piece in enumerate(pieces):
            if wanted in piece:
                found[token,] = None
                continue
            for size in range(1, min(len(piece), len(wanted) - 1) + 1):
                if piece.endswith(wanted[:size]):
                    if size not in tails:
                        rest = wanted[size:].decode(errors="ignore")
                        tails[size] = tuple(tokenizer.encode(rest, add_special=False, first=False)[:MAX_BREAKER_TAIL])
                    if tails[size]:
                        found[token, *tails[size]] = None
    return tuple(found)
