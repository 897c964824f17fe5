"""The small byte-level tokenizer of every random model: two special tokens, the 256 bytes, a few merges, unused rest."""

from __future__ import annotations

from oracles.random_models.shapes import VOCAB

SPECIAL = ("<|endoftext|>", "<|im_end|>")
MERGES = ("Ġ t", "h e", "i n", "Ġt he", "e r", "a n", "o n")


def tokens() -> list[str]:
    """By id, VOCAB of them."""
    found = [*SPECIAL, *byte_characters(), *(pair.replace(" ", "") for pair in MERGES)]
    return found + [f"<unused{i}>" for i in range(VOCAB - len(found))]


def is_unused(token: str) -> bool:
    return token.startswith("<unused")


def byte_characters() -> list[str]:
    """The printable stand-ins of GPT-2's byte-level BPE, by byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    stand_in = {b: b for b in printable} | {b: 256 + i for i, b in enumerate(others)}
    return [chr(stand_in[b]) for b in range(256)]
