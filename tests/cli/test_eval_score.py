"""`kvik eval score` and `kvik compare runs`: files in, figures out, and one line where something is wrong."""

from __future__ import annotations

import json
import os

import pytest

from kvik.evaluation.metrics import METRICS

PREDICTIONS = [
    {"id": "a", "prediction": "the cat sat"}, {"id": "b", "prediction": "a dog"}, {"id": "c", "prediction": "the bird"},
    {"id": "d", "prediction": "fish"},
]  # fmt: skip
REFERENCES = [
    {"id": "d", "reference": "fish"}, {"id": "a", "references": ["the cat sat down", "a cat sat"]},
    {"id": "c", "reference": "a bird sang"}, {"id": "b", "reference": "cat"},
]  # fmt: skip


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write(name, lines):
        with open(name, "w") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
        return name

    return write


@pytest.fixture
def score(kvik, write):
    def score(metric, *more, predictions=PREDICTIONS, references=REFERENCES):
        files = ["--predictions", write("P.jsonl", predictions)]
        if references is not None:
            files += ["--references", write("R.jsonl", references)]
        return kvik("eval", "score", "--metric", metric, *files, *more)

    return score


def test_a_table_for_people(score):
    ended = score("exact_match,token_f1", "--per-sample")
    assert ended.code == 0, ended.err
    lines = ended.out.splitlines()
    assert [line.split() for line in lines[:3]] == [
        ["id", "exact_match", "token_f1"], ["a", "1.0000", "1.0000"], ["b", "0.0000", "0.0000"],
    ]  # fmt: skip
    table = lines[6:9]
    assert table[0].split() == ["metric", "value", "95", "%", "interval", "scored", "range"]
    assert table[1].split()[:2] == ["exact_match", "0.5000"] and table[1].endswith("4  0 to 1")
    assert "4 samples of P.jsonl beside R.jsonl.\nIntervals: the samples drawn anew, 2000 times, seed 0.\n" in ended.out
    assert any(line.startswith("token_f1: token_f1|") for line in lines)


def test_json(score):
    report = json.loads(score("token_f1,distinct_n", "--json", "--per-sample", "--level", "0.9", "--seed", "3").out)
    f1, distinct = report["metrics"]["token_f1"], report["metrics"]["distinct_n"]
    assert f1["low"] < f1["value"] < f1["high"] and f1["scored"] == 4 and f1["unscored"] == []
    assert distinct["low"] is None and "judges the samples together" in distinct["no_interval"]
    assert report["settings"] == {"level": 0.9, "seed": 3, "resamples": 2000, "resampled": "samples"}
    assert report["per_sample"][3] == {"id": "d", "scores": {"token_f1": 1.0, "distinct_n": None}}
    assert (
        set(report["inputs"]) == {"predictions", "references"} and len(report["inputs"]["predictions"]["sha256"]) == 64
    )


def test_percent_is_said_and_a_corpus_metric_has_an_interval(score):
    ended = score("bleu,chrf,ter")
    assert ended.code == 0, ended.err
    rows = {line.split()[0]: line for line in ended.out.splitlines() if line}
    assert rows["bleu"].endswith("0 to 100") and rows["ter"].endswith("0 up, lower is better")
    assert " to " in rows["chrf"].split("%")[0] and "version:" in ended.out


def test_predictions_with_references_or_without(score):
    both = [{"prediction": "x", "reference": "x"}, {"text": "y", "references": ["z", "y"]}]
    assert (
        json.loads(score("exact_match", "--json", predictions=both, references=None).out)["metrics"]["exact_match"][
            "value"
        ]
        == 1
    )
    ended = score("repetition", "--json", references=None)
    assert ended.code == 0 and json.loads(ended.out)["metrics"]["repetition"]["value"] is None
    ended = score("exact_match", references=None)
    assert ended.code == 2 and "exact_match compares with references: name their file with --references" in ended.err


def test_what_cannot_be_scored_is_named(score):
    lines = [
        {"id": "a", "line": 1, "text": "the cat", "choices": [{}, {}]},
        {"id": "b", "line": 2, "error": "too long"},
    ]
    ended = score("token_f1", predictions=lines, references=[{"id": i, "reference": "cat"} for i in "ba"])
    assert ended.code == 0 and "token_f1: 1 not scored, no prediction: too long (id b)" in ended.out
    assert "1 lines have several answers: the first of each is scored" in ended.err


def test_figures_are_shown_also_where_they_cannot_be_kept(score, tmp_path):
    (tmp_path / "file").touch()
    ended = score("token_f1", "--output", "file/run")
    assert ended.code == 74 and "cannot use file/run" in ended.err and "token_f1  0." in ended.out


def test_choices_that_are_no_list_are_a_field_like_another(score):
    ended = score("token_f1", predictions=[{"text": "a", "choices": 5}], references=[{"reference": "a"}])
    assert ended.code == 0 and "several" not in ended.err


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["rougeL,exact_mach"], 2, "--metric must be one of exact_match, "),
        (["exact_mach"], 2, "got 'exact_mach'; did you mean 'exact_match'?"),
        ([","], 2, "--metric names none"),
        (["exact_match", "--level", "1"], 2, "--level must be between 0 and 1, got 1.0"),
        (["exact_match", "--seed", "-1"], 2, "--seed must be in [0, 18446744073709551615], got -1"),
        (["bleu", "--language", "python"], 2, "--language: no setting 'language': bleu takes tokenize"),
        (["bleu,rouge", "--k", "1,10"], 2, "--k: no setting 'k': bleu takes"),
        (["exact_match", "--setting", "x=1"], 2, "--setting x: no setting 'x': exact_match takes normalize"),
        (["bleu", "--setting", "lower_case=on"], 2, "did you mean 'lowercase'?"),
        (["bleu", "--setting", "lowercase=maybe"], 2, "--setting lowercase takes on or off, got 'maybe'"),
        (["bleu", "--setting", "lowercase"], 2, "--setting takes NAME=VALUE or METRIC.NAME=VALUE, got 'lowercase'"),
        (["bleu,chrf", "--setting", "rouge.stem=on"], 2, "--setting rouge.stem must be one of bleu, chrf, got 'rouge'"),
        (
            ["bleu,chrf", "--setting", "chrf.tokenize=char"],
            2,
            "--setting chrf.tokenize: no setting 'tokenize': chrf takes",
        ),
        (
            ["bleu", "--setting", "lowercase=on", "--setting", "bleu.lowercase=off"],
            2,
            "bleu was given 'lowercase' already",
        ),
    ],
)
def test_wrong_usage(score, arguments, code, said):
    ended = score(*arguments)
    assert ended.code == code and said in ended.err and ended.err.count("\n") == 1


def test_bad_files(score, kvik, write):
    ended = score("exact_match", references=[{"id": "a", "reference": "x"}])
    assert ended.code == 65 and 'P.jsonl only, first "b" (line 2)' in ended.err
    ended = score("exact_match", predictions=[{"id": "a", "prediction": "x"}, {"id": "a", "prediction": "y"}])
    assert ended.code == 65 and 'P.jsonl: line 2: id "a" is that of line 1 already' in ended.err
    ended = kvik("eval", "score", "--metric", "exact_match", "--predictions", "absent")
    assert ended.code == 65 and "absent: no such file" in ended.err


def test_settings_go_to_the_metrics_that_take_them(score):
    report = json.loads(
        score("bleu,chrf,token_f1", "--setting", "lowercase=on", "--setting", "chrf.beta=3", "--json").out
    )
    assert "case:lc" in report["metrics"]["bleu"]["signature"] and "case:lc" in report["metrics"]["chrf"]["signature"]
    group = json.loads(
        score("rouge", "--setting", "rouge.stem=on", "--setting", "rouge1.stem=off", "--json").out or "{}"
    )
    assert not group  # given twice
    group = json.loads(score("rouge", "--setting", "rouge1.stem=on", "--json").out)["metrics"]
    assert "stem:yes" in group["rouge1"]["signature"] and "stem:no" in group["rougeL"]["signature"]


def test_a_run_is_kept_once(score, tmp_path):
    assert score("token_f1,bleu", "--output", "runs/a", "--setting", "lowercase=on").code == 0
    manifest = json.loads((tmp_path / "runs/a/manifest.json").read_text())
    assert set(manifest["metrics"]) == {"token_f1", "bleu"} and manifest["settings"]["metrics"]["bleu"] == {
        "lowercase": True
    }
    assert json.loads((tmp_path / "runs/a/report.json").read_text())["samples"] == 4
    lines = [json.loads(line) for line in (tmp_path / "runs/a/samples.jsonl").read_text().splitlines()]
    assert lines[0]["references"] == ["the cat sat down", "a cat sat"] and set(lines[0]["scores"]) == {
        "token_f1",
        "bleu",
    }
    ended = score("token_f1", "--output", "runs/a")
    assert ended.code == 2 and "runs/a holds a run already" in ended.err
    again = score("token_f1", references=None, predictions=lines)  # a run's samples are predictions with references
    assert again.code == 0


@pytest.fixture
def two_runs(score):
    """Runs a and b: b has another answer for "b" and "d", and a sample of its own."""
    assert score("token_f1,exact_match,bleu", "--output", "a").code == 0
    better = [
        {**one, "prediction": {"b": "cat", "d": "no fish"}.get(one["id"], one["prediction"])} for one in PREDICTIONS
    ]
    more = [*better, {"id": "e", "prediction": "x"}], [*REFERENCES, {"id": "e", "reference": "y"}]
    assert score("token_f1,exact_match,bleu", "--output", "b", predictions=more[0], references=more[1]).code == 0


def test_compare_runs(two_runs, kvik):
    ended = kvik(
        "compare", "runs", "a", "b", "--metric", "token_f1,exact_match", "--margin", "0.9", "--margin", "exact_match=0"
    )
    assert ended.code == 0, ended.err
    lines = ended.out.splitlines()
    assert lines[:2] == ["A: a", "B: b"]
    assert lines[3].split() == ["metric", "A", "B", "B", "-", "A", "95", "%", "interval", "p", "verdict"]
    assert lines[4].startswith("token_f1") and lines[4].endswith("equivalent") and lines[5].endswith("undecided")
    assert "4 samples in both; permutation test, seed 0." in ended.out and "Only in b: 1 (id e)." in ended.out
    changed = ended.out[ended.out.index("token_f1: 2 of 4 samples changed:") :].splitlines()
    assert changed[2].split() == ["b", "0.0000", "1.0000", "+1.0000"] and changed[3].split()[0] == "d"


def test_compare_runs_as_json(two_runs, kvik):
    report = json.loads(
        kvik("compare", "runs", "a", "b/samples.jsonl", "--test", "bootstrap", "--json", "--margin", "bleu=3").out
    )
    assert [one["metric"] for one in report["differences"]] == ["token_f1", "exact_match", "bleu"]
    f1, _, bleu = report["differences"]
    assert f1["difference"]["low"] <= f1["difference"]["value"] <= f1["difference"]["high"] and 0 < f1["p_value"] <= 1
    assert f1["verdict"] is None and bleu["verdict"] in ("undecided", "different") and bleu["corpus"]
    assert f1["changed"][0] == {"id": "b", "a": 0.0, "b": 1.0} and report["only_b"] == ["e"] and report["pairs"] == 4
    assert report["settings"] == {"test": "bootstrap", "level": 0.95, "seed": 0} and report["torn"] == {
        "a": False,
        "b": False,
    }


def test_runs_scored_in_different_ways(two_runs, score, kvik):
    assert score("bleu,token_f1", "--setting", "lowercase=on", "--output", "c").code == 0
    ended = kvik("compare", "runs", "a", "c", "--metric", "bleu")
    assert ended.code == 65 and "bleu was scored in different ways: " in ended.err and "case:lc" in ended.err
    ended = kvik("compare", "runs", "a", "c")
    assert ended.code == 0 and "exact_match is not scored in c; not compared." in ended.out
    assert "token_f1: no sample changed." in ended.out


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--test", "t"], 2, "--test must be one of permutation, bootstrap, got 't'"),
        (["--margin", "-1"], 2, "--margin takes a number of at least 0, or METRIC=X, got '-1'"),
        (["--margin", "x=y"], 2, "--margin takes a number of at least 0"),
        (["--margin", "1", "--margin", "2"], 2, "--margin without a metric was given twice"),
        (["--margin", "rouge1=1"], 2, "--margin must be one of token_f1, exact_match, bleu, got 'rouge1'"),
        (["--metric", "bleu", "--margin", "token_f1=1"], 2, "--margin token_f1=1: token_f1 is not compared"),
        (["--metric", "blue"], 2, "did you mean 'bleu'?"),
        (["--level", "0"], 2, "--level must be between 0 and 1"),
        (["--changed", "-1"], 2, "--changed must be at least 0, got -1"),
    ],
)
def test_wrong_comparisons(two_runs, kvik, arguments, code, said):
    ended = kvik("compare", "runs", "a", "b", *arguments)
    assert ended.code == code and said in ended.err and ended.err.count("\n") == 1


def test_torn_and_bare_runs_are_said(two_runs, kvik, tmp_path):
    path = tmp_path / "b/samples.jsonl"
    path.write_bytes(path.read_bytes()[:-5])
    os.rename(path, tmp_path / "bare.jsonl")
    ended = kvik("compare", "runs", "a", "bare.jsonl", "--metric", "token_f1")
    assert ended.code == 0 and "bare.jsonl: its last line is torn and was left out." in ended.out
    assert "bare.jsonl has no manifest" in ended.out
    ended = kvik("compare", "runs", "a", "b")
    assert ended.code == 65 and "b/samples.jsonl: no such file" in ended.err


def test_the_help_names_every_metric(kvik):
    shown = kvik("eval", "score", "--help").out
    assert all(name in shown for name in METRICS)
