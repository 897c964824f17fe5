"""CodeBLEU: how alike programs are in words, keywords, syntax and data flow."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from kvik.errors import ParameterError
from kvik.evaluation.metrics.code_bleu.languages import LANGUAGES
from kvik.evaluation.metrics.code_bleu.scoring import (
    COLUMNS,
    COMPONENTS,
    TOKENS,
    Tokens,
    Unscorable,
    components,
    count,
    score,
)
from kvik.evaluation.metrics.code_bleu.trees import versions
from kvik.evaluation.metrics.result import MetricResult, References, Sums, Unscored, check_pairs, signature
from kvik.params.checks import choose, real

__all__ = ["LANGUAGES", "code_bleu"]

Floats = NDArray[np.float64]


def code_bleu(
    predictions: Sequence[str],
    references: References,
    *,
    language: str,
    weights: Sequence[float] = (0.25, 0.25, 0.25, 0.25),
    tokens: Tokens = "space",
) -> MetricResult:
    """CodeBLEU: a weighted mean of four matches, in [0, 1]. Ren et al. 2020, "CodeBLEU", arXiv:2009.10297.

    language: an entry of LANGUAGES. weights: of the components (the paper's alpha, beta, gamma, delta), divided by their
    sum. tokens: n-grams are of what stands between spaces, as the authors' implementation has it, or of the tokens of the
    language.

    ngram is BLEU, weighted_ngram n-gram recall with keywords at 1 and other tokens at 0.2 (ngrams.py); syntax is the share
    of the reference's subtrees, names and values left out, that the prediction has too; dataflow the share of its data-flow
    items (dataflow.py). Value and parts are of the corpus: counts are added before they are divided, as in the authors'
    implementation; per_sample is each sample alone. Of several references BLEU takes the best matches, the other components
    add all up: a prediction that is one of two different references has less than 1.
    Comments and docstrings count in n-grams only. Code that does not parse is scored on the tree that tree-sitter's error
    recovery makes of it; the part `unparsable` is the share of such predictions. An empty prediction scores 0. A text of
    fewer than four tokens has no 4-grams, and so less than 1 in the first two components even beside itself.

    A component that does not exist is left out and the others weigh more: a reference may have no data flow (the authors'
    implementation puts 0; the package `codebleu` 1, also for a match of 0). Unscored are samples with a reference without
    code, with more than 100,000 bytes, with a data flow of more than 5,000,000 steps, and those whose only weighted
    component does not exist.

    Agrees with the package `codebleu`, also where that differs from the paper: subtrees are not clipped, one that the
    reference has twice and the prediction once counts twice. It differs on purpose where `codebleu` depends on Python's
    random order of strings (sources merged in loops; here sorted), cuts tokens at wrong places (after characters that are not
    ASCII), leaves out the body of a `for` with an `else`, drops a whole data flow (deep code; text assigned to an attribute),
    punishes predictions of one token in weighted_ngram, and in code that does not parse: comments are left out there too.

    Raises ParameterError for an unknown language (the nearest is named), weights out of range, tree-sitter not installed.
    """
    samples = check_pairs(predictions, references)
    spoken = LANGUAGES[choose("language", language, tuple(LANGUAGES))]
    choose("tokens", tokens, TOKENS)
    shares = _shares(weights)
    grammar = versions(spoken.grammar)
    counts = np.zeros((len(samples), COLUMNS))
    unscored: dict[int, str] = {}
    broken = 0
    for index, (prediction, given) in enumerate(zip(predictions, samples, strict=True)):
        try:
            counts[index], unparsable = count(prediction, given, spoken, tokens)
        except Unscorable as reason:
            unscored[index] = str(reason)
        else:
            broken += unparsable
    scored = len(samples) - len(unscored)
    per_sample: list[float | None] = [None] * len(samples)
    for index, found in enumerate(score(shares, counts)):
        if index not in unscored and np.isnan(found):
            unscored[index] = "its reference has no data flow, and nothing else has a weight"
        elif index not in unscored:
            per_sample[index] = float(found)
    value, parts = _whole(counts, shares, scored, broken)
    weighing = ",".join(f"{share:g}" for share in shares)
    signed = signature("code_bleu", language=language, weights=weighing, tokens=tokens, **grammar)
    reasons = tuple(Unscored(index, unscored[index]) for index in sorted(unscored))
    return MetricResult(value, tuple(per_sample), reasons, signed, parts, Sums(counts, partial(score, shares)))


def _whole(counts: Floats, shares: Floats, scored: int, broken: int) -> tuple[float | None, dict[str, float]]:
    """The corpus: its value, and its components with the share of predictions that do not parse."""
    if not scored:
        return None, {}
    added = counts.sum(axis=0, keepdims=True)
    value = float(score(shares, added)[0])
    parts = {name: float(part[0]) for name, part in components(added).items() if not np.isnan(part[0])}
    return None if np.isnan(value) else value, parts | {"unparsable": broken / scored}


def _shares(weights: Sequence[float]) -> Floats:
    """The weights as shares of their sum: [4]."""
    if len(weights) != len(COMPONENTS):
        raise ParameterError(f"weights must be {len(COMPONENTS)}, of {', '.join(COMPONENTS)}; got {len(weights)}")
    for name, weight in zip(COMPONENTS, weights, strict=True):
        real(f"weight of {name}", weight, 0.0, 1e6)
    shares = np.array(weights, np.float64)
    if not shares.any():
        raise ParameterError("weights must not all be 0")
    shares /= shares.sum()
    return shares
