"""SQuAD's exact match and F1: figures of evaluate-v2.0.py, and a twin that follows it with lists."""

from __future__ import annotations

import string
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvik.errors import ParameterError
from kvik.evaluation.metrics.answers import exact_match, squad_normalize, token_f1

WORD = st.sampled_from(["the", "The", "a", "an", "cat", "Cat.", "cat", "anthem", "U.S.", "-", "é", "e\u0301", "貓", "🐈", " ", "\n"])
TEXT = st.lists(WORD, max_size=6).map(" ".join) | st.text(max_size=8)


def slow_normalize(text):
    kept = "".join(c for c in text.lower() if c not in string.punctuation)
    found, run = [], ""
    for c in kept + " ":  # articles are words between characters that are no letters, digits or underscores
        if c.isalnum() or c == "_":
            run += c
        else:
            found += [" " if run in ("a", "an", "the") else run, c]
            run = ""
    return " ".join("".join(found).split())


def slow_f1(prediction, reference):
    mine, theirs = slow_normalize(prediction).split(), slow_normalize(reference).split()
    if not mine or not theirs:
        return float(mine == theirs)
    left, same = list(theirs), 0
    for word in mine:
        if word in left:
            left.remove(word)
            same += 1
    return 2 * same / (len(mine) + len(theirs))


def slow_references(several):
    return [one for one in several if slow_normalize(one)] or [""]


@given(TEXT, st.lists(TEXT, min_size=1, max_size=3))
def test_as_the_definition(prediction, several):
    wanted = slow_references(several)
    (f1,), (exact,) = token_f1([prediction], [several]).per_sample, exact_match([prediction], [several]).per_sample
    assert f1 == pytest.approx(max(slow_f1(prediction, one) for one in wanted), abs=1e-12)
    assert exact == any(slow_normalize(prediction) == slow_normalize(one) for one in wanted)
    assert squad_normalize(prediction) == slow_normalize(prediction)


# prediction, references, exact match, F1: what compute_exact and compute_f1 of evaluate-v2.0.py give
GOLDEN = [
    ("the Eiffel Tower!", ["Eiffel tower"], 1, 1.0),
    ("in the city of Paris, France", ["Paris"], 0, 1 / 3),
    ("Paris", ["in Paris", "Paris, France", "London"], 0, 2 / 3),
    ("cat cat cat", ["cat cat dog"], 0, 2 / 3),
    ("U.S.", ["us"], 1, 1.0),
    ("well-known", ["well known"], 0, 0.0),
    ("1,000", ["1000"], 1, 1.0),
    ("", [""], 1, 1.0),
    ("the", [""], 1, 1.0),
    ("Paris", [""], 0, 0.0),
    ("", ["Paris"], 0, 0.0),
    ("", ["Paris", "the"], 0, 0.0),  # an answer of which nothing is left does not count beside another
    ("  \n ", ["..."], 1, 1.0),
]


@pytest.mark.parametrize(("prediction", "references", "exact", "f1"), GOLDEN)
def test_golden(prediction, references, exact, f1):
    assert exact_match([prediction], [references]).value == exact
    assert token_f1([prediction], [references]).value == pytest.approx(f1)


def test_value_and_parts():
    found = token_f1(["a b c", "x"], ["b c d e", ["y", "x z"]], normalize="none")
    assert found.per_sample == pytest.approx((4 / 7, 2 / 3)) and found.value == pytest.approx((4 / 7 + 2 / 3) / 2)
    assert found.parts == pytest.approx({"precision": (2 / 3 + 1) / 2, "recall": (1 / 2 + 1 / 2) / 2})
    assert found.unscored == () and "normalize:none" in found.signature
    assert exact_match([], []).value is None and token_f1([], []).parts == {}


def test_not_normalized():
    assert exact_match(["The cat"], ["the cat"], normalize="none").value == 0
    assert exact_match([""], [["x", ""]], normalize="none").value == 1
    assert token_f1(["The cat"], ["the cat"], normalize="none").value == 0.5


def test_unicode_is_as_it_is():
    composed, apart = unicodedata.normalize("NFC", "café"), unicodedata.normalize("NFD", "café")
    assert exact_match([composed], [apart]).value == 0  # as in SQuAD
    assert exact_match(["貓 🐈"], ["貓 🐈"]).value == token_f1(["貓 🐈"], ["貓 🐈"]).value == 1


def test_wrong_arguments():
    with pytest.raises(ParameterError, match="2 predictions and 1 references"):
        exact_match(["a", "b"], ["a"])
    with pytest.raises(ParameterError, match="did you mean 'squad'"):
        token_f1(["a"], ["a"], normalize="sqad")


def test_long_texts():
    text = " ".join(f"w{i % 3000}" for i in range(10_000))
    assert token_f1([text], [text + " more"]).value == pytest.approx(20_000 / 20_001)
