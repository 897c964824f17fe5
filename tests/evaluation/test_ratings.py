"""What people prefer: items, files of ratings, and what they say together."""

from __future__ import annotations

import json

import pytest

from kvik.errors import DataError, ParameterError, StorageError, TryAgainError
from kvik.evaluation.agreement import krippendorff_alpha
from kvik.evaluation.predictions import read_samples
from kvik.evaluation.ratings import Header, Item, RatingsFile, first_is_a, items_of, read_ratings, summarize

INPUTS = {"a": {"name": "a.jsonl", "sha256": "1"}, "b": {"name": "b.jsonl", "sha256": "2"}}


def rated(path, rater, answers, inputs=INPUTS):
    with RatingsFile(str(path), Header(rater, 0, len(answers), inputs)) as file:
        for id, answer in answers.items():
            file.add(Item(id, None, "x", "y"), answer, "a")
    return read_ratings(str(path))


def samples(tmp_path, name, lines):
    (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return read_samples(str(tmp_path / name), ("prompt",) if name == "q" else ("prediction", "text"))


def test_items(tmp_path):
    a = samples(
        tmp_path, "a", [{"id": 1, "text": "x", "prompt": "own"}, {"id": 2, "text": "y"}, {"id": 3, "error": "e"}]
    )
    b = samples(tmp_path, "b", [{"id": 2, "text": "z"}, {"id": 3, "text": "v"}, {"id": 1, "text": "w"}])
    found, missing = items_of(a, b)
    assert found == [Item(1, "own", "x", "w"), Item(2, None, "y", "z")] and [one.id for one in missing] == [3]
    asked = samples(tmp_path, "q", [{"prompt": "one"}, {"prompt": "two"}])  # a batch without ids: they are line numbers
    assert [item.prompt for item in items_of(a, b, asked)[0]] == ["one", "two"]
    with pytest.raises(DataError, match="q: has no prompt for id 1 "):
        items_of(a, b, samples(tmp_path, "q", [{"id": 2, "prompt": "two"}]))


def test_the_order_is_fair_and_of_the_item_alone():
    firsts = [first_is_a(0, id) for id in range(1000)]
    assert 450 < sum(firsts) < 550 and firsts == [first_is_a(0, id) for id in range(1000)]
    assert firsts != [first_is_a(1, id) for id in range(1000)]
    assert any(first_is_a(0, id) != first_is_a(0, str(id)) for id in range(20))  # 3 and "3" are two ids


def test_a_file_goes_on_where_it_ended(tmp_path):
    path = tmp_path / "r"
    rated(path, "anna", {"x": "a", "y": "skip"})
    with open(path, "ab") as file:
        file.write(b'{"id": "z", "ans')  # killed while it wrote
    found = rated(path, "anna", {"y": "b", "z": "tie"})
    assert found.answers == {"x": "a", "y": "b", "z": "tie"} and found.header.rater == "anna"


def test_other_inputs_raters_and_writers_are_refused(tmp_path):
    path = tmp_path / "r"
    rated(path, "anna", {"x": "a"})
    for header, said in [
        (Header("bo", 0, 1, INPUTS), 'has ratings with rater "anna", not "bo"'),
        (Header("anna", 1, 1, INPUTS), "has ratings with seed 0, not 1"),
        (
            Header("anna", 0, 1, {**INPUTS, "b": {"name": "c", "sha256": "3"}}),
            "other inputs: b was b.jsonl, now it is c",
        ),
        (
            Header("anna", 0, 1, {**INPUTS, "b": {"name": "b.jsonl", "sha256": "3"}}),
            "b was b.jsonl, which has changed since",
        ),
        (Header("anna", 0, 1, {**INPUTS, "prompts": {"name": "q", "sha256": "3"}}), "prompts was none, now it is q"),
    ]:
        with pytest.raises(DataError, match=said):
            RatingsFile(str(path), header)
    with RatingsFile(str(path), Header("anna", 0, 1, INPUTS)), pytest.raises(TryAgainError):
        RatingsFile(str(path), Header("anna", 0, 1, INPUTS))
    with pytest.raises(StorageError):
        RatingsFile(str(tmp_path / "no" / "folder"), Header("anna", 0, 1, INPUTS))


@pytest.mark.parametrize(
    ("lines", "said"),
    [([], "it is empty"), (['{"id": 1}'], "its first line does not say who"), (["{", "{}"], "line 1: is not JSON")],
)
def test_what_are_no_ratings(tmp_path, lines, said):
    (tmp_path / "r").write_text("".join(line + "\n" for line in lines))
    with pytest.raises(DataError, match=said):
        read_ratings(str(tmp_path / "r"))


@pytest.mark.parametrize("line", ['{"id": "x", "answer": "c", "first": "a"}', '{"id": null, "answer": "a", "first": "a"}',
                                  '{"id": "x", "answer": "a"}', '{"id": "x", "answer": ["a"], "first": "a"}'])  # fmt: skip
def test_what_is_no_rating(tmp_path, line):
    rated(tmp_path / "r", "anna", {"x": "a"})
    with open(tmp_path / "r", "a") as file:
        file.write(line + "\n")
    with pytest.raises(DataError, match="r: line 3: is no rating"):
        read_ratings(str(tmp_path / "r"))


def test_preference_of_one_rater(tmp_path):
    answers = dict(enumerate(["b"] * 8 + ["a"] * 2 + ["tie"] * 3 + ["same"] + ["skip"] * 2))
    report = summarize([rated(tmp_path / "r", "anna", answers)])
    found = report.raters["anna"]
    assert (found.a, found.b, found.ties, found.same, found.skipped) == (2, 8, 4, 1, 2)
    assert found.share_b.value == pytest.approx(10 / 14) and found.share_b.low < 10 / 14 < found.share_b.high
    assert found.p_value == pytest.approx(0.109375)  # scipy.stats.binomtest(8, 10)
    assert (report.first, report.second) == (2, 8) and report.together is None and report.agreement is None
    nothing = summarize([rated(tmp_path / "s", "bo", {1: "skip"})]).raters["bo"]
    assert nothing.share_b is None and nothing.p_value == 1 and nothing.skipped == 1


def test_two_raters(tmp_path):
    """The table of `test_kappa_of_published_tables`: kappa 0.4; what was skipped or is the same text does not count."""
    one = dict(enumerate(["a"] * 25 + ["b"] * 25 + ["skip", "same", "a"]))
    other = dict(enumerate(["a"] * 20 + ["b"] * 5 + ["a"] * 10 + ["b"] * 15 + ["a", "same"]))
    report = summarize([rated(tmp_path / "r", "anna", one), rated(tmp_path / "s", "bo", other)])
    assert report.agreement.measure == "Cohen's kappa" and report.agreement.value == pytest.approx(0.4)
    assert report.agreement.items == 50
    assert (report.together.a, report.together.b, report.together.ties, report.together.same) == (22, 15, 16, 1)


def test_more_raters(tmp_path):
    rows = ["abtaab", "abtabb", "abtta."]
    rated_by = [
        rated(tmp_path / f"r{i}", f"r{i}", {j: {"t": "tie", ".": "skip"}.get(c, c) for j, c in enumerate(row)})
        for i, row in enumerate(rows)
    ]
    report = summarize(rated_by)
    wanted = krippendorff_alpha([[None if c == "." else c for c in row] for row in rows])
    assert (report.agreement.measure, report.agreement.value) == ("Krippendorff's alpha", pytest.approx(wanted))
    assert report.agreement.items == 6


def test_raters_who_cannot_be_put_together(tmp_path):
    anna = rated(tmp_path / "r", "anna", {1: "a"})
    with pytest.raises(ParameterError, match=r"rater 'anna' comes twice: in .*r and .*s"):
        summarize([anna, rated(tmp_path / "s", "anna", {1: "b"})])
    with pytest.raises(DataError, match=r"rate other files: b is b.jsonl and c"):
        summarize([anna, rated(tmp_path / "t", "bo", {1: "b"}, {**INPUTS, "b": {"name": "c", "sha256": "9"}})])
    bo = rated(tmp_path / "u", "bo", {2: "b"})
    assert summarize([anna, bo]).agreement.value is None and summarize([anna, bo]).agreement.items == 0
    with pytest.raises(ParameterError, match="no ratings"):
        summarize([])
