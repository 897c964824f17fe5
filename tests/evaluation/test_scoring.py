"""Metrics of samples: the table, settings, intervals, and what could not be scored."""

from __future__ import annotations

import json
import subprocess
import sys
import types
from importlib.util import find_spec

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
    module = types.ModuleType("kvik.evaluation.metrics.fake")
    module.length, module.summed, module.alone = length, summed, alone
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(METRICS, "length", Metric("fake:length", "", by_sample=("weight",)))
    monkeypatch.setitem(METRICS, "summed", Metric("fake:summed", "", pooled="sums"))
    monkeypatch.setitem(METRICS, "alone", Metric("fake:alone", "", needs_references=False, pooled="set"))


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
        module = metric.place.partition(":")[0]
        if module != "fake" and find_spec(f"kvik.evaluation.metrics.{module}") is None:
            continue
        assert set(metric.by_sample) <= set(settings_of(metric)), name
        assert metric.about or metric.place.startswith("fake:")
    for group, members in GROUPS.items():
        assert set(members) <= set(METRICS) and group not in METRICS


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
        "[1.5, 2]"
        in score_samples("length", samples([*pairs("a", weight=1.5), *pairs("b", weight=2)]), {}).result.signature
    )
    assert "|3" in score_samples("length", samples(pairs("a", weight=1.5)), {"weight": 3}).result.signature
    with pytest.raises(DataError, match='line 2: has no "weight", which other samples have'):
        score_samples("length", samples([*pairs("a", weight=1), *pairs("b")]), {})


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
