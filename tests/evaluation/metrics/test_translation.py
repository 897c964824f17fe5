"""BLEU, chrF and TER against sacrebleu called as its own pages say, and the figures there."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvik.errors import ParameterError
from kvik.evaluation.metrics.translation import bleu, chrf, ter

sacrebleu = pytest.importorskip("sacrebleu.metrics")

# The example of sacrebleu's README, with its figures.
SYSTEM = ["The dog bit the man.", "It wasn't surprising.", "The man had just bitten him."]
REFERENCES = [
    ["The dog bit the man.", "The dog had bit the man."],
    ["It was not unexpected.", "No one was surprised."],
    ["The man bit him first.", "The man had bitten the dog."],
]

WORD = st.sampled_from(
    ["the", "The", "cat", "sat", "on", "3.5", "mat.", "“x”", "na\u00efve", "nai\u0308ve", "貓", "🐈", "&amp;"]
)
FULL = st.lists(WORD, min_size=1, max_size=9).map(" ".join)
SAMPLES = st.lists(st.tuples(FULL | st.just(""), st.lists(FULL, min_size=1, max_size=3)), min_size=1, max_size=4)


def streams(several):
    """Of lists of references by sample, sacrebleu's by stream; None where a sample has fewer."""
    return [[one[i] if i < len(one) else None for one in several] for i in range(max(map(len, several)))]


def same(found, predictions, several, metric, sentences):
    corpus = metric.corpus_score(predictions, streams(several))
    assert found.value == pytest.approx(corpus.score, abs=1e-9)
    assert found.signature == f"{corpus.name}|{metric.get_signature()}"
    want = [sentences.sentence_score(one, refs).score for one, refs in zip(predictions, several, strict=True)]
    assert found.per_sample == pytest.approx(want, abs=1e-9)


@settings(deadline=None)
@given(SAMPLES, st.sampled_from(["13a", "intl", "char", "zh", "none"]), st.booleans(), st.sampled_from([("exp", None), ("floor", 0.2), ("add-k", None), ("add-k", 2), ("none", None)]))  # fmt: skip
def test_bleu(samples, tokenize, lowercase, smoothing):
    predictions, several = map(list, zip(*samples, strict=True))
    told = {"tokenize": tokenize, "lowercase": lowercase, "smooth_method": smoothing[0], "smooth_value": smoothing[1]}
    found = bleu(predictions, several, **told)
    same(found, predictions, several, sacrebleu.BLEU(**told), sacrebleu.BLEU(**told, effective_order=True))


@settings(deadline=None)
@given(SAMPLES, st.integers(1, 6), st.integers(0, 2), st.integers(0, 3), st.booleans(), st.booleans(), st.booleans())
def test_chrf(samples, chars, words, beta, lowercase, whitespace, eps):
    predictions, several = map(list, zip(*samples, strict=True))
    told = {
        "char_order": chars, "word_order": words, "beta": beta, "lowercase": lowercase, "whitespace": whitespace,
        "eps_smoothing": eps,
    }  # fmt: skip
    metric = sacrebleu.CHRF(**told)
    same(chrf(predictions, several, **told), predictions, several, metric, sacrebleu.CHRF(**told))


@settings(deadline=None)
@given(SAMPLES, st.booleans(), st.booleans(), st.booleans())
def test_ter(samples, normalized, no_punct, case):
    predictions, several = map(list, zip(*samples, strict=True))
    told = {"normalized": normalized, "no_punct": no_punct, "case_sensitive": case}
    metric = sacrebleu.TER(**told)
    same(ter(predictions, several, **told), predictions, several, metric, sacrebleu.TER(**told))


def test_golden(caplog):
    found = bleu(SYSTEM, REFERENCES)
    assert found.value == pytest.approx(48.530827009929865)
    assert found.signature.startswith("BLEU|nrefs:2|case:mixed|eff:no|tok:13a|smooth:exp|version:")
    assert chrf(SYSTEM, REFERENCES).value == pytest.approx(59.73, abs=0.01)
    one = [*REFERENCES[:2], "The man bit him first."]
    assert "|nrefs:var|" in bleu(SYSTEM, one).signature and "|nrefs:var|" in ter(SYSTEM, one).signature
    assert chrf(SYSTEM, REFERENCES, word_order=2).signature.startswith("chrF2++|")
    assert not caplog.records  # sacrebleu warns where its sentence BLEU is used against its advice


@pytest.mark.parametrize("metric", [bleu, chrf, ter])
def test_what_cannot_be_scored(metric):
    found = metric(["the cat sat here", "x", "", "y"], ["the cat sat there", "", "the cat", [" ", "\n"]])
    assert [(one.index, one.reason) for one in found.unscored] == [
        (1, "the reference is empty"),
        (3, "the reference is empty"),
    ]
    assert found.per_sample[1] is None and found.per_sample[3] is None
    assert found.per_sample[2] == (100 if metric is ter else 0)
    assert found.value == metric(["the cat sat here", ""], ["the cat sat there", "the cat"]).value
    nothing = metric(["x"], [""])
    assert nothing.value is None and nothing.per_sample == (None,) and nothing.signature
    assert metric([], []).value is None


@pytest.mark.parametrize("metric", [bleu, chrf, ter])
def test_sums_make_the_value_of_any_samples(metric):
    predictions, references = [*SYSTEM, "x"], [*REFERENCES, ""]
    found = metric(predictions, references)
    drawn = [[0, 1, 2, 3], [2, 2, 3, 1], [1, 1, 1, 1]]
    want = [metric([predictions[i] for i in some], [references[i] for i in some]).value for some in drawn]
    sums = np.array([found.sums.counts[some].sum(axis=0) for some in drawn])
    assert found.sums.value(sums) == pytest.approx(want) and want[0] == found.value
    assert np.isnan(found.sums.value(found.sums.counts[[3]])).all()  # nothing that counts


def test_wrong_arguments():
    with pytest.raises(ParameterError, match="3 predictions and 2 references"):
        bleu(SYSTEM, REFERENCES[:2])
    with pytest.raises(ParameterError, match="tokenize must be one of 13a"):
        bleu(SYSTEM, REFERENCES, tokenize="spm")  # would download a model
    with pytest.raises(ParameterError, match="smooth_value goes with"):
        bleu(SYSTEM, REFERENCES, smooth_value=1.0)
    with pytest.raises(ParameterError, match="asian_support changes nothing"):
        ter(SYSTEM, REFERENCES, asian_support=True)
    with pytest.raises(ParameterError, match="char_order must be at least 1"):
        chrf(SYSTEM, REFERENCES, char_order=0)


def test_a_tokenizer_that_is_not_there(monkeypatch):
    import sacrebleu.tokenizers.tokenizer_ja_mecab as mecab

    monkeypatch.setattr(mecab, "MeCab", None)
    with pytest.raises(ParameterError, match=r'pip install "sacrebleu\[ja\]"'):
        bleu(["x"], ["x"], tokenize="ja-mecab")


def test_long_texts():
    draw = random.Random(0)
    text = " ".join(f"w{draw.randrange(500)}" for _ in range(10_000))
    assert ter([text], [text]).unscored[0].reason == "10000 words are more than max_words 500"
    assert ter(["a b c", "a"], ["a b", "a"], max_words=2).per_sample == (None, 0.0)
    assert (
        ter(["一只猫"], ["一只狗"], max_words=2, normalized=True, asian_support=True).value is None
    )  # three characters
    assert bleu([text], [text]).value == pytest.approx(100) and chrf([text], [text]).value == pytest.approx(100)
