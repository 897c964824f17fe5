"""Hub folders: the ids of `tokenizers` on the same file, and back without losing a byte."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from text.hub_folders import FAMILIES, MARKED, reference, write_folder
from text.vocabularies import HARD_TEXTS

from kvik.text.tokenizer import Tokenizer

MORE_TEXTS = [
    "e\u0301\u0323 \u212b \u1100\u1161\u11a8 \ufb01 \u0958 > \u0338<s>\u0338",
    "<s>a <s> b</s>\n\n\n  <left> <right>  x <both>\u3000\x1c word,words word_ hello world hell\xa0<both>\xa0\x85",
    " leading", "  two", "trailing ", "\n\n\n\nx", "a" * 3000, " " * 500 + "x" + "\n" * 70, "é" * 200,
    "[INST] hi [/INST] <start_of_turn>user\n<end_of_turn> <table><tool_call>x</tool_call><|im_start|><|eot_id|>",
    "".join(map(chr, range(1, 300))),
]  # fmt: skip
pieces = st.sampled_from([
    "hello", " wor", "ll", " ", "  ", "    ", "\n", "\n\n", "\t", "\r\n", "1", "23", "'s", "é", "e\u0301", "👍", "\u0301", "\xa0", "\x85",
    "\u3000", "\x1c", "<s>", "</s>", "<bos>", "<|endoftext|>", "<|im_end|>", "<|eot_id|>", "[INST]", "<tool_call>", "<left>",
    "<right>", "<both>", "word", "hell", "<0x0A>", "<unk>", "<table>", "中文", "_", "²", "the ", "again",
])  # fmt: skip
texts = st.lists(st.one_of(pieces, pieces, st.text(max_size=4)), max_size=14).map("".join)


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    folder = tmp_path_factory.mktemp("hub")
    return {family: Tokenizer.from_hub(write_folder(folder / family, reference(family))) for family in FAMILIES}


def expected_ids(family: str, text: str, parse: bool, add: bool = False) -> list[int]:
    oracle = reference(family)
    oracle.encode_special_tokens = not parse
    ids: list[int] = oracle.encode(text, add_special_tokens=add).ids
    return ids


def returned(family: str, text: str) -> str:
    """What is left of a text when it comes back."""
    normalizer = reference(family).normalizer
    if family in ("qwen2", "flagged"):
        return str(normalizer.normalize_str(text))
    if family in ("mistral", "metaspace", "gpt2_with_prefix") and text.startswith(" "):
        return text[1:]
    return text


def check(made: dict[str, Tokenizer], family: str, text: str) -> None:
    if family in MARKED:
        text = text.replace("▁", "")
    tokenizer = made[family]
    for parse in (False, True):
        for add in (False, True):
            ids = tokenizer.encode(text, add_special=add, parse_special=parse)
            assert ids == expected_ids(family, text, parse, add), (parse, add)
    ids = tokenizer.encode(text, add_special=False)
    assert not tokenizer.special_ids.intersection(ids)
    if family not in ("flagged", "gpt2_with_prefix", "metaspace"):
        assert tokenizer.decode_bytes(ids) == returned(family, text).encode()


@pytest.mark.parametrize("family", FAMILIES)
def test_hard_texts_have_the_ids_of_tokenizers(made: dict[str, Tokenizer], family: str) -> None:
    for text in (*HARD_TEXTS, *MORE_TEXTS):
        check(made, family, text)


@pytest.mark.parametrize("family", FAMILIES)
@given(text=texts)
@settings(max_examples=120, deadline=None)
def test_any_text_has_the_ids_of_tokenizers(made: dict[str, Tokenizer], family: str, text: str) -> None:
    check(made, family, text)
