"""Tokenizer: the same ids as `tokenizers`, and back without losing a byte."""

from __future__ import annotations

import itertools
import json
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from text.vocabularies import (
    CONTROL,
    HARD_TEXTS,
    NORMAL,
    USER_DEFINED,
    byte_level,
    oracle,
    plain_sentencepiece,
    sentencepiece,
)

from kvik.errors import DataError, ParameterError, StorageError
from kvik.text.bpe import BPE
from kvik.text.pretokenizers import PRE_TOKENIZERS
from kvik.text.tokenizer import Tokenizer

# SmolLM2 has no token for these bytes; see test_what_the_vocabulary_cannot_express_is_refused.
SMOLLM_LACKS = "\x04\x06\x13\x14\x16\x1d"
smollm_texts = st.text(st.characters(codec="utf-8", max_codepoint=0x3FFFF, exclude_characters=SMOLLM_LACKS))
# Text in which merges, words and special tokens happen.
pieces = st.sampled_from(
    ["hello", " wor", "ll", "  ", "\n", "1", "'s", "é", "👍", "\u0301", "<|end|>", "<|user|>", "<s>", "▁", "a"]
)
mixed = st.lists(st.one_of(pieces, st.text(max_size=4)), max_size=12).map("".join)


@pytest.mark.parametrize("text", HARD_TEXTS)
def test_hard_texts_have_the_ids_of_tokenizers(smollm: Tokenizer, smollm_reference: Any, text: str) -> None:
    assert smollm.encode(text, parse_special=True) == smollm_reference.encode(text).ids
    assert smollm.decode_bytes(smollm.encode(text)) == text.encode()


@given(text=st.one_of(smollm_texts, mixed))
@settings(max_examples=300, deadline=None)
def test_any_text_comes_back_and_has_the_ids_of_tokenizers(smollm: Tokenizer, smollm_reference: Any, text: str) -> None:
    text = "".join(char for char in text if char not in SMOLLM_LACKS and ord(char) < 0x40000)
    ids = smollm.encode(text)
    assert smollm.decode_bytes(ids) == text.encode()
    assert smollm.decode(ids) == text
    assert not smollm.special_ids.intersection(ids)
    assert smollm.encode(text, parse_special=True) == smollm_reference.encode(text).ids


@pytest.mark.parametrize("pre", sorted(PRE_TOKENIZERS))
@given(text=mixed)
@settings(max_examples=15, deadline=None)
def test_every_pre_tokenizer_keeps_every_byte(pre: str, text: str) -> None:
    tokenizer = Tokenizer.from_gguf(byte_level(pre))
    assert tokenizer.decode_bytes(tokenizer.encode(text, add_special=False)) == text.encode()


@pytest.mark.parametrize(
    ("pre", "text", "words"),
    [
        ("gpt-2", "I'll 123 go!", ["I", "'ll", " 123", " go", "!"]),
        ("smollm", "I'll 123 go!", ["I", "'ll", " ", "1", "2", "3", " go", "!"]),
        ("llama-bpe", "I'LL 12345 go!\n\n x", ["I", "'LL", " ", "123", "45", " go", "!\n\n", " x"]),
        ("qwen2", "I'LL 123 go!", ["I", "'LL", " ", "1", "2", "3", " go", "!"]),
        ("falcon", "a-b 1234", ["a", "-", "b", " ", "123", "4"]),
        ("deepseek-coder", "ab\n\n中文 1", ["ab", "\n", "\n", "中文", " ", "1"]),
        ("gpt-4o", "HelloWorld's", ["Hello", "World's"]),
        ("tekken", "HelloWorld's", ["Hello", "World", "'s"]),
    ],
)
def test_words_are_cut_as_the_models_cut_them(pre: str, text: str, words: list[str]) -> None:
    from tokenizers import Regex, pre_tokenizers

    cutter = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in PRE_TOKENIZERS[pre].patterns]
    )
    assert [word for word, _ in cutter.pre_tokenize_str(text)] == words


@given(
    words=st.lists(st.text("abc", min_size=2, max_size=5), unique=True, max_size=12),
    text=st.text("abc ", max_size=80),
)
@settings(max_examples=150, deadline=None)
def test_merging_is_that_of_tokenizers(words: list[str], text: str) -> None:
    from tokenizers import pre_tokenizers

    known, merges = set("abc"), []
    for word in words:  # a merge list like a trained one: both halves exist before they join
        for at in range(1, len(word)):
            if word[:at] in known and word[at:] in known and f"{word[:at]} {word[at:]}" not in merges:
                merges.append(f"{word[:at]} {word[at:]}")
                known.add(word)
    metadata = byte_level("gpt-2", merges=merges)
    reference = oracle(metadata, pre_tokenizers.ByteLevel(add_prefix_space=False))
    assert Tokenizer.from_gguf(metadata).encode(text) == reference.encode(text).ids


def test_a_long_word_is_merged_in_reasonable_time(smollm: Tokenizer) -> None:
    text, began = "ab" * 100_000, time.monotonic()
    assert smollm.decode(smollm.encode(text)) == text
    assert time.monotonic() - began < 20  # 0.7 s when nothing else runs; a quadratic merge takes hours


def test_ignore_merges_takes_whole_words() -> None:
    merges = ["a b", "c d"]
    extra = [("abcd", NORMAL), ("Ġx", NORMAL)]
    plain = Tokenizer.from_gguf(byte_level("gpt-2", merges=merges, extra=extra))
    whole = Tokenizer.from_gguf(byte_level("llama-bpe", merges=merges, extra=extra, bos_token_id=1))
    assert [plain.piece(token) for token in plain.encode("abcd x")] == [b"ab", b"cd", b" ", b"x"]
    assert [whole.piece(token) for token in whole.encode("abcd x", add_special=False)] == [b"abcd", b" x"]
    assert whole.encode("abcd")[0] == 1  # this family begins its prompts so


class TestSpecialTokens:
    def test_their_text_is_ordinary_unless_asked(self) -> None:
        tokenizer = Tokenizer.from_gguf(byte_level())
        assert not tokenizer.special_ids.intersection(tokenizer.encode("<|end|> hello <|user|>"))
        ids = tokenizer.encode("<|end|>hello<|user|>", parse_special=True)
        assert (ids[0], ids[-1]) == (0, 1)
        assert tokenizer.decode(ids) == "<|end|>hello<|user|>"
        assert tokenizer.decode(ids, skip_special=True) == "hello"

    def test_merges_cannot_make_one(self) -> None:
        metadata = byte_level(merges=["a b", "ab c"])
        metadata["tokenizer.ggml.token_type"][metadata["tokenizer.ggml.tokens"].index("abc")] = CONTROL
        tokenizer = Tokenizer.from_gguf(metadata)
        assert not tokenizer.special_ids.intersection(tokenizer.encode("abc"))

    def test_a_whole_word_cannot_be_one(self) -> None:
        tokenizer = Tokenizer.from_gguf(byte_level("llama-bpe", extra=[("stop", CONTROL)], add_bos_token=False))
        assert not tokenizer.special_ids.intersection(tokenizer.encode("stop"))

    def test_user_defined_tokens_are_found_first_but_markup_is_special(self) -> None:
        extra = [("    ", USER_DEFINED), ("hell", USER_DEFINED), ("<|tool|>", USER_DEFINED)]
        metadata = byte_level(merges=["h e"], extra=extra)
        spaces, hell, tool = range(len(metadata["tokenizer.ggml.tokens"]) - 3, len(metadata["tokenizer.ggml.tokens"]))
        tokenizer = Tokenizer.from_gguf(metadata)
        assert tokenizer.encode("    hell") == [spaces, hell]
        assert tool in tokenizer.special_ids
        assert spaces not in tokenizer.special_ids
        assert tool not in tokenizer.encode("<|tool|>")
        assert tokenizer.encode("<|tool|>", parse_special=True) == [tool]
        assert tokenizer.split_special("    hell<|tool|>x") == ["    hell", tool, "x"]

    def test_the_longest_of_several_counts(self) -> None:
        metadata = byte_level(merges=[], extra=[("<x>", CONTROL), ("<x><y>", CONTROL)])
        short, long = len(metadata["tokenizer.ggml.tokens"]) - 2, len(metadata["tokenizer.ggml.tokens"]) - 1
        tokenizer = Tokenizer.from_gguf(metadata)
        assert tokenizer.encode("<x><y><x>", parse_special=True) == [long, short]

    def test_whatever_ends_a_turn_is_known(self, smollm: Tokenizer) -> None:
        assert smollm.eos_ids == {0, 2}  # <|endoftext|>, <|im_end|>
        assert smollm.bos_id == 1
        assert smollm.add_bos is False
        assert smollm.special_ids == set(range(17))
        assert smollm.vocab_size == 49152
        metadata = byte_level(extra=[("<|eot_id|>", CONTROL), ("<|eom_id|>", CONTROL)], eot_token_id=1)
        count = len(metadata["tokenizer.ggml.tokens"])
        assert Tokenizer.from_gguf(metadata).eos_ids == {0, 1, count - 2, count - 1}

    def test_between_messages_of_one_turn_is_no_end(self) -> None:
        metadata = byte_level(extra=[("<|return|>", CONTROL), ("<|call|>", CONTROL)], eos_token_id=1)
        count = len(metadata["tokenizer.ggml.tokens"])
        assert Tokenizer.from_gguf(metadata).eos_ids == {1, count - 2, count - 1}  # and not <|end|>

    def test_beginning_and_end_are_added(self) -> None:
        tokenizer = Tokenizer.from_gguf(byte_level(bos_token_id=1, add_bos_token=True, add_eos_token=True))
        assert tokenizer.encode("") == [1, 0]
        assert tokenizer.encode("", add_special=False) == []


class TestSentencePiece:
    @given(text=st.one_of(mixed, st.text("helo wrdan ", max_size=30)))
    @settings(max_examples=300, deadline=None)
    def test_ids_are_those_of_the_definition(self, text: str) -> None:
        text = text.replace("▁", "")
        metadata = sentencepiece()
        tokenizer = Tokenizer.from_gguf(metadata)
        assert tokenizer.encode(text, add_special=False) == plain_sentencepiece(metadata, text)

    @given(text=mixed, parse=st.booleans(), prefix=st.booleans())
    @settings(max_examples=200, deadline=None)
    def test_any_text_comes_back(self, text: str, parse: bool, prefix: bool) -> None:
        tokenizer = Tokenizer.from_gguf(sentencepiece(add_space_prefix=prefix))
        ids = tokenizer.encode(text, add_special=False, parse_special=parse)
        assert tokenizer.decode_bytes(ids) == text.encode()

    def test_pieces_across_words_take_the_text_whole(self) -> None:
        metadata = sentencepiece([("▁", -1.0), ("a", -2.0), ("b", -3.0), ("a▁", -0.5), ("a▁b", -0.25)])
        tokenizer = Tokenizer.from_gguf(metadata)
        for text in ("a b", "a a b b", "b a b"):
            assert tokenizer.encode(text, add_special=False) == plain_sentencepiece(metadata, text)

    def test_the_space_in_front_is_added_after_special_tokens_and_taken_away_again(self) -> None:
        tokenizer = Tokenizer.from_gguf(sentencepiece())
        assert tokenizer.add_bos
        ids = tokenizer.encode("w</s>w", parse_special=True)
        assert [tokenizer.token_text(token) for token in ids] == ["<s>", " w", "</s>", " w"]
        assert tokenizer.decode(ids) == "<s>w</s>w"
        # Text that continues a prompt keeps its space.
        assert tokenizer.decode(ids[1:2], after=tokenizer.encode("hello")[-1]) == " w"
        assert tokenizer.decode(ids[1:2]) == "w"

    @pytest.mark.parametrize("marks", ["  ", "▁▁"])
    @pytest.mark.parametrize("prefix", [False, True])
    def test_what_users_defined_is_found_before_anything_is_merged(self, marks: str, prefix: bool) -> None:
        """Gemma's runs of spaces and newlines. Without prefix these are the ids that llama.cpp gives."""
        words = [("▁", -9.0), ("a", -10.0), ("b", -11.0), ("▁a", -1.0), ("ab", -3.0)]
        metadata = sentencepiece(words, add_space_prefix=prefix)
        tokens, kinds = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
        for text in (marks, "\n", "\n\n", "<b>"):
            tokens.append(text)
            kinds.append(USER_DEFINED)
            metadata["tokenizer.ggml.scores"].append(-1000.0)
        tokenizer = Tokenizer.from_gguf(metadata)
        name = tokens.index
        ids = tokenizer.encode("  a\n\n\nab<b>   a", add_special=False)
        if not prefix:
            expected = [marks, "a", "\n\n", "\n", "ab", "<b>", marks, "▁a"]
            assert ids == [name(text) for text in expected]
        assert tokenizer.special_ids == {0, 1, 2}
        for text in ("  a\n\n\nab<b>   a", "   ", "\n", " \n  \n", "a  b", "▁▁a  ▁"):
            assert tokenizer.decode(tokenizer.encode(text, add_special=False)) == text


class TestRefusals:
    @pytest.mark.parametrize("text", ["\ud800", "a\udfffb", "\ud83d"])
    def test_lone_surrogates(self, smollm: Tokenizer, text: str) -> None:
        with pytest.raises(ParameterError, match=r"lone surrogate U\+D"):
            smollm.encode(text)

    def test_what_is_no_text(self, smollm: Tokenizer) -> None:
        with pytest.raises(ParameterError, match="text must be a string, got bytes"):
            smollm.encode(b"x")  # type: ignore[arg-type]

    @pytest.mark.parametrize("token", [-1, 49152, 10**9, True, 1.0, "1", None])
    def test_ids_outside_the_vocabulary(self, smollm: Tokenizer, token: Any) -> None:
        with pytest.raises(ParameterError, match=r"outside the vocabulary \[0, 49151\]"):
            smollm.decode([1, token])

    @pytest.mark.parametrize("char", [*SMOLLM_LACKS, "\U00040000", "\U000fffff"])
    def test_what_the_vocabulary_cannot_express_is_refused(self, smollm: Tokenizer, char: str) -> None:
        try:
            ids = smollm.encode(f"a{char}b")
        except ParameterError as error:
            assert f"U+{ord(char):04X}" in str(error)  # not left out silently
        else:
            assert smollm.decode(ids) == f"a{char}b"


class TestBadMetadata:
    def change(self, metadata: dict[str, Any], **keys: Any) -> dict[str, Any]:
        return metadata | {f"tokenizer.ggml.{key}": value for key, value in keys.items()}

    @pytest.mark.parametrize(
        ("keys", "words"),
        [
            ({"model": "t5"}, "tokenizer.ggml.model is 't5'; Kvik reads 'gpt2'"),
            ({"model": None}, "tokenizer.ggml.model is None"),
            ({"pre": "nonsense"}, "tokenizer.ggml.pre is 'nonsense', unknown to Kvik; it knows a.x-4.0, bloom"),
            ({"pre": 3}, "tokenizer.ggml.pre is 3"),
            ({"tokens": []}, "tokenizer.ggml.tokens is missing or empty"),
            ({"tokens": "abc"}, "tokenizer.ggml.tokens is not a list"),
            ({"tokens": [1, 2]}, r"tokenizer.ggml.tokens\[0\] is 1, not of type str"),
            ({"tokens": ["a", "b", "a"]}, r"tokenizer.ggml.tokens\[2\] is 'a' again, as at 0"),
            ({"token_type": [1, 2]}, "token_type has 2 entries for 265 tokens"),
            ({"token_type": ["1"] * 265}, r"token_type\[0\] is '1', not of type int"),
            ({"merges": ["h e", "he"]}, r"merges\[1\] is 'he': it must be two tokens"),
            ({"merges": ["h zz"]}, r"merges\[0\] is 'h zz'"),
            ({"merges": ["x y"]}, r"merges\[0\] is 'x y'"),
            ({"merges": ["h e l"]}, r"merges\[0\] is 'h e l'"),
            ({"merges": [""]}, r"merges\[0\] is ''"),
            ({"eos_token_id": 265}, r"eos_token_id is 265, outside \[0, 264\]"),
            ({"eos_token_id": -1}, "eos_token_id is -1"),
            ({"eos_token_id": "0"}, "eos_token_id is '0'"),
            ({"add_bos_token": True}, "add_bos_token is set but there is no tokenizer.ggml.bos_token_id"),
            ({"add_bos_token": 1}, "add_bos_token is 1, not true or false"),
        ],
    )
    def test_byte_level(self, keys: dict[str, Any], words: str) -> None:
        metadata = self.change(byte_level(), **keys)
        assert len(byte_level()["tokenizer.ggml.tokens"]) == 265
        with pytest.raises(DataError, match=words) as error:
            Tokenizer.from_gguf(metadata)
        assert "\n" not in str(error.value)

    @pytest.mark.parametrize(
        ("keys", "words"),
        [
            ({"scores": [0.0]}, "scores has 1 entries for 283 tokens"),
            ({"scores": [0.0] * 259 + [float("nan")] * 24}, r"scores\[259\] is nan"),
            ({"token_type": [1] * 283}, "no byte tokens"),
            ({"token_type": [6] * 283}, r"tokens\[0\] is '<unk>' but of type byte"),
            ({"bos_token_id": None, "add_bos_token": True}, "add_bos_token is set but there is no"),
        ],
    )
    def test_sentencepiece(self, keys: dict[str, Any], words: str) -> None:
        with pytest.raises(DataError, match=words):
            Tokenizer.from_gguf(self.change(sentencepiece(), **keys))

    def test_template_of_another_type(self) -> None:
        with pytest.raises(DataError, match="chat_template is not a string"):
            Tokenizer.from_gguf(byte_level() | {"tokenizer.chat_template": 1})


class TestSaved:
    @pytest.mark.parametrize("metadata", [byte_level("llama-bpe", bos_token_id=1), sentencepiece()])
    def test_a_saved_tokenizer_is_the_same(self, tmp_path: Path, metadata: dict[str, Any]) -> None:
        first = Tokenizer.from_gguf(metadata | {"tokenizer.chat_template": "{{ 1 }}"})
        first.save(tmp_path / "deep" / "folder")
        second = Tokenizer.load(tmp_path / "deep" / "folder")
        for text, parse in itertools.product(HARD_TEXTS, (False, True)):
            assert second.encode(text, parse_special=parse) == first.encode(text, parse_special=parse)
        every = range(first.vocab_size)
        assert second.decode_bytes(every) == first.decode_bytes(every)
        for name in ("vocab_size", "bos_id", "eos_ids", "add_bos", "add_eos", "special_ids", "chat_template"):
            assert getattr(second, name) == getattr(first, name)
        second.save(tmp_path / "again")
        assert Tokenizer.load(tmp_path / "again").encode("hello") == first.encode("hello")

    @pytest.mark.parametrize("name", ["kvik_tokenizer.json", "kvik_tokenizer.bin"])
    def test_damage_is_noticed(self, tmp_path: Path, name: str) -> None:
        Tokenizer.from_gguf(byte_level()).save(tmp_path)
        whole = (tmp_path / name).read_bytes()
        for damaged in (
            b"",
            b"x",
            whole[:-1],
            whole[: len(whole) // 2],
            whole + b"\0",
            bytes([whole[0] ^ 1]) + whole[1:],
        ):
            (tmp_path / name).write_bytes(damaged)
            with pytest.raises(DataError, match="delete the folder") as error:
                Tokenizer.load(tmp_path)
            assert str(tmp_path) in str(error.value)
        (tmp_path / name).unlink()
        with pytest.raises(DataError, match=f"{name} is missing"):
            Tokenizer.load(tmp_path)

    def test_another_version_is_refused(self, tmp_path: Path) -> None:
        Tokenizer.from_gguf(byte_level()).save(tmp_path)
        kept = json.loads((tmp_path / "kvik_tokenizer.json").read_text())
        (tmp_path / "kvik_tokenizer.json").write_text(json.dumps(kept | {"format": 99}))
        with pytest.raises(DataError, match="another version"):
            Tokenizer.load(tmp_path)

    def test_a_folder_that_cannot_be_written(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(StorageError, match=r"cannot use .*file"):
            Tokenizer.from_gguf(byte_level()).save(tmp_path / "file")

    def test_cut_tables_are_refused(self) -> None:
        with pytest.raises(DataError, match="packed vocabulary"):
            BPE(b"kvikbpe1")
        with pytest.raises(DataError, match="packed vocabulary"):
            BPE(b"kvikbpe1" + b"\xff" * 48)


@pytest.mark.parametrize("name", ["padding", "unknown", "eot"])
def test_a_character_that_also_serves_as_a_special_token_can_be_typed(name: str) -> None:
    metadata = byte_level()
    token = metadata["tokenizer.ggml.tokens"].index("!")
    tokenizer = Tokenizer.from_gguf({**metadata, f"tokenizer.ggml.{name}_token_id": token})
    assert token in tokenizer.encode("hello!")
    assert tokenizer.decode(tokenizer.encode("hello!")) == "hello!"
