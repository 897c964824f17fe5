"""Reads a vocabulary from GGUF metadata (the keys `tokenizer.ggml.*` of the GGUF specification).

Two kinds are understood: "gpt2", byte-level BPE with merges, and "llama", SentencePiece BPE with scores and byte
fallback. A file that contradicts itself is refused; nothing here trusts it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from kvik.errors import DataError
from kvik.text.bpe import Merge
from kvik.text.cutting import Prefix, regex_cut
from kvik.text.literals import Literal
from kvik.text.pretokenizers import PRE_TOKENIZERS
from kvik.text.vocabulary import BYTE_ALPHABET, MARKUP, Vocabulary, byte_piece, joining_rules, turn_ends, units_for

__all__ = ["read_vocabulary"]

_KEY = "tokenizer.ggml."
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6


def read_vocabulary(metadata: Mapping[str, object]) -> Vocabulary:
    """The vocabulary that a file's metadata describes. Raises DataError naming the key."""
    kind = metadata.get(_KEY + "model")
    if kind not in ("gpt2", "llama"):
        raise DataError(f"{_KEY}model is {kind!r}; Kvik reads 'gpt2' (byte-level BPE) and 'llama' (SentencePiece BPE)")
    tokens = _tokens(metadata)
    types = _types(metadata, len(tokens))
    ids = {name: _token_id(metadata, name, len(tokens)) for name in ("bos", "eos", "eot", "eom", "unknown", "padding")}
    own = {token: text for token, text in enumerate(tokens) if types[token] in (_CONTROL, _USER_DEFINED)}
    ends = turn_ends(own)
    eos_ids = ends | {t for name in ("eos", "eot", "eom") if (t := ids[name]) is not None}
    special = ends | {token for token, kind_of in enumerate(types) if kind_of in (_UNKNOWN, _CONTROL)}
    # A character that also serves for padding, say, must stay within reach of text.
    special |= {t for t in ids.values() if t is not None and (types[t] != _NORMAL or len(tokens[t]) > 1)}
    special |= {t for t, kind_of in enumerate(types) if kind_of == _USER_DEFINED and MARKUP.fullmatch(tokens[t])}
    literals = {t: tokens[t] for t in range(len(tokens)) if (t in special or types[t] == _USER_DEFINED) and tokens[t]}
    if kind == "llama":  # older converters leave the marks of spaces in what users defined
        literals |= {t: text.replace("▁", " ") for t, text in literals.items() if t not in special}
    read = _byte_level if kind == "gpt2" else _sentencepiece
    parts, add_bos = read(metadata, tokens, types, literals, special)
    add_bos = _flag(metadata, "add_bos_token", add_bos and ids["bos"] is not None)
    add_eos = _flag(metadata, "add_eos_token", False)
    for wanted, name in ((add_bos, "bos"), (add_eos, "eos")):
        if wanted and ids[name] is None:
            raise DataError(f"{_KEY}add_{name}_token is set but there is no {_KEY}{name}_token_id")
    return Vocabulary(
        literals=[Literal(text, token) for token, text in literals.items()],
        special_ids=frozenset(special),
        normalizers=(),
        bos_id=ids["bos"],
        eos_id=ids["eos"],
        eos_ids=frozenset(eos_ids),
        add_bos=add_bos,
        add_eos=add_eos,
        chat_template=_template(metadata, "tokenizer.chat_template"),
        tool_template=_template(metadata, "tokenizer.chat_template.tool_use"),
        **parts,
    )


def _template(metadata: Mapping[str, object], key: str) -> str | None:
    template = metadata.get(key)
    if template is not None and not isinstance(template, str):
        raise DataError(f"{key} is not a string")
    return template


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


def _byte_level(
    metadata: Mapping[str, object], tokens: list[str], types: list[int], literals: dict[int, str], special: set[int]
) -> tuple[dict[str, Any], bool]:
    name = metadata.get(_KEY + "pre", "default")
    pre = PRE_TOKENIZERS.get(name) if isinstance(name, str) else None
    if pre is None:
        raise DataError(f"{_KEY}pre is {name!r}, unknown to Kvik; it knows {', '.join(sorted(PRE_TOKENIZERS))}")
    pieces = []
    for token, text in enumerate(tokens):
        piece = None if token in literals else byte_piece(text)
        # A token with characters outside the alphabet can only stand for its own text.
        pieces.append(text.encode() if piece is None else piece)
    by_text = {text: token for token, text in enumerate(tokens) if text and token not in special}
    bytes_to_id = {BYTE_ALPHABET[text]: t for text, t in by_text.items() if text in BYTE_ALPHABET and t not in literals}
    words = [t for text, t in by_text.items() if t not in literals] if pre.ignore_merges else []
    parts = {
        "pieces": pieces,
        "merges": _merges(metadata, tokens, special),
        "bytes_to_id": bytes_to_id,
        "chars_to_id": {},
        "words": words,
        "cuts": tuple(regex_cut(pattern) for pattern in pre.patterns),
        "prefix": Prefix.NONE,
        "units": "",
    }
    return parts, pre.add_bos


def _merges(metadata: Mapping[str, object], tokens: list[str], special: set[int]) -> list[Merge]:
    rules = _list(metadata, "merges", str)
    ends = [rule.find(" ", 1) for rule in rules]
    pairs = [(rule[:at], rule[at + 1 :]) if at > 0 else None for rule, at in zip(rules, ends, strict=True)]

    def refuse(rank: int) -> DataError:
        return DataError(f"{_KEY}merges[{rank}] is {rules[rank]!r}: it must be two tokens whose joining is a token")

    return joining_rules(pairs, {text: token for token, text in enumerate(tokens) if text}, special, refuse)


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
            pieces.append(literals[token].encode())
        else:
            spaced = text.replace("▁", " ")
            pieces.append(spaced.encode())
            if text and not math.isfinite(scores[token]):
                raise DataError(f"{_KEY}scores[{token}] is {scores[token]}, not a finite number")
            if " " not in text:  # text has "▁" for every space, so no part of it is such a token
                members[spaced] = token
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
        "cuts": None,
        "prefix": Prefix.EACH if _flag(metadata, "add_space_prefix", True) else Prefix.NONE,
        "units": units_for(members),
    }
    return parts, True


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
