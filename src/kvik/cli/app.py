"""The `kvik` command: finds the verb, runs it, and turns whatever ends it into one line and an exit code.

A verb's module is imported when that verb runs, and imports what is heavy inside its functions: `kvik run` has 0.45 s
until the first token, all imports included.

Exit codes: 0 done, 2 wrong usage, 65 bad file or data, 74 input, output or network, 75 try again, 130 stopped with
Ctrl-C, 141 the reader of the output left, 1 a defect of Kvik.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterable, Sequence
from importlib import import_module
from typing import Annotated, Any

import typer

from kvik.errors import KvikError

__all__ = ["VERBS", "build", "main"]

VERBS = {
    "run": "kvik.cli.run",
    "chat": "kvik.cli.chat",
    "replay": "kvik.cli.replay",
    "serve": "kvik.cli.serve",
    "plan": "kvik.cli.plan",
    "compare": "kvik.cli.compare",
    "xray": "kvik.cli.xray",
    "eval": "kvik.cli.eval",
    "bench": "kvik.cli.bench",
    "models": "kvik.cli.models",
    "doctor": "kvik.cli.doctor",
}
"""Module by verb, in the order of the help. A module has `register(app)`."""

GROUPS = frozenset({"compare", "eval", "models", "plan"})
"""Verbs with verbs of their own; alone they print their help."""

INTERRUPTED, PIPE_CLOSED = 130, 141
STDOUT_FILENO = 1
_COMPLETION = "_KVIK_COMPLETE"
# Of what typer raises for wrong usage it exports only this one; the others share its second base.
_ClickException: Any = typer.BadParameter.__mro__[2]


def build(verbs: Iterable[str] = VERBS, *, completion: bool = True) -> typer.Typer:
    """The command line with some or all of its verbs."""
    app = typer.Typer(
        name="kvik",
        add_completion=completion,
        rich_markup_mode="rich",
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["--help", "-h"]},
    )
    app.callback()(_root)
    for verb in verbs:
        import_module(VERBS[verb]).register(app)
    return app


def _show_version(wanted: bool) -> None:
    if wanted:
        from kvik import __version__

        print(f"kvik {__version__}")
        raise typer.Exit


def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """Run language models on a CPU, look inside a generation, measure which settings to ship.

    \b
    Examples:
      kvik run "Why is the sky blue?"         an answer, as it is written
      kvik chat                               a conversation
      kvik serve                              an OpenAI-compatible server
      git diff | kvik run - --system "Write a commit message."
      kvik plan decoding "summarize mail"     which strategy, why, and the command
      kvik compare decoding "Once upon a time"    the strategies, measured
      kvik xray "The capital of France is"    what every token was chosen from
      kvik bench --json                       how fast this machine is
      kvik doctor                             whether everything is in place
    """


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code. argv: without the program's name, None for the process's own."""
    _prepare_streams()
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        code = _dispatch(arguments)
        sys.stdout.flush()
        return code
    except BaseException as error:
        code, line = _ending(error)
        if os.environ.get("KVIK_DEBUG") == "1" and not isinstance(error, typer.Exit):
            import traceback

            traceback.print_exc()
        _finish_output()
        if line:
            print(f"kvik: error: {' '.join(line.split())}", file=sys.stderr, flush=True)
        return code


def _dispatch(arguments: list[str]) -> int:
    if not arguments or (len(arguments) == 1 and arguments[0] in GROUPS):
        arguments = [*arguments, "--help"]
    if _COMPLETION in os.environ:
        typer.main.get_command(build())(arguments, prog_name="kvik", complete_var=_COMPLETION)
    known = arguments[0] in VERBS
    app = build(arguments[:1], completion=False) if known else build()
    # Not the command's own main(): that one ends the process on a closed pipe, and words errors in several lines.
    command = typer.main.get_command(app)
    with command.make_context("kvik", arguments) as context:
        command.invoke(context)
    return 0


def _ending(error: BaseException) -> tuple[int, str]:
    """Exit code and error line (empty for none) of what ended the command."""
    if isinstance(error, typer.Exit):
        return error.exit_code, ""
    if isinstance(error, KvikError):
        return error.exit_code, str(error)
    if isinstance(error, KeyboardInterrupt | typer.Abort):
        return INTERRUPTED, ""
    if isinstance(error, SystemExit):
        return (error.code, "") if isinstance(error.code, int) else (0 if error.code is None else 1, "")
    if isinstance(error, BrokenPipeError):
        return PIPE_CLOSED, ""
    if isinstance(error, _ClickException):
        return 2, _usage_line(error)
    if isinstance(error, OSError):
        named = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
        return 74, f"{named}{error.strerror or error}"
    if isinstance(error, MemoryError):
        return 75, "out of memory; try a smaller model, fewer bits (--weights int4) or close other programs"
    what = f"{type(error).__name__}: {error}"
    return 1, f"this is a defect in Kvik, please report it with the traceback that KVIK_DEBUG=1 shows: {what}"


def _usage_line(error: Any) -> str:
    path = error.ctx.command_path if getattr(error, "ctx", None) is not None else "kvik"
    message: str = error.format_message()
    return f"{message.rstrip('. ')}; see `{path} --help`"


def _prepare_streams() -> None:
    """Printing never fails for a character the terminal cannot show, nor for a stream that was closed at the start."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - lives as long as the process
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _finish_output() -> None:
    """Print what is still buffered; where that is impossible drop it, or the interpreter's end would fail on it."""
    try:
        sys.stdout.flush()
    except OSError:
        if sys.stdout is sys.__stdout__:
            descriptor = os.open(os.devnull, os.O_WRONLY)
            os.dup2(descriptor, STDOUT_FILENO)
            os.close(descriptor)
