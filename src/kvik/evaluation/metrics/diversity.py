"""How varied texts are: within one, and among samples of one prompt."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Hashable, Sequence

__all__ = ["distinct_n", "repetition_rate", "self_bleu", "words"]

Tokens = Sequence[Hashable]
BLEU_ORDER = 4


def words(text: str) -> list[str]:
    """The tokens of these metrics for plain text: runs of letters and digits, and each other visible character; case kept."""
    return re.findall(r"\w+|[^\w\s]", text)


def _ngrams(tokens: Tokens, n: int) -> list[tuple[Hashable, ...]]:
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


def distinct_n(texts: Sequence[Tokens], n: int) -> float | None:
    """Different n-grams over all n-grams of the texts together; n-grams do not reach from one text into the next.

    texts: token sequences. In (0, 1], 1 where no n-gram comes twice; None where there is no n-gram. It falls with length:
    compare texts of like lengths. Li et al. 2016, "A diversity-promoting objective function", arXiv:1510.03055.
    """
    found = [gram for tokens in texts for gram in _ngrams(tokens, n)]
    return len(set(found)) / len(found) if found else None


def repetition_rate(tokens: Tokens, n: int = 4) -> float | None:
    """Share of a text's n-grams that occurred in it before: 1 - different n-grams / n-grams.

    In [0, 1), 0 where none comes twice; None where there is no n-gram. It is seq-rep-n of Welleck et al. 2019, "Neural
    text generation with unlikelihood training", arXiv:1908.04319.
    """
    found = _ngrams(tokens, n)
    return 1 - len(set(found)) / len(found) if found else None


def self_bleu(texts: Sequence[Tokens]) -> float | None:
    """How alike samples are: the mean over them of BLEU with all the others as references.

    texts: token sequences; those without tokens are left out. In [0, 1], 1 where all are the same; None where fewer than
    two are left. Zhu et al. 2018, "Texygen", arXiv:1802.01886.

    BLEU is that of Papineni et al. 2002 for one sentence: geometric mean of clipped n-gram precisions, n = 1 to 4 as far
    as the sample has n-grams, times exp(1 - r / c) where the sample's length c is below r, the reference length nearest
    to it (the shorter of two). For n > 1 one is added to matches and total (Lin and Och 2004), so that samples without a
    common 4-gram can be told apart. No further tokenization, case kept.
    """
    kept = [tokens for tokens in texts if len(tokens)]
    if len(kept) < 2:
        return None
    counts = [[Counter(_ngrams(tokens, n)) for n in range(1, BLEU_ORDER + 1)] for tokens in kept]
    scores = [_bleu(i, [len(tokens) for tokens in kept], counts) for i in range(len(kept))]
    return math.fsum(scores) / len(scores)


def _bleu(sample: int, lengths: list[int], counts: list[list[Counter[tuple[Hashable, ...]]]]) -> float:
    """BLEU of one of the texts against the others; counts: by text, by n - 1, its n-grams."""
    others = [i for i in range(len(lengths)) if i != sample]
    length = lengths[sample]
    logs = []
    for order, grams in enumerate(counts[sample][:length]):
        most = {gram: max(counts[i][order][gram] for i in others) for gram in grams}
        matches, total = sum(min(count, most[gram]) for gram, count in grams.items()), grams.total()
        add = 1 if order else 0
        if matches + add == 0:
            return 0.0
        logs.append(math.log((matches + add) / (total + add)))
    nearest = min((lengths[i] for i in others), key=lambda other: (abs(other - length), other))
    return math.exp(math.fsum(logs) / len(logs) + min(0.0, 1 - nearest / length))
