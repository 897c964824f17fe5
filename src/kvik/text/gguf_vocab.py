"""Reads a vocabulary from GGUF metadata (the keys `tokenizer.ggml.*` of the GGUF specification).

Two kinds are understood: "gpt2", byte-level BPE with merges, and "llama", SentencePiece BPE with scores and byte
fallback. A file that contradicts itself is refused; nothing here trusts it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from kvik.errors import DataError
from kvik.text.bpe import Merge
from kvik.text.pretokenizers import PRE_TOKENIZERS

__all__ = ["Vocabulary", "read_vocabulary"]

_KEY = "tokenizer.ggml."
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6

#: Texts that end a turn or a document in the models we know; a token counts when the file gives it a type of its own.
_ENDS = frozenset((
    "<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<end_of_turn>", "<|endoftext|>",
    "<|end_of_text|>", "</s>", "<eos>", "<EOT>", "<|EOT|>", "[EOT]", "[EOS]", "<end_of_utterance>",
    "<｜end▁of▁sentence｜>", "<|END_OF_TURN_TOKEN|>",
))  # fmt: skip
#: User-defined tokens of this shape are structure of the model's dialogue, whatever type the converter gave them.
_MARKUP = re.compile(r"<[|｜].+[|｜]>")


class Vocabulary(NamedTuple):
    """What a tokenizer is made of.

    Attributes:
        pieces: the bytes of each token, by id.
        literals: tokens that are found in the text as a whole before anything else, special ones included: id to text.
        special_ids: those of them that ordinary text never becomes.
        merges, bytes_to_id, chars_to_id, words: see `kvik.text.bpe.pack_bpe`.
        patterns: the pre-tokenizer's expressions; None for SentencePiece.
        space_prefix: a text, and what follows a literal token, gets a space in front (SentencePiece).
        whole_text: SentencePiece merges may cross words, so a text is one word.
    """

    pieces: list[bytes]
    literals: dict[int, str]
    special_ids: frozenset[int]
    merges: list[Merge]
    bytes_to_id: dict[int, int]
    chars_to_id: dict[str, int]
    words: list[int]
    patterns: tuple[str, ...] | None
    space_prefix: bool
    whole_text: bool
    bos_id: int | None
    eos_ids: frozenset[int]
    add_bos: bool
    add_eos: bool
    chat_template: str | None


def read_vocabulary(metadata: Mapping[str, object]) -> Vocabulary:
    """The vocabulary that a file's metadata describes. Raises DataError naming the key."""
    kind = metadata.get(_KEY + "model")
    if kind not in ("gpt2", "llama"):
        raise DataError(f"{_KEY}model is {kind!r}; Kvik reads 'gpt2' (byte-level BPE) and 'llama' (SentencePiece BPE)")
    tokens = _tokens(metadata)
    types = _types(metadata, len(tokens))
    ids = {name: _token_id(metadata, name, len(tokens)) for name in ("bos", "eos", "eot", "eom", "unknown", "padding")}
    eos_ids = _ends(tokens, types, [ids[name] for name in ("eos", "eot", "eom")])
    special = {token for token, kind_of in enumerate(types) if kind_of in (_UNKNOWN, _CONTROL)}
    special |= eos_ids | {token for token in ids.values() if token is not None}
    special |= {t for t, kind_of in enumerate(types) if kind_of == _USER_DEFINED and _MARKUP.fullmatch(tokens[t])}
    literals = {t: tokens[t] for t in range(len(tokens)) if (t in special or types[t] == _USER_DEFINED) and tokens[t]}
    read = _byte_level if kind == "gpt2" else _sentencepiece
    parts, add_bos = read(metadata, tokens, types, literals, special)
    add_bos = _flag(metadata, "add_bos_token", add_bos and ids["bos"] is not None)
    add_eos = _flag(metadata, "add_eos_token", False)
    for wanted, name in ((add_bos, "bos"), (add_eos, "eos")):
        if wanted and ids[name] is None:
            raise DataError(f"{_KEY}add_{name}_token is set but there is no {_KEY}{name}_token_id")
    template = metadata.get("tokenizer.chat_template")
    if template is not None and not isinstance(template, str):
        raise DataError("tokenizer.chat_template is not a string")
    return Vocabulary(
        literals=literals,
        special_ids=frozenset(special),
        bos_id=ids["bos"],
        eos_ids=frozenset(eos_ids),
        add_bos=add_bos,
        add_eos=add_eos,
        chat_template=template,
        **parts,
    )


def _tokens(metadata: Mapping[str, object]) -> list[str]:
    tokens = _list(metadata, "tokens", str)
    if not tokens:
        raise DataError(f"{_KEY}tokens is missing or empty; the file carries no vocabulary")
    first: dict[str, int] = {}
    for token, text in enumerate(tokens):
        if text and first.setdefault(text, token) != token:
            raise DataError(f"{_KEY}tokens[{token}] is {text!r} again, as at {first[text]}")
    return tokens


def _types(metadata: Mapping[str, object], count: int) -> list[int]:
    types = _list(metadata, "token_type", int)
    if not types:
        return [_NORMAL] * count
    if len(types) != count:
        raise DataError(f"{_KEY}token_type has {len(types)} entries for {count} tokens")
    return types


def _ends(tokens: list[str], types: list[int], named: list[int | None]) -> set[int]:
    ends = {t for t, text in enumerate(tokens) if text in _ENDS and types[t] in (_CONTROL, _USER_DEFINED)}
    texts = {tokens[t] for t in ends}
    if "<|return|>" in texts and "<|call|>" in texts:  # harmony: there <|end|> separates messages within a turn
        ends = {t for t in ends if tokens[t] != "<|end|>"}
    return ends | {t for t in named if t is not None}


def _byte_level(
    metadata: Mapping[str, object], tokens: list[str], types: list[int], literals: dict[int, str], special: set[int]
) -> tuple[dict[str, Any], bool]:
    name = metadata.get(_KEY + "pre", "default")
    pre = PRE_TOKENIZERS.get(name) if isinstance(name, str) else None
    if pre is None:
        raise DataError(f"{_KEY}pre is {name!r}, unknown to Kvik; it knows {', '.join(sorted(PRE_TOKENIZERS))}")
    alphabet = _byte_alphabet()
    pieces = []
    for token, text in enumerate(tokens):
        values = None if token in literals else [alphabet.get(char) for char in text]
        # A token with characters outside the alphabet can only stand for its own text.
        pieces.append(text.encode() if values is None or None in values else bytes(v for v in values if v is not None))
    by_text = {text: token for token, text in enumerate(tokens) if text and token not in special}
    bytes_to_id = {alphabet[text]: t for text, t in by_text.items() if text in alphabet and t not in literals}
    words = [t for text, t in by_text.items() if t not in literals] if pre.ignore_merges else []
    parts = {
        "pieces": pieces,
        "merges": _merges(metadata, by_text, special, {text: t for t, text in enumerate(tokens)}),
        "bytes_to_id": bytes_to_id,
        "chars_to_id": {},
        "words": words,
        "patterns": pre.patterns,
        "space_prefix": False,
        "whole_text": False,
    }
    return parts, pre.add_bos


def _merges(
    metadata: Mapping[str, object], by_text: dict[str, int], special: set[int], everything: dict[str, int]
) -> list[Merge]:
    merges = []
    for rank, rule in enumerate(_list(metadata, "merges", str)):
        at = rule.find(" ", 1)
        left, right = rule[:at], rule[at + 1 :]
        ids = [everything.get(text) for text in (left, right, left + right)]
        if at < 0 or None in ids:
            raise DataError(f"{_KEY}merges[{rank}] is {rule!r}: it must be two tokens whose joining is a token")
        if not special.intersection(ids):  # ordinary text must not become a special token
            merges.append((by_text[left], by_text[right], rank, by_text[left + right]))
    return merges


def _sentencepiece(
    metadata: Mapping[str, object], tokens: list[str], types: list[int], literals: dict[int, str], special: set[int]
) -> tuple[dict[str, Any], bool]:
    scores = _list(metadata, "scores", float)
    if len(scores) != len(tokens):
        raise DataError(f"{_KEY}scores has {len(scores)} entries for {len(tokens)} tokens")
    pieces, bytes_to_id, members = [], {}, {}
    for token, text in enumerate(tokens):
        if types[token] == _BYTE:
            value = re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", text)
            if value is None:
                raise DataError(f"{_KEY}tokens[{token}] is {text!r} but of type byte: expected <0x00> to <0xFF>")
            bytes_to_id[int(value[1], 16)] = token
            pieces.append(bytes([int(value[1], 16)]))
        elif token in literals:
            pieces.append(text.encode())
        else:
            pieces.append(text.replace("▁", " ").encode())
            if text and not math.isfinite(scores[token]):
                raise DataError(f"{_KEY}scores[{token}] is {scores[token]}, not a finite number")
            members[text] = token
    if not bytes_to_id:
        raise DataError(f"{_KEY}tokens has no byte tokens; SentencePiece without byte fallback is unsupported")
    members.pop("", None)
    # A pair joins with the score of what it becomes; equal scores have equal rank, and then the leftmost pair joins.
    ranks = {score: rank for rank, score in enumerate(sorted({scores[t] for t in members.values()}, reverse=True))}
    merges = [
        (members[text[:at]], members[text[at:]], ranks[scores[token]], token)
        for text, token in members.items()
        for at in range(1, len(text))
        if text[:at] in members and text[at:] in members
    ]
    parts = {
        "pieces": pieces,
        "merges": merges,
        "bytes_to_id": bytes_to_id,
        "chars_to_id": {text: token for text, token in members.items() if len(text) == 1},
        "words": [],
        "patterns": None,
        "space_prefix": _flag(metadata, "add_space_prefix", True),
        "whole_text": any("▁" in text.lstrip("▁") for text in members),
    }
    return parts, True


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins: 188 bytes are their own Latin-1 character, the other 68 are U+0100 onwards."""
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(value): value for value in own}
    for value in range(256):
        if value not in own:
            alphabet[chr(0x100 + len(alphabet) - len(own))] = value
    return alphabet


def _list(metadata: Mapping[str, object], name: str, of: type) -> list[Any]:
    value = metadata.get(_KEY + name, [])
    wanted = (int, float) if of is float else of
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise DataError(f"{_KEY}{name} is not a list")
    for index, entry in enumerate(value):
        if not isinstance(entry, wanted) or isinstance(entry, bool):
            raise DataError(f"{_KEY}{name}[{index}] is {entry!r}, not of type {of.__name__}")
    return list(value)


def _flag(metadata: Mapping[str, object], name: str, default: bool) -> bool:
    value = metadata.get(_KEY + name, default)
    if not isinstance(value, bool):
        raise DataError(f"{_KEY}{name} is {value!r}, not true or false")
    return value


def _token_id(metadata: Mapping[str, object], name: str, count: int) -> int | None:
    value = metadata.get(f"{_KEY}{name}_token_id")
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < count:
        raise DataError(f"{_KEY}{name}_token_id is {value!r}, outside [0, {count - 1}]")
    return value
