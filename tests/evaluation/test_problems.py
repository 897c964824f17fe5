"""Attempts of a file become problems, and pass@k of the command counts these."""

from __future__ import annotations

import json

import pytest

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
