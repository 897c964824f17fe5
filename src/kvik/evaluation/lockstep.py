"""Two models over the same texts in lockstep: a few rows of logits of each at a time, compared and dropped."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from contextlib import ExitStack, closing
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from kvik.errors import DataError, ParameterError
from kvik.evaluation.model import Info, Rows, RowScorer, TextTokens
from kvik.evaluation.rows import Compare, RowFigures
from kvik.evaluation.windows import Size, Window, text_windows

__all__ = ["Compared", "Distributions", "VocabularyTokens", "check_models", "compared_rows", "limited_windows"]

Logits = NDArray[np.float32]


@runtime_checkable
class _Sized(Protocol):
    @property
    def vocab_size(self) -> int: ...


class VocabularyTokens(TextTokens, _Sized, Protocol):
    """vocab_size: tokens that `piece` knows."""


class VocabularyInfo(Info, _Sized, Protocol):
    """vocab_size: logits of a row; padding may make it more than the tokenizer's."""


@runtime_checkable
class Distributions(RowScorer, Protocol):
    """A model that gives whole distributions over its vocabulary: `kvik.LLM` is one."""

    @property
    def tokenizer(self) -> VocabularyTokens: ...

    @property
    def info(self) -> VocabularyInfo: ...


class Compared(NamedTuple):
    """Figures of some predictions of a window. first: index in it of the token that the first of them is of."""

    first: int
    figures: RowFigures


def check_models(model: Distributions, reference: Distributions) -> None:
    """Raise ParameterError, by name, for models without whole distributions or with two vocabularies."""
    for one in (model, reference):
        if not isinstance(one, Distributions) or not isinstance(one.info, _Sized):
            name = getattr(getattr(one, "info", None), "name", type(one).__name__)
            raise ParameterError(
                f"{name} does not give whole distributions over its vocabulary, which divergence needs"
            )
    names = f"{model.info.name} and {reference.info.name}"
    sizes = model.info.vocab_size, reference.info.vocab_size
    if sizes[0] != sizes[1]:
        raise ParameterError(f"{names} have vocabularies of {sizes[0]} and {sizes[1]} tokens and cannot be compared")
    if model is reference or model.info.digest == reference.info.digest:
        return
    own, theirs = model.tokenizer, reference.tokenizer
    for token in range(min(own.vocab_size, theirs.vocab_size)):
        a, b = own.piece(token, token), theirs.piece(token, token)
        if a != b:
            raise ParameterError(
                f"{names} have different vocabularies of {sizes[0]} tokens and cannot be compared: token {token} is "
                f"{a.decode(errors='replace')!r} and {b.decode(errors='replace')!r}"
            )


def limited_windows(
    tokenizer: TextTokens, texts: Iterable[Iterable[str]], size: Size, tokens: int | None
) -> Iterator[tuple[int, Window]]:
    """Each text's number and its windows, until so many tokens are predicted (None: all)."""
    for index, text in enumerate(texts):
        for window in text_windows(tokenizer, text, size):
            if tokens is not None and len(window.sizes) >= tokens:
                yield index, window._replace(ids=window.ids[: window.first + tokens], sizes=window.sizes[:tokens])
                return
            yield index, window
            if tokens is not None:
                tokens -= len(window.sizes)


def compared_rows(
    model: Distributions, reference: Distributions, window: Window, compare: Compare
) -> Generator[Compared]:
    """The figures of a window's predictions, in order. DataError for logits that are not numbers."""
    ids = np.array(window.ids, np.int32)
    done = window.first
    with ExitStack() as reading:  # whatever ends it early, neither model goes on waiting for its reader
        base = reading.enter_context(closing(reference.score_rows(window.ids, first=window.first)))
        pairs: Iterator[tuple[int, Logits, Logits]]
        if model is reference:
            pairs = ((rows.first, rows.logits, rows.logits) for rows in base)
        else:
            pairs = _aligned(base, reading.enter_context(closing(model.score_rows(window.ids, first=window.first))))
        for first, of_reference, of_model in pairs:
            figures = compare(of_reference, of_model, ids[first : first + len(of_reference)])
            if np.isnan(figures.kl).any():
                raise DataError(f"{model.info.name} or {reference.info.name} gives logits that are not numbers")
            done = first + len(of_reference)
            yield Compared(first, figures)
    if done != len(ids):
        raise DataError(f"rows of logits end before token {done} of a window of {len(ids)}")


def _aligned(a: Iterator[Rows], b: Iterator[Rows]) -> Iterator[tuple[int, Logits, Logits]]:
    """The rows of both that are of the same tokens; either may give more at a time than the other."""
    first, one, other = 0, _NONE, _NONE
    while True:
        if not len(one):
            rows = next(a, None)
            first, one = (rows.first, rows.logits) if rows is not None else (first, _NONE)
        if not len(other):
            more = next(b, None)
            other = more.logits if more is not None else _NONE
        count = min(len(one), len(other))
        if not count:
            return
        yield first, one[:count], other[:count]
        first, one, other = first + count, one[count:], other[count:]


_NONE: Logits = np.empty((0, 0), np.float32)
