"""The command line at a terminal: a pseudo-terminal with a person's keys, a fake model behind it."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import select
import signal
import sys
import time
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
START = (
    f"import sys; sys.path.insert(0, {str(TESTS)!r}); from cli.fake_llm import FakeLLM; FakeLLM.delay = {{delay}};"
    "from kvik.cli import options; options.make_llm = FakeLLM;"
    "from kvik.cli.app import main; sys.exit(main(sys.argv[1:]))"
)
ENTER, ALT_ENTER, CTRL_C, CTRL_D = b"\r", b"\x1b\r", b"\x03", b"\x04"


class Screen:
    """A process at a terminal of its own."""

    def __init__(self, *arguments: str, home: Path, delay: float = 0.0) -> None:
        self.pid, self.terminal = pty.fork()
        if self.pid == 0:
            os.environ.update(KVIK_HOME=str(home), TERM="xterm", NO_COLOR="1")
            os.execv(sys.executable, [sys.executable, "-c", START.format(delay=delay), *arguments])
        self.seen = ""

    def type(self, keys: bytes) -> None:
        os.write(self.terminal, keys)

    def wait_for(self, text: str, seconds: float = 60.0) -> str:
        """Read until the text has come; what came before it is forgotten."""
        end = time.monotonic() + seconds
        while text not in self.seen:
            ready, _, _ = select.select([self.terminal], [], [], max(0.0, end - time.monotonic()))
            assert ready, f"{text!r} did not come, but {self.seen!r}"
            try:
                data = os.read(self.terminal, 65536)
            except OSError:  # the process is gone
                data = b""
            assert data, f"{text!r} did not come, but {self.seen!r}"
            self.answer_queries(data)
            self.seen += re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", data.decode())
        before, _, self.seen = self.seen.partition(text)
        return before

    def answer_queries(self, data: bytes) -> None:
        if b"\x1b[6n" in data:  # prompt_toolkit asks where the cursor is
            self.type(b"\x1b[24;1R")

    def exit_code(self) -> int:
        """Of the process, which must be about to end."""
        end = time.monotonic() + 60
        while time.monotonic() < end:
            ready, _, _ = select.select([self.terminal], [], [], 0.05)
            if ready:
                with contextlib.suppress(OSError):  # the process is gone
                    self.seen += os.read(self.terminal, 65536).decode()
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.pid = 0
                return os.waitstatus_to_exitcode(status)
        raise AssertionError(f"still running: {self.seen!r}")

    def close(self) -> None:
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self.terminal)


@pytest.fixture
def screen(tmp_path):
    """Start a command at a terminal: screen("chat", delay=0.1)."""
    screens = []

    def start(*arguments, delay=0.0):
        screens.append(Screen(*arguments, home=tmp_path, delay=delay))
        return screens[-1]

    yield start
    for one in screens:
        one.close()


def test_conversation(screen, tmp_path):
    shown = screen("chat")
    shown.wait_for("/? lists the commands")
    shown.wait_for(">")
    shown.type(b"hello" + ENTER)
    shown.wait_for("The sky is blue.")
    shown.wait_for("8 generated tokens")
    shown.wait_for(">")
    shown.type(CTRL_C)
    shown.wait_for("Ctrl-D or /exit leaves.")
    shown.type(b"/set top_p 7" + ENTER)
    shown.wait_for("kvik: error: top_p must be finite and in [0, 1], got 7.0")
    shown.type(b"one" + ALT_ENTER + b"two" + ENTER)
    shown.wait_for("8 generated tokens")
    shown.wait_for(">")
    shown.type(f"/save {tmp_path}/talk.json".encode() + ENTER)
    shown.wait_for("4 messages are in")
    shown.wait_for(">")
    shown.type(CTRL_D)
    assert shown.exit_code() == 0
    assert '"one\\ntwo"' in (tmp_path / "talk.json").read_text()
    history = tmp_path / "chat_history"
    assert "+hello" in history.read_text() and history.stat().st_mode & 0o777 == 0o600


def test_ctrl_c_stops_the_answer_and_the_conversation_goes_on(screen):
    shown = screen("chat", delay=0.4)
    shown.wait_for(">")
    shown.type(b"hello" + ENTER)
    shown.wait_for("The sky")
    shown.type(CTRL_C)
    assert "Really" not in shown.wait_for("interrupted")
    shown.wait_for(">")
    shown.type(b"/set max_tokens 1" + ENTER + b"again" + ENTER)
    shown.wait_for("1 generated tokens")
    shown.wait_for(">")
    shown.type(b"/exit" + ENTER)
    assert shown.exit_code() == 0


def test_block_of_lines(screen):
    shown = screen("chat", "--raw")
    shown.wait_for(">")
    shown.type(b'"""' + ENTER)
    shown.wait_for(".")
    shown.type(b"one" + ENTER + b"two" + ENTER + b'"""' + ENTER)
    shown.wait_for("8 generated tokens")
    shown.type(b"/exit" + ENTER)
    assert shown.exit_code() == 0


def test_run_ends_with_130_after_ctrl_c(screen):
    shown = screen("run", "hello", delay=0.4)
    shown.wait_for("The")
    shown.type(CTRL_C)
    shown.wait_for("interrupted")
    assert shown.exit_code() == 130


def test_batch_shows_a_bar_and_bad_lines_above_it(screen, tmp_path):
    (tmp_path / "in").write_text("{}\n" + '{"prompt": "hi"}\n' * 6)
    arguments = ("--batch", str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--max-sequences", "1")
    shown = screen("run", *arguments, delay=0.1)
    shown.wait_for("line 1: needs either prompt or messages")
    shown.wait_for("of 7 requests, ")
    shown.wait_for(" left")
    shown.type(CTRL_C)
    shown.wait_for("--resume goes on")
    assert shown.exit_code() == 130
