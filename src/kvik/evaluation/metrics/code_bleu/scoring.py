"""A sample of CodeBLEU as a row of counts, and rows as scores: rows are added over a corpus before anything is divided."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvik.evaluation.metrics.code_bleu.dataflow import MAX_STEPS, TooManySteps, data_flow, shared_flow
from kvik.evaluation.metrics.code_bleu.languages import Language
from kvik.evaluation.metrics.code_bleu.ngrams import NGRAM_COLUMNS, count_ngrams, ngram_match, weighted_ngram_match
from kvik.evaluation.metrics.code_bleu.trees import Shapes, Source, parse

__all__ = ["COLUMNS", "COMPONENTS", "TOKENS", "Counted", "Tokens", "Unscorable", "components", "count", "score"]

Floats = NDArray[np.float64]
Tokens = Literal["space", "syntax"]
TOKENS: tuple[Tokens, ...] = ("space", "syntax")

COMPONENTS = ("ngram", "weighted_ngram", "syntax", "dataflow")
COLUMNS = NGRAM_COLUMNS + 4
MAX_BYTES = 100_000
"""Of one text. tree-sitter's time grows with the square of the length for some texts that are no code: a minute at most."""


class Unscorable(Exception):
    """A sample that cannot be scored; the message is why."""


class Counted(NamedTuple):
    """row: [COLUMNS], as `components` takes them; broken: whether the prediction is no valid code."""

    row: list[float]
    broken: bool


def count(prediction: str, references: Sequence[str], language: Language, tokens: Tokens) -> Counted:
    """The counts of one sample: those of n-grams, then subtrees of the references that the prediction has, all of them;
    items of their data flow that it has, all of them. Raises Unscorable."""
    for text in (prediction, *references):
        if len(text) > MAX_BYTES or len(text.encode("utf-8", "replace")) > MAX_BYTES:
            raise Unscorable(f"has code of more than {MAX_BYTES} bytes")
    shapes: Shapes = {}
    own, *others = (parse(text, language.grammar, shapes) for text in (prediction, *references))
    if not all(other.atoms for other in others):
        raise Unscorable("its reference has no code")
    try:
        flow = data_flow(own, language.rules)
        flows = [shared_flow(flow, data_flow(other, language.rules)) for other in others]
    except TooManySteps:
        raise Unscorable(f"its data flow takes more than {MAX_STEPS} steps") from None
    words = [
        _tokens(text, source, tokens) for text, source in zip((prediction, *references), (own, *others), strict=True)
    ]
    row = count_ngrams(words[0], words[1:], language.keywords)
    # not clipped: a subtree counts as often as the reference has it
    row.append(sum(times for other in others for shape, times in other.shapes.items() if shape in own.shapes))
    row.append(sum(other.shapes.total() for other in others))
    row.append(sum(matches for matches, _ in flows))
    row.append(sum(total for _, total in flows))
    return Counted(row, own.broken)


def components(counts: Floats) -> dict[str, Floats]:
    """The four components of added rows [R, COLUMNS]: each [R] in [0, 1], NaN where it does not exist."""
    syntax, dataflow = counts[:, NGRAM_COLUMNS : NGRAM_COLUMNS + 2], counts[:, NGRAM_COLUMNS + 2 :]
    found = (ngram_match(counts), weighted_ngram_match(counts), _ratio(*syntax.T), _ratio(*dataflow.T))
    return dict(zip(COMPONENTS, found, strict=True))


def score(weights: Floats, counts: Floats) -> Floats:
    """CodeBLEU of added rows [R, COLUMNS]: [R] in [0, 1]; NaN where no component with a weight exists.

    weights: [4], those of components that do not exist are shared out among the others in proportion.
    """
    parts = np.stack(list(components(counts).values()), axis=1)
    there = weights * ~np.isnan(parts)
    total = there.sum(axis=1)
    weighted = (there * np.nan_to_num(parts)).sum(axis=1)
    return _ratio(weighted, total)


def _ratio(part: Floats, whole: Floats) -> Floats:
    """NaN where the whole is 0."""
    ratio = np.full(len(whole), np.nan)
    np.divide(part, whole, out=ratio, where=whole > 0)
    return ratio


def _tokens(text: str, source: Source, tokens: Tokens) -> list[str]:
    return text.split() if tokens == "space" else [atom.text for atom in source.atoms]
