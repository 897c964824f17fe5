"""Files of predictions and references: what is read, paired and refused."""

from __future__ import annotations

import hashlib
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvik.errors import DataError
from kvik.evaluation.predictions import PREDICTION, REFERENCE, need_references, pair, read_samples, with_references


@pytest.fixture
def file(tmp_path):
    """Write lines (objects, or bytes as they are) to a file; its name."""

    def write(name, lines):
        path = tmp_path / name
        path.write_bytes(
            b"".join((one if isinstance(one, bytes) else json.dumps(one).encode()) + b"\n" for one in lines)
        )
        return str(path)

    return write


def test_what_a_line_says(file):
    name = file("p", [
        {"id": "a", "prediction": "x", "reference": "r", "language": "python", "prompt": "why?"},
        b"",
        {"id": 7, "text": "y", "references": ["r", "s"], "messages": [{"role": "user", "content": "how?"}]},
        {"id": "7", "prediction": "", "references": None},
    ])  # fmt: skip
    found = read_samples(name)
    assert [(one.id, one.line, one.prediction, one.references, one.prompt) for one in found.samples] == [
        ("a", 1, "x", ("r",), "why?"), (7, 3, "y", ("r", "s"), "how?"), ("7", 4, "", None, None),
    ]  # fmt: skip
    assert found.samples[0].fields["language"] == "python" and found.named
    with open(name, "rb") as data:
        assert found.sha256 == hashlib.sha256(data.read()).hexdigest()
    with pytest.raises(DataError, match='p: line 4: has no "reference" or "references"'):
        need_references(found)


def test_results_of_a_batch_are_predictions(file):
    found = read_samples(file("p", [
        {"id": 1, "line": 1, "text": "yes", "choices": [{"text": "yes"}], "usage": {}, "receipt": "r", "request": "0f"},
        {"id": "x", "line": 2, "error": "the prompt is empty"},
    ]))  # fmt: skip
    assert [one.prediction for one in found.samples] == ["yes", None]
    assert [one.missing for one in found.samples] == [None, "no prediction: the prompt is empty"]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"{", "is not JSON"),
        (b"\xff", "is not UTF-8: byte 0xff"),
        (b"[1]", "must be an object, got"),
        (b'{"prediction": NaN}', "NaN is no number"),
        (b'{"prediction": "a", "prediction": "b"}', "names 'prediction' twice"),
        (b'{"prediction": "\\ud800"}', "half a surrogate pair"),
        ({"predicton": "x"}, 'needs "prediction" or "text"; it has \'predicton\''),
        ({"answer": "x"}, 'needs "prediction" or "text"'),
        ({"prediction": None}, "prediction must not be null"),
        ({"prediction": 3}, "prediction must be text, got 3"),
        ({"text": ["x"]}, "text must be text"),
        ({"prediction": "x", "reference": "a", "references": ["b"]}, "has both"),
        ({"prediction": "x", "reference": 3}, "reference must be text or a list of texts, got 3"),
        ({"prediction": "x", "references": ["a", None]}, "references must be text or a list of texts"),
        ({"prediction": "x", "references": []}, "references must name at least one"),
        ({"prediction": "x", "id": 1.5}, "id must be text or a whole number, got 1.5"),
        ({"prediction": "x", "id": True}, "id must be text or a whole number, got true"),
        ({"prediction": "x", "id": "first"}, 'id "first" is that of line 1 already'),
        ({"prediction": "x"}, "either all lines have an id or none: line 1 has one, line 2 has none"),
    ],
)
def test_a_bad_line_is_named(file, line, said):
    if isinstance(line, dict) and "id" not in line and list(line) != ["prediction"]:
        line = {"id": "second", **line}
    name = file("p", [{"id": "first", "prediction": "x"}, line])
    with pytest.raises(DataError) as error:
        read_samples(name)
    assert str(error.value).startswith(f"{name}: line 2: ") and said in str(error.value)


def test_bad_files(file, tmp_path):
    for name, said in (
        (file("none", []), "has no samples"),
        (str(tmp_path), "is a folder"),
        ("absent", "no such file"),
    ):
        with pytest.raises(DataError, match=said):
            read_samples(name)


def test_pairs_by_id(file):
    predictions = read_samples(file("p", [{"id": i, "prediction": f"p{i}"} for i in (1, 2, 3)]))
    references = read_samples(file("r", [{"id": i, "reference": f"r{i}", "k": i} for i in (3, 1, 2)]), REFERENCE)
    joined = with_references(predictions, references)
    assert [(one.prediction, one.references, one.fields["k"]) for one in joined.samples] == [
        ("p1", ("r1",), 1), ("p2", ("r2",), 2), ("p3", ("r3",), 3),
    ]  # fmt: skip


def test_what_both_files_say_is_taken_from_the_predictions_but_the_references(file):
    both = {"id": 1, "prompt": "asked", "k": "P", "reference": "old", "prediction": "p"}
    other = {"id": 1, "prompt": "other", "k": "R", "l": "R", "reference": "new"}
    (joined,) = with_references(read_samples(file("p", [both])), read_samples(file("r", [other]), REFERENCE)).samples
    assert (joined.prompt, joined.references) == ("asked", ("new",))
    assert {name: joined.fields[name] for name in "kl"} == {"k": "P", "l": "R"}


@pytest.mark.parametrize(("first", "second"), [(True, False), (False, True), (False, False)])
def test_pairs_by_order_where_a_file_has_no_ids(file, first, second):
    def lines(named, field):
        return [{"id": f"i{i}", field: field[0] + str(i)} if named else {field: field[0] + str(i)} for i in (1, 2)]

    predictions = read_samples(file("p", lines(first, "prediction")))
    joined = with_references(predictions, read_samples(file("r", lines(second, "reference")), REFERENCE))
    assert [(one.prediction, one.references) for one in joined.samples] == [("p1", ("r1",)), ("p2", ("r2",))]
    assert [one.id for one in joined.samples] == (["i1", "i2"] if first or second else [1, 2])
    short = read_samples(file("s", lines(False, "reference")[:1]), REFERENCE)
    with pytest.raises(DataError, match=r"p has 2 samples and .*s 1; without ids in both"):
        with_references(predictions, short)


def test_ids_of_one_file_only(file):
    predictions = read_samples(file("p", [{"id": i, "prediction": "p"} for i in "abc"]))
    references = read_samples(file("r", [{"id": i, "reference": "r"} for i in "cd"]), REFERENCE)
    with pytest.raises(DataError, match=r'r: 2 ids are in .*p only, first "a" \(line 1\)') as error:
        list(pair(references, predictions))
    assert "r: " in str(error.value)
    with pytest.raises(DataError, match=r'p: 1 id is in .*r only, "d" \(line 2\)'):
        list(pair(predictions, references))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(["id", "text", "prediction", "reference", "references", "prompt", "messages", "error", "content"]), inner, max_size=4),
    max_leaves=8,
)  # fmt: skip


@given(st.lists(st.binary(max_size=30) | JSON.map(lambda value: json.dumps(value).encode()), max_size=4))
@settings(
    max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
def test_any_file_is_samples_or_refused(tmp_path, lines):
    path = tmp_path / "any"
    path.write_bytes(b"\n".join(lines))
    try:
        found = read_samples(str(path), PREDICTION)
    except DataError as error:
        assert str(error).startswith(f"{path}: ")
        return
    assert len({one.id for one in found.samples}) == len(found.samples) > 0
    for one in found.samples:
        assert (one.prediction is None) == (one.missing is not None)
        assert one.references is None or (one.references and all(isinstance(text, str) for text in one.references))
