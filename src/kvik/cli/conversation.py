"""What was said in `kvik chat`, and what its commands do."""

from __future__ import annotations

import difflib
import json
import shlex
from collections.abc import Callable
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from kvik.cli.answer import Answer, encode, print_logprobs, take_answer, with_seed
from kvik.cli.cache_options import check_prompt
from kvik.cli.output import note, plain, print_json, write
from kvik.cli.strategy_options import biases
from kvik.errors import ParameterError
from kvik.params import SamplingParams

if TYPE_CHECKING:
    from kvik.engine.request import Chunk
    from kvik.llm import LLM

__all__ = ["HELP", "SETTABLE", "Conversation"]

HELP = "/? lists the commands, Alt-Enter starts a new line, Ctrl-D leaves."


def _flag(text: str) -> bool:
    known = {"on": True, "true": True, "yes": True, "off": False, "false": False, "no": False}
    if text.lower() not in known:
        raise ValueError("takes on or off")
    return known[text.lower()]


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError("takes a whole number") from None


def _real(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError("takes a number") from None


def _or_none(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    return lambda text: None if text.lower() == "none" else parse(text)


def _strings(text: str) -> tuple[str, ...]:
    return () if text.lower() == "none" else tuple(shlex.split(text))


def _ids(text: str) -> tuple[int, ...]:
    return () if text.lower() == "none" else tuple(_whole(piece) for piece in text.replace(",", " ").split())


def _biases(text: str) -> dict[int, float]:
    return {} if text.lower() == "none" else biases([text])


SETTABLE: dict[str, Callable[[str], Any]] = {
    "logit_bias": _biases,
    "bad_words": _strings,
    "repetition_penalty": _real,
    "presence_penalty": _real,
    "frequency_penalty": _real,
    "no_repeat_ngram_size": _whole,
    "dry_multiplier": _real,
    "dry_base": _real,
    "dry_allowed_length": _whole,
    "dry_range": _whole,
    "dry_breakers": _strings,
    "temperature": _real,
    "top_k": _whole,
    "top_p": _real,
    "min_p": _real,
    "typical_p": _real,
    "epsilon_cutoff": _real,
    "eta_cutoff": _real,
    "top_n_sigma": _real,
    "xtc_probability": _real,
    "xtc_threshold": _real,
    "seed": _or_none(_whole),
    "max_tokens": _or_none(_whole),
    "min_tokens": _whole,
    "stop": _strings,
    "stop_token_ids": _ids,
    "ignore_eos": _flag,
    "logprobs": _or_none(_whole),
    "logprobs_mode": str,
}
"""What /set takes: the fields of SamplingParams but n, grammar and trace, with how a value is written."""


class Conversation:
    """Messages and settings; `hear` takes a line and answers it or does what it commands."""

    def __init__(self, llm: LLM, params: SamplingParams, load_seconds: float, *, raw: bool, json: bool) -> None:
        self.llm, self.params, self.raw, self.json = llm, params, raw, json
        self.messages: list[dict[str, str]] = []
        self.interrupted = False
        self._load_seconds = load_seconds

    def hear(self, text: str) -> bool:
        """Take a message or command. True when the person wants to leave."""
        if text.startswith("//"):  # a message that begins with a slash
            text = text[1:]
        elif text.startswith("/"):
            name, _, rest = text.partition(" ")
            return self._command(name, rest.strip())
        self._answer(text)
        return False

    def _answer(self, text: str) -> None:
        """Answer a message. A message that could not be answered is as if it had not been said."""
        messages = [*self.messages, {"role": "user", "content": text}]
        if self.raw or self.llm.chat_template is None:  # one text: what is said goes on in a new line
            ids = encode(self.llm, [{"role": "user", "content": "\n".join(m["content"] for m in messages)}], True)
        else:
            ids = encode(self.llm, messages, False)
        params = with_seed(self.params)
        answer = Answer(len(ids), self._load_seconds)
        check_prompt(self.llm.info.cache, len(ids))
        take_answer(self.llm.stream(ids, params), answer, self._ignore if self.json else self._show)
        self.messages = [*messages, {"role": "assistant", "content": answer.whole.text}]
        self.interrupted = answer.interrupted
        if self.json:
            print_json({**plain(answer.whole), "params": params, "timings": answer.timings}, line=True)
            return
        write("\n")
        print_logprobs(self.llm, answer.whole)
        note(answer.summary(self.llm), dim=True)

    def _show(self, chunk: Chunk) -> None:
        write(chunk.text)

    def _ignore(self, chunk: Chunk) -> None:
        """JSON comes when the answer is whole."""

    def set_system(self, text: str) -> None:
        """What the model is told before all else; "" for nothing. The conversation stays."""
        if text and (self.raw or self.llm.chat_template is None):
            encode(self.llm, [{"role": "system", "content": text}], self.raw)  # says why that cannot be
        rest = [m for m in self.messages if m["role"] != "system"]
        self.messages = [{"role": "system", "content": text}, *rest] if text else rest

    @property
    def system(self) -> str:
        """The system message, "" when there is none."""
        return next((m["content"] for m in self.messages if m["role"] == "system"), "")

    def _command(self, name: str, rest: str) -> bool:
        known: dict[str, Callable[[str], None]] = {
            "/?": self._help, "/help": self._help, "/set": self._set, "/system": self._system,
            "/clear": self._clear, "/save": self._save,
        }  # fmt: skip
        if name in ("/exit", "/quit"):
            return True
        if name not in known:
            names = [*known, "/exit"]
            near = difflib.get_close_matches(name, names, 1)
            hint = f"; did you mean {near[0]}?" if near else f"; known: {', '.join(names)}"
            raise ParameterError(f"unknown command {name}{hint} (a message that begins with / is written with //)")
        known[name](rest)
        return False

    def _help(self, rest: str) -> None:
        note(
            "/set NAME VALUE   change a setting; /set alone shows all of them\n"
            "/system TEXT      what the model is told before all else; alone it shows that, with none it removes it\n"
            "/clear            forget the conversation\n"
            "/save FILE        write the conversation as JSON\n"
            "/exit             leave (or Ctrl-D)\n"
            'A message of several lines: Alt-Enter starts a new line, or put lines of """ before and after it.'
        )

    def _set(self, rest: str) -> None:
        name, _, value = rest.partition(" ")
        name, value = name.replace("-", "_").lstrip("_"), value.strip()
        if not name:
            note("\n".join(f"{field:20} {_written(getattr(self.params, field))}" for field in SETTABLE))
            return
        if name not in SETTABLE:
            near = difflib.get_close_matches(name, SETTABLE, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ParameterError(f"/set knows {', '.join(SETTABLE)}; got {name!r}{hint}")
        if not value:
            note(f"{name} {_written(getattr(self.params, name))}")
            return
        try:
            self.params = replace(self.params, **{name: SETTABLE[name](value)})
        except ParameterError as error:
            raise ParameterError(f"{error}{_first(name, str(error))}") from None
        except ValueError as error:
            raise ParameterError(f"/set {name}: {error}, got {value!r}") from None

    def _system(self, rest: str) -> None:
        if not rest:
            note(self.system or "There is no system message.")
        else:
            self.set_system("" if rest.lower() == "none" else rest)

    def _clear(self, rest: str) -> None:
        self.messages = [m for m in self.messages if m["role"] == "system"]

    def _save(self, rest: str) -> None:
        if not rest:
            raise ParameterError("/save needs the name of a file")
        from pathlib import Path

        from kvik.files import atomic_write

        settings = {f.name: getattr(self.params, f.name) for f in fields(self.params)}
        kept = {"model": self.llm.info.name, "messages": self.messages, "params": settings}
        path = Path(rest).expanduser()
        if path.is_dir() or not path.parent.is_dir():
            raise ParameterError(f"/save writes a file in a folder that exists, got {rest}")
        with atomic_write(path) as file:
            file.write(json.dumps(plain(kept), ensure_ascii=False, indent=2).encode() + b"\n")
        note(f"{len(self.messages)} messages are in {rest}")


def _first(name: str, error: str) -> str:
    """Where another setting needs the one to be changed: the command that resets it."""
    other, _, needed = error.partition(" needs ")
    if other not in SETTABLE or needed.partition(",")[0] != name:
        return ""
    default = _written(getattr(SamplingParams, other))
    return f"; first set {other} back to its default" if "\n" in default else f"; first /set {other} {default}"


def _written(value: Any) -> str:
    if isinstance(value, tuple) and value and isinstance(value[0], tuple):
        return ",".join(f"{token}={bias:g}" for token, bias in value)
    if isinstance(value, tuple):
        return " ".join(shlex.quote(str(item)) for item in value) or "none"
    if isinstance(value, bool):
        return "on" if value else "off"
    return "none" if value is None else str(value)
