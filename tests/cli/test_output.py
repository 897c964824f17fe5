from __future__ import annotations

import io
import json
import re
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pytest

from kvik.cli import output


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Pair(NamedTuple):
    a: int
    b: float


@dataclass(frozen=True)
class Thing:
    pairs: tuple[Pair, ...]
    path: Path


def test_json_is_valid_whatever_comes(capsys):
    output.print_json({"thing": Thing((Pair(1, float("-inf")), Pair(2, float("nan"))), Path("/x")), "set": {2, 1}})
    assert json.loads(capsys.readouterr().out) == {
        "thing": {"pairs": [{"a": 1, "b": None}, {"a": 2, "b": None}], "path": "/x"}, "set": [1, 2]
    }  # fmt: skip


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1.0 kB"),
        (98_362_432, "98.4 MB"),
        (999_960, "1.0 MB"),
        (2.5e12, "2500.0 GB"),
    ],
)
def test_amount(count, text):
    assert output.amount(count) == text


def test_quoted():
    assert output.quoted(" né\n".encode()) == '" né\\n"'
    assert output.quoted(b"\xe2\x80") == "<e2 80>"


def test_control_characters_do_not_reach_a_terminal(monkeypatch, capsys):
    output.write("a\x1b[2Jb\n")
    assert capsys.readouterr().out == "a\x1b[2Jb\n"
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    output.write("a\x1b]0;x\x07\x9b\tb\n")
    assert screen.getvalue() == "a␛]0;x␇\ufffd\tb\n"


def test_no_bars_without_a_terminal(capsys):
    with output.Progress() as progress:
        progress("download", 0, 10)
        progress("download", 10, 10)
    assert capsys.readouterr() == ("", "")


def test_bar_comes_when_the_wait_is_long(monkeypatch):
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    now = time.monotonic()
    monkeypatch.setattr(output.time, "monotonic", lambda: now)
    with output.Progress() as progress:
        progress("load", 0, 10)
        assert screen.getvalue() == ""
        now += 1
        progress("load", 5, 10)
    assert "Loading" in screen.getvalue()


def test_bar_counts_what_it_is_told_to_count(monkeypatch):
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    now = time.monotonic()
    monkeypatch.setattr(output.time, "monotonic", lambda: now)
    with output.Progress(unit="tokens") as progress:
        progress("compare", 0, 2048)
        now += 1
        progress("compare", 511, 2048)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue())
    assert "Comparing" in shown and "511/2048 tokens" in shown and "bytes" not in shown


def test_ctrl_c_twice():
    with output.Interrupt() as interrupt:
        interrupt.gentle = True
        signal.raise_signal(signal.SIGINT)
        assert interrupt.pressed
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ignored_ctrl_c_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with output.Interrupt() as interrupt:
            signal.raise_signal(signal.SIGINT)
            assert not interrupt.pressed
    finally:
        signal.signal(signal.SIGINT, before)
