"""Each metric against a slow twin that follows the definition word by word, and against figures worked out by hand."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvik.evaluation.metrics import determinism, distinct_n, mean_logprob, repetition_rate, self_bleu, words

TEXT = st.lists(st.sampled_from("abcd"), max_size=12)
TEXTS = st.lists(TEXT, max_size=5)


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
    texts = [t for t in texts if t]
    if len(texts) < 2:
        return None
    scores = []
    for i, sample in enumerate(texts):
        references = texts[:i] + texts[i + 1 :]
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
        scores.append(brevity * math.prod(float(p) for p in precisions) ** (1 / len(precisions)))
    return sum(scores) / len(scores)


@given(TEXTS, st.integers(1, 5))
def test_distinct(texts, n):
    assert distinct_n(texts, n) == slow_distinct(texts, n)


@given(TEXT, st.integers(1, 5))
def test_repetition(tokens, n):
    want = slow_repetition(tokens, n)
    assert repetition_rate(tokens, n) == (None if want is None else pytest.approx(want, abs=1e-12))


@given(TEXTS)
def test_self_bleu(texts):
    want, got = slow_self_bleu(texts), self_bleu(texts)
    assert got == (None if want is None else pytest.approx(want, abs=1e-12))
    assert got is None or 0 <= got <= 1


@given(TEXTS)
def test_self_bleu_is_that_of_another_implementation(texts):
    bleu = pytest.importorskip("sacrebleu.metrics").BLEU(
        tokenize="none", smooth_method="add-k", smooth_value=1, effective_order=True
    )
    texts = [t for t in texts if len(t) >= 4]  # with fewer it counts the order that is not there
    if len(texts) < 2:
        return
    joined = [" ".join(t) for t in texts]
    want = [bleu.sentence_score(t, joined[:i] + joined[i + 1 :]).score / 100 for i, t in enumerate(joined)]
    assert self_bleu(texts) == pytest.approx(sum(want) / len(want), abs=1e-9)


def test_by_hand():
    assert distinct_n(["abab", "ab"], 2) == 2 / 4
    assert repetition_rate("abcabc", 2) == pytest.approx(2 / 5)
    # against "the cat sat": matches 2 of 3 words, (1 + 1) / (2 + 1) pairs, (0 + 1) / (1 + 1) triples
    texts = [["the", "cat", "ran"], ["the", "cat", "sat"]]
    assert self_bleu(texts) == pytest.approx((2 / 3 * 2 / 3 * 1 / 2) ** (1 / 3))
    assert self_bleu([list("same"), list("same")]) == 1.0
    assert self_bleu([["a"], ["b"]]) == 0.0


def test_what_cannot_be_scored_is_none():
    assert distinct_n([], 1) is None and distinct_n([["a"]], 2) is None
    assert repetition_rate(["a", "b"], 3) is None
    assert self_bleu([["a"]]) is None and self_bleu([["a"], []]) is None
    assert mean_logprob([]) is None and determinism(["x"]) is None
    with pytest.raises(ValueError, match="at least 1"):
        distinct_n([["a"]], 0)


@given(st.lists(st.sampled_from("xyz"), min_size=2, max_size=8))
def test_determinism(outputs):
    pairs = [a == b for a, b in combinations(outputs, 2)]
    assert determinism(outputs) == pytest.approx(sum(pairs) / len(pairs))


def test_mean_logprob():
    assert mean_logprob([-1.0, -2.0, -6.0]) == -3.0
    assert mean_logprob([-0.1] * 10) == -0.1  # summed without rounding


def test_words():
    assert words("It's 3.5 km, naïve—yes") == ["It", "'", "s", "3", ".", "5", "km", ",", "naïve", "—", "yes"]
