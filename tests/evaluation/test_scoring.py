"""Metrics of samples: the table, settings, intervals, and what could not be scored."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

from kvik.errors import DataError, ParameterError
from kvik.evaluation import metrics
from kvik.evaluation.metrics import GROUPS, METRICS, Metric, MetricResult, Sums, Unscored, check_pairs
from kvik.evaluation.predictions import read_samples
from kvik.evaluation.scoring import metric_names, score_samples, settings_of


def length(predictions, references, *, most: int = 10, weight: list[float] | None = None):
    scores = [None if not text else min(len(text), most) / most for text in predictions]
    left = tuple(Unscored(i, "it is empty") for i, score in enumerate(scores) if score is None)
    there = [score for score in scores if score is not None]
    return MetricResult(sum(there) / len(there) if there else None, tuple(scores), left, f"length|{most}|{weight}")


def summed(predictions, references):
    rows = np.array([[len(p), len(r[0])] for p, r in zip(predictions, references, strict=True)], np.float64)
    value = rows[:, 0].sum() / rows[:, 1].sum()
    scores = tuple((rows[:, 0] / rows[:, 1]).tolist())
    return MetricResult(value, scores, (), "summed", sums=Sums(rows, lambda sums: sums[:, 0] / sums[:, 1]))


def alone(predictions, references=None, *, n: int):
    return MetricResult(len(set(predictions)) / n, tuple(1.0 for _ in predictions), (), "alone")


@pytest.fixture(autouse=True)
def table(monkeypatch):
    """Three metrics that can be looked through, among the real ones."""
    monkeypatch.setitem(METRICS, "length", Metric(length, "", by_sample={"weight": int}))
    monkeypatch.setitem(METRICS, "summed", Metric(summed, "", pooled="sums"))
    monkeypatch.setitem(METRICS, "alone", Metric(alone, "", needs_references=False, pooled="set"))


@pytest.fixture
def samples(tmp_path):
    def read(lines):
        (tmp_path / "p").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return read_samples(str(tmp_path / "p"))

    return read


def pairs(*texts, **more):
    return [{"prediction": text, "reference": "abcd", **more} for text in texts]


def test_every_metric_of_the_table_is_there_and_says_what_it_takes():
    for name, metric in METRICS.items():
        assert set(metric.by_sample) <= set(settings_of(metric)), name
        assert metric.about or name in ("length", "summed", "alone")
    for group, members in GROUPS.items():
        assert set(members) <= set(METRICS) and group not in METRICS


def test_metrics_are_called_by_their_names():
    for name in set(METRICS) - {"length", "summed", "alone", "pass_at_k"}:
        assert getattr(metrics, name) is METRICS[name].function, name
    assert metrics.rouge(["a cat"], ["a cat"], kind="rouge1").value == 1 and metrics.pass_at_k(2, 1, 1) == 0.5


PACKAGES = ("sacrebleu", "nltk", "scipy", "tree_sitter", "torch", "transformers")


@pytest.mark.parametrize("name", [name for name in METRICS if name != "pass_at_k"])
def test_a_metric_names_the_extra_it_needs_and_no_other_needs_one(name, monkeypatch):
    from kvik.evaluation.metrics.code_bleu import trees

    trees._parser.cache_clear()
    for package in [module for module in sys.modules if module.split(".")[0] in PACKAGES] + list(PACKAGES):
        monkeypatch.setitem(sys.modules, package, None)
    metric = METRICS[name]
    more = {"language": "python"} if name == "code_bleu" else {}
    if metric.extra is None:
        assert metric.function(["a b c d"], *([["a b c e"]] if metric.needs_references else []), **more).per_sample
        return
    with pytest.raises(ParameterError, match=rf'^{name} needs \w[\w-]*: pip install "kvik\[{metric.extra}\]"$'):
        metric.function(["a"], ["a"], **more)


def test_the_table_imports_no_package():
    code = (
        "import sys, kvik.evaluation.metrics; "
        "print(sorted({'sacrebleu', 'nltk', 'scipy', 'tree_sitter', 'torch', 'rouge_score'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_names():
    assert metric_names("--metric", ["bleu", "rouge", "rouge1"]) == ("bleu", "rouge1", "rouge2", "rougeL", "rougeLsum")
    with pytest.raises(ParameterError, match="got 'bertscor'; did you mean 'bertscore'"):
        metric_names("--metric", ["bertscor"])


def test_a_mean_has_the_interval_of_its_scores(samples):
    found = score_samples("length", samples(pairs("aa", "aaaa", "", "aaaaaa")), {"most": 8})
    assert found.result.value == pytest.approx(0.5) and found.result.per_sample == (0.25, 0.5, None, 0.75)
    assert found.interval.value == found.result.value and 0.25 <= found.interval.low < 0.5 < found.interval.high <= 0.75
    assert found.result.unscored == (Unscored(2, "it is empty"),) and found.no_interval is None
    again = score_samples("length", samples(pairs("aa", "aaaa", "", "aaaaaa")), {"most": 8}, seed=1, level=0.5)
    assert again.interval.low >= found.interval.low and again.interval.high <= found.interval.high


def test_a_corpus_figure_has_the_interval_of_its_sums(samples):
    lines = [{"prediction": "a" * i, "reference": "b" * (i + 1)} for i in range(1, 30)]
    found = score_samples("summed", samples(lines), {})
    assert found.interval.value == found.result.value == pytest.approx(435 / 464)
    assert 0.9 < found.interval.low < found.result.value < found.interval.high < 0.96  # of sums: the mean is lower
    assert np.mean(found.result.per_sample) < found.interval.low


def test_what_has_no_interval_says_why(samples):
    found = score_samples("alone", samples([{"prediction": "a"}, {"prediction": "b"}]), {"n": 2})
    assert found.result.value == 1 and found.interval is None and "judges the samples together" in found.no_interval
    none = score_samples("length", samples(pairs("", "")), {})
    assert none.interval is None and none.no_interval == "nothing could be scored" and none.result.value is None


def test_samples_without_a_prediction_keep_their_place(samples):
    lines = [{"id": 1, "error": "too long", "reference": "r"}, {"id": 2, "text": "aa", "reference": "r"},
             {"id": 3, "text": "", "reference": "r"}]  # fmt: skip
    found = score_samples("length", samples(lines), {}).result
    assert found.per_sample == (None, 0.2, None)
    assert found.unscored == (Unscored(0, "no prediction: too long"), Unscored(2, "it is empty"))
    assert score_samples("length", samples(lines[:1]), {}).result.unscored == (Unscored(0, "no prediction: too long"),)


def test_settings_by_sample(samples):
    assert (
        "[1, 2]"
        in score_samples("length", samples([*pairs("a", weight=1), *pairs("b", weight=2)]), {}).result.signature
    )
    assert "|3" in score_samples("length", samples(pairs("a", weight=1)), {"weight": 3}).result.signature
    with pytest.raises(DataError, match='line 2: has no "weight", which other samples have'):
        score_samples("length", samples([*pairs("a", weight=1), *pairs("b")]), {})


@pytest.mark.parametrize(
    ("metric", "fields", "said"),
    [
        ("self_bleu", {"group": [1]}, r"line 2: group must be text or a whole number, got \[1\]"),
        ("self_bleu", {"group": None}, "line 2: group must be text or a whole number, got null"),
        ("execution_accuracy", {"database": 5}, "line 2: database must be text, got 5"),
        ("pass_at_k", {"n": "3", "c": 1}, 'line 2: n must be a whole number, got "3"'),
        ("pass_at_k", {"n": 3, "c": True}, "line 2: c must be a whole number, got true"),
    ],
)
def test_a_setting_of_a_sample_has_its_type(samples, metric, fields, said):
    fine = {"group": "g", "database": "d", "n": 3, "c": 1}
    with pytest.raises(DataError, match=said):
        score_samples(metric, samples([*pairs("a", **fine), *pairs("b", **fine | fields)]), {})


def test_samples_without_a_score_are_not_drawn(samples):
    texts = ["a b c d e", "a b c d f", "x a b c d", "q q q q q", "a b x x x"]
    lines = [{"prediction": text, "reference": "a b c d e"} for text in texts]
    whole = score_samples("bleu", samples(lines), {})
    padded = score_samples("bleu", samples([*lines, *({"prediction": "a", "reference": ""} for _ in range(20))]), {})
    assert padded.interval == whole.interval and padded.result.value == whole.result.value


def test_settings_that_do_not_fit(samples):
    with pytest.raises(ParameterError, match="length takes no setting 'mast'; it takes most, weight"):
        score_samples("length", samples(pairs("a")), {"mast": 3})
    with pytest.raises(ParameterError, match="alone needs the setting 'n'"):
        score_samples("alone", samples(pairs("a")), {})
    with pytest.raises(DataError, match='line 2: has no "reference"'):
        score_samples("length", samples([*pairs("a"), {"prediction": "b"}]), {})


@pytest.mark.parametrize(
    ("predictions", "references", "said"),
    [
        (["a"], ["a", "b"], "there are 1 predictions and 2 references"),
        ("ab", ["a", "b"], "predictions must be a list of str, got str"),
        (["a"], "a", "references must be a list of str or of lists of str, got str"),
        (["a", 3], ["a", "b"], "prediction 1 must be a str, got int"),
        (["a"], [3], "references of sample 0 must be a str or a list of str, got int"),
        (["a"], [[]], "sample 0 has no references"),
        (["a"], [["a", None]], "a reference of sample 0 must be a str, got NoneType"),
    ],
)
def test_what_metrics_refuse(predictions, references, said):
    with pytest.raises(ParameterError, match=said):
        check_pairs(predictions, references)


def test_one_reference_or_several():
    assert check_pairs(["a", "b"], ["x", ["y", "z"]]) == [("x",), ("y", "z")]
    assert metrics.check_pairs([], []) == []
