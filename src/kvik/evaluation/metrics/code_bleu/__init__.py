"""CodeBLEU: how alike programs are in words, keywords, syntax and data flow."""

from __future__ import annotations

from collections.abc import Sequence, Set
from functools import partial
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from kvik.errors import ParameterError
from kvik.evaluation.metrics.code_bleu.dataflow import TooManySteps, data_flow, shared_flow
from kvik.evaluation.metrics.code_bleu.languages import LANGUAGES, Language
from kvik.evaluation.metrics.code_bleu.ngrams import NGRAM_COLUMNS, count_ngrams, ngram_match, weighted_ngram_match
from kvik.evaluation.metrics.code_bleu.trees import Shapes, Source, parse, versions
from kvik.evaluation.metrics.result import MetricResult, References, Sums, Unscored, check_pairs
from kvik.params.checks import choose, real

__all__ = ["LANGUAGES", "code_bleu"]

Floats = NDArray[np.float64]
Tokens = Literal["space", "syntax"]

COMPONENTS = ("ngram", "weighted_ngram", "syntax", "dataflow")
COLUMNS = NGRAM_COLUMNS + 4
MAX_BYTES = 1_000_000


def code_bleu(
    predictions: Sequence[str],
    references: References,
    *,
    language: str,
    weights: Sequence[float] = (0.25, 0.25, 0.25, 0.25),
    tokens: Tokens = "space",
) -> MetricResult:
    """CodeBLEU: a weighted mean of four matches, in [0, 1]. Ren et al. 2020, "CodeBLEU", arXiv:2009.10297.

    language: an entry of LANGUAGES. weights: of the components (the paper's alpha, beta, gamma, delta). tokens: n-grams are
    of what stands between spaces, as the authors' implementation has it, or of the tokens of the language.

    ngram is BLEU, weighted_ngram is n-gram recall with keywords at 1 and other tokens at 0.2 (see ngrams.py); syntax is the
    share of the reference's subtrees, names and values left out, that the prediction has too; dataflow the share of its
    data-flow items (see dataflow.py). Value and parts are of the corpus, counts added before they are divided, as in the
    authors' calc_code_bleu; per_sample is each sample alone. Several references of a sample are all counted, but for BLEU.
    Comments and docstrings count in n-grams only. Code that does not parse is scored on the tree that tree-sitter's error
    recovery gives; part `unparsable` is the share of such predictions. An empty prediction scores 0.

    A component that does not exist is left out and the others weigh more: a reference may have no data flow (the authors'
    implementation puts 0; the package `codebleu` 1, also for a match of 0). Unscored are samples with a reference without
    tokens, with more than 1,000,000 bytes, or with a data flow of more than 5,000,000 steps, and those whose only weighted component
    does not exist.

    Agrees with `codebleu` 0.7 on the same grammars, including what differs from the paper: subtrees are not clipped, a
    reference's subtree counts as often as it comes if the prediction has it once. It differs on purpose where that
    implementation depends on Python's random order of strings (sources merged in loops: here sorted), cuts tokens at wrong
    places (beside characters that are not ASCII), leaves out the body of a `for` with an `else`, drops the whole data flow
    (deep or broken code), and removes comments by tokens or patterns (here by syntax; a function of only a docstring stays
    valid, comments are gone from broken code too).

    Raises ParameterError for an unknown language (the nearest is named), weights out of range, tree-sitter not installed.
    """
    samples = check_pairs(predictions, references)
    spoken = LANGUAGES[choose("language", language, tuple(LANGUAGES))]
    choose("tokens", tokens, ("space", "syntax"))
    shares = _weights(weights)
    counts = np.zeros((len(samples), COLUMNS))
    unscored: list[Unscored] = []
    broken = 0
    for index, (prediction, given) in enumerate(zip(predictions, samples, strict=True)):
        row = _counted(prediction, given, spoken, tokens)
        if isinstance(row, str):
            unscored.append(Unscored(index, row))
        else:
            counts[index], unparsable = row
            broken += unparsable
    scored = counts.any(axis=1)
    per_sample = [float(score) if there else np.nan for score, there in zip(_score(shares, counts), scored, strict=True)]
    for index in np.flatnonzero(scored & np.isnan(per_sample)):
        unscored.append(Unscored(int(index), "the only components with a weight do not exist: its reference has no data flow"))
    whole = counts.sum(axis=0, keepdims=True)
    value = float(_score(shares, whole)[0]) if scored.any() else np.nan
    parts = {name: float(part[0]) for name, part in _components(whole).items() if scored.any() and not np.isnan(part[0])}
    if scored.any():
        parts["unparsable"] = broken / int(scored.sum())
    return MetricResult(
        None if np.isnan(value) else value,
        tuple(None if np.isnan(score) else score for score in per_sample),
        tuple(sorted(unscored, key=lambda entry: entry.index)),
        f"code_bleu|language:{language}|weights:{','.join(f'{w:g}' for w in shares)}|tokens:{tokens}|"
        f"{versions(spoken.grammar)}|version:1",
        parts,
        sums=Sums(counts, partial(_score, shares)),
    )
