"""Reads the vocabulary of a hub folder: `tokenizer.json` and what stands beside it.

`tokenizer.json` is the serialized form of the library `tokenizers`; ids are those that library gives. Its `truncation`
and `padding` are left aside, as every caller of it does. A file that contradicts itself is refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kvik.errors import DataError
from kvik.text.bpe import Merge
from kvik.text.cutting import Prefix, Units
from kvik.text.hub_config import HubConfig, read_config
from kvik.text.hub_files import Node, read_json
from kvik.text.hub_pipeline import Pipeline, read_around, read_pipeline
from kvik.text.literals import Literal
from kvik.text.vocabulary import BYTE_ALPHABET, MARKUP, Vocabulary, byte_piece, joining_rules, turn_ends, units_for

__all__ = ["read_hub"]

_MAX_BYTES = 1 << 28
_MAX_TOKENS = 1 << 21
_LONGEST_LITERAL = 1024
_BYTE_TOKENS = {f"<0x{value:02X}>": value for value in range(256)}


def read_hub(folder: Path) -> Vocabulary:
    """The vocabulary of a folder. Raises DataError naming the file and the place in it."""
    top = read_json(folder / "tokenizer.json", _MAX_BYTES)
    if top is None:
        other = "; tokenizer.model alone is not read" if (folder / "tokenizer.model").exists() else ""
        raise DataError(f"tokenizer.json is missing{other}", path=folder)
    model = _model(top)
    vocab = _vocab(model["vocab"])
    config, pipeline = read_config(folder), read_pipeline(top)
    literals, special = _literals(top, vocab, config)
    known = vocab | {entry.text: entry.token for entry in literals}
    size = max(known.values()) + 1
    around = read_around(top["post_processor"], size)
    bos, add_bos = _end_of_text("bos", around[0], known, config)
    eos, add_eos = _end_of_text("eos", around[1], known, config)
    named_ends = [node.number(size) for node in config.ends]
    eos = named_ends[0] if eos is None and named_ends else eos
    ends = turn_ends({entry.token: entry.text for entry in literals}) | {*named_ends, eos} - {None}
    special |= {entry.token for entry in literals if entry.token in ends or MARKUP.fullmatch(entry.text)}
    read = _byte_level if pipeline.byte_level else _marked
    literals, pieces, parts = read(model, vocab, literals, special, pipeline)
    return Vocabulary(
        pieces=[pieces.get(token, b"") for token in range(size)],
        literals=literals,
        special_ids=frozenset(special),
        merges=_merges(model, vocab, special),
        normalizers=pipeline.normalizers,
        prefix=pipeline.prefix,
        bos_id=bos,
        eos_id=eos,
        eos_ids=frozenset(token for token in ends if token is not None),
        add_bos=add_bos,
        add_eos=add_eos,
        chat_template=config.chat_template,
        tool_template=config.tool_template,
        **parts,
    )


def _model(top: Node) -> Node:
    """The model, which must be BPE without what Kvik does not do."""
    model = top["model"]
    kind = model["type"]
    if kind.value is not None and kind.text() != "BPE":
        raise kind.error("Kvik reads BPE")
    if kind.value is None and model["merges"].value is None:
        raise model["merges"].error("missing; Kvik reads BPE")
    if model["dropout"].value not in (None, 0):
        raise model["dropout"].error("leaves merges out by chance, which Kvik does not do")
    for name in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model[name].value not in (None, ""):
            raise model[name].error("a mark of parts of words, which Kvik does not know")
    for name in ("fuse_unk", "byte_fallback", "ignore_merges"):
        model[name].flag(False)
    if model["unk_token"].value is not None:
        model["unk_token"].text()
    return model


def _vocab(node: Node) -> dict[str, int]:
    """Token texts to ids, each once."""
    vocab = node.object()
    if not vocab or len(vocab) > _MAX_TOKENS:
        raise DataError(f"{node.place} has {len(vocab)} tokens; expected 1 to {_MAX_TOKENS}", path=node.path)
    ids: dict[int, str] = {}
    for text, token in vocab.items():
        if type(token) is not int or not 0 <= token < _MAX_TOKENS:
            Node(token, f"{node.place}[{text!r:.60}]", node.path).number(_MAX_TOKENS)
        if ids.setdefault(token, text) is not text:
            raise DataError(f"{node.place}[{text!r:.60}] is {token}, as is {ids[token]!r:.60}", path=node.path)
    try:
        "".join(vocab).encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{node.place} has a token with a lone surrogate: {error.reason}", path=node.path) from None
    return vocab


def _literals(top: Node, vocab: dict[str, int], config: HubConfig) -> tuple[list[Literal], set[int]]:
    """The tokens found in text as a whole, and which of them are special.

    Those the model has no row for are left out (Gemma 3's text models have an image token beyond their embedding), but
    for those that the folder's other files make use of, which are refused.
    """
    literals: dict[int, Literal] = {}
    special: set[int] = set()
    texts = {token: text for text, token in vocab.items()}
    for node in top["added_tokens"]:
        text, token = node["content"].text(), node["id"].number(_MAX_TOKENS)
        if not 0 < len(text) <= _LONGEST_LITERAL:
            raise node["content"].error(f"expected 1 to {_LONGEST_LITERAL} characters")
        if texts.setdefault(token, text) != text:
            raise node["id"].error(f"the id of {texts[token]!r:.60}, and this is {text!r:.60}")
        if vocab.get(text, token) != token or token in literals:
            raise node["content"].error("there already")
        flags = [node[name].flag(False) for name in ("normalized", "lstrip", "rstrip", "single_word", "special")]
        if text not in vocab and config.vocab_size is not None and token >= config.vocab_size:
            _refuse_used(node, text, token, config)
            continue
        literals[token] = Literal(text, token, *flags[:4])
        if flags[4]:
            special.add(token)
    if len({entry.text for entry in literals.values()}) != len(literals):
        raise top["added_tokens"].error("one text with two ids")
    for name, text in config.named.items():  # these are special even where the list does not say so
        token = vocab.get(text, next((t for t, entry in literals.items() if entry.text == text), -1))
        if token >= 0:
            # A character that also serves for padding, say, must stay within reach of text.
            if token in literals or len(text) > 1:
                literals.setdefault(token, Literal(text, token))
                special.add(token)
        elif name in ("bos_token", "eos_token"):
            raise DataError(f"{name} is {text!r:.60}, which is no token of tokenizer.json", path=config.path)
    return list(literals.values()), special


def _refuse_used(node: Node, text: str, token: int, config: HubConfig) -> None:
    """Refuse an added token that the model has no row for where a text could come to need it."""
    named = (f"{config.path.name}: {name}" for name, other in config.named.items() if other == text)
    user = next(named, config.ids.get(token))
    if user is None and any(text in template for template in (config.chat_template, config.tool_template) if template):
        user = "the chat template"
    if user is not None:
        rows = f"the model's vocab_size is {config.vocab_size}"
        raise DataError(f"{node.place} is {text!r:.60} with id {token}, but {rows} and {user} uses it", path=node.path)


def _end_of_text(name: str, put: int | None, known: dict[str, int], config: HubConfig) -> tuple[int | None, bool]:
    """The token that begins or ends a text, and whether it is put there. put: what the post-processor puts there."""
    text = config.named.get(f"{name}_token")
    named = None if text is None else known.get(text)
    if put is not None and named is not None and put != named:
        raise DataError(f"{name}_token is {text!r:.60}, but post_processor puts token {put} there", path=config.path)
    token = named if put is None else put
    add = config.add.get(name, put is not None)
    if add and token is None:
        raise DataError(f"add_{name}_token is set but there is no {name}_token", path=config.path)
    return token, add


def _merges(model: Node, vocab: dict[str, int], special: set[int]) -> list[Merge]:
    node = model["merges"]
    rules = node.value if isinstance(node.value, list) else list(node)

    def pair(rule: object) -> tuple[str, str] | None:
        parts = rule.split(" ") if isinstance(rule, str) else rule
        if not isinstance(parts, list) or len(parts) != 2 or not all(isinstance(part, str) for part in parts):
            return None
        return parts[0], parts[1]

    def refuse(rank: int) -> DataError:
        wrong = Node(rules[rank], f"{node.place}[{rank}]", node.path)
        return wrong.error("it must be two tokens whose joining is a token")

    return joining_rules(map(pair, rules), vocab, special, refuse)


_Parts = tuple[list[Literal], dict[int, bytes], dict[str, Any]]


def _byte_level(
    model: Node, vocab: dict[str, int], literals: list[Literal], special: set[int], pipeline: Pipeline
) -> _Parts:
    written = {token: piece for text, token in vocab.items() if (piece := byte_piece(text)) is not None}
    ordinary = [token for token in written if token not in special]
    # A token with characters outside the alphabet can only stand for its own text.
    pieces = {token: written.get(token, text.encode()) for text, token in vocab.items()}
    pieces |= {entry.token: entry.text.encode() for entry in literals}
    parts = {
        "bytes_to_id": {
            BYTE_ALPHABET[text]: t for text, t in vocab.items() if text in BYTE_ALPHABET and t not in special
        },
        "chars_to_id": {},
        "words": ordinary if model["ignore_merges"].value else [],
        "cuts": pipeline.cuts,
        "units": "",
    }
    return literals, pieces, parts


def _marked(
    model: Node, vocab: dict[str, int], literals: list[Literal], special: set[int], pipeline: Pipeline
) -> _Parts:
    """Tokens with "▁" for spaces, here with the spaces; where a token has a real space, no text leads to it."""
    fallback = bool(model["byte_fallback"].value)
    bytes_to_id = {v: vocab[text] for text, v in _BYTE_TOKENS.items() if text in vocab} if fallback else {}
    byte_tokens = set(bytes_to_id.values())
    spaced = {
        text.replace("▁", " "): token
        for text, token in vocab.items()
        if text and " " not in text and token not in special and token not in byte_tokens
    }
    pieces = {token: text.replace("▁", " ").encode() for text, token in vocab.items()}
    pieces |= {token: bytes([value]) for value, token in bytes_to_id.items()}
    kept = []
    for entry in literals:
        text = entry.text.replace("▁", " ") if entry.normalized else entry.text
        # A space that is put in front is part of what a normalized literal stands for.
        front = " " if entry.normalized and pipeline.prefix == Prefix.EACH else ""
        pieces[entry.token] = (front + text).encode()
        if "▁" in text and entry.token not in special:
            pieces[entry.token] = text.replace("▁", " ").encode()
        else:
            kept.append(entry._replace(text=text))
    parts = {
        "bytes_to_id": bytes_to_id,
        "chars_to_id": {text: token for text, token in spaced.items() if len(text) == 1},
        "words": list(spaced.values()) if model["ignore_merges"].value else [],
        "cuts": None,
        "units": Units.SINGLE if pipeline.single else units_for(spaced),
    }
    return kept, pieces, parts
