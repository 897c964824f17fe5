"""Reads the steps of a `tokenizer.json` (the serialized form of the library `tokenizers`): normalizer, pre-tokenizer,
post-processor, decoder. What Kvik would not do exactly so is refused by its name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from kvik.text.cutting import Prefix, Step, regex_cut
from kvik.text.hub_files import Node
from kvik.text.pretokenizers import PRE_TOKENIZERS
from kvik.text.regex_check import regex_fault

__all__ = ["Pipeline", "read_around", "read_pipeline"]

_MOST_STEPS, _MOST_DEEP = 64, 4
_LONGEST_CONTENT = 64
_UNICODE_FORMS = ("NFC", "NFD", "NFKC", "NFKD")
_BEHAVIORS = {
    "Isolated": "isolated", "Contiguous": "contiguous", "MergedWithPrevious": "merged_with_previous",
    "MergedWithNext": "merged_with_next",
}  # fmt: skip
_DROPPING = ("Whitespace", "WhitespaceSplit", "BertPreTokenizer", "CharDelimiterSplit")


class Pipeline(NamedTuple):
    """What happens to text before it is merged; see `kvik.text.vocabulary.Vocabulary`.

    Attributes:
        byte_level: tokens are written in the byte alphabet; otherwise "▁" stands for a space.
        single: each space begins a unit of its own (Metaspace with split).
    """

    byte_level: bool
    normalizers: tuple[Step, ...]
    cuts: tuple[Step, ...]
    prefix: str
    single: bool


def read_pipeline(top: Node) -> Pipeline:
    """The steps of a tokenizer. Raises DataError."""
    normalizers, marked, each = _normalizers(top)
    cuts: list[Step] = []
    byte_level, prefix, single = False, Prefix.EACH if each else Prefix.NONE, False
    for node in _flat(top["pre_tokenizer"], "pretokenizers"):
        kind = node.kind()
        if byte_level:
            raise node["type"].error("a step after ByteLevel, which Kvik does not know")
        if kind == "ByteLevel":
            if marked:
                raise node["type"].error('a vocabulary has either bytes or "▁" for spaces')
            byte_level = True
            if node["add_prefix_space"].flag():
                if cuts:
                    raise node["add_prefix_space"].error("set after another step, which Kvik does not know")
                prefix = Prefix.BARE
            if node["use_regex"].flag(True):
                cuts += [regex_cut(pattern) for pattern in PRE_TOKENIZERS["gpt-2"].patterns]
        elif kind == "Metaspace":
            scheme = _metaspace(node)
            marked, prefix = True, prefix or scheme
            single = node["split"].flag(True)
        elif kind == "Split" and marked and node["pattern"].value == {"String": " "}:
            continue  # no space is left to split at (Gemma)
        elif marked:
            raise node["type"].error('beside "▁" for spaces, which Kvik does not know')
        else:
            cuts.append(_cut(node, kind))
    if not byte_level and not marked:
        raise top["pre_tokenizer"].error(
            'neither ByteLevel nor "▁" for spaces: a kind of vocabulary Kvik does not know'
        )
    if not byte_level and cuts:
        raise top["pre_tokenizer"].error('cuts beside "▁" for spaces, which Kvik does not know')
    _check_decoder(top["decoder"], byte_level)
    return Pipeline(byte_level, tuple(normalizers), tuple(cuts), prefix, single)


def _flat(node: Node, entries: str, depth: int = 0) -> Iterator[Node]:
    """The steps of a step or a Sequence of them."""
    if node.value is None:
        return
    if node.kind() != "Sequence":
        yield node
        return
    steps = list(node[entries])
    if depth >= _MOST_DEEP or len(steps) > _MOST_STEPS:
        raise node["type"].error(f"more than {_MOST_STEPS} steps or {_MOST_DEEP} Sequences in one another")
    for step in steps:
        yield from _flat(step, entries, depth + 1)


def _normalizers(top: Node) -> tuple[list[Step], bool, bool]:
    """The steps that change text; whether spaces become "▁"; whether one is put in front."""
    steps: list[Step] = []
    marked = each = False
    for node in _flat(top["normalizer"], "normalizers"):
        kind = node.kind()
        if kind == "Prepend":
            if node["prepend"].text() != "▁" or each:
                raise node["prepend"].error('Kvik knows "▁", once')
            each = True
        elif kind == "Replace" and node["pattern"].value == {"String": " "} and node["content"].value == "▁":
            marked = True
        elif marked or each:
            raise node["type"].error('a step after "▁" came in, which Kvik does not know')
        elif kind == "Replace":
            steps.append(_replacement(node))
        elif kind in (*_UNICODE_FORMS, "Lowercase"):
            steps.append((kind,))
        else:
            known = ", ".join((*_UNICODE_FORMS, "Lowercase", "Replace", "Prepend"))
            raise node["type"].error(f"a normalizer Kvik does not know; it knows {known}")
    if each and not marked:
        raise top["normalizer"].error('puts "▁" in front but leaves spaces')
    return steps, marked, each


def _replacement(node: Node) -> Step:
    kind, pattern = _pattern(node["pattern"])
    content = node["content"].text()
    if "▁" in content or "▁" in pattern:
        raise node.error('replaces "▁", which Kvik does not know')
    if len(content) > _LONGEST_CONTENT:
        raise node["content"].error(f"more than {_LONGEST_CONTENT} characters")
    return ("Replace", kind, pattern, content)


def _metaspace(node: Node) -> str:
    if node["replacement"].text() != "▁":
        raise node["replacement"].error('Kvik knows "▁"')
    scheme = node["prepend_scheme"].value
    if node["add_prefix_space"].flag(True) is False:
        scheme = scheme or "never"
        if scheme != "never":
            raise node["prepend_scheme"].error("contradicts add_prefix_space")
    schemes = {None: Prefix.BARE, "always": Prefix.BARE, "first": Prefix.FIRST, "never": Prefix.NONE}
    if not (scheme is None or isinstance(scheme, str)) or scheme not in schemes:
        raise node["prepend_scheme"].error("expected always, first or never")
    return schemes[scheme]


def _cut(node: Node, kind: str) -> Step:
    if kind == "Digits":
        return ("Digits", node["individual_digits"].flag())
    if kind == "Punctuation":
        return ("Punctuation", _behavior(node["behavior"]) if node["behavior"].value is not None else "isolated")
    if kind == "Split":
        matcher, pattern = _pattern(node["pattern"])
        invert = node["invert"].flag(False)
        if node["behavior"].value == "Removed" and invert:
            return ("Split", matcher, pattern, "isolated", False)  # keeps the matches; Kvik also what lies between
        return ("Split", matcher, pattern, _behavior(node["behavior"]), invert)
    if kind in _DROPPING:
        raise node["type"].error("drops whitespace, so that text would not come back; Kvik does not do that")
    known = "ByteLevel, Split, Digits, Punctuation, Metaspace"
    raise node["type"].error(f"a pre-tokenizer Kvik does not know; it knows {known}")


def _behavior(node: Node) -> str:
    if node.text() == "Removed":
        raise node.error("removes text, which would not come back; Kvik does not do that")
    if node.text() not in _BEHAVIORS:
        raise node.error(f"expected {', '.join(_BEHAVIORS)}")
    return _BEHAVIORS[node.text()]


def _pattern(node: Node) -> tuple[str, str]:
    """Kind and text of a pattern."""
    if len(node.object()) != 1 or next(iter(node.object())) not in ("String", "Regex"):
        raise node.error("expected String or Regex")
    kind = next(iter(node.object()))
    pattern = node[kind].text()
    fault = regex_fault(pattern) if kind == "Regex" else None if pattern else "empty"
    if fault is not None:
        raise node[kind].error(fault)
    return kind, pattern


def _check_decoder(decoder: Node, byte_level: bool) -> None:
    known = ("ByteLevel",) if byte_level else ("Replace", "ByteFallback", "Fuse", "Strip", "Metaspace")
    for node in _flat(decoder, "decoders"):
        if node.kind() not in known:
            raise node["type"].error(f"does not belong to this vocabulary; expected {', '.join(known)}")


def read_around(post_processor: Node, size: int) -> tuple[int | None, int | None]:
    """The tokens that are put before and after a text, ids below `size`. Raises DataError."""
    templates = [node for node in _flat(post_processor, "processors") if node.kind() != "ByteLevel"]
    for node in templates:
        if node.kind() != "TemplateProcessing" or node is not templates[0]:
            raise node["type"].error(
                "a post-processor Kvik does not know; it knows ByteLevel and one TemplateProcessing"
            )
    around: list[list[Node]] = [[]]
    for entry in templates[0]["single"] if templates else ():
        if entry["Sequence"].value is not None:
            around.append([])
        else:
            around[-1].append(entry)
    if templates and (len(around) != 2 or max(map(len, around)) > 1):
        raise templates[0]["single"].error("Kvik knows the text once, with at most one token before and one after")
    before, after = (_put(templates[0], entries[0], size) if entries else None for entries in (around[0], around[-1]))
    return before, after


def _put(template: Node, entry: Node, size: int) -> int:
    ids = list(template["special_tokens"][entry["SpecialToken"]["id"].text()]["ids"])
    if len(ids) != 1:
        raise entry.error("not one token")
    return ids[0].number(size)
