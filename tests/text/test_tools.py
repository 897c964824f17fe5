"""Chat templates of the families with tools, system messages and refused roles: transformers' ids, and no special token
from any tool."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from text.test_chat_template import CONVERSATIONS, SPECIALS

from kvik.errors import DataError, ParameterError
from kvik.text.chat_template import ChatTemplate
from kvik.text.tokenizer import Tokenizer

# Templates with the features of the families' own, written for these tests.
STYLES = {
    "qwen": (
        "{%- if tools %}\n{{- '<|im_start|>system\\n' }}\n"
        "{%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}\n"
        "{{- 'Functions you may call:\\n<tools>' }}\n"
        "{%- for tool in tools %}{{- '\\n' }}{{- tool | tojson }}{%- endfor %}\n"
        "{{- '\\n</tools><|im_end|>\\n' }}\n{%- endif %}\n"
        "{%- for message in messages %}\n"
        "{%- if message.role == 'tool' %}\n"
        "{{- '<|im_start|>user' if loop.first or loop.previtem.role != 'tool' }}{{- '\\n<tool_response>\\n' ~ message.content ~ '\\n</tool_response>' }}\n"
        "{{- '<|im_end|>\\n' if loop.last or loop.nextitem.role != 'tool' }}\n"
        "{%- elif message.role == 'assistant' and message.tool_calls %}\n"
        "{{- '<|im_start|>assistant' }}{%- if message.content %}{{- '\\n' + message.content }}{%- endif %}\n"
        "{%- for call in message.tool_calls %}{%- if call.function is defined %}{%- set call = call.function %}{%- endif %}\n"
        "{{- '\\n<tool_call>\\n{\"name\": \"' + call.name + '\", \"arguments\": ' }}"
        "{{- call.arguments if call.arguments is string else call.arguments | tojson }}{{- '}\\n</tool_call>' }}{%- endfor %}\n"
        "{{- '<|im_end|>\\n' }}\n"
        "{%- else %}{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}{%- endif %}\n{%- endfor %}\n"
        "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
    ),
    "mistral": (
        "{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content'] %}{%- set rest = messages[1:] %}"
        "{%- else %}{%- set rest = messages %}{%- endif %}"
        "{%- if not tools is defined %}{%- set tools = none %}{%- endif %}"
        "{%- set asked = rest | selectattr('role', 'equalto', 'user') | list %}{%- set ns = namespace(index=0) %}"
        "{%- for m in rest if m.role != 'tool' and not m.tool_calls is defined %}"
        "{%- if (m['role'] == 'user') != (ns.index % 2 == 0) %}{{- raise_exception('user and assistant take turns') }}{%- endif %}"
        "{%- set ns.index = ns.index + 1 %}{%- endfor %}{{- bos_token }}"
        "{%- for m in rest %}{%- if m['role'] == 'user' %}"
        "{%- if tools is not none and m == asked[-1] %}{{- '[TOOLS][' }}{%- for tool in tools %}"
        "{%- for key, value in tool.function.items() if key != 'return' %}"
        "{{- '\"' + key + '\": ' + (value if value is string else value | tojson) }}{{- ', ' if not loop.last }}{%- endfor %}"
        "{{- ', ' if not loop.last }}{%- endfor %}{{- ']' }}{%- endif %}"
        "{{- '[INST]' + (system + '\\n\\n' if loop.last and system is defined else '') + m['content'] + '[/INST]' }}"
        "{%- elif m.tool_calls is defined and m.tool_calls is not none %}{{- '[CALLS][' }}{%- for call in m.tool_calls %}"
        "{%- set out = call.function | tojson %}{{- out[:-1] }}"
        "{%- if not call.id is defined or call.id | length != 9 %}{{- raise_exception('ids of calls have 9 characters') }}{%- endif %}"
        "{{- ', \"id\": \"' + call.id + '\"}' }}{{- ', ' if not loop.last else ']' + eos_token }}{%- endfor %}"
        "{%- elif m['role'] == 'assistant' %}{{- m['content'] | trim + eos_token }}"
        "{%- elif m['role'] == 'tool' %}{{- '[RESULTS]{\"content\": ' + m.content | string + ', \"id\": \"' + m.tool_call_id + '\"}' }}"
        "{%- else %}{{- raise_exception('a role of ' + m['role']) }}{%- endif %}{%- endfor %}"
    ),
    "llama": (
        "{{- bos_token }}{%- if not date_string is defined %}{%- set date_string = strftime_now('%d %b %Y') %}{%- endif %}"
        "{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content'] | trim %}{%- set messages = messages[1:] %}"
        "{%- else %}{%- set system = '' %}{%- endif %}"
        "{{- '<|im_start|>system<|im_end|>\\n\\n' }}{%- if tools is not none %}{{- 'Environment: ipython\\n' }}{%- endif %}"
        "{{- 'Today: ' + date_string + '\\n\\n' }}"
        "{%- if tools %}{%- for t in tools %}{{- t | tojson(indent=4) }}{{- '\\n\\n' }}{%- endfor %}{%- endif %}{{- system }}{{- eos_token }}"
        "{%- for m in messages %}{%- if 'tool_calls' in m %}"
        "{%- if not m.tool_calls | length == 1 %}{{- raise_exception('one call at a time') }}{%- endif %}"
        "{%- set call = m.tool_calls[0].function %}{{- '{\"name\": \"' + call.name + '\", \"parameters\": ' }}{{- call.arguments | tojson }}{{- '}' }}"
        "{%- elif m.role == 'tool' or m.role == 'ipython' %}"
        "{%- if m.content is mapping or m.content is not string and m.content is iterable %}{{- m.content | tojson }}{%- else %}{{- m.content }}{%- endif %}"
        "{%- else %}{{- '<|im_start|>' + m['role'] + '<|im_end|>\\n\\n' + m['content'] | trim }}{%- endif %}{{- eos_token }}{%- endfor %}"
    ),
    "gemma": (
        "{{ bos_token }}{%- if messages[0]['role'] == 'system' -%}{%- set before = messages[0]['content'] + '\\n\\n' -%}"
        "{%- set rest = messages[1:] -%}{%- else -%}{%- set before = '' -%}{%- set rest = messages -%}{%- endif -%}"
        "{%- for m in rest -%}{%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) -%}{{ raise_exception('turns must alternate') }}{%- endif -%}"
        "{%- if m['role'] == 'assistant' -%}{%- set role = 'model' -%}{%- else -%}{%- set role = m['role'] -%}{%- endif -%}"
        "{{ '<|im_start|>' + role + '\\n' + (before if loop.first else '') }}"
        "{%- if m['content'] is string -%}{{ m['content'] | trim }}{%- elif m['content'] is iterable -%}"
        "{%- for item in m['content'] -%}{{ item['text'] | trim }}{%- endfor -%}{%- endif -%}{{ '<|im_end|>\\n' }}"
        "{%- endfor -%}{%- if add_generation_prompt -%}{{ '<|im_start|>model\\n' }}{%- endif -%}"
    ),
    "typed": (
        "{%- macro kind(spec) -%}{%- if spec.type == 'array' -%}list[{{ kind(spec['items']) }}]{%- elif spec.enum is defined -%}"
        "{{ spec.enum | map('tojson') | join(' | ') }}{%- else -%}{{ {'string': 'str', 'integer': 'int'}.get(spec.type, 'Any') }}{%- endif -%}{%- endmacro -%}"
        "{%- for tool in tools or [] -%}{%- set f = tool['function'] -%}def {{ f['name'] }}("
        "{%- for name, spec in f.parameters.properties | dictsort -%}{{ name }}: {{ kind(spec) }}{{ ' = ' ~ spec.default if spec.default is defined }}"
        "{{ ', ' if not loop.last }}{%- endfor %}): {{ f.description | default('', true) }}\n{% endfor -%}"
        "{%- for m in messages %}{% generation %}{{ m.role ~ ': ' ~ (m.content or '') ~ '\\n' }}{% endgeneration %}"
        "{%- for call in m.tool_calls or [] %}{{ call }}{% endfor %}{% endfor %}"
    ),
}  # fmt: skip
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "weather", "description": 'The "weather" <b>now</b> & later: é', "parameters": {
        "type": "object", "required": ["city"], "properties": {
            "unit": {"type": "string", "enum": ["C", "F"]}, "city": {"type": "string", "description": "Where"},
            "days": {"type": "integer", "default": 3}, "also": {"type": "array", "items": {"type": "string"}},
        },
    }}},
    {"type": "function", "function": {"name": "now", "description": "", "parameters": {"type": "object", "properties": {}},
                                      "return": {"type": "string"}}},
]  # fmt: skip


def calling(*arguments: Any, content: str | None = "") -> dict[str, Any]:
    calls = [
        {"id": f"call{index:05}", "type": "function", "function": {"name": "weather", "arguments": value}}
        for index, value in enumerate(arguments)
    ]
    return {"role": "assistant", "content": content, "tool_calls": calls}


ANSWER = {"role": "tool", "content": '{"t": 42.5}', "tool_call_id": "call00000", "name": "weather"}
ASK = {"role": "user", "content": "Will it rain in Århus?"}
CALLS: list[list[dict[str, Any]]] = [
    [ASK, calling({"city": "Århus", "days": 3, "x": [1.5, None, True, {"a": []}]}), ANSWER],
    [{"role": "system", "content": "Be brief."}, ASK, calling('{"city": "Å"}', content=None), ANSWER,
     {"role": "assistant", "content": "No."}, ASK],
    [ASK, calling({"city": "A"}, {"city": "B"}), ANSWER, ANSWER],
]  # fmt: skip


@lru_cache(maxsize=1)
def fast_tokenizer(reference: Any) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=reference, bos_token="<|im_start|>", eos_token="<|im_end|>")


def transformers_ids(reference: Any, template: str, messages: Any, tools: Any, generate: bool) -> list[int] | None:
    """None where the template refuses."""
    from jinja2.exceptions import TemplateError

    try:
        ids: list[int] = fast_tokenizer(reference).apply_chat_template(
            messages, tools=tools, chat_template=template, add_generation_prompt=generate, return_dict=False
        )
    except TemplateError:
        return None
    return ids


@pytest.mark.parametrize("tools", [None, [], TOOLS], ids=["without", "none", "two"])
@pytest.mark.parametrize("style", STYLES)
def test_conversations_have_the_ids_of_transformers(
    smollm: Tokenizer, smollm_reference: Any, style: str, tools: list[dict[str, Any]] | None
) -> None:
    template = ChatTemplate(STYLES[style], "<|im_start|>", "<|im_end|>")
    written = 0
    for messages in (*CONVERSATIONS, *CALLS):
        for generate in (True, False):
            expected = transformers_ids(smollm_reference, STYLES[style], messages, tools, generate)
            if expected is None:
                with pytest.raises(ParameterError, match="the chat template refuses messages"):
                    template.encode(smollm, messages, tools=tools, add_generation_prompt=generate)
            else:
                written += 1
                assert template.encode(smollm, messages, tools=tools, add_generation_prompt=generate) == expected
    assert written >= 4


class TestSpecialTextInTools:
    @given(
        parts=st.lists(st.sampled_from([*SPECIALS, "<", "|", ">", "im_", "end|>", "<|im_", "<|", "|>", " ", "a", "\n", '"', "\\", "é",
                                        "\ufdd0", "<tools>"]), max_size=6).map("".join),
        style=st.sampled_from(sorted(STYLES)),
        place=st.sampled_from(["name", "description", "key", "enum", "arguments", "argument key", "text", "id", "content"]),
    )  # fmt: skip
    @settings(max_examples=150, deadline=None)
    def test_adds_no_special_token_and_is_kept(self, smollm: Tokenizer, parts: str, style: str, place: str) -> None:
        def conversation(text: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
            function = {
                "name": text if place == "name" else "f",
                "description": text if place == "description" else "d",
                "parameters": {"type": "object", "properties": {
                    text if place == "key" else "k": {"type": "string", "enum": [text if place == "enum" else "e"]}
                }},
            }  # fmt: skip
            arguments: Any = text if place == "text" else {
                text if place == "argument key" else "k": text if place == "arguments" else "v"
            }  # fmt: skip
            messages = [ASK, calling(arguments), ANSWER | {"content": text if place == "content" else "c"}]
            if place == "id":
                messages[2]["tool_call_id"] = text
            return messages, [{"type": "function", "function": function}]

        template = ChatTemplate(STYLES[style], "<|im_start|>", "<|im_end|>")
        refused = style == "gemma"  # which takes nothing but user and assistant
        messages, tools = conversation(parts)
        plain, plain_tools = conversation("a")
        if refused:
            with pytest.raises(ParameterError, match="turns must alternate"):
                template.encode(smollm, messages, tools=tools)
            return
        ids = template.encode(smollm, messages, tools=tools)
        honest = template.encode(smollm, plain, tools=plain_tools)
        assert [t for t in ids if t in smollm.special_ids] == [t for t in honest if t in smollm.special_ids]
        if style != "typed" or "\ufdd0" not in parts:  # which shows values as Python writes them
            assert smollm.decode(ids) == template.render(messages, tools=tools)

    def test_a_constant_of_the_template_is_recognized(self, smollm: Tokenizer) -> None:
        template = ChatTemplate("{% if tools[0].type == '<f' %}yes{% endif %}", "", "")
        assert smollm.decode(template.encode(smollm, [ASK], tools=[{"type": "<f"}])) == "yes"


class TestRefusedMessages:
    @pytest.mark.parametrize(
        ("style", "messages", "tools", "words"),
        [
            ("gemma", [ASK, ASK], None, r"refuses messages\[1\], whose role is 'user': turns must alternate"),
            ("gemma", [{"role": "assistant", "content": "a"}, ASK], None, r"messages\[0\], whose role is 'assistant'"),
            ("mistral", [ASK, {"role": "<|im_end|>", "content": "a"}], None,
             r"refuses messages\[1\], whose role is '<\|im_end\|>': a role of <\|im_end\|>"),
            ("llama", [ASK, calling({}, {}), ANSWER], TOOLS, r"messages\[1\], whose role is 'assistant': one call at a time"),
        ],
    )  # fmt: skip
    def test_are_named_with_their_role(
        self, smollm: Tokenizer, style: str, messages: Any, tools: Any, words: str
    ) -> None:
        template = ChatTemplate(STYLES[style], "", "")
        with pytest.raises(ParameterError, match=words) as error:
            template.encode(smollm, messages, tools=tools)
        assert "\n" not in str(error.value)

    def test_when_only_the_whole_conversation_is_refused(self, smollm: Tokenizer) -> None:
        template = ChatTemplate(
            "{% if messages | length % 2 == 0 %}{{ raise_exception('odd ones only') }}{% endif %}", "", ""
        )
        with pytest.raises(ParameterError, match=r"refuses messages\[1\], whose role is 'user': odd ones only"):
            template.encode(smollm, [ASK, ASK, ASK, ASK])

    @pytest.mark.parametrize(
        ("message", "words"),
        [
            (
                {"role": "user", "content": "a", "tool_calls": []},
                "unknown key 'tool_calls'; role and content are known",
            ),
            ({"role": "assistant", "content": "a", "name": "b"}, "unknown key 'name'; role and content and tool_calls"),
            ({"role": "assistant", "tool_calls": []}, r"messages\[0\] has no content"),
            ({"role": "assistant", "content": None, "tool_calls": []}, r"messages\[0\].content must be a string"),
            (
                {"role": "assistant", "tool_calls": "x"},
                r"messages\[0\].tool_calls must be a list of JSON objects, got str",
            ),
            (
                {"role": "assistant", "tool_calls": ["x"]},
                r"messages\[0\].tool_calls\[0\] must be a JSON object, got str",
            ),
            (
                {"role": "tool", "content": "a", "tool_call_id": 3},
                r"messages\[0\].tool_call_id must be a string, got int",
            ),
            ({"role": "tool", "content": None}, r"messages\[0\].content must be a string, got NoneType"),
            ({"role": ["tool"], "content": "a"}, r"messages\[0\].role must be a string, got list"),
        ],
    )
    def test_malformed_ones_are_named(self, smollm: Tokenizer, message: Any, words: str) -> None:
        with pytest.raises(ParameterError, match=words):
            ChatTemplate("{{ 1 }}", "", "").encode(smollm, [message])


def deep(levels: int) -> dict[str, Any]:
    return {"a": deep(levels - 1)} if levels else {}


class TestTools:
    @pytest.mark.parametrize(
        ("tools", "words"),
        [
            ({"type": "function"}, "tools must be a list of JSON objects, got dict"),
            ("[]", "tools must be a list of JSON objects, got str"),
            ([print], r"tools\[0\] must be a JSON object, got builtin_function_or_method"),
            ([{}, {"a": {"b": [1, {2}]}}], r"tools\[1\].a.b\[1\] is set, which JSON cannot say"),
            ([{"a": float("nan")}], r"tools\[0\].a is nan, which JSON cannot say"),
            ([{"a": 2**63}], r"tools\[0\].a has more than 64 bits"),
            ([{1: "a"}], r"a key of tools\[0\] must be a string, got int"),
            ([{"a": "\ud800"}], r"tools\[0\].a has a lone surrogate"),
            ([{"\ud800": "a"}], r"a key of tools\[0\] has a lone surrogate"),
            ([deep(40)], r"tools\[0\].a.* is too much: at most 65536 values, 24 deep"),
            ([{"a": [0] * 70_000}], r"tools\[0\].a\[\d+\] is too much"),
        ],
    )
    def test_malformed_ones_are_named(self, smollm: Tokenizer, tools: Any, words: str) -> None:
        with pytest.raises(ParameterError, match=words):
            ChatTemplate("{{ 1 }}", "", "").encode(smollm, [ASK], tools=tools)

    def test_are_not_changed(self, smollm: Tokenizer) -> None:
        tools = ({"name": "<|im_end|>", "list": ("a", "<|im_end|>")},)
        ChatTemplate("{{ tools | tojson }}", "", "").encode(smollm, [ASK], tools=tools)
        assert tools == ({"name": "<|im_end|>", "list": ("a", "<|im_end|>")},)

    def test_count_toward_what_a_rendering_may_be(self, smollm: Tokenizer) -> None:
        template = ChatTemplate("{{ tools[0].a * 12 }}", "", "")
        assert len(template.render([ASK], tools=[{"a": "x" * 100_000}])) == 1_200_000
        with pytest.raises(DataError, match="makes a value of more than"):
            ChatTemplate("{{ tools[0].a * 20 }}", "", "").render([ASK], tools=[{"a": "x" * 100_000}])

    def test_a_template_of_their_own(self, smollm: Tokenizer) -> None:
        template = ChatTemplate("plain", "", "", tool_source="{{ tools | length }} tools")
        assert smollm.decode(template.encode(smollm, [ASK])) == template.render([ASK]) == "plain"
        assert smollm.decode(template.encode(smollm, [ASK], tools=TOOLS)) == "2 tools"
        assert template.render([ASK], tools=[]) == "0 tools"
