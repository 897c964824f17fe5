"""Hub folders: the ids of `tokenizers` on the same file, and back without losing a byte."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from text.hub_folders import FAMILIES, MARKED, reference, write_folder
from text.vocabularies import HARD_TEXTS

from kvik.errors import DataError, KvikError
from kvik.text.chat_template import ChatTemplate
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
# Whether a character newer than Python's Unicode belongs to a word, the library knows and Python does not.
assigned = st.characters(exclude_categories=("Cs", "Cn"))
texts = st.lists(st.one_of(pieces, pieces, st.text(assigned, max_size=4)), max_size=14).map("".join)


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


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_one_is_the_same(made: dict[str, Tokenizer], family: str, tmp_path: Path) -> None:
    first = made[family]
    first.save(tmp_path)
    second = Tokenizer.load(tmp_path)
    for text in (*HARD_TEXTS, *MORE_TEXTS):
        for parse in (False, True):
            ids = first.encode(text, parse_special=parse)
            assert second.encode(text, parse_special=parse) == ids
            assert second.decode_bytes(ids) == first.decode_bytes(ids)


@pytest.mark.parametrize("family", MARKED)
def test_the_mark_of_spaces_in_a_text_is_no_space(made: dict[str, Tokenizer], family: str) -> None:
    text = "a▁b ▁▁ c"
    ids = made[family].encode(text, add_special=False)
    assert made[family].decode(ids) == text
    assert ids != made[family].encode(text.replace("▁", " "), add_special=False)


def test_literals_with_marks_of_spaces_stand_for_spaces(made: dict[str, Tokenizer]) -> None:
    token = reference("gemma").token_to_id("▁" * 8)
    assert made["gemma"].piece(token) == b" " * 8
    assert token not in made["gemma"].encode("▁" * 8)


def test_parts_of_a_document_get_no_space_of_their_own(made: dict[str, Tokenizer]) -> None:
    tokenizer = made["mistral"]  # a space in front of the document only
    whole = tokenizer.encode("<s>hello[INST]hello", add_special=False, parse_special=True)
    parts = tokenizer.split_special("<s>hello[INST]hello")
    assert [part for part in parts if isinstance(part, str)] == ["hello", "hello"]
    joined: list[int] = []
    for index, part in enumerate(parts):
        joined += [part] if isinstance(part, int) else tokenizer.encode(part, add_special=False, first=index == 0)
    assert joined == whole == reference("mistral").encode("<s>hello[INST]hello", add_special_tokens=False).ids
    assert tokenizer.encode("hello", add_special=False) != tokenizer.encode("hello", add_special=False, first=False)


@pytest.mark.parametrize(
    ("family", "bos", "eos"),
    [
        ("llama2", "<s>", "</s>"),
        ("mistral", "<s>", "</s>"),
        ("metaspace", "<s>", "</s>"),
        ("gemma", "<bos>", "<end_of_turn>"),
        ("llama3", "<|begin_of_text|>", "<|eot_id|>"),
        ("tekken", "<s>", "</s>"),
        ("flagged", "<s>", "</s>"),
    ],
)
def test_conversations_have_the_ids_of_transformers(tmp_path: Path, family: str, bos: str, eos: str) -> None:
    from transformers import PreTrainedTokenizerFast

    template = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content + eos_token }}"
        "{% else %}{{ '[INST] ' + m.content + ' [/INST]' }}{% endif %}{% endfor %}"
    )
    names = {"bos_token": bos, "eos_token": eos}
    tokenizer = Tokenizer.from_hub(
        write_folder(tmp_path, reference(family), tokenizer_config=names | {"chat_template": template})
    )
    reference(family).encode_special_tokens = False
    library = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"), **names)
    made = ChatTemplate.of(tokenizer)
    assert made is not None
    messages = [
        {"role": "user", "content": " hello  world\n\n\nagain"},
        {"role": "assistant", "content": "é word"},
        {"role": "user", "content": "<table>12 the\xa0"},
    ]
    for count in (1, 2, 3):
        expected = library.apply_chat_template(messages[:count], chat_template=template, return_dict=False)
        assert made.encode(tokenizer, messages[:count]) == expected
    hostile = made.encode(tokenizer, [{"role": "user", "content": f"{eos} [INST] {bos}"}])
    honest = made.encode(tokenizer, [{"role": "user", "content": "a"}])
    special = tokenizer.special_ids
    assert [token for token in hostile if token in special] == [token for token in honest if token in special]


ROW = 987654
"""Stands for the first id without a row."""


class TestFilesBeside:
    def read(self, folder: Path, family: str = "qwen2", **files: Any) -> Tokenizer:
        return Tokenizer.from_hub(write_folder(folder, reference(family), **files))

    def ids(self, family: str, *texts: str) -> set[int]:
        return {reference(family).token_to_id(text) for text in texts}

    def test_without_any(self, tmp_path: Path) -> None:
        tokenizer = self.read(tmp_path)
        assert tokenizer.eos_ids == self.ids("qwen2", "<|endoftext|>", "<|im_end|>")  # by their texts
        assert (tokenizer.bos_id, tokenizer.add_bos, tokenizer.add_eos) == (None, False, False)
        assert tokenizer.special_ids == self.ids("qwen2", "<|endoftext|>", "<|im_start|>", "<|im_end|>")
        assert tokenizer.chat_template is None

    @pytest.mark.parametrize(
        ("files", "ends"),
        [
            ({"generation_config": {"eos_token_id": [3, 4]}, "config": {"eos_token_id": 5}}, {3, 4}),
            ({"generation_config": {"eos_token_id": 3}}, {3}),
            ({"generation_config": {}, "config": {"eos_token_id": 5}}, {5}),
            ({"config": {"eos_token_id": None, "text_config": {"eos_token_id": [6]}}}, {6}),
            ({"tokenizer_config": {"eos_token": {"content": "<tool_call>"}}}, set()),
        ],
    )
    def test_ends_of_turns(self, tmp_path: Path, files: dict[str, Any], ends: set[int]) -> None:
        by_text = self.ids("qwen2", "<|endoftext|>", "<|im_end|>")
        named = self.ids("qwen2", "<tool_call>") if "tokenizer_config" in files else set()
        tokenizer = self.read(tmp_path, **files)
        assert tokenizer.eos_ids == ends | by_text | named
        assert named <= tokenizer.special_ids

    def test_an_ordinary_token_that_ends_a_turn_is_still_written(self, tmp_path: Path) -> None:
        token = reference("qwen2").token_to_id("a")
        tokenizer = self.read(tmp_path, config={"eos_token_id": token})
        assert token in tokenizer.eos_ids
        assert tokenizer.encode("a") == [token]

    @pytest.mark.parametrize(
        ("family", "config", "expected"),
        [
            ("llama3", {}, (True, False)),  # as the post-processor says
            ("llama3", {"add_bos_token": False}, (False, False)),
            ("gpt2", {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}, (False, False)),
            ("gpt2", {"bos_token": "<|endoftext|>", "add_bos_token": True}, (True, False)),
            ("llama2", {"eos_token": "</s>", "add_eos_token": True, "add_bos_token": None}, (True, True)),
        ],
    )
    def test_what_is_put_around(
        self, tmp_path: Path, family: str, config: dict[str, Any], expected: tuple[bool, bool]
    ) -> None:
        tokenizer = self.read(tmp_path, family, tokenizer_config=config)
        assert (tokenizer.add_bos, tokenizer.add_eos) == expected
        ids, plain = tokenizer.encode("hello"), tokenizer.encode("hello", add_special=False)
        end = [reference(family).token_to_id("</s>")] if expected[1] else []
        assert ids == [tokenizer.bos_id] * expected[0] + plain + end

    def test_both_ends_by_the_post_processor(self, tmp_path: Path) -> None:
        from tokenizers import Tokenizer as Library
        from tokenizers import processors

        both = Library.from_str(reference("llama2").to_str())
        both.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
        )
        tokenizer = Tokenizer.from_hub(write_folder(tmp_path, both))
        assert (
            tokenizer.encode("hello")
            == both.encode("hello").ids
            == [1, *tokenizer.encode("hello", add_special=False), 2]
        )

    def test_chat_templates(self, tmp_path: Path) -> None:
        def template(**files: Any) -> tuple[str | None, str | None]:
            tokenizer = self.read(tmp_path, **files)
            return tokenizer.chat_template, tokenizer.tool_template

        assert template(tokenizer_config={"chat_template": "{{ 1 }}"}) == ("{{ 1 }}", None)
        several = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
        assert template(tokenizer_config={"chat_template": several}) == ("d", "t")
        (tmp_path / "chat_template.jinja").write_text("from the file")
        assert template(tokenizer_config={"chat_template": several}) == ("from the file", None)

    def test_the_texts_a_template_gets(self, tmp_path: Path) -> None:
        names = {
            "bos_token": "<s>",
            "eos_token": {"content": "</s>"},
            "chat_template": "{{ bos_token }}|{{ eos_token }}",
        }
        for family in ("llama2", "llama2_normalized", "mistral", "metaspace"):
            template = ChatTemplate.of(self.read(tmp_path / family, family, tokenizer_config=names))
            assert template is not None
            assert template.render([{"role": "user", "content": "a"}]) == "<s>|</s>"

    def test_tokens_without_a_row_are_left_out(self, tmp_path: Path) -> None:
        rows = reference("gemma").token_to_id("<table>")  # the last of the added ones
        tokenizer = self.read(tmp_path, "gemma", config={"text_config": {"vocab_size": rows}})
        assert tokenizer.vocab_size == rows
        assert tokenizer.decode(tokenizer.encode("<table>", add_special=False)) == "<table>"

    @pytest.mark.parametrize(
        ("files", "user"),
        [
            ({"tokenizer_config": {"pad_token": "<table>"}}, "tokenizer_config.json: pad_token"),
            ({"generation_config": {"eos_token_id": [ROW]}}, r"generation_config.json: eos_token_id"),
            ({"config": {"pad_token_id": ROW}}, "config.json: pad_token_id"),
            ({"tokenizer_config": {"chat_template": "<bos>{{ x }}<table>"}}, "the chat template"),
        ],
    )
    def test_tokens_without_a_row_that_are_used_are_refused(
        self, tmp_path: Path, files: dict[str, Any], user: str
    ) -> None:
        rows = reference("gemma").token_to_id("<table>")
        known = json.loads(json.dumps(files).replace(str(ROW), str(rows)))
        known["config"] = {"vocab_size": rows} | known.get("config", {})
        with pytest.raises(
            DataError,
            match=rf"tokenizer\.json: added_tokens\[\d+\] is '<table>' with id {rows}, .* is {rows} and {user}",
        ):
            self.read(tmp_path, "gemma", **known)

    def test_ids_without_a_token(self, tmp_path: Path) -> None:
        whole = json.loads(reference("qwen2").to_str())
        size = len(whole["model"]["vocab"])
        for entry in whole["added_tokens"]:
            entry["id"] += 1000
        tokenizer = Tokenizer.from_hub(write_folder(tmp_path, whole))
        assert tokenizer.vocab_size == max(entry["id"] for entry in whole["added_tokens"]) + 1
        assert tokenizer.decode_bytes([size, size + 1]) == b""
        assert tokenizer.encode("<|im_end|>", parse_special=True) == [whole["added_tokens"][2]["id"]]


def changed(family: str, place: str, value: Any) -> dict[str, Any]:
    """A family's tokenizer.json with another value at a place such as `model.merges.3`; `...` deletes."""
    whole = json.loads(reference(family).to_str())
    *way, last = place.split(".")
    at = whole
    for key in way:
        at = at[int(key)] if isinstance(at, list) else at[key]
    if value is ...:
        del at[last]
    elif isinstance(at, list):
        at[int(last)] = value
    else:
        at[last] = value
    return cast(dict[str, Any], whole)


class TestRefusals:
    @pytest.mark.parametrize(
        ("family", "place", "value", "words"),
        [
            ("llama3", "model", [], r"model is \[\]: not an object"),
            ("llama3", "model.type", "Unigram", r"model.type is 'Unigram': Kvik reads BPE"),
            ("llama3", "model.type", "WordPiece", r"model.type is 'WordPiece'"),
            ("llama3", "model.dropout", 0.1, r"model.dropout is 0.1"),
            ("llama3", "model.continuing_subword_prefix", "##", r"model.continuing_subword_prefix is '##'"),
            ("llama3", "model.end_of_word_suffix", "</w>", r"model.end_of_word_suffix is '</w>'"),
            ("llama3", "model.byte_fallback", 1, r"model.byte_fallback is 1: not true or false"),
            ("llama3", "model.vocab", {}, r"model.vocab has 0 tokens"),
            ("llama3", "model.vocab", [["a", 0.0]], r"model.vocab is .*: not an object"),
            ("llama3", "model.vocab.the", 5, r"model.vocab\['the'\] is 5, as is "),
            ("llama3", "model.vocab.the", -1, r"model.vocab\['the'\] is -1: not an integer from 0"),
            ("llama3", "model.vocab.the", 1 << 31, r"model.vocab\['the'\] is 2147483648: not an integer from 0"),
            ("llama3", "model.vocab.the", "1", r"model.vocab\['the'\] is '1'"),
            ("llama3", "model.vocab.the", True, r"model.vocab\['the'\] is True"),
            ("llama3", "model.merges", 3, r"model.merges is 3: not a list"),
            ("llama3", "model.merges.17", ["a"], r"model.merges\[17\] is \['a'\]: it must be two tokens"),
            ("llama3", "model.merges.17", ["a", 1], r"model.merges\[17\] is "),
            ("llama3", "model.merges.17", "a b c", r"model.merges\[17\] is 'a b c'"),
            ("llama3", "model.merges.17", "ab", r"model.merges\[17\] is 'ab'"),
            ("llama3", "model.merges.17", ["nowhere", "a"], r"model.merges\[17\] is \['nowhere', 'a'\]: it must be two"),
            ("llama3", "added_tokens", {}, r"added_tokens is \{\}: not a list"),
            ("llama3", "added_tokens.1.id", 0, r"added_tokens\[1\].id is 0: the id of '<\|begin_of_text\|>'"),
            ("llama3", "added_tokens.1.id", 9999, r"added_tokens\[1\].content is '<\|end_of_text\|>': there already"),
            ("llama3", "added_tokens.1.content", "", r"added_tokens\[1\].content is '': expected 1 to 1024"),
            ("llama3", "added_tokens.1.content", None, r"added_tokens\[1\].content is None: not a string"),
            ("llama3", "added_tokens.1.content", "x" * 1025, r"added_tokens\[1\].content is 'xxx"),
            ("llama3", "added_tokens.1.lstrip", 1, r"added_tokens\[1\].lstrip is 1: not true or false"),
            ("llama3", "normalizer", {"type": "Precompiled"}, r"normalizer.type is 'Precompiled': a normalizer Kvik"),
            ("llama3", "normalizer", {"type": "Prepend", "prepend": "▁"}, r'normalizer is .*: puts "▁" in front'),
            ("gpt2", "normalizer", {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
             r"pre_tokenizer.type is 'ByteLevel': a vocabulary has either"),
            ("llama3", "normalizer", {"type": "Replace", "pattern": {"Regex": "("}, "content": "x"},
             r"normalizer.pattern.Regex is '\(': has a parenthesis too few"),
            ("llama3", "normalizer", {"type": "Replace", "pattern": {"Regex": "a", "String": "a"}, "content": "x"},
             r"normalizer.pattern is .*: expected String or Regex"),
            ("llama3", "normalizer", {"type": "Replace", "pattern": {"String": "a"}, "content": "x" * 99},
             r"normalizer.content is .*: more than 64"),
            ("llama2", "normalizer", {"type": "Sequence", "normalizers": [
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}, {"type": "NFKC"}]},
             r'normalizer.normalizers\[1\].type is \'NFKC\': a step after "▁"'),
            ("llama2", "normalizer.normalizers.0.prepend", "x", r"normalizers\[0\].prepend is 'x'"),
            ("llama2", "normalizer", None, r"pre_tokenizer is None: neither ByteLevel nor"),
            ("llama2", "pre_tokenizer", {"type": "Digits", "individual_digits": True}, r"pre_tokenizer.type is 'Digits'"),
            ("llama3", "pre_tokenizer", {"type": "Whitespace"}, r"pre_tokenizer.type is 'Whitespace': drops whitespace"),
            ("llama3", "pre_tokenizer", {"type": "Fancy"}, r"pre_tokenizer.type is 'Fancy': a pre-tokenizer Kvik does not"),
            ("llama3", "pre_tokenizer", {"kind": 1}, r"pre_tokenizer.type is None: not a string"),
            ("llama3", "pre_tokenizer.pretokenizers.0.pattern.Regex", "(a+)+$", r"Regex is '\(a\+\)\+\$': repeats"),
            ("llama3", "pre_tokenizer.pretokenizers.0.behavior", "Removed", r"behavior is 'Removed': removes text"),
            ("llama3", "pre_tokenizer.pretokenizers.0.behavior", "Sideways", r"behavior is 'Sideways': expected Isolated"),
            ("llama3", "pre_tokenizer.pretokenizers.0", {"type": "ByteLevel", "add_prefix_space": False},
             r"pretokenizers\[1\].type is 'ByteLevel': a step after ByteLevel"),
            ("llama3", "pre_tokenizer.pretokenizers.1.add_prefix_space", True, r"add_prefix_space is True: set after"),
            ("mistral", "pre_tokenizer.replacement", "_", r"pre_tokenizer.replacement is '_'"),
            ("mistral", "pre_tokenizer.prepend_scheme", "last", r"prepend_scheme is 'last': expected always"),
            ("mistral", "pre_tokenizer.add_prefix_space", False, r"prepend_scheme is 'first': contradicts"),
            ("llama3", "decoder", {"type": "WordPiece"}, r"decoder.type is 'WordPiece': does not belong"),
            ("llama3", "post_processor", {"type": "BertProcessing"}, r"post_processor.type is 'BertProcessing': a post-"),
            ("llama2", "post_processor.single", [], r"post_processor.single is \[\]: Kvik knows the text once"),
            ("llama2", "post_processor.special_tokens", {}, r"special_tokens.<s> is None: not an object"),
            ("llama2", "post_processor.special_tokens.<s>.ids", [99999], r"ids\[0\] is 99999: not an integer from 0 to"),
        ],
    )  # fmt: skip
    def test_of_tokenizer_json(self, tmp_path: Path, family: str, place: str, value: Any, words: str) -> None:
        write_folder(tmp_path, changed(family, place, value))
        with pytest.raises(DataError, match=words) as error:
            Tokenizer.from_hub(tmp_path)
        assert str(error.value).startswith(str(tmp_path / "tokenizer.json"))
        assert "\n" not in str(error.value)
        assert len(str(error.value)) < 600

    @pytest.mark.parametrize(
        ("files", "words"),
        [
            ({"tokenizer_config": {"add_bos_token": True}}, r"tokenizer_config.json: add_bos_token is set but there is no"),
            ({"tokenizer_config": {"add_bos_token": 1}}, r"tokenizer_config.json: add_bos_token is 1: not true or false"),
            ({"tokenizer_config": {"eos_token": 7}}, r"tokenizer_config.json: eos_token is 7: not a string"),
            ({"tokenizer_config": {"eos_token": "<nowhere>"}},
             r"tokenizer_config.json: eos_token is '<nowhere>', which is no token of tokenizer.json"),
            ({"tokenizer_config": {"bos_token": {"content": "<nowhere>"}}}, r"bos_token is '<nowhere>', which is no"),
            ({"tokenizer_config": {"chat_template": 7}}, r"tokenizer_config.json: chat_template is 7: not a string"),
            ({"tokenizer_config": {"chat_template": [{"name": "x", "template": "y"}]}}, r"no template is named default"),
            ({"tokenizer_config": {"chat_template": "\ud800"}}, r"chat_template is .*: no valid Unicode"),
            ({"generation_config": {"eos_token_id": [1, 99999]}},
             r"generation_config.json: eos_token_id\[1\] is 99999: not an integer from 0 to"),
            ({"config": {"eos_token_id": "x"}}, r"config.json: eos_token_id is 'x'"),
            ({"config": {"text_config": {"eos_token_id": -1}}}, r"config.json: text_config.eos_token_id is -1"),
            ({"config": {"vocab_size": -1}}, r"config.json: vocab_size is -1"),
            ({"config": []}, r"config.json: the top is \[\]: not an object"),
        ],
    )  # fmt: skip
    def test_of_the_files_beside(self, tmp_path: Path, files: dict[str, Any], words: str) -> None:
        with pytest.raises(DataError, match=words):
            Tokenizer.from_hub(write_folder(tmp_path, reference("qwen2"), **files))

    def test_a_contradiction_between_two_files(self, tmp_path: Path) -> None:
        write_folder(tmp_path, reference("llama2"), tokenizer_config={"bos_token": "</s>"})
        with pytest.raises(DataError, match="bos_token is '</s>', but post_processor puts token 1 there"):
            Tokenizer.from_hub(tmp_path)

    @pytest.mark.parametrize(
        ("content", "words"),
        [
            (b"", "is not JSON"),
            (b"{", "is not JSON"),
            (b"\xff{}", r"is not UTF-8: .* \(at byte 0\)"),
            (b"\xef\xbb\xbf{}", r"begins with a byte order mark.* \(at byte 0\)"),
            (b"[" * 100_000, "nests too deeply"),
            (b'{"model": {"vocab": {"a": 0, "a": 1}}}', "is not JSON: the key 'a' stands twice in one object"),
            (b'{"model": 1' + b"0" * 5000 + b"}", "a number in it has over 4300 digits"),
        ],
    )
    def test_of_what_is_no_json(self, tmp_path: Path, content: bytes, words: str) -> None:
        (tmp_path / "tokenizer.json").write_bytes(content)
        with pytest.raises(DataError, match=words) as error:
            Tokenizer.from_hub(tmp_path)
        assert "tokenizer.json" in str(error.value)

    def test_of_what_is_no_file(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"tokenizer.json is missing$"):
            Tokenizer.from_hub(tmp_path)
        (tmp_path / "tokenizer.model").write_bytes(b"")
        with pytest.raises(DataError, match=r"tokenizer.model alone is not read"):
            Tokenizer.from_hub(tmp_path)
        os.mkfifo(tmp_path / "tokenizer.json")
        with pytest.raises(DataError, match="is a FIFO, not a file"):
            Tokenizer.from_hub(tmp_path)

    def test_of_what_is_too_large(self, tmp_path: Path) -> None:
        with (tmp_path / "tokenizer.json").open("wb") as file:
            file.truncate(1 << 40)
        with pytest.raises(DataError, match="has 1099511627776 bytes; at most 268435456 are read"):
            Tokenizer.from_hub(tmp_path)

    @given(data=st.data())
    @settings(max_examples=150, deadline=None)
    def test_of_anything_else_are_data_errors(
        self, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
    ) -> None:
        whole = json.loads(reference(data.draw(st.sampled_from(["llama3", "llama2", "mistral"]))).to_str())
        places: list[tuple[Any, Any]] = []

        def walk(at: Any) -> None:
            entries = at.items() if isinstance(at, dict) else enumerate(at) if isinstance(at, list) else ()
            for key, value in entries:
                if len(at) < 50 or key in ("the", 17):
                    places.append((at, key))
                    walk(value)

        walk(whole)
        values = st.sampled_from([None, True, 0, -1, 3, 1.5, "", "x", "▁", [], [None], {}, {"type": "Sequence"}, {"type": "ByteLevel"},
                                  {"type": "NFC"}, {"String": " "}, {"Regex": "a|"}, 2**70, "\ud800"])  # fmt: skip
        for _ in range(data.draw(st.integers(1, 3))):
            at, key = data.draw(st.sampled_from(places))
            at[key] = data.draw(values)
        folder = tmp_path_factory.mktemp("fuzzed")
        (folder / "tokenizer.json").write_text(json.dumps(whole))
        try:
            tokenizer = Tokenizer.from_hub(folder)
            tokenizer.decode(tokenizer.encode("hello \n world 12", parse_special=True))
        except KvikError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize("name", ["pad_token", "sep_token", "unk_token"])
def test_a_character_that_also_serves_as_a_special_token_can_be_typed(tmp_path: Path, name: str) -> None:
    folder = write_folder(tmp_path / "m", reference("gpt2"), tokenizer_config={name: "!"})
    tokenizer = Tokenizer.from_hub(folder)
    assert tokenizer.encode("hello!", add_special=False) == reference("gpt2").encode("hello!").ids
    assert tokenizer.decode(tokenizer.encode("hello!", add_special=False)) == "hello!"
