"""`kvik chat`: a conversation, in the terminal or through a pipe."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from time import perf_counter
from typing import TYPE_CHECKING

import typer

from kvik.cli.conversation import HELP, Conversation
from kvik.cli.input import decoded
from kvik.cli.options import EngineOptions, Json, ModelOptions, Plain, SamplingOptions, System, add_verb
from kvik.cli.output import note
from kvik.errors import KvikError, ParameterError

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import History
    from prompt_toolkit.key_binding import KeyBindings

__all__ = ["register"]

BLOCK = '"""'
_INTERRUPTED = 130


def register(app: typer.Typer) -> None:
    """Add the verb."""
    add_verb(app, "chat", chat)


def chat(
    model: ModelOptions,
    sampling: SamplingOptions,
    engine: EngineOptions,
    raw: Plain = False,
    system: System = None,
    json: Json = False,
) -> None:
    """Talk with a model.

    Enter sends, Alt-Enter starts a new line; between lines of three double quotes a message may have any number of
    lines. Ctrl-C stops the answer and keeps what was said; Ctrl-D leaves. Lines that begin with / are commands, /?
    lists them. Input that is no terminal is taken line by line, each a message; with --json each answer is a line of
    JSON.

    \b
    Examples:
      kvik chat --system "Answer in one sentence." --temperature 0
      printf 'Hi!\\nWhat did I just say?\\n' | kvik chat --json
    """
    sampling.check(json)
    if sampling.n != 1:
        raise ParameterError(f"--n must be 1 here, got {sampling.n}: a conversation has one answer at a time")
    machine = engine.params()
    begun = perf_counter()
    llm = model.load(machine)
    talk = Conversation(llm, sampling.params(llm.default_params()), perf_counter() - begun, raw=raw, json=json)
    if system is not None:
        talk.set_system(system)
    if sys.stdin is not None and sys.stdin.isatty() and sys.stdout.isatty() and not json:
        _at_terminal(talk)
    else:
        _through_pipe(talk)


def _through_pipe(talk: Conversation) -> None:
    for message in piped_messages():
        if talk.hear(message):
            return
        if talk.interrupted:
            raise typer.Exit(_INTERRUPTED)


def piped_messages() -> Iterator[str]:
    """Messages of standard input: a line each, or the lines between two of three double quotes; no empty ones."""
    if sys.stdin is None:
        return
    block: list[str] | None = None
    offset = 0
    for data in sys.stdin.buffer:
        line = decoded(data, "standard input", offset).rstrip("\r\n")
        offset += len(data)
        if line.strip() == BLOCK:
            if block is None:
                block = []
                continue
            line, block = "\n".join(block), None
        elif block is not None:
            block.append(line)
            continue
        if line.strip():
            yield line
    if block is not None:
        raise ParameterError(f"standard input ends inside a message that {BLOCK} began; end it with {BLOCK}")


def _at_terminal(talk: Conversation) -> None:
    session = _session()
    info = talk.llm.info
    note(f"{info.name}, {info.context_length} tokens of context. {HELP}")
    while True:
        try:
            message = _read(session)
        except KeyboardInterrupt:
            note("Ctrl-D or /exit leaves.")
            continue
        except EOFError:
            return
        if not message.strip():
            continue
        try:
            if talk.hear(message):
                return
        except KeyboardInterrupt:
            note("Stopped before the answer began; the message is forgotten.")
        except KvikError as error:
            note(f"kvik: error: {error}")


def _read(session: PromptSession[str]) -> str:
    message = session.prompt("> ")
    if message.strip() != BLOCK:
        return message
    lines: list[str] = []
    while (line := session.prompt(". ")).strip() != BLOCK:
        lines.append(line)
    return "\n".join(lines)


def _session() -> PromptSession[str]:
    from prompt_toolkit import PromptSession

    return PromptSession(
        history=_history(), key_bindings=_keys(), multiline=True, prompt_continuation=lambda width, line, wrapped: ". "
    )


def _keys() -> KeyBindings:
    """Enter sends, also of several lines; Alt-Enter begins another."""
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    keys = KeyBindings()

    @keys.add("enter")
    def send(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter")
    @keys.add("escape", "c-j")  # what Alt-Enter is when it was typed while an answer was being written
    def new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return keys


def _history() -> History:
    """What was typed before, kept beside the models for this user only."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    from kvik.weights.store import default_root

    path = default_root() / "chat_history"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
        with open(path, "ab"):
            return FileHistory(path)
    except OSError as error:
        note(f"What you type is not kept for the next time: {path}: {error.strerror}")
        return InMemoryHistory()
