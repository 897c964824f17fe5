"""Texts in pieces have the tokens they have as a whole."""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from text.hub_folders import CORPUS, FAMILIES, reference, write_folder
from text.vocabularies import HARD_TEXTS, sentencepiece

from kvik.errors import ParameterError
from kvik.evaluation.token_stream import token_stream
from kvik.text.tokenizer import Tokenizer

LONG = [
    "a" * 2000,
    "ab" * 700 + "\n" * 400 + " " * 500 + "end",
    "0123456789" * 150,
    "hello world hello hello " * 60,
    "👩‍👩‍👧‍👦🏳️‍🌈✨👍🏽" * 80,
    "中文字符日本語テキスト한국어" * 80,
    "e\u0301\u0323" * 400 + " \u0301" * 200,
    "\n\n\n \t \r\n" * 150,
    "<left>  word  <right>  hello w é\n\n<both> <s> hell" * 30,
    " ".join(CORPUS * 2),
]
OTHERS = ("sentencepiece", "sentencepiece without a space in front")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tokenizers")


@cache
def tokenizer_of(family: str, folder: Path) -> Tokenizer:
    if family in FAMILIES:
        return Tokenizer.from_hub(write_folder(folder / family, reference(family)))
    return Tokenizer.from_gguf(sentencepiece(add_space_prefix="without" not in family))


def streamed(tokenizer: Tokenizer, pieces: list[str], chunk: int, overlap: int) -> tuple[list[int], list[int], int]:
    """Ids, sizes, and in how many parts they came."""
    parts = list(token_stream(tokenizer, pieces, chunk=chunk, overlap=overlap))
    return [t for p in parts for t in p.ids], [n for p in parts for n in p.sizes], len(parts)


def cut(text: str, random: random.Random) -> list[str]:
    """The text in pieces of any length, some of them empty."""
    places = sorted(random.choices(range(len(text) + 1), k=12))
    return [text[start:end] for start, end in zip([0, *places], [*places, len(text)], strict=True)]


@pytest.mark.parametrize("family", [*FAMILIES, *OTHERS])
def test_long_texts_without_an_easy_place_to_cut(family: str, folder: Path) -> None:
    tokenizer = tokenizer_of(family, folder)
    rng = random.Random(family)
    parts = 0
    for text in LONG:
        whole = tokenizer.encode(text, add_special=False)
        ids, sizes, count = streamed(tokenizer, cut(text, rng), 600, 200)
        assert ids == whole, text[:20]
        assert sum(sizes) == len(tokenizer.decode_bytes(whole))
        parts += count
    assert parts >= 2 * len(LONG), "most texts come in several parts"


@settings(max_examples=30, deadline=None)
@given(data=st.data(), seed=st.integers(0, 2**32))
def test_random_mixtures(folder: Path, data: st.DataObject, seed: int) -> None:
    tokenizer = tokenizer_of(data.draw(st.sampled_from([*FAMILIES, *OTHERS])), folder)
    rng = random.Random(seed)
    words = [piece for text in HARD_TEXTS for piece in (text, text.upper(), *text.split())]
    text = "".join(rng.choice([w + " ", w, w * rng.randint(1, 40)]) for w in rng.choices(words, k=rng.randint(0, 60)))
    chunk = rng.choice((40, 150, 1000))
    ids, sizes, _ = streamed(tokenizer, cut(text, rng), chunk, chunk // rng.randint(2, 8))
    whole = tokenizer.encode(text, add_special=False)
    assert ids == whole and sum(sizes) == len(tokenizer.decode_bytes(whole))


def test_sizes_are_the_bytes_of_the_text(smollm: Tokenizer) -> None:
    text = "Smørrebrød 🥪 and more of it. " * 400
    ids, sizes, parts = streamed(smollm, [text], 2000, 300)
    assert sum(sizes) == len(text.encode()) and parts > 4
    assert sizes == [len(smollm.piece(token)) for token in ids]


def test_memory_is_a_few_chunks(smollm: Tokenizer) -> None:
    """No part is larger than what a chunk becomes, and the pieces are taken as they are needed."""
    taken = 0

    def pieces():
        nonlocal taken
        for _ in range(200):
            taken += 1
            yield "The quick brown fox jumps over the lazy dog.\n" * 10

    largest = 0
    for index, part in enumerate(token_stream(smollm, pieces(), chunk=4000, overlap=500)):
        largest = max(largest, len(part.ids))
        assert index or taken < 25
    assert 0 < largest < 4000


def test_nothing_and_nonsense() -> None:
    tokenizer = Tokenizer.from_gguf(sentencepiece())
    assert streamed(tokenizer, [], 10, 2) == ([], [], 0)
    assert streamed(tokenizer, ["", ""], 10, 2)[0] == []
    with pytest.raises(ParameterError, match="chunk must be above overlap"):
        list(token_stream(tokenizer, ["a"], chunk=4, overlap=4))
