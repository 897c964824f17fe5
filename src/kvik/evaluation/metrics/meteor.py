"""METEOR (Lavie and Agarwal 2007, "METEOR: an automatic metric for MT evaluation with high levels of correlation with human
judgments"), as nltk.translate.meteor_score defines it: not the Java program, which has weights by stage and paraphrases."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, NamedTuple

from kvik.evaluation.metrics.result import MetricResult, References, Unscored, check_pairs, mean_of, signature
from kvik.evaluation.metrics.wordnet import WordNet
from kvik.evaluation.metrics.words import porter, words
from kvik.params import choose
from kvik.params.checks import real

__all__ = ["WordTokenizer", "meteor"]

WordTokenizer = Literal["words", "whitespace"]
"""words: runs of letters and digits, and each other visible character. whitespace: what is between whitespace, for texts that
are tokenized already. nltk leaves the choice to its caller."""
TOKENIZERS: dict[WordTokenizer, Callable[[str], list[str]]] = {"words": words, "whitespace": str.split}

Placed = list[tuple[int, str]]
"""Tokens that are not matched yet, with their places, ascending."""


class _Score(NamedTuple):
    score: float
    precision: float
    recall: float
    penalty: float


class _Definition(NamedTuple):
    """stem, synonyms: of a word; synonyms None leaves that stage out."""

    stem: Callable[[str], str]
    synonyms: Callable[[str], Iterable[str]] | None
    alpha: float
    beta: float
    gamma: float


def meteor(
    predictions: Sequence[str],
    references: References,
    *,
    wordnet: str | os.PathLike[str] | WordNet | None = None,
    tokenize: WordTokenizer = "words",
    alpha: float = 0.9,
    beta: float = 3.0,
    gamma: float = 0.5,
) -> MetricResult:
    """Weighted F-mean of the words that are matched, less a penalty for every break in their order.

    Words in lower case are matched one to one: equal ones, then those of equal Porter stems, then, of what is left, stems that
    are synonyms. F-mean is P R / (alpha P + (1 - alpha) R), the penalty gamma (chunks / matches)^beta, a chunk being a run of
    matches that are neighbours on both sides. Of several references the best counts.

    wordnet: the folder of WordNet's database files (nothing is downloaded), or such a folder opened. Without it there is no
    stage of synonyms, and the signature says wordnet:none: that is less than nltk's METEOR. Needs nltk for the stemmer.

    In [0, 1]; 0 without a match; 1 is not reached, as even the same text is one chunk. A sample whose references have no token
    is not scored. value: the mean. parts: precision, recall and penalty, means over the samples' best references.
    """
    pairs = check_pairs(predictions, references)
    tokens = TOKENIZERS[choose("tokenize", tokenize, tuple(TOKENIZERS))]
    real("alpha", alpha, 0.0, 1.0)
    real("beta", beta, 0.0)
    real("gamma", gamma, 0.0, 1.0)
    stem = porter("meteor")
    opened = WordNet(os.fspath(wordnet)) if isinstance(wordnet, str | os.PathLike) else wordnet
    define = _Definition(stem, None if opened is None else opened.synonyms, alpha, beta, gamma)
    scores: list[_Score | None] = []
    for given, several in zip(predictions, pairs, strict=True):
        mine, *wanted = ([token.lower() for token in tokens(text)] for text in (given, *several))
        scores.append(max((_meteor(mine, one, define) for one in wanted if one), key=lambda s: s.score, default=None))
    signed = signature(
        "meteor", wordnet="none" if opened is None else f"sha256-{opened.digest}", tok=tokenize, alpha=alpha, beta=beta,
        gamma=gamma,
    )  # fmt: skip
    return _result(scores, signed)


def _result(scores: Sequence[_Score | None], signed: str) -> MetricResult:
    scored = [score for score in scores if score is not None]
    per_sample = tuple(None if score is None else score.score for score in scores)
    parts = {name: [getattr(score, name) for score in scored] for name in ("precision", "recall", "penalty")}
    return MetricResult(
        mean_of(per_sample), per_sample,
        tuple(Unscored(i, "no reference has a token") for i, score in enumerate(scores) if score is None), signed,
        {name: mean for name, found in parts.items() if (mean := mean_of(found)) is not None},
    )  # fmt: skip


def _meteor(prediction: list[str], reference: list[str], define: _Definition) -> _Score:
    pairs = sorted(_align(prediction, reference, define))
    if not pairs:
        return _Score(0.0, 0.0, 0.0, 0.0)
    precision, recall = len(pairs) / len(prediction), len(pairs) / len(reference)
    mean = precision * recall / (define.alpha * precision + (1 - define.alpha) * recall)
    chunks = 1 + sum((a + 1, b + 1) != after for (a, b), after in zip(pairs, pairs[1:], strict=False))
    penalty = define.gamma * (chunks / len(pairs)) ** define.beta
    return _Score((1 - penalty) * mean, precision, recall, penalty)


def _align(prediction: list[str], reference: list[str], define: _Definition) -> list[tuple[int, int]]:
    """Places of the words that are matched: equal words, then equal stems, then stems that are synonyms."""
    mine, theirs = list(enumerate(prediction)), list(enumerate(reference))
    pairs = _match(mine, theirs, lambda word: (word,))
    mine, theirs = ([(i, define.stem(word)) for i, word in left] for left in (mine, theirs))
    pairs += _match(mine, theirs, lambda word: (word,))
    synonyms = define.synonyms
    if synonyms is not None:
        pairs += _match(mine, theirs, lambda word: {word, *synonyms(word)})
    return pairs


def _match(mine: Placed, theirs: Placed, same: Callable[[str], Iterable[str]]) -> list[tuple[int, int]]:
    """Takes out of both what matches, and gives the places.

    From the last word of `mine` to the first, each takes the last word of `theirs` that is left and one of `same`.
    """
    places: dict[str, list[int]] = defaultdict(list)
    for place, word in theirs:
        places[word].append(place)
    pairs = []
    for place, word in reversed(mine):
        last = max((places[one] for one in same(word) if places.get(one)), key=lambda found: found[-1], default=None)
        if last is not None:
            pairs.append((place, last.pop()))
    taken_mine, taken_theirs = {a for a, _ in pairs}, {b for _, b in pairs}
    mine[:] = [one for one in mine if one[0] not in taken_mine]
    theirs[:] = [one for one in theirs if one[0] not in taken_theirs]
    return pairs
