"""How varied texts are: within one, and among samples of one prompt. No references: they are taken only to be called as the others.

Tokens are `words`; n-grams do not reach from one text into the next. What lengths do to these figures is said with each.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from typing import NamedTuple

from kvik.errors import ParameterError
from kvik.evaluation.metrics.result import MetricResult, References, Unscored, check_texts, mean_of, signature
from kvik.evaluation.metrics.words import words
from kvik.params.checks import integer

__all__ = ["distinct_n", "repetition", "self_bleu"]

BLEU_ORDER = 4

Gram = tuple[str, ...]


def distinct_n(predictions: Sequence[str], references: References | None = None, *, n: int = 2) -> MetricResult:
    """Different n-grams over all n-grams, of all texts together: that is `value`. per_sample: of each text by itself.

    In (0, 1], 1 where no n-gram comes twice; a text without an n-gram is not scored. It falls with length and with the number
    of texts: compare equal ones. Li et al. 2016, "A diversity-promoting objective function", arXiv:1510.03055.
    """
    grams = _grams(predictions, n)
    together = [gram for found in grams for gram in found]
    return MetricResult(
        len(set(together)) / len(together) if together else None,
        tuple(len(set(found)) / len(found) if found else None for found in grams),
        _too_short(grams, n), signature(f"distinct_{n}", tok="words"),
    )  # fmt: skip


def repetition(predictions: Sequence[str], references: References | None = None, *, n: int = 4) -> MetricResult:
    """Share of a text's n-grams that occurred in it before: 1 - different n-grams / n-grams. value: the mean of the texts.

    In [0, 1), 0 where none comes twice; a text without an n-gram is not scored. It is seq-rep-n of Welleck et al. 2019,
    "Neural text generation with unlikelihood training", arXiv:1908.04319.
    """
    grams = _grams(predictions, n)
    rates = tuple(1 - len(set(found)) / len(found) if found else None for found in grams)
    return MetricResult(mean_of(rates), rates, _too_short(grams, n), signature(f"repetition_{n}", tok="words"))


def self_bleu(
    predictions: Sequence[str], references: References | None = None, *, group: Sequence[Hashable] | None = None
) -> MetricResult:
    """How alike samples are: BLEU of each with all the others of its group as references; value is the mean.

    group: which one each prediction is of, its prompt mostly; without it all are of one. In [0, 1], 1 where all of a group are
    the same. Texts without words are left out; one that is alone in its group is not scored. Zhu et al. 2018, "Texygen",
    arXiv:1802.01886.

    BLEU is that of Papineni et al. 2002 for one sentence: geometric mean of clipped n-gram precisions, n = 1 to 4 as far
    as the sample has n-grams, times exp(1 - r / c) where the sample's length c is below r, the reference length nearest
    to it (the shorter of two). For n > 1 one is added to matches and total (Lin and Och 2004), so that samples without a
    common 4-gram can be told apart. No further tokenization, case kept.
    """
    texts = [words(text) for text in check_texts(predictions)]
    if group is not None and len(group) != len(texts):
        raise ParameterError(f"there are {len(texts)} predictions and the groups of {len(group)}")
    members: dict[Hashable, list[int]] = defaultdict(list)
    for i, tokens in enumerate(texts):
        if tokens:
            members[None if group is None else group[i]].append(i)
    scores: list[float | None] = [None] * len(texts)
    for together in members.values():
        if len(together) > 1:
            for i, score in zip(together, _bleu_of_each([texts[i] for i in together]), strict=True):
                scores[i] = score
    missing = tuple(
        Unscored(i, "no other prediction to compare with" if texts[i] else "it has no words")
        for i, score in enumerate(scores)
        if score is None
    )
    told = signature("self_bleu", tok="words", order=BLEU_ORDER, smooth="add-k[1]", eff=True, groups=group is not None)
    return MetricResult(mean_of(scores), tuple(scores), missing, told)


def _grams(predictions: Sequence[str], n: int) -> list[list[Gram]]:
    integer("n", n, 1)
    return [_ngrams(words(text), n) for text in check_texts(predictions)]


def _ngrams(tokens: Sequence[str], n: int) -> list[Gram]:
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


def _too_short(grams: Sequence[Sequence[Gram]], n: int) -> tuple[Unscored, ...]:
    return tuple(Unscored(i, f"it has fewer than {n} words") for i, found in enumerate(grams) if not found)


class _Most(NamedTuple):
    """Of an n-gram: how often the text has it that has it most often, which text that is, and how often any other has it."""

    count: int
    holder: int
    elsewhere: int


def _bleu_of_each(texts: Sequence[Sequence[str]]) -> list[float]:
    """BLEU of each text with the others as references; at least two, each with tokens."""
    counts = [[Counter(_ngrams(tokens, n)) for n in range(1, BLEU_ORDER + 1)] for tokens in texts]
    most: dict[Gram, _Most] = {}
    for i, orders in enumerate(counts):
        for gram, count in (item for grams in orders for item in grams.items()):
            best = most.get(gram, _Most(0, -1, 0))
            most[gram] = (
                _Most(count, i, best.count) if count > best.count else best._replace(elsewhere=max(count, best.elsewhere))
            )
    nearest = _nearest([len(tokens) for tokens in texts])
    return [_bleu(i, len(tokens), nearest[i], counts[i], most) for i, tokens in enumerate(texts)]


def _bleu(text: int, length: int, nearest: int, counts: list[Counter[Gram]], most: dict[Gram, _Most]) -> float:
    logs = []
    for order, grams in enumerate(counts[:length]):
        total = grams.total()
        matches = 0
        for gram, count in grams.items():
            best = most[gram]
            matches += min(count, best.elsewhere if best.holder == text else best.count)
        add = 1 if order else 0
        if matches + add == 0:
            return 0.0
        logs.append(math.log((matches + add) / (total + add)))
    return math.exp(math.fsum(logs) / len(logs) + min(0.0, 1 - nearest / length))


def _nearest(lengths: Sequence[int]) -> list[int]:
    """For each text the length nearest to its own among the others', the shorter of two: a neighbour in order of length."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    found = [0] * len(lengths)
    for at, i in enumerate(order):
        beside = order[max(0, at - 1) : at] + order[at + 1 : at + 2]
        found[i] = min((lengths[j] for j in beside), key=lambda other: (abs(other - lengths[i]), other))
    return found
