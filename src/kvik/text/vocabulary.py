"""What a tokenizer is made of, whichever file it was read from, and the facts that both readers share."""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterable, Mapping
from typing import NamedTuple

from kvik.errors import DataError
from kvik.text.bpe import Merge
from kvik.text.cutting import Step, Units
from kvik.text.literals import Literal

__all__ = ["BYTE_ALPHABET", "ENDS", "MARKUP", "Vocabulary", "byte_piece", "joining_rules", "turn_ends", "units_for"]

#: Texts that end a turn or a document in the models we know; a token counts when the file gives it a type of its own.
ENDS = frozenset((
    "<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<end_of_turn>", "<|endoftext|>",
    "<|end_of_text|>", "</s>", "<eos>", "<EOT>", "<|EOT|>", "[EOT]", "[EOS]", "<end_of_utterance>",
    "<｜end▁of▁sentence｜>", "<|END_OF_TURN_TOKEN|>",
))  # fmt: skip
#: User-defined tokens of this shape are structure of the model's dialogue, whatever type the file gives them.
MARKUP = re.compile(r"<[|｜].+[|｜]>")


class Vocabulary(NamedTuple):
    """What a tokenizer is made of. Where a file writes "▁" for a space, this has the space.

    Attributes:
        pieces: the bytes of each token, by id; empty where an id has no token.
        literals: tokens that are found in the text as a whole before anything else, special ones included.
        special_ids: those of them that ordinary text never becomes.
        merges, bytes_to_id, chars_to_id, words: see `kvik.text.bpe.pack_bpe`.
        normalizers: what happens to text before it is cut; see `kvik.text.cutting`.
        cuts: how text is cut into words; None for SentencePiece.
        prefix, units: one of `Prefix`; for SentencePiece one of `Units`.
        bos_id, eos_id: the tokens that `add_bos` and `add_eos` put around a text.
        eos_ids: tokens that end a turn or a document.
        chat_template, tool_template: the latter where the file has one of its own for conversations with tools.
    """

    pieces: list[bytes]
    literals: list[Literal]
    special_ids: frozenset[int]
    merges: list[Merge]
    bytes_to_id: dict[int, int]
    chars_to_id: dict[str, int]
    words: list[int]
    normalizers: tuple[Step, ...]
    cuts: tuple[Step, ...] | None
    prefix: str
    units: str
    bos_id: int | None
    eos_id: int | None
    eos_ids: frozenset[int]
    add_bos: bool
    add_eos: bool
    chat_template: str | None
    tool_template: str | None


def _byte_alphabet() -> dict[str, int]:
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(value): value for value in own}
    for value in range(256):
        if value not in own:
            alphabet[chr(0x100 + len(alphabet) - len(own))] = value
    return alphabet


#: GPT-2's printable stand-ins: 188 bytes are their own Latin-1 character, the other 68 are U+0100 onwards.
BYTE_ALPHABET: Mapping[str, int] = _byte_alphabet()


def byte_piece(text: str) -> bytes | None:
    """The bytes of a token written in the byte alphabet; None for one that is not."""
    try:
        return bytes([BYTE_ALPHABET[char] for char in text])
    except KeyError:
        return None


def turn_ends(texts: Mapping[int, str]) -> set[int]:
    """Which of these tokens (id to text) end a turn or a document by their text."""
    ends = {token for token, text in texts.items() if text in ENDS}
    found = {texts[token] for token in ends}
    if "<|return|>" in found and "<|call|>" in found:  # harmony: there <|end|> separates messages within a turn
        ends = {token for token in ends if texts[token] != "<|end|>"}
    return ends


def joining_rules(
    pairs: Iterable[tuple[str, str] | None],
    ids: Mapping[str, int],
    special: Container[int],
    refuse: Callable[[int], DataError],
) -> list[Merge]:
    """Merges by text as merges by id, in order of rank.

    Rules that would make ordinary text a special token are left out. Raises `refuse(rank)` for what is no pair of
    tokens whose joining is a token.
    """
    rules = []
    for rank, pair in enumerate(pairs):
        if pair is None:
            raise refuse(rank)
        left, right, joined = ids.get(pair[0]), ids.get(pair[1]), ids.get(pair[0] + pair[1])
        if left is None or right is None or joined is None:
            raise refuse(rank)
        if not (left in special or right in special or joined in special):
            rules.append((left, right, rank, joined))
    return rules


def units_for(merged: Iterable[str]) -> str:
    """The smallest units of SentencePiece text that none of these joined tokens crosses."""
    return Units.WHOLE if any(" " in text.lstrip(" ") for text in merged) else Units.RUNS
