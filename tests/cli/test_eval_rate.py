"""`kvik eval rate`: what a rater sees, types and gets."""

from __future__ import annotations

import json
import os
import re
import signal

import pytest
from cli.test_terminal import CTRL_C, CTRL_D, Screen
from rich.cells import cell_len

from kvik.cli.rating_screen import wrapped
from kvik.evaluation.ratings import first_is_a

ITEMS = 6


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = {
        "a.jsonl": [{"id": i, "text": f"answer of A {i}"} for i in range(ITEMS)],
        "b.jsonl": [{"id": i, "text": f"answer of B {i}"} for i in range(ITEMS)],
        "q.jsonl": [{"id": i, "prompt": f"question {i}?"} for i in range(ITEMS)],
    }
    for name, entries in lines.items():
        (tmp_path / name).write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return tmp_path


@pytest.fixture
def rate(kvik, files):
    def rate(keys, *more, out="r.jsonl", rater="anna"):
        stdin = "".join(key + "\n" for key in keys).encode()
        return kvik("eval", "rate", "a.jsonl", "b.jsonl", "--out", out, "--rater", rater, *more, stdin=stdin)

    return rate


def answers(out="r.jsonl"):
    with open(out) as file:
        entries = [json.loads(line) for line in file]
    return [(entry["id"], entry["answer"]) for entry in entries[1:]]


def better(item, which, seed=0):
    """The key for A's or B's answer of an item."""
    return "1" if first_is_a(seed, item) == (which == "a") else "2"


def test_all_items_from_a_pipe(rate):
    ended = rate([better(i, "b") for i in range(4)] + ["=", "s"], "--prompts", "q.jsonl")
    assert ended.code == 0, ended.err
    assert answers() == [(0, "b"), (1, "b"), (2, "b"), (3, "b"), (4, "tie"), (5, "skip")]
    first = ended.out.split("1 of 6")[1].split("2 of 6")[0]
    shown = ("A 0", "B 0") if first_is_a(0, 0) else ("B 0", "A 0")
    assert re.search(
        rf"question 0\?.*\[1\]\n│ answer of {shown[0]}\n\n\[2\]\n│ answer of {shown[1]}\n", first, re.DOTALL
    )
    report = ended.out[ended.out.index("A: a.jsonl") :]
    assert report.splitlines()[4].split()[:6] == ["anna", "0", "4", "1", "1", "0.9000"]
    assert "p: sign test" in report


def test_names_are_hidden_until_the_end(rate):
    ended = rate(["1"] * ITEMS)
    before = ended.out[: ended.out.index("A: a.jsonl")]
    assert "a.jsonl" not in before and "b.jsonl" not in before


def test_it_goes_on_where_it_ended(rate):
    ended = rate(["1", "2", "q"])
    assert ended.code == 0 and "2 of 6 items are done; the same command goes on in r.jsonl" in ended.err
    assert "A: a.jsonl" not in ended.out
    ended = rate(["="])  # the pipe ends
    assert "3 of 6 items are done" in ended.err and "3 of 6" in ended.out
    ended = rate(["s", "s", "s"])
    assert ended.code == 0 and len(answers()) == ITEMS and "1 of 6" not in ended.out
    assert rate([]).code == 0 and len(answers()) == ITEMS  # all are done: the report again


def test_back_asks_again_and_the_last_answer_counts(rate):
    ended = rate(["b", better(0, "a"), better(1, "a"), "b", "b", better(0, "b"), "=", "=", "=", "="])
    assert ended.code == 0, ended.err
    assert answers() == [(0, "a"), (1, "a"), (0, "b"), (2, "tie"), (3, "tie"), (4, "tie"), (5, "tie")]
    assert "this is the first item" in ended.err and f"(it was {better(0, 'a')})" in ended.out
    assert ended.out[ended.out.index("rater") :].splitlines()[1].split()[1:4] == ["1", "1", "4"]


def test_the_seed_changes_the_order(rate):
    rate(["1"] * ITEMS, "--seed", "0")
    rate(["1"] * ITEMS, "--seed", "3", out="s.jsonl")
    assert answers("s.jsonl") != answers()
    assert [a for _, a in answers()] == ["a" if first_is_a(0, i) else "b" for i in range(ITEMS)]


def test_same_texts_are_not_asked_about(rate, files):
    lines = [{"id": i, "text": f"answer of {'AB'[i % 2]} {i}"} for i in range(ITEMS)]
    (files / "b.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    ended = rate(["1"] * 3)
    assert ended.code == 0 and [answer for _, answer in answers()].count("same") == 3
    assert "3 of the ties are the same text twice, which nobody was asked about." in ended.out


def test_a_wrong_line_keeps_what_was_said(rate):
    ended = rate(["1", "better"])
    assert ended.code == 65 and "standard input: line 2: must be one of 1 2 = s b q, got 'better'" in ended.err
    assert len(answers()) == 1


def test_other_inputs_and_raters_are_refused(rate, files, kvik):
    rate(["1", "q"])
    assert 'r.jsonl: has ratings with rater "anna", not "bo"' in rate(["1"], rater="bo").err
    assert "has ratings with seed 0, not 1" in rate(["1"], "--seed", "1").err
    with open(files / "a.jsonl", "a") as file:
        file.write("\n")
    ended = rate(["1"])
    assert ended.code == 65 and "a was a.jsonl, which has changed since; name another --out" in ended.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["a.jsonl", "b.jsonl", "--rater", "x"], "--out is needed to rate"),
        (["a.jsonl", "b.jsonl", "--out", "r"], "--rater is needed to rate"),
        (["a.jsonl", "b.jsonl", "--out", "r", "--rater", " "], "--rater is needed to rate"),
        (["a.jsonl", "--out", "r", "--rater", "x"], "two files of predictions are compared, got 1"),
        (["a.jsonl", "b.jsonl", "--json", "--out", "r", "--rater", "x"], "--json needs --report"),
        (["a.jsonl", "b.jsonl", "--seed", "-1", "--out", "r", "--rater", "x"], "--seed must be in [0, "),
        (["r.jsonl", "--report", "--rater", "x"], "--rater cannot be with --report"),
        (["r.jsonl", "--report", "--seed", "0"], "--seed cannot be with --report"),
    ],
)
def test_wrong_usage(kvik, files, arguments, said):
    ended = kvik("eval", "rate", *arguments)
    assert ended.code == 2 and said in ended.err and ended.err.count("\n") == 1


def test_the_report_of_several_raters(rate, kvik):
    for rater, keys in (("anna", "bbbaa="), ("bo", "bbaaa="), ("cy", "babaas")):
        rate([better(i, key) if key in "ab" else key for i, key in enumerate(keys)], out=f"{rater}.jsonl", rater=rater)
    two = kvik("eval", "rate", "--report", "anna.jsonl", "bo.jsonl")
    assert two.code == 0 and "Cohen's kappa 0.7391, over 6 items" in two.out  # (5/6 - 13/36) / (1 - 13/36)
    assert [line.split()[0] for line in two.out.splitlines()[3:7]] == ["rater", "anna", "bo", "together"]
    report = json.loads(kvik("eval", "rate", "--report", "anna.jsonl", "bo.jsonl", "cy.jsonl", "--json").out)
    assert report["agreement"]["measure"] == "Krippendorff's alpha" and report["agreement"]["items"] == 6
    assert report["raters"]["cy"]["skipped"] == 1 and report["together"]["ties"] == 1
    twice = kvik("eval", "rate", "--report", "anna.jsonl", "anna.jsonl")
    assert twice.code == 2 and "rater 'anna' comes twice: in anna.jsonl and anna.jsonl" in twice.err


def test_keys_at_a_terminal(files):
    screen = Screen("eval", "rate", "a.jsonl", "b.jsonl", "--out", "r.jsonl", "--rater", "anna", home=files)
    try:
        assert "1 of 6" in screen.wait_for("q quit: ")
        screen.type(b"1")  # no Enter
        screen.wait_for("2 of 6")
        screen.wait_for("q quit: ")
        screen.type(b"x")
        screen.wait_for("the keys are 1 2 = s b q: ")
        screen.type(b"\x1b[A")  # an arrow is one key, not three
        screen.wait_for("the keys are 1 2 = s b q: ")
        screen.type(b"=s")
        assert "4 of 6" in screen.wait_for("4 of 6") + "4 of 6"
        screen.wait_for("q quit: ")
        screen.type(CTRL_C)
        screen.wait_for("3 of 6 items are done; the same command goes on in r.jsonl")
        assert screen.exit_code() == 130
    finally:
        screen.close()
    assert [answer for _, answer in answers()][1:] == ["tie", "skip"]
    screen = Screen("eval", "rate", "a.jsonl", "b.jsonl", "--out", "r.jsonl", "--rater", "anna", home=files)
    try:
        screen.wait_for("q quit: ")
        screen.type(CTRL_D)
        screen.wait_for("3 of 6 items are done")
        assert screen.exit_code() == 0
    finally:
        screen.close()


def test_texts_cannot_steer_the_screen(rate, files, monkeypatch):
    evil = "\x1b[2J\x1b]0;title\x07\r[2]\nmine\u202eesrever\u2028x"
    (files / "a.jsonl").write_text("".join(json.dumps({"id": i, "text": evil}) + "\n" for i in range(ITEMS)))
    for columns in ("40", "160"):
        monkeypatch.setenv("COLUMNS", columns)
        shown = rate(["q"], out=f"{columns}.jsonl").out
        assert not re.search("[\x00-\x09\x0b-\x1f\x7f\u202e\u2028]", shown)
        assert all(cell_len(line) <= int(columns) for line in shown.splitlines()[:-1])
        assert len(re.findall(r"^\[2\]|\[1\] +\[2\]", shown, re.MULTILINE)) == 1  # the answer's own stands in a frame


def test_wide_screens_have_the_answers_beside_each_other(rate, files, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    shown = rate(["q"]).out
    assert re.search(r"^\[1\] {56}\[2\]$", shown, re.MULTILINE) and re.search(
        r"│ answer of . 0 +│ answer of . 0$", shown, re.MULTILINE
    )
    lines = [{"id": i, "text": "שלום"} for i in range(ITEMS)]  # a terminal may turn such a line around
    (files / "b.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert re.search(r"^\[2\]$", rate(["q"], out="rtl.jsonl").out, re.MULTILINE)


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("", [""]), ("a b", ["a b"]), ("one two three", ["one two", "three"]), ("abcdefghijkl", ["abcdefgh", "ijkl"]),
        ("a\n\nb", ["a", "", "b"]), ("日本語日本語", ["日本語日", "本語"]), ("a\tb", ["a   b"]), ("ab abcdefghijkl", ["ab", "abcdefgh", "ijkl"]),
    ],
)  # fmt: skip
def test_wrapping(text, lines):
    assert wrapped(text, 8) == lines


def test_ctrl_c_keeps_what_was_said(files):
    screen = Screen("eval", "rate", "a.jsonl", "b.jsonl", "--out", "r.jsonl", "--rater", "anna", home=files)
    try:
        screen.wait_for("q quit: ")
        screen.type(b"2")
        screen.wait_for("2 of 6")
        os.kill(screen.pid, signal.SIGINT)
        screen.wait_for("1 of 6 items are done")
        assert screen.exit_code() == 130
    finally:
        screen.close()
    assert len(answers()) == 1
