"""ROUGE against rouge-score 0.1.2, to the last bit, and figures of its own tests."""

from __future__ import annotations

import random
import sys
from time import perf_counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvik.errors import ParameterError
from kvik.evaluation.metrics.rouge import KINDS, rouge, rouge2, rougeL, rougeLsum

rouge_scorer = pytest.importorskip("rouge_score.rouge_scorer")

WORD = st.sampled_from(["a", "b", "B", "c", "running", "runs", "skies", "w1", "it's", "x-y", "naïve", "İ", "K", "貓", "🐈", "\n", "\n\n", " "])  # fmt: skip
TEXT = st.lists(WORD, max_size=12).map(" ".join) | st.text(max_size=10)


def oracle(prediction, several, stem):
    return rouge_scorer.RougeScorer(list(KINDS), use_stemmer=stem).score_multi(several, prediction)


def same(kind, prediction, several, stem, want):
    found = rouge([prediction], [several], kind=kind, stem=stem)
    assert found.per_sample == (found.value,) == (want.fmeasure,)
    assert found.parts == {"precision": want.precision, "recall": want.recall}


@settings(deadline=None)
@given(TEXT, st.lists(TEXT, min_size=1, max_size=3), st.booleans())
def test_as_rouge_score(prediction, several, stem):
    want = oracle(prediction, several, stem)
    for kind in KINDS:
        if any(c in "abcdefghijklmnopqrstuvwxyz0123456789" for text in several for c in text.lower()):
            same(kind, prediction, several, stem, want[kind])
        else:
            assert rouge([prediction], [several], kind=kind, stem=stem).per_sample == (None,)
            assert want[kind].fmeasure == 0


@pytest.mark.parametrize("seed", range(6))
def test_among_many_longest_subsequences_the_same(seed):
    draw = random.Random(seed)
    letters = "abcdef"[: 2 + seed % 5]
    texts = ["\n".join(" ".join(draw.choices(letters, k=draw.randint(0, 40))) for _ in range(6)) for _ in range(3)]
    want = oracle(texts[0], texts[1:], False)
    for kind in KINDS:
        same(kind, texts[0], texts[1:], False, want[kind])


# From rouge_scorer_test.py of rouge-score 0.1.2: kind, stem, prediction, references, precision, recall, F1
GOLDEN = [
    ("rouge1", False, "testing", ["testing one two"], 1, 1 / 3, 1 / 2),
    ("rouge2", False, "testing one", ["testing one two"], 1, 1 / 2, 2 / 3),
    ("rougeL", False, "testing two", ["testing one two"], 1, 2 / 3, 4 / 5),
    ("rouge1", False, "text first", ["first text", "first something"], 1, 1, 1),
    ("rouge2", False, "text first", ["first text", "first something"], 0, 0, 0),
    ("rougeL", False, "text first", ["first text", "first something"], 0.5, 0.5, 0.5),
    ("rougeLsum", True, "Second sentence.\nFirst Sentence.", ["First sentence.\nSecond Sentence."], 1, 1, 1),
    ("rougeLsum", True, "Second sentence. First Sentence.", ["First sentence. Second Sentence."], 0.5, 0.5, 0.5),
    # section 3.2 of Lin 2004
    ("rougeLsum", False, "w1 w2 w6 w7 w8\nw1 w3 w8 w9 w5", ["w1 w2 w3 w4 w5"], 0.4, 0.8, 8 / 15),
    ("rougeLsum", False, "/", ["w1 w2 w3 w4 w5"], 0, 0, 0),
]


@pytest.mark.parametrize(("kind", "stem", "prediction", "several", "precision", "recall", "f1"), GOLDEN)
def test_golden(kind, stem, prediction, several, precision, recall, f1):
    found = rouge([prediction], [several], kind=kind, stem=stem)
    assert found.value == pytest.approx(f1) and found.parts == pytest.approx({"precision": precision, "recall": recall})


def test_what_cannot_be_scored():
    found = rougeL(["a cat", "a cat", "", "a"], ["a cat", "一只猫", "a", " \n "])
    assert found.per_sample == (1.0, None, 0.0, None) and found.value == 0.5
    assert [(one.index, one.reason) for one in found.unscored] == [
        (1, "no reference has a token (a-z, 0-9)"), (3, "no reference has a token (a-z, 0-9)"),
    ]  # fmt: skip
    nothing = rouge2(["x"], ["…"])
    assert nothing.value is None and nothing.parts == {} and nothing.signature.startswith("rouge2|tok:a-z0-9|stem:no|")
    assert rouge2(["x"], ["x"]).value == 0  # no pair of words on either side: rouge-score's 0


def test_words_of_three_letters_are_not_stemmed():
    assert rouge(["was"], ["wa"], kind="rouge1", stem=True).value == 0  # Porter would make "wa" of it
    assert rouge(["cats"], ["cat"], kind="rouge1", stem=True).value == 1


def test_wrong_arguments(monkeypatch):
    with pytest.raises(ParameterError, match=r"must be one of rouge1.*did you mean 'rougeL"):
        rouge(["a"], ["a"], kind="rougel")
    with pytest.raises(ParameterError, match="1 predictions and 2 references"):
        rouge(["a"], ["a", "b"])
    monkeypatch.setitem(sys.modules, "nltk.stem.porter", None)
    with pytest.raises(ParameterError, match=r'stem=True needs nltk: pip install "kvik\[eval\]"'):
        rouge(["a"], ["a"], stem=True)
    assert rouge(["a"], ["a"]).value == 1


def test_long_texts():
    draw = random.Random(0)
    text = [f"w{draw.randrange(500)}" for _ in range(10_000)]
    other = [word for word in text if draw.random() < 0.5]
    begun = perf_counter()
    for function in (rougeL, rougeLsum):
        found = function([" ".join(other)], [" ".join(text)])
        assert found.parts == pytest.approx({"precision": 1, "recall": len(other) / 10_000})
    assert perf_counter() - begun < 10  # a table of 50,000,000 cells takes longer
