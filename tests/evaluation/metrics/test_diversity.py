"""Each metric against a slow twin that follows the definition word by word, and against figures worked out by hand."""

from __future__ import annotations

import math
import random
from fractions import Fraction
from itertools import combinations
from time import perf_counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvik.errors import ParameterError
from kvik.evaluation.metrics import determinism, distinct_n, mean_logprob, repetition, self_bleu, words

TEXT = st.lists(st.sampled_from("abcd"), max_size=12)
TEXTS = st.lists(TEXT, max_size=5)


def joined(texts):
    return [" ".join(tokens) for tokens in texts]


def grams(tokens, n):
    return [tuple(tokens[i : i + n]) for i in range(len(tokens)) if i + n <= len(tokens)]


def slow_distinct(texts, n):
    seen, total = [], 0
    for tokens in texts:
        for gram in grams(tokens, n):
            total += 1
            if gram not in seen:
                seen.append(gram)
    return None if total == 0 else len(seen) / total


def slow_repetition(tokens, n):
    found = grams(tokens, n)
    return None if not found else sum(gram in found[:i] for i, gram in enumerate(found)) / len(found)


def slow_self_bleu(texts):
    """One entry a text; None for a text without words and for one that is alone."""
    return [slow_bleu(text, [t for j, t in enumerate(texts) if j != i and t]) for i, text in enumerate(texts)]


def slow_bleu(sample, references):
    if not sample or not references:
        return None
    precisions = []
    for n in range(1, 5):
        mine = grams(sample, n)
        if not mine:
            break
        matches = 0
        for gram in set(mine):
            matches += min(mine.count(gram), max(grams(r, n).count(gram) for r in references))
        add = 0 if n == 1 else 1
        precisions.append(Fraction(matches + add, len(mine) + add))
    nearest = sorted((abs(len(r) - len(sample)), len(r)) for r in references)[0][1]
    brevity = 1.0 if len(sample) >= nearest else math.exp(1 - nearest / len(sample))
    return brevity * math.prod(float(p) for p in precisions) ** (1 / len(precisions))


def near(figures):
    return tuple(None if one is None else pytest.approx(one, abs=1e-12) for one in figures)


def mean(figures):
    there = [one for one in figures if one is not None]
    return sum(there) / len(there) if there else None


@given(TEXTS, st.integers(1, 5))
def test_distinct(texts, n):
    found = distinct_n(joined(texts), n=n)
    assert found.value == slow_distinct(texts, n)
    assert found.per_sample == tuple(slow_distinct([text], n) for text in texts)
    assert {one.index for one in found.unscored} == {i for i, text in enumerate(texts) if len(text) < n}


@given(TEXTS, st.integers(1, 5))
def test_repetition(texts, n):
    want, found = [slow_repetition(text, n) for text in texts], repetition(joined(texts), n=n)
    assert found.per_sample == near(want) and (found.value,) == near([mean(want)])
    assert {one.index for one in found.unscored} == {i for i, text in enumerate(texts) if len(text) < n}


@given(TEXTS)
def test_self_bleu(texts):
    want, found = slow_self_bleu(texts), self_bleu(joined(texts))
    assert found.per_sample == near(want) and (found.value,) == near([mean(want)])
    assert found.value is None or 0 <= found.value <= 1
    reasons = {one.index: one.reason for one in found.unscored}
    assert set(reasons) == {i for i, one in enumerate(want) if one is None}
    assert all(reasons[i] == "it has no words" for i, text in enumerate(texts) if not text)


@given(st.lists(st.tuples(TEXT, st.sampled_from(["p", "q", 3])), max_size=8))
def test_self_bleu_by_groups(samples):
    texts, groups = [text for text, _ in samples], [group for _, group in samples]
    want = [None] * len(texts)
    for group in set(groups):
        members = [i for i, one in enumerate(groups) if one == group]
        for i, score in zip(members, slow_self_bleu([texts[i] for i in members]), strict=True):
            want[i] = score
    found = self_bleu(joined(texts), group=groups)
    assert found.per_sample == near(want) and "groups:yes" in found.signature


@given(TEXTS)
def test_self_bleu_is_that_of_another_implementation(texts):
    bleu = pytest.importorskip("sacrebleu.metrics").BLEU(
        tokenize="none", smooth_method="add-k", smooth_value=1, effective_order=True
    )
    whole = joined(t for t in texts if len(t) >= 4)  # with fewer it counts the order that is not there
    if len(whole) < 2:
        return
    want = [bleu.sentence_score(t, whole[:i] + whole[i + 1 :]).score / 100 for i, t in enumerate(whole)]
    assert self_bleu(whole).per_sample == pytest.approx(want, abs=1e-9)


@given(TEXTS)
def test_self_bleu_is_that_of_nltk(texts):
    nltk = pytest.importorskip("nltk.translate.bleu_score")
    whole = [t for t in texts if len(t) >= 4]
    if len(whole) < 2:
        return
    want = [
        nltk.sentence_bleu(whole[:i] + whole[i + 1 :], t, smoothing_function=nltk.SmoothingFunction().method2)
        for i, t in enumerate(whole)
    ]
    assert self_bleu(joined(whole)).per_sample == pytest.approx(want, abs=1e-9)


def test_by_hand():
    assert distinct_n(["a b a b", "a b"], n=2).value == 2 / 4
    assert repetition(["a b c a b c"], n=2).value == pytest.approx(2 / 5)
    # against "the cat sat": matches 2 of 3 words, (1 + 1) / (2 + 1) pairs, (0 + 1) / (1 + 1) triples
    assert self_bleu(["the cat ran", "the cat sat"]).value == pytest.approx((2 / 3 * 2 / 3 * 1 / 2) ** (1 / 3))
    assert self_bleu(["s a m e", "s a m e"]).value == 1.0
    assert self_bleu(["a", "b"]).value == 0.0


def test_what_cannot_be_scored_is_none():
    assert distinct_n([], n=1).value is None and distinct_n(["a"], n=2).value is None
    assert repetition(["a b"], n=3).value is None and repetition(["a b"], n=3).unscored[0].reason == "it has fewer than 3 words"
    assert self_bleu(["a"]).value is None and self_bleu(["a", ""]).value is None
    assert mean_logprob([]) is None and determinism(["x"]) is None
    with pytest.raises(ParameterError, match="at least 1"):
        distinct_n(["a"], n=0)
    with pytest.raises(ParameterError, match="2 predictions and the groups of 1"):
        self_bleu(["a", "b"], group=["p"])
    with pytest.raises(ParameterError, match="prediction 1 must be a str"):
        repetition(["a", None])


def test_many_texts():
    draw = random.Random(0)
    texts = [" ".join(f"w{draw.randrange(200)}" for _ in range(60)) for _ in range(1000)]
    begun = perf_counter()
    assert 0 < self_bleu(texts).value < 1
    assert perf_counter() - begun < 10  # each text against each other takes longer


@given(st.lists(st.sampled_from("xyz"), min_size=2, max_size=8))
def test_determinism(outputs):
    pairs = [a == b for a, b in combinations(outputs, 2)]
    assert determinism(outputs) == pytest.approx(sum(pairs) / len(pairs))


def test_mean_logprob():
    assert mean_logprob([-1.0, -2.0, -6.0]) == -3.0
    assert mean_logprob([-0.1] * 10) == -0.1  # summed without rounding


def test_words():
    assert words("It's 3.5 km, naïve—yes") == ["It", "'", "s", "3", ".", "5", "km", ",", "naïve", "—", "yes"]
