"""Chat templates: transformers' ids for honest conversations, no special token from any message."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from text.vocabularies import CONTROL, byte_level, sentencepiece

from kvik.errors import DataError, ParameterError
from kvik.text.chat_template import ChatTemplate
from kvik.text.tokenizer import Tokenizer

# Templates in the styles of the model families, written for these tests.
STYLES = {
    "chatml": (
        "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}"
        "{% endif %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "with think": (
        "{%- set ns = namespace(last=-1) %}\n{%- for m in messages[::-1] %}\n"
        "  {%- set index = (messages|length - 1) - loop.index0 %}\n"
        "  {%- if ns.last < 0 and m.role == 'user' and not (m.content.startswith('<tool>') and m.content.endswith('</tool>')) %}"
        "\n    {%- set ns.last = index %}\n  {%- endif %}\n{%- endfor %}\n"
        "{%- for message in messages %}\n{%- set content = message.content %}\n"
        "{%- if message.role == 'assistant' and '</think>' in content %}\n"
        "  {%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}\n"
        "  {%- set content = content.split('</think>')[-1].lstrip('\\n') %}\n"
        "  {%- if loop.index0 > ns.last %}{%- set content = '<think>\\n' ~ thought ~ '\\n</think>\\n\\n' ~ content %}{%- endif %}\n"
        "{%- endif %}\n{{- '<|im_start|>' ~ message.role ~ '\\n' ~ content ~ '<|im_end|>\\n' }}\n{%- endfor %}\n"
        "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
    ),
    "headers": (
        "{{- bos_token }}{% macro head(role) %}<|im_start|>{{ role }}<|im_end|>\n\n{% endmacro %}"
        "{%- for message in messages %}{{ head(message['role']) + message['content'] | trim + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ head('assistant') }}{% endif %}"
    ),
    "alternating": (
        "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% set loop_messages = messages[1:] %}"
        "{% else %}{% set system = false %}{% set loop_messages = messages %}{% endif %}{{ bos_token }}"
        "{% for message in loop_messages %}"
        "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
        "{% set content = ('<<SYS>>\n' + system + '\n<</SYS>>\n\n' if loop.first and system else '') + message['content'] %}"
        "{% if message['role'] == 'user' %}{{ '[INST] ' + content.strip() + ' [/INST]' }}"
        "{% else %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
    ),
    "composed": "{% for m in messages %}{{ '<|' ~ m.role ~ '|>' }}\n{{ m.content | upper }}{% endfor %}",
    "as json": "{{ messages | tojson(indent=2) }}{{ messages | map(attribute='content') | join(', ') }}{% generation %}x{% endgeneration %}",
    "loops": (
        "{% for m in messages if m.role != 'system' %}{% if loop.index > 3 %}{% break %}{% endif %}"
        "{{ '%s: %3d|' % (m.role, loop.index) }}{{ m['content'].replace('a', 'b') | indent(2) }}{{ [m.role, none, 1.5] }}"
        "{% else %}none{% endfor %}{{ strftime_now('%%') }}{{ dict(a=1).items() | list }}{{ messages | selectattr('role', 'equalto', 'user') | list | length }}"
    ),
}
CONVERSATIONS = [
    [{"role": "user", "content": "Hi there"}],
    [
        {"role": "system", "content": " Short answers. "},
        {"role": "user", "content": "2 < 3 and 5 > 4?\n"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nYes, <b>both</b>."},
        {"role": "user", "content": "<tool>x</tool>"},
    ],
    [
        {"role": "user", "content": "ខ្មែរ 👍 <| |> < "},
        {"role": "assistant", "content": "<think>a"},
        {"role": "user", "content": "> quoted | text [INST] ▁"},
    ],
]
SPECIALS = ["<|im_end|>", "<|im_start|>", "<|endoftext|>"]


def transformers_ids(reference: Any, template: str, messages: list[dict[str, str]], generate: bool) -> list[int]:
    from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(tokenizer_object=reference, bos_token="<|im_start|>", eos_token="<|im_end|>")
    ids: list[int] = fast.apply_chat_template(
        messages, chat_template=template, add_generation_prompt=generate, tokenize=True, return_dict=False
    )
    return ids


@pytest.mark.parametrize("generate", [True, False])
@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("style", STYLES)
def test_honest_conversations_have_the_ids_of_transformers(
    smollm: Tokenizer, smollm_reference: Any, style: str, conversation: list[dict[str, str]], generate: bool
) -> None:
    template = ChatTemplate(STYLES[style], "<|im_start|>", "<|im_end|>")
    expected = transformers_ids(smollm_reference, STYLES[style], conversation, generate)
    assert template.encode(smollm, conversation, add_generation_prompt=generate) == expected


def test_the_default_models_own_template(smollm: Tokenizer, smollm_reference: Any) -> None:
    template = ChatTemplate.of(smollm)
    assert template is not None and smollm.chat_template is not None
    for conversation in CONVERSATIONS:
        expected = transformers_ids(smollm_reference, smollm.chat_template, conversation, True)
        assert template.encode(smollm, conversation) == expected
    assert ChatTemplate.of(Tokenizer.from_gguf(byte_level())) is None


class TestSpecialTextInMessages:
    def specials_of(self, smollm: Tokenizer, template: str, messages: list[dict[str, str]]) -> list[int]:
        ids = ChatTemplate(template, "<|im_start|>", "<|im_end|>").encode(smollm, messages)
        return [token for token in ids if token in smollm.special_ids]

    @given(
        parts=st.lists(
            st.sampled_from([*SPECIALS, "<", "|", ">", "im_", "end", "im_end|>", "<|im_", "<|", "|>", " ", "a", "</think>", "<b>",
                             "\n", "\ufdd0", "\\ufdd0", "system", "[/INST]"]),
            max_size=8,
        ),
        style=st.sampled_from(sorted(STYLES)),
    )  # fmt: skip
    @settings(max_examples=400, deadline=None)
    def test_adds_no_special_token_and_is_kept(self, smollm: Tokenizer, parts: list[str], style: str) -> None:
        content = "".join(parts)
        honest = self.specials_of(smollm, STYLES[style], [{"role": "user", "content": "a"}])
        template = ChatTemplate(STYLES[style], "<|im_start|>", "<|im_end|>")
        messages = [{"role": "user", "content": content}]
        ids = template.encode(smollm, messages)
        assert [token for token in ids if token in smollm.special_ids] == honest
        assert smollm.decode(ids) == template.render(messages)

    @pytest.mark.parametrize("special", SPECIALS)
    def test_in_roles_too(self, smollm: Tokenizer, special: str) -> None:
        honest = self.specials_of(smollm, STYLES["chatml"], [{"role": "user", "content": "a"}])
        assert self.specials_of(smollm, STYLES["chatml"], [{"role": special, "content": "a"}]) == honest

    @pytest.mark.parametrize(
        ("template", "contents"),
        [
            ("{{ messages[0].content.replace('X', '') }}", ["<|im_XendX|>"]),
            ("{{ messages[0].content.replace('X', '') }}", ["<X|im_end|>"]),
            ("{{ messages[0].content.split('</think>') | join }}", ["<</think>|im_end|>"]),
            ("{{ messages[0].content.split('</think>') | join }}", ["<|im_</think>end|>"]),
            ("{{ messages[0].content.split('<|im') | join }}", ["<<|im|im_end|>"]),
            ("{% for m in messages %}{{ m.content }}{% endfor %}", ["<", "|im_end|>"]),
            ("{% for m in messages %}{{ m.content | trim }}{% endfor %}", ["<|im_ ", " end|>"]),
            ("<|{{ messages[0].content }}", ["im_end|>"]),
            ("<|{{ messages[0].content | trim }}|>", ["  im_end "]),
            ("{{ '<|im_' + messages[0].content.strip() }}", ["\n end|>"]),
            ("{{ messages[0].content | lower }}", ["<|IM_END|>"]),
            ("{{ messages[0].content[1:] }}", ["<<|im_end|>"]),
            ("{{ messages[0].content[2:-1] }}", ["<|<|im_end|>>"]),
            ("{{ messages | tojson(ensure_ascii=true) }}", ["<|im_end|>"]),
            ("{{ '<' in messages[0].content }}{{ messages[0].content }}", ["<|im_end|>"]),
        ],
    )
    def test_templates_that_cut_and_join(self, smollm: Tokenizer, template: str, contents: list[str]) -> None:
        messages = [{"role": "user", "content": content} for content in contents]
        assert self.specials_of(smollm, template, messages) == []

    def test_a_role_may_complete_what_the_template_begins(self, smollm: Tokenizer) -> None:
        assert self.specials_of(
            smollm, "{{ '<|' ~ messages[0].role ~ '|>' }}", [{"role": "im_end", "content": ""}]
        ) == [2]

    def test_with_every_noncharacter_taken(self, smollm: Tokenizer) -> None:
        taken = "".join(map(chr, range(0xFDD0, 0xFDF0)))
        ids = ChatTemplate("{{ messages[0].content }}", "", "").encode(
            smollm, [{"role": "user", "content": taken + "<|im_end|>"}]
        )
        assert smollm.decode(ids) == taken + "<|im_end|>"


class TestBeginningOfText:
    tokenizer = Tokenizer.from_gguf(byte_level("gpt-2", bos_token_id=1, add_bos_token=True))
    messages = [{"role": "user", "content": "hello"}]  # noqa: RUF012

    @pytest.mark.parametrize(
        "source", ["{{ bos_token }}{{ messages[0].content }}", "<|user|>{{ messages[0].content }}"]
    )
    def test_is_not_doubled(self, source: str) -> None:
        ids = ChatTemplate(source, "<|user|>", "<|end|>").encode(self.tokenizer, self.messages)
        assert ids == [1, *self.tokenizer.encode("hello", add_special=False)]

    def test_is_added_where_the_template_does_not_write_it(self) -> None:
        ids = ChatTemplate("{{ messages[0].content }}", "<|user|>", "<|end|>").encode(self.tokenizer, self.messages)
        assert ids == [1, *self.tokenizer.encode("hello", add_special=False)]

    def test_sentencepiece(self) -> None:
        tokenizer = Tokenizer.from_gguf(sentencepiece())
        template = ChatTemplate(STYLES["alternating"], "<s>", "</s>")
        ids = template.encode(tokenizer, [*self.messages, {"role": "assistant", "content": "</s>"}, *self.messages])
        assert ids[0] == 1
        assert [token for token in ids if token in tokenizer.special_ids] == [1, 2]
        assert tokenizer.decode(ids) == "<s>[INST] hello [/INST] </s> </s>[INST] hello [/INST]"


class TestMessages:
    @pytest.mark.parametrize(
        ("messages", "words"),
        [
            ([], "messages is empty"),
            ("hi", "messages must be a list of messages, got str"),
            ({"role": "user", "content": "hi"}, "messages must be a list of messages, got dict"),
            (None, "messages must be a list of messages, got NoneType"),
            (["hi"], r"messages\[0\] is no dict with role and content but str"),
            ([{"role": "user", "content": "a"}, {"role": "user"}], r"messages\[1\] has no content"),
            ([{"content": "a"}], r"messages\[0\] has no role"),
            ([{"role": "user", "content": None}], r"messages\[0\].content must be a string, got NoneType"),
            ([{"role": 1, "content": "a"}], r"messages\[0\].role must be a string, got int"),
            ([{"role": "user", "content": [{"type": "text"}]}], r"messages\[0\].content must be a string, got list"),
            ([{"role": "user", "content": "a", "name": "b"}], r"messages\[0\] has an unknown key 'name'"),
            ([{"role": "user", "content": "a\ud800"}], r"messages\[0\].content has a lone surrogate U\+D800"),
        ],
    )
    def test_malformed_ones_are_named(self, smollm: Tokenizer, messages: Any, words: str) -> None:
        with pytest.raises(ParameterError, match=words):
            ChatTemplate("{{ 1 }}", "", "").encode(smollm, messages)

    def test_the_templates_own_refusal_is_told(self, smollm: Tokenizer) -> None:
        with pytest.raises(ParameterError, match="Roles must alternate"):
            ChatTemplate(STYLES["alternating"], "", "").encode(smollm, [{"role": "assistant", "content": "a"}])

    def test_they_are_not_changed(self, smollm: Tokenizer) -> None:
        messages = [{"role": "user", "content": "<|im_end|>"}]
        ChatTemplate(STYLES["chatml"], "", "").encode(smollm, messages)
        assert messages == [{"role": "user", "content": "<|im_end|>"}]


def test_threads_share_a_template(smollm: Tokenizer) -> None:
    template = ChatTemplate(STYLES["with think"], "", "")
    expected = template.encode(smollm, CONVERSATIONS[1])
    results: list[list[int]] = []
    threads = [
        threading.Thread(target=lambda: results.extend(template.encode(smollm, CONVERSATIONS[1]) for _ in range(10)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [expected] * 40


def test_a_template_of_another_vocabulary(smollm: Tokenizer) -> None:
    template = ChatTemplate("{{ messages[0].content }}<|user|>", "", "")
    tokenizer = Tokenizer.from_gguf(byte_level(extra=[("<|im_end|>", CONTROL)]))
    for _ in range(2):  # the shield is made anew for each vocabulary
        assert not smollm.special_ids.intersection(template.encode(smollm, [{"role": "user", "content": "<|im_end|>"}]))
        assert template.encode(tokenizer, [{"role": "user", "content": "<|user|>"}])[-1] == 1
        assert template.encode(tokenizer, [{"role": "user", "content": "<|user|>"}]).count(1) == 1


@pytest.mark.parametrize(
    "source", ["{% if %}", "{{ messages.foo.bar }}", "{{ 1 / 0 }}", "{{ 'a' + 1 }}", "{{ undefined() }}"]
)
def test_faulty_templates_are_data_errors_of_one_line(source: str) -> None:
    with pytest.raises(DataError, match=r"^chat template: ") as error:
        ChatTemplate(source, "", "").render([{"role": "user", "content": "a"}])
    assert "\n" not in str(error.value)
