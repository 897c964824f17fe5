"""The incremental detokenizer says the same as decoding everything, and never half a character."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from text.vocabularies import HARD_TEXTS, byte_level, sentencepiece

from kvik.errors import ParameterError
from kvik.text.detokenize import Detokenizer
from kvik.text.tokenizer import Tokenizer

BYTE_LEVEL, SENTENCEPIECE = Tokenizer.from_gguf(byte_level()), Tokenizer.from_gguf(sentencepiece())
ids_of = {
    tokenizer: st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=40)
    for tokenizer in (BYTE_LEVEL, SENTENCEPIECE)
}


def byte_ids(data: bytes) -> list[int]:
    """The byte tokens of BYTE_LEVEL."""
    return [2 + value for value in data]


@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, SENTENCEPIECE], ids=["byte-level", "sentencepiece"])
@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_pieces_add_up_to_the_whole(tokenizer: Tokenizer, data: st.DataObject) -> None:
    ids = data.draw(ids_of[tokenizer])
    skip = data.draw(st.booleans())
    after = data.draw(st.one_of(st.none(), st.integers(0, tokenizer.vocab_size - 1)))
    detokenizer = Detokenizer(tokenizer, skip_special=skip, after=after)
    text, at = "", 0
    while at < len(ids):
        step = data.draw(st.integers(1, 5))
        text += detokenizer.add(ids[at : at + step])
        at += step
    text += detokenizer.finish()
    assert text == tokenizer.decode(ids, skip_special=skip, after=after)


@given(seed=st.randoms(use_true_random=False))
@settings(max_examples=20, deadline=None)
def test_random_ids_of_the_whole_vocabulary(smollm: Tokenizer, seed: Any) -> None:
    ids = [seed.randrange(smollm.vocab_size) for _ in range(500)]
    detokenizer = Detokenizer(smollm, skip_special=False)
    assert "".join(detokenizer.add((token,)) for token in ids) + detokenizer.finish() == smollm.decode(ids)


@pytest.mark.parametrize("text", HARD_TEXTS)
def test_text_comes_in_whole_characters(smollm: Tokenizer, text: str) -> None:
    detokenizer = Detokenizer(smollm)
    so_far = ""
    for token in smollm.encode(text):
        so_far += detokenizer.add([token])
        assert text.startswith(so_far)
        assert "\ufffd" not in so_far or "\ufffd" in text
    assert so_far + detokenizer.finish() == text


def test_a_character_waits_for_its_last_byte() -> None:
    detokenizer = Detokenizer(BYTE_LEVEL)
    outputs = [detokenizer.add([token]) for token in byte_ids("👍é".encode())]
    assert outputs == ["", "", "", "👍", "", "é"]
    assert detokenizer.finish() == ""


def test_invalid_bytes_become_replacement_characters_once_certain() -> None:
    detokenizer = Detokenizer(BYTE_LEVEL)
    # 0xFF begins nothing; 0xF0 0x9F could still become an emoji until 'a' comes; 0xC3 is left over.
    outputs = [detokenizer.add([token]) for token in byte_ids(b"\xff\xf0\x9fa\xc3")]
    assert outputs == ["\ufffd", "", "", "\ufffda", ""]
    assert detokenizer.finish() == "\ufffd"


def test_special_tokens_are_left_out_or_shown() -> None:
    ids = [1, *byte_ids(b"hi"), 0]
    assert Detokenizer(BYTE_LEVEL).add(ids) == "hi"
    assert Detokenizer(BYTE_LEVEL, skip_special=False).add(ids) == "<|user|>hi<|end|>"


def test_text_that_continues_a_prompt_keeps_its_space() -> None:
    word = SENTENCEPIECE.encode("w", add_special=False)
    assert Detokenizer(SENTENCEPIECE).add(word) == "w"
    assert Detokenizer(SENTENCEPIECE, after=word[-1]).add(word) == " w"
    assert Detokenizer(SENTENCEPIECE, after=1).add(word) == "w"


def test_ids_outside_the_vocabulary_are_refused() -> None:
    with pytest.raises(ParameterError, match="outside the vocabulary"):
        Detokenizer(BYTE_LEVEL).add([10**6])


def test_a_fork_goes_its_own_way() -> None:
    one = Detokenizer(BYTE_LEVEL)
    assert one.add(byte_ids("👍".encode()[:2])) == ""
    other = one.fork()
    assert one.add(byte_ids("👍".encode()[2:])) == "👍"
    assert other.add(byte_ids(b"a")) == "\ufffda" and other.finish() == one.finish() == ""
