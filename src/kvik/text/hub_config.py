"""Reads what stands beside a hub's `tokenizer.json`: named tokens, ends of turns, chat templates."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from kvik.text.hub_files import Node, read_json, read_text

__all__ = ["HubConfig", "read_config"]

_MAX_BYTES = 1 << 24
_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "cls_token", "sep_token", "mask_token")


class HubConfig(NamedTuple):
    """What the files beside `tokenizer.json` say.

    Attributes:
        path: of tokenizer_config.json.
        named: texts of the tokens that have a part: `eos_token` to text.
        ids: token ids that generation_config.json or config.json give a part, to the places that do.
        ends: `eos_token_id` of generation_config.json or else of config.json, one place for each id.
        add: whether `bos` and `eos` are put around a text, where tokenizer_config.json says so.
        vocab_size: rows of the model's embedding, where config.json says so.
        chat_template, tool_template: chat_template.jinja, or the templates of tokenizer_config.json.
    """

    path: Path
    named: dict[str, str]
    ids: dict[int, str]
    ends: list[Node]
    add: dict[str, bool]
    vocab_size: int | None
    chat_template: str | None
    tool_template: str | None


def read_config(folder: Path) -> HubConfig:
    """Each file may be missing. Raises DataError naming file and place."""
    nothing = Node({}, "", folder)
    tokenizer = read_json(folder / "tokenizer_config.json", _MAX_BYTES) or nothing
    model = read_json(folder / "config.json", _MAX_BYTES) or nothing
    if isinstance(model["text_config"].value, dict) and model["vocab_size"].value is None:
        model = _inner(model)
    generation = read_json(folder / "generation_config.json", _MAX_BYTES) or nothing
    ends = next((n for n in (generation["eos_token_id"], model["eos_token_id"]) if n.value is not None), None)
    vocab_size = model["vocab_size"]
    chat, tool = _templates(tokenizer["chat_template"])
    written = read_text(folder / "chat_template.jinja", _MAX_BYTES)
    return HubConfig(
        path=folder / "tokenizer_config.json",
        named={name: text for name in _NAMES if (text := _token(tokenizer[name])) is not None},
        ids=_ids(model) | _ids(generation),
        ends=[] if ends is None else list(ends) if isinstance(ends.value, list) else [ends],
        add={
            name: node.flag() for name in ("bos", "eos") if (node := tokenizer[f"add_{name}_token"]).value is not None
        },
        vocab_size=None if vocab_size.value is None else vocab_size.number(1 << 31),
        chat_template=chat if written is None else written,
        tool_template=tool if written is None else None,
    )


def _inner(model: Node) -> Node:
    """The language model of a configuration with several, its ends of turns those of the whole if they are there."""
    text = model["text_config"]
    outer = model["eos_token_id"].value
    return Node(text.object() | ({} if outer is None else {"eos_token_id": outer}), text.place, text.path)


def _ids(file: Node) -> dict[int, str]:
    """Ids that have a part, one or a list of them, to `file: place`. What is no id is left to those who use it."""
    found = {}
    for node in (file[f"{name}_id"] for name in _NAMES):
        for token in node.value if isinstance(node.value, list) else [node.value]:
            if type(token) is int:
                found[token] = f"{node.path.name}: {node.place}"
    return found


def _token(node: Node) -> str | None:
    """A token's text, given as a string or as an object with its flags."""
    if node.value is None:
        return None
    return (node["content"] if isinstance(node.value, dict) else node).text() or None


def _templates(node: Node) -> tuple[str | None, str | None]:
    """The template for conversations and, where there are several, that for conversations with tools."""
    if node.value is None:
        return None, None
    if not isinstance(node.value, list):
        return node.text(), None
    named = {entry["name"].text(): entry["template"].text() for entry in node}
    if named and "default" not in named:
        raise node.error("no template is named default")
    return named.get("default"), named.get("tool_use")
