"""Writes a conversation the way a model was trained to read it."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvik.errors import DataError, KvikError, ParameterError
from kvik.text.conversation import Message, check_messages, check_tools, mapped, strings
from kvik.text.shield import Shield, unmarked, unused_mark
from kvik.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from kvik.text.sandbox import TemplateEnvironment

__all__ = ["ChatTemplate", "Tools"]

MAX_SECONDS = 2.0
# A rendering may be 16 times as long as the conversation, and 64 Ki characters for what the template itself writes.
_GROWTH, _OWN_LENGTH = 16, 1 << 16
_OWN_TOTAL, _TOTAL_GROWTH = 1 << 26, 4

Tools = Sequence[Mapping[str, Any]]


class ChatTemplate:
    """A Jinja chat template from a model file, rendered in a sandbox with bounds on time and output.

    The text of a special token inside a message stays ordinary text: only what the template itself writes becomes
    special tokens. Safe to share between threads; compiled once, at the first use.
    """

    def __init__(
        self,
        source: str,
        bos_token: str,
        eos_token: str,
        *,
        max_seconds: float = MAX_SECONDS,
        tool_source: str | None = None,
        path: Path | None = None,
    ) -> None:
        """
        Args:
            source: the template.
            bos_token, eos_token: texts of these tokens, empty where the model has none.
            max_seconds: wall-clock time for compiling and, again, for each rendering.
            tool_source: the template for conversations with tools, where the model has one of its own for them.
            path: the model it is of, for messages.
        """
        self.path = path
        self.source, self.bos_token, self.eos_token, self.max_seconds = source, bos_token, eos_token, max_seconds
        self._lock = threading.Lock()
        self._compiled: tuple[TemplateEnvironment, Any] | None = None
        self._shield: Shield | None = None
        self._with_tools = self
        if tool_source is not None:
            self._with_tools = ChatTemplate(tool_source, bos_token, eos_token, max_seconds=max_seconds, path=path)

    @classmethod
    def of(cls, tokenizer: Tokenizer, path: Path | None = None) -> ChatTemplate | None:
        """The template of a tokenizer's model; None when it has none. path: the model's, for messages."""
        if tokenizer.chat_template is None:
            return None
        bos, eos = tokenizer.end_texts()
        return cls(tokenizer.chat_template, bos, eos, tool_source=tokenizer.tool_template, path=path)

    def encode(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Message],
        *,
        tools: Tools | None = None,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """The ids of a conversation.

        A beginning-of-text token is put in front where the model wants one and the template did not write it.

        Args:
            tokenizer: the model's.
            messages: at least one, each with "role" and "content", both strings. Those of the role "assistant" may have
                "tool_calls" (a list of JSON objects; then content may be None), those of the role "tool"
                "tool_call_id" and "name" (strings).
            tools: JSON objects that describe functions, in the form the template expects (usually
                `{"type": "function", "function": {"name": …, "description": …, "parameters": <JSON schema>}}`). A
                template that has no place for tools leaves them out without a word.
            add_generation_prompt: end with what makes the model answer.

        Raises:
            ParameterError: a message or tool is malformed, or the template refuses the conversation (its own words are
                given, and the message at which it did).
            DataError: the template is faulty or exceeds a bound.
        """
        checked, listed = check_messages(messages), check_tools(tools)
        used = self if listed is None else self._with_tools
        shield = used._shield_for(tokenizer.special_texts())
        mark = unused_mark([used.source, *strings(checked), *strings(listed)])
        shielded = [
            mapped(message, lambda text: shield.marked_value(text, mark))
            | {"role": shield.marked(message["role"], mark)}
            | ({"content": shield.marked_content(text, mark)} if (text := message.get("content")) is not None else {})
            for message in checked
        ]
        shielded_tools = mapped(listed, lambda text: shield.marked_value(text, mark))
        try:
            text = used._render(shielded, shielded_tools, add_generation_prompt)
        except ParameterError as error:
            raise used._refusal(shielded, shielded_tools, add_generation_prompt, str(error), mark) from error
        ids: list[int] = []
        for index, part in enumerate(tokenizer.split_special(text)):
            if isinstance(part, int):
                ids.append(part)
            else:
                ids += tokenizer.encode(unmarked(part, mark), add_special=False, first=index == 0)
        if tokenizer.add_bos and tokenizer.bos_id is not None and ids[:1] != [tokenizer.bos_id]:
            ids.insert(0, tokenizer.bos_id)
        return ids

    def render(
        self, messages: Sequence[Message], *, tools: Tools | None = None, add_generation_prompt: bool = True
    ) -> str:
        """The text of a conversation, as it stands: special tokens in messages are not told from the template's own."""
        used = self if tools is None else self._with_tools
        return used._render([dict(message) for message in messages], check_tools(tools), add_generation_prompt)

    def _render(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, add_generation_prompt: bool
    ) -> str:
        from kvik.text.template_meter import Meter

        environment, template = self._compile()
        given = sum(len(text) + 1 for text in strings([messages, tools]))
        largest = _OWN_LENGTH + _GROWTH * given
        variables = {
            "messages": messages, "tools": tools, "documents": None,
            "add_generation_prompt": add_generation_prompt, "bos_token": self.bos_token, "eos_token": self.eos_token,
        }  # fmt: skip
        try:
            return environment.render_metered(
                template, variables, Meter(self.max_seconds, largest, _OWN_TOTAL + _TOTAL_GROWTH * largest)
            )
        except Exception as error:  # a faulty template can raise anything
            raise _explained(error, self.path) from error

    def _refusal(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, generate: bool, words: str, mark: str
    ) -> ParameterError:
        """Names the message that the template refuses: the first without which it does not say these words."""
        until = time.monotonic() + self.max_seconds
        for index, message in enumerate(messages):
            try:
                self._render(messages[: index + 1], tools, generate)
            except DataError:
                continue
            except ParameterError as error:
                if str(error) == words:
                    role = unmarked(message["role"], mark)
                    place = f"messages[{index}], whose role is {role!r:.60}"
                    return ParameterError(f"the chat template refuses {place}: {unmarked(words, mark)}")
            if time.monotonic() > until:
                break
        return ParameterError(f"the chat template refuses these messages: {unmarked(words, mark)}")

    def _compile(self) -> tuple[TemplateEnvironment, Any]:
        with self._lock:
            if self._compiled is None:
                from kvik.text.sandbox import TemplateEnvironment
                from kvik.text.template_meter import Meter

                environment = TemplateEnvironment()
                try:
                    meter = Meter(self.max_seconds, _OWN_LENGTH, _OWN_TOTAL)
                    self._compiled = environment, environment.compile_metered(self.source, meter)
                except Exception as error:  # likewise
                    raise _explained(error, self.path) from error
            return self._compiled

    def _shield_for(self, special: tuple[str, ...]) -> Shield:
        environment, _ = self._compile()
        if self._shield is None or self._shield.special != special:
            self._shield = Shield(special, environment.constants, environment.texts)
        return self._shield


def _explained(error: Exception, path: Path | None) -> KvikError:
    from kvik.text.sandbox import TemplateRaised

    words = " ".join(str(error).split())[:500]
    if isinstance(error, TemplateRaised):
        return ParameterError(words or "raise_exception without words")
    if isinstance(error, RecursionError):
        words = "nests too deeply"
    line = getattr(error, "lineno", None)
    where = f" (line {line})" if isinstance(line, int) else ""
    return DataError(f"chat template: {words or type(error).__name__}{where}", path=path)
