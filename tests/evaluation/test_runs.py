"""A run's folder: written as it goes, read whatever became of it, compared with another."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from kvik.errors import DataError, ParameterError, StorageError, TryAgainError
from kvik.evaluation.run_comparison import Change, compare_runs
from kvik.evaluation.runs import MANIFEST, SAMPLES, Manifest, RunSample, RunWriter, read_run

MANIFEST_A = Manifest({"f1": "f1|v1", "em": "em|v1"}, {"seed": 0}, {"predictions": {"name": "p", "sha256": "0"}})


def sample(id, f1, em=0.0, references=("r",), reasons=None):
    return RunSample(id, "p", references, {"f1": f1, "em": em}, reasons or {})


def write(folder, samples, manifest=MANIFEST_A):
    with RunWriter(folder, manifest) as run:
        for one in samples:
            run.write(one)
    return str(folder)


def test_what_is_written_is_read(tmp_path):
    samples = (
        sample("a", 0.1),
        sample(2, None, reasons={"f1": "no words"}),
        RunSample("c", None, None, {"f1": None}, {"f1": "none"}),
    )
    name = write(tmp_path / "deep" / "run", samples)
    for given in (name, os.path.join(name, SAMPLES)):
        found = read_run(given)
        assert found.samples == samples and found.manifest == MANIFEST_A and not found.torn
        assert found.metrics == ("f1", "em")
    manifest = json.loads((tmp_path / "deep" / "run" / MANIFEST).read_text())
    assert manifest["kind"] == "kvik run" and set(manifest["versions"]) == {"kvik", "python"}


def test_samples_are_there_as_soon_as_they_are_made(tmp_path):
    code = (
        "import os, sys; from pathlib import Path; from kvik.evaluation.runs import *\n"
        "run = RunWriter(Path(sys.argv[1]), Manifest({'f1': 's'}))\n"
        "run.write(RunSample('a', 'p', None, {'f1': 1.0})); os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", code, tmp_path / "run"], check=False).returncode == 9
    assert [one.id for one in read_run(str(tmp_path / "run")).samples] == ["a"]


def test_half_a_last_line_is_left_out(tmp_path):
    name = write(tmp_path / "run", [sample("a", 1.0), sample("b", 0.5)])
    path = tmp_path / "run" / SAMPLES
    path.write_bytes(path.read_bytes()[:-9])
    found = read_run(name)
    assert found.torn and [one.id for one in found.samples] == ["a"]


def test_one_writer_one_run(tmp_path):
    with RunWriter(tmp_path / "run", MANIFEST_A) as run:
        with pytest.raises(TryAgainError, match="another process writes to it"):
            RunWriter(tmp_path / "run", MANIFEST_A)
        run.write(sample("a", 1.0))
    with pytest.raises(ParameterError, match="run holds a run already; name another folder"):
        RunWriter(tmp_path / "run", MANIFEST_A)
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError):
        RunWriter(tmp_path / "file", MANIFEST_A)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"id": "b"}', 'needs "prediction"'),
        ('{"id": 1.5, "prediction": "", "references": null, "scores": {}}', "id must be text or a whole number"),
        ('{"id": "b", "prediction": 1, "references": null, "scores": {}}', "prediction must be text or null"),
        ('{"id": "b", "prediction": "", "references": "r", "scores": {}}', "references must be a list"),
        ('{"id": "b", "prediction": "", "references": null, "scores": {"f1": "1"}}', "scores must be an object"),
        ('{"id": "b", "prediction": "", "references": null, "scores": {"f1": true}}', "scores must be an object"),
        ('{"id": "b", "prediction": "", "references": null, "scores": {"f1": 1' + "0" * 400 + "}}", "scores must be"),
        ('{"id": "b", "prediction": "", "references": null, "scores": {}, "reasons": {"f1": 1}}', "reasons must be"),
        ('{"id": "a", "prediction": "", "references": null, "scores": {}}', 'id "a" is that of line 1 already'),
        ("{", "is not JSON"),
    ],
)
def test_bad_samples_are_named(tmp_path, line, said):
    name = write(tmp_path / "run", [sample("a", 1.0)])
    with open(tmp_path / "run" / SAMPLES, "a") as file:
        file.write(line + "\n")
    with pytest.raises(DataError, match=r"samples.jsonl: line 2: ") as error:
        read_run(name)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [("{}", "is no manifest of a run"), ("[", "is not JSON"), ('{"kind": "kvik run", "format": 2}', "and format 1"),
     ('{"kind": "kvik run", "format": 1, "metrics": []}', "metrics must be an object"),
     ('{"kind": "kvik run", "format": 1, "metrics": {"f": 1}, "settings": {}, "inputs": {}, "versions": {}}', "signature of f")],
)  # fmt: skip
def test_bad_manifests_are_named(tmp_path, text, said):
    name = write(tmp_path / "run", [sample("a", 1.0)])
    (tmp_path / "run" / MANIFEST).write_text(text)
    with pytest.raises(DataError, match=r"manifest.json: ") as error:
        read_run(name)
    assert said in str(error.value)


def test_what_is_no_run(tmp_path):
    for name in (tmp_path, tmp_path / "absent"):
        with pytest.raises(DataError, match="no such file"):
            read_run(str(name))


def runs(tmp_path, a, b, **more):
    return read_run(write(tmp_path / "a", a)), read_run(write(tmp_path / "b", b, **more))


def test_differences_of_pairs(tmp_path):
    a, b = runs(
        tmp_path,
        [sample(i, 0.5, em=1.0) for i in range(20)] + [sample("only a", 1.0), sample("none", None)],
        [sample(i, 0.5 + i / 100, em=1.0) for i in reversed(range(20))] + [sample("none", 0.0), sample("only b", 1.0)],
    )
    found = compare_runs(a, b, margins={"f1": 0.2, "em": 0.01})
    f1, em = found.differences
    assert (found.pairs, found.only_a, found.only_b, found.left_out) == (21, ("only a",), ("only b",), {})
    assert (f1.pairs, f1.unscored, f1.a) == (20, 1, 0.5) and f1.b == pytest.approx(0.595)
    assert f1.difference.value == pytest.approx(0.095) and 0.05 < f1.difference.low < f1.difference.high < 0.13
    assert f1.p_value < 0.001 and f1.verdict == "equivalent"
    assert f1.changed[0] == Change(19, 0.5, 0.69) and f1.changed[-1].id == 1 and len(f1.changed) == 19
    assert (
        em.pairs == 21
        and em.changed == ()
        and em.p_value == 1
        and em.difference == (0, 0, 0)
        and em.verdict == "equivalent"
    )
    assert compare_runs(a, b, ["f1"], margins={"f1": 0.1}).differences[0].verdict == "different"
    assert compare_runs(a, b, ["f1"], test="bootstrap").differences[0].p_value < 0.01
    assert compare_runs(a, b, ["f1"]).differences[0].verdict is None


def test_runs_that_cannot_be_compared(tmp_path):
    a = read_run(write(tmp_path / "a", [sample("x", 1.0), sample("y", 1.0)]))
    other = read_run(write(tmp_path / "refs", [sample("x", 1.0), sample("y", 1.0, references=("s",))]))
    with pytest.raises(DataError, match=r'1 sample has other references in .*refs than in .*a, first id "y"'):
        compare_runs(a, other)
    strange = read_run(write(tmp_path / "ids", [sample("z", 1.0)]))
    with pytest.raises(DataError, match="no sample in common"):
        compare_runs(a, strange)
    with pytest.raises(ParameterError, match="--metric must be one of f1, em, got 'ef1'; did you mean 'f1'"):
        compare_runs(a, a, ["ef1"])
    none = read_run(write(tmp_path / "none", [sample("x", None, em=None)]))
    with pytest.raises(DataError, match="no metric to compare: f1: no sample has a score in both; em: "):
        compare_runs(a, none)


def test_other_signatures_are_refused_by_name(tmp_path):
    a, b = runs(tmp_path, [sample("x", 1.0)], [sample("x", 0.0)], manifest=Manifest({"f1": "f1|v2", "em": "em|v1"}))
    found = compare_runs(a, b)
    assert [one.metric for one in found.differences] == ["em"]
    assert "was scored in different ways: f1|v1 in" in found.left_out["f1"]
    with pytest.raises(DataError, match=r"f1 was scored in different ways: f1.v1 in .*a, f1.v2 in .*b"):
        compare_runs(a, b, ["f1"])
    only = read_run(write(tmp_path / "only", [RunSample("x", "p", ("r",), {"f1": 1.0})]))
    assert compare_runs(a, only).left_out == {"em": f"is not scored in {tmp_path / 'only'}"}
    with pytest.raises(DataError, match="em is not scored in"):
        compare_runs(a, only, ["em"])
