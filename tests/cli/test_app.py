"""The command line as a whole: help, endings, streams, what it imports."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import typer

from kvik.cli import app, options
from kvik.errors import DataError, StorageError, TryAgainError


def raising(monkeypatch, error):
    def make(model, **settings):
        raise error

    monkeypatch.setattr(options, "make_llm", make)


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (DataError("is broken", path="m.gguf", offset=7), 65, "m.gguf: is broken (at byte 7)"),
        (StorageError("no space\nleft"), 74, r"no space\nleft"),
        (TryAgainError("later"), 75, "later"),
        (OSError(28, "No space left on device", "/full"), 74, "/full: No space left on device"),
        (MemoryError(), 75, "out of memory"),
        (KeyboardInterrupt(), 130, None),
        (BrokenPipeError(), 141, None),
        (ZeroDivisionError("x"), 1, "defect"),
    ],
)
def test_endings(kvik, monkeypatch, error, code, line):
    raising(monkeypatch, error)
    ended = kvik("run", "hi")
    assert ended.code == code and ended.out == ""
    if line is None:
        assert ended.err == ""
    else:
        (said,) = ended.err.splitlines()
        assert said.startswith("kvik: error: ") and line in said


def test_traceback_only_when_asked(kvik, monkeypatch):
    raising(monkeypatch, ZeroDivisionError("x"))
    assert "Traceback" not in kvik("run", "hi").err
    monkeypatch.setenv("KVIK_DEBUG", "1")
    assert "Traceback" in kvik("run", "hi").err


@pytest.mark.parametrize(
    "arguments", [[], ["--help"], ["-h"], ["models"], ["eval"], *([verb, "--help"] for verb in app.VERBS)]
)
def test_help(kvik, arguments):
    ended = kvik(*arguments)
    assert ended.code == 0 and ended.err == "" and "Usage: kvik" in ended.out
    if arguments[:1] not in (["models"], ["eval"], ["plan"], ["compare"]):
        assert "Examples:" in ended.out


@pytest.mark.parametrize(
    "arguments", [["models", "list"], ["models", "show"], ["models", "pull"], ["models", "rm"], ["eval", "logprobs"]]
)
def test_help_of_the_inner_verbs_has_examples(kvik, arguments):
    assert "Examples:" in kvik(*arguments, "--help").out


def test_unknown_verb(kvik):
    ended = kvik("rnu", "hi")
    assert ended.code == 2 and "rnu" in ended.err and ended.err.count("\n") == 1
    assert kvik("models", "lst").code == 2


def test_version(kvik):
    import kvik as package

    assert kvik("--version").out == f"kvik {package.__version__}\n"


def test_completion_of_verbs_and_options(process):
    def complete(line):
        env = {"_KVIK_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(line.split(" ")) - 1)}
        return process(env=env).stdout.decode().split()

    assert set(complete("kvik ")) == set(app.VERBS)
    assert complete("kvik run --temp") == ["--temperature"]
    assert complete("kvik run --weights in") == ["int8", "int4"]
    assert complete("kvik run -m smol") == ["smollm2-135m"]
    assert complete("kvik models r") == ["rm"]


def test_starting_imports_nothing_heavy():
    """`kvik run` has 0.45 s to its first token: what only other verbs, help or terminals need must not be imported."""
    code = (
        "import sys; from kvik.cli.app import main; main(['run', 'hi', '--top-p', '2']);"
        "print([m for m in ('numpy', 'rich', 'prompt_toolkit', 'jinja2', 'tokenizers', 'torch', 'kvik.cli.chat',"
        " 'kvik.weights.store') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_broken_pipe_is_quiet(process):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as closed:
        done = process("models", "list", stdout=closed, stderr=subprocess.PIPE)
    assert done.returncode == 141 and done.stderr == b""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_full_disk(process):
    with open("/dev/full", "wb") as full:
        done = process("models", "list", "--json", stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 74
    assert done.stderr == b"kvik: error: No space left on device\n"


def test_closed_streams(tmp_path):
    command = f"{sys.executable} -m kvik.cli models list --json >&- 2>&- <&-"
    assert (
        subprocess.run(command, shell=True, env={**os.environ, "KVIK_HOME": str(tmp_path)}, check=False).returncode == 0
    )


def test_terminals_that_know_few_characters(process, tmp_path):
    done = process("models", "list", env={"PYTHONIOENCODING": "ascii", "KVIK_HOME": str(tmp_path / "ö")})
    assert done.returncode == 0 and b"\\xf6" in done.stderr


def test_every_verb_takes_json():
    def leaves(command):
        inner = getattr(command, "commands", None)
        return [command] if inner is None else [leaf for one in inner.values() for leaf in leaves(one)]

    for command in leaves(typer.main.get_command(app.build())):
        if command.name == "serve":  # answers in JSON, but over HTTP
            continue
        assert any("--json" in p.opts for p in command.params), command.name
