"""Writes a conversation the way a model was trained to read it."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kvik.errors import DataError, KvikError, ParameterError
from kvik.text.tokenizer import Tokenizer, check_text

if TYPE_CHECKING:
    from kvik.text.sandbox import TemplateEnvironment

__all__ = ["ChatTemplate"]

MAX_SECONDS = 2.0
# A rendering may be 16 times as long as the conversation, and 64 Ki characters for what the template itself writes.
_GROWTH, _OWN_LENGTH = 16, 1 << 16
_OWN_TOTAL, _TOTAL_GROWTH = 1 << 26, 4
_KEYS = frozenset(("role", "content"))
# Code points that are no characters: none of them means anything in a text.
_NONCHARACTERS = [*range(0xFDD0, 0xFDF0), *(plane << 16 | last for plane in range(17) for last in (0xFFFE, 0xFFFF))]


class ChatTemplate:
    """A Jinja chat template from a model file, rendered in a sandbox with bounds on time and output.

    The text of a special token inside a message stays ordinary text: only what the template itself writes becomes
    special tokens. Safe to share between threads; compiled once, at the first use.
    """

    def __init__(self, source: str, bos_token: str, eos_token: str, *, max_seconds: float = MAX_SECONDS) -> None:
        """
        Args:
            source: the template.
            bos_token, eos_token: texts of these tokens, empty where the model has none.
            max_seconds: wall-clock time for compiling and, again, for each rendering.
        """
        self.source, self.bos_token, self.eos_token, self.max_seconds = source, bos_token, eos_token, max_seconds
        self._lock = threading.Lock()
        self._compiled: tuple[TemplateEnvironment, Any] | None = None
        self._shield: _Shield | None = None

    def encode(
        self, tokenizer: Tokenizer, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True
    ) -> list[int]:
        """The ids of a conversation.

        A beginning-of-text token is put in front where the model wants one and the template did not write it.

        Args:
            tokenizer: the model's.
            messages: each with exactly "role" and "content", both strings; at least one.
            add_generation_prompt: end with what makes the model answer.

        Raises:
            ParameterError: a message is malformed, or the template refuses the conversation (its own words are given).
            DataError: the template is faulty or exceeds a bound.
        """
        checked = _check_messages(messages)
        shield = self._shield_for(tokenizer.special_texts())
        mark = self._unused_mark(checked)
        shielded = [
            {"role": shield.marked(m["role"], mark), "content": shield.marked_content(m["content"], mark)}
            for m in checked
        ]
        text = self.render(shielded, add_generation_prompt=add_generation_prompt)
        ids: list[int] = []
        for part in tokenizer.split_special(text):
            if isinstance(part, int):
                ids.append(part)
            else:
                ordinary = part.replace(mark, "").replace(_escaped(mark), "")
                ids += tokenizer.encode(ordinary, add_special=False)
        if tokenizer.add_bos and tokenizer.bos_id is not None and ids[:1] != [tokenizer.bos_id]:
            ids.insert(0, tokenizer.bos_id)
        return ids

    def render(self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True) -> str:
        """The text of a conversation, as it stands: special tokens in messages are not told from the template's own."""
        from kvik.text.template_meter import Meter

        environment, template = self._compile()
        given = sum(len(m["role"]) + len(m["content"]) for m in messages)
        largest = _OWN_LENGTH + _GROWTH * given
        variables = {
            "messages": [dict(message) for message in messages], "tools": None, "documents": None,
            "add_generation_prompt": add_generation_prompt, "bos_token": self.bos_token, "eos_token": self.eos_token,
        }  # fmt: skip
        try:
            return environment.render_metered(
                template, variables, Meter(self.max_seconds, largest, _OWN_TOTAL + _TOTAL_GROWTH * largest)
            )
        except Exception as error:  # a faulty template can raise anything
            raise _explained(error) from error

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
                    raise _explained(error) from error
            return self._compiled

    def _shield_for(self, special: tuple[str, ...]) -> _Shield:
        environment, _ = self._compile()
        if self._shield is None or self._shield.special != special:
            self._shield = _Shield(special, environment.constants, environment.texts)
        return self._shield

    def _unused_mark(self, messages: Sequence[Mapping[str, str]]) -> str:
        texts = [self.source, *(text for message in messages for text in message.values())]
        for point in _NONCHARACTERS:
            mark = chr(point)
            if not any(mark in text or _escaped(mark) in text for text in texts):
                return mark
        raise ParameterError("the messages use all 66 noncharacters of Unicode; take one out")


class _Shield:
    """Puts a mark into message texts wherever a special token's text could come about.

    Inside every special token's text, and, since templates cut and join texts, after every character that begins one.
    The latter is left out where a constant of the template begins (`</think>` in what an assistant wrote), so that the
    template finds it. Marks are taken out again once the special tokens have been found.
    """

    def __init__(self, special: tuple[str, ...], constants: set[str], texts: set[str]) -> None:
        self.special = special
        self._kept = tuple(constant for constant in constants if constant and not any(s in constant for s in special))
        firsts = {text[0] for text in special}
        self._first = re.compile("[" + "".join(map(re.escape, sorted(firsts))) + "]") if firsts else None
        # What would complete a special token that the template's own text leaves begun.
        longest = max(map(len, special), default=0)
        tails = {own[-length:] for own in constants | texts for length in range(1, min(longest, len(own)) + 1)}
        self._rests = tuple({text[at:] for text in special for at in range(1, len(text)) if text[:at] in tails})

    def marked(self, text: str, mark: str) -> str:
        """The text with its marks."""
        return text if self._first is None else self._first.sub(lambda found: self._char(found, mark), text)

    def marked_content(self, text: str, mark: str) -> str:
        """As `marked`, and one in front where the text could complete what the template began."""
        start = len(text) - len(text.lstrip())
        body = text[start:]
        if body and any(body.startswith(rest) or rest.startswith(body.rstrip()) for rest in self._rests):
            return text[:start] + mark + self.marked(body, mark)
        return self.marked(text, mark)

    def _char(self, found: re.Match[str], mark: str) -> str:
        char, text, at = found[0], found.string, found.start()
        if not text.startswith(self.special, at):
            common = char.isalnum() or char.isspace()  # begins too many words to be worth marking
            if common or (self._kept and text.startswith(self._kept, at)):
                return char
        return char + mark


def _escaped(mark: str) -> str:
    """The mark in JSON of ASCII characters only, in which a template may write a message."""
    return json.dumps(mark)[1:-1]


def _check_messages(messages: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise ParameterError(f"messages must be a list of messages, got {type(messages).__name__}")
    if not messages:
        raise ParameterError("messages is empty; give at least one")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise ParameterError(f"messages[{index}] is no dict with role and content but {type(message).__name__}")
        for key in message:
            if key not in _KEYS:
                raise ParameterError(f"messages[{index}] has an unknown key {key!r}; role and content are known")
        for key in ("role", "content"):
            if key not in message:
                raise ParameterError(f"messages[{index}] has no {key}")
            check_text(message[key], f"messages[{index}].{key}")
    return [dict(message) for message in messages]


def _explained(error: Exception) -> KvikError:
    from kvik.text.sandbox import TemplateRaised

    words = " ".join(str(error).split())[:500]
    if isinstance(error, TemplateRaised):
        return ParameterError(words or "the chat template refuses these messages")
    if isinstance(error, RecursionError):
        words = "nests too deeply"
    line = getattr(error, "lineno", None)
    where = f" (line {line})" if isinstance(line, int) else ""
    return DataError(f"chat template: {words or type(error).__name__}{where}")
