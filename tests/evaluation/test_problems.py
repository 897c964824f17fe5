"""Attempts of a file become problems, and pass@k of the command counts these."""

from __future__ import annotations

import json
import sqlite3

import pytest

from kvik.cli.app import main
from kvik.errors import DataError
from kvik.evaluation.predictions import read_samples
from kvik.evaluation.problems import ATTEMPTS, by_problem


def lines(path, *entries):
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return str(path)


def problems(path, *entries):
    return by_problem(read_samples(lines(path, *entries), ATTEMPTS)).samples


def test_attempts_are_counted_by_problem(tmp_path):
    found = problems(
        tmp_path / "p.jsonl",
        {"problem": "b", "passed": True},
        {"problem": 1, "passed": False},
        {"problem": "b", "passed": False, "prediction": "x"},
        {"problem": "b", "passed": True},
    )
    assert [(one.id, one.line, dict(one.fields)) for one in found] == [
        ("b", 1, {"n": 3, "c": 2}),
        (1, 2, {"n": 1, "c": 0}),
    ]


def test_problems_stay_as_they_are(tmp_path):
    found = problems(tmp_path / "p.jsonl", {"id": "a", "n": 3, "c": 1}, {"id": "b", "n": 2, "c": 0})
    assert [(one.id, dict(one.fields)) for one in found] == [("a", {"n": 3, "c": 1}), ("b", {"n": 2, "c": 0})]


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"passed": True}, 'line 2: has "passed" and no "problem"'),
        ({"n": 3, "c": 1}, 'line 2: has no "problem"'),
        ({"problem": "a", "n": 3}, 'line 2: has no "passed"'),
        ({"problem": "a", "passed": 1}, "line 2: passed must be true or false, got 1"),
        ({"problem": 1.5, "passed": True}, "line 2: problem must be text or a whole number, got 1.5"),
        ({"problem": True, "passed": True}, "line 2: problem must be"),
    ],
)
def test_bad_attempts_are_named(tmp_path, entry, words):
    with pytest.raises(DataError, match=words):
        problems(tmp_path / "p.jsonl", {"problem": "a", "passed": True}, entry)


@pytest.mark.parametrize(("n", "c"), [(3, 4), (3, -1), (0, 0)])
def test_numbers_that_cannot_be_are_named_by_their_line(tmp_path, n, c):
    with pytest.raises(
        DataError, match=rf"p.jsonl: line 2: n must be at least 1 and c in \[0, n\], got n {n} and c {c}"
    ):
        problems(tmp_path / "p.jsonl", {"n": 3, "c": 1}, {"n": n, "c": c})


def test_the_command_counts_problems(tmp_path, capsys):
    attempts = [{"problem": name, "passed": i < c} for name, c in (("a", 3), ("b", 0)) for i in range(10)]
    file = lines(tmp_path / "p.jsonl", *attempts)
    assert main(["eval", "score", "--metric", "pass_at_k", "--predictions", file, "--k", "1,10", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    entry = found["metrics"]["pass_at_k"]
    assert entry["value"] == pytest.approx(0.15) and entry["parts"] == pytest.approx({"pass@1": 0.15, "pass@10": 0.5})
    assert found["samples"] == 2 and entry["low"] <= 0.15 <= entry["high"]


@pytest.mark.parametrize(
    ("rest", "code", "words"),
    [
        (["--k", "11"], 2, "pass@11 needs 11 samples a problem, the most is 10"),
        (["--k", "0"], 2, "k must be at least 1"),
        (["--metric", "pass_at_k,code_bleu", "--language", "python"], 2, "score them apart"),
    ],
)
def test_the_command_refuses(tmp_path, capsys, rest, code, words):
    file = lines(tmp_path / "p.jsonl", *({"problem": "a", "passed": True, "prediction": "x"} for _ in range(10)))
    metric = [] if "--metric" in rest else ["--metric", "pass_at_k"]
    assert main(["eval", "score", "--predictions", file, *metric, *rest]) == code
    assert words in capsys.readouterr().err


def test_the_command_asks_a_database(tmp_path, capsys):
    database = tmp_path / "shop.db"
    with sqlite3.connect(database) as connection:
        connection.execute("CREATE TABLE t (x)")
    connection.close()
    queries = lines(
        tmp_path / "q.jsonl",
        {"id": "a", "prediction": "SELECT count(*) FROM t", "reference": "SELECT 0"},
        {"id": "b", "prediction": "SELECT y FROM t", "reference": "SELECT 0"},
        {"id": "c", "prediction": "SELECT 0", "reference": "SELECT y FROM t"},
    )
    run = tmp_path / "run"
    arguments = ["--predictions", queries, "--database", str(database), "--output", str(run), "--json"]
    assert main(["eval", "score", "--metric", "execution_accuracy", *arguments]) == 0
    entry = json.loads(capsys.readouterr().out)["metrics"]["execution_accuracy"]
    assert entry["value"] == 0.5 and [one["id"] for one in entry["unscored"]] == ["c"]
    kept = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert [one["scores"]["execution_accuracy"] for one in kept] == [1.0, 0.0, None]
    assert "no such column: y" in kept[1]["reasons"]["execution_accuracy"]
