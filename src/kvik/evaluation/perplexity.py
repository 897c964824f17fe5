"""How well a model predicts texts: perplexity by token, byte and word, bits per byte, and how sure these are.

Jelinek, Mercer, Bahl and Baker 1977, "Perplexity, a measure of the difficulty of speech recognition tasks". Every
predicted token counts alike, whatever text it stands in. Perplexity by token cannot be compared between models whose
tokens differ; bits per byte can.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from kvik.errors import DataError, ParameterError
from kvik.evaluation.model import TextModel
from kvik.evaluation.segments import Segments, paired
from kvik.evaluation.statistics import LEVEL, RESAMPLES, Interval, block_bootstrap, paired_block_bootstrap
from kvik.evaluation.window_scores import GroupScores, Position, Totals, group_windows, score_group
from kvik.evaluation.windows import window_size

__all__ = ["Difference", "Perplexity", "Text", "as_texts", "difference", "exp", "perplexity"]

Text = str | Iterable[str]
_NATS_PER_BIT = math.log(2)


@dataclass(frozen=True)
class Perplexity:
    """A model's predictions of texts.

    Attributes:
        predictions: tokens predicted: all but a text's first where nothing comes before it.
        nll: mean negative log-likelihood of a prediction, nats.
        token_perplexity, byte_perplexity, word_perplexity: exp of the nats per token, byte and word; inf beyond float64.
            Words are what stands between whitespace; None where there is none.
        bits_per_byte: of UTF-8.
        standard_error: of nll, by bootstrap over segments; None of a single segment, which says nothing of the spread.
        interval: of token_perplexity, at 95 %; None as above.
        window, stride: see `windows.Size`.
        texts, texts_without: of them, those without a prediction (empty, or of one token).
        bytes, words: of the texts that have one, less a first token that is not predicted.
        by_position: mean nll by the number of tokens that came before in the window.
        segments: sums by bytes of the texts.
        text_digest: of the texts. token_digest: of the predicted tokens.
    """

    predictions: int
    nll: float
    token_perplexity: float
    byte_perplexity: float | None
    word_perplexity: float | None
    bits_per_byte: float | None
    standard_error: float | None
    interval: Interval | None
    window: int
    stride: int
    texts: int
    texts_without: int
    bytes: int
    words: int
    by_position: tuple[Position, ...]
    segments: Segments
    text_digest: str
    token_digest: str


class Difference(NamedTuple):
    """One result less another. bits_per_byte: over the same segments; nll: per token, None where the tokens differ."""

    bits_per_byte: Interval
    nll: Interval | None


def _unheard(scores: GroupScores) -> None:
    """Figures that nobody keeps."""


def _unwatched(done: int) -> None:
    """Progress that nobody watches."""


def perplexity(
    model: TextModel,
    texts: str | Iterable[Text],
    *,
    window: int | None = None,
    stride: int | None = None,
    progress: Callable[[int], None] = _unwatched,
    known: Iterable[GroupScores] = (),
    heard: Callable[[GroupScores], None] = _unheard,
) -> Perplexity:
    """The model's perplexity of the texts, in windows.

    Args:
        model: see `TextModel`.
        texts: each a string or the pieces of one, so that a text may be larger than memory; a string is one text.
        window: most tokens of a window, 2 to the model's context; None is 2,048 or the context.
        stride: tokens that each window after the first predicts anew, 1 to window - 1; None is window - 1.
        progress: called with bytes of text that are scored.
        known: what `heard` was called with before, of the same texts, model and settings, in order: not scored again.
        heard: called with the figures of each group of windows as it is scored.

    Raises ParameterError for settings out of range, DataError for texts without a prediction.
    """
    size = window_size(window, stride, model.info.context_length)
    totals, before = Totals(size), iter(known)
    for group in group_windows(model.tokenizer, as_texts(texts), size, totals):
        scores = next(before, None)
        if scores is None:
            scores = score_group(model, group)
            heard(scores)
        elif scores.tokens != group.digest:
            raise DataError(f"what is known of group {scores.number} of windows is of other tokens")
        totals.add(group, scores)
        progress(totals.bytes_done)
    return _result(totals)


def as_texts(texts: str | Iterable[Text]) -> Iterator[Iterable[str]]:
    """Each text in pieces; a string is one text. ParameterError for what is neither."""
    for text in (texts,) if isinstance(texts, str) else _listed(texts):
        yield (text,) if isinstance(text, str) else _listed(text)


def _listed(found: Iterable[Any]) -> Iterable[Any]:
    if isinstance(found, bytes) or not isinstance(found, Iterable):
        raise ParameterError(f"texts must be strings or pieces of them, got {type(found).__name__}")
    return found


def _result(totals: Totals) -> Perplexity:
    if not totals.predictions:
        raise DataError(f"no text has a token to predict: {totals.without()}")
    segments = totals.segments.result(totals.bytes)
    total = math.fsum(segments.nll)
    nll = total / totals.predictions
    found = block_bootstrap(segments.nll, segments.predictions)
    known = math.isfinite(found.standard_error)
    return Perplexity(
        predictions=totals.predictions, nll=nll,
        token_perplexity=exp(nll), byte_perplexity=_per(total, totals.bytes), word_perplexity=_per(total, totals.words),
        bits_per_byte=total / totals.bytes / _NATS_PER_BIT if totals.bytes else None,
        standard_error=found.standard_error if known else None,
        interval=Interval(exp(nll), exp(found.interval.low), exp(found.interval.high)) if known else None,
        window=totals.size.window, stride=totals.size.stride, texts=totals.texts, texts_without=totals.texts_without,
        bytes=totals.bytes, words=totals.words, by_position=totals.by_position(), segments=segments,
        text_digest=totals.text_digest, token_digest=totals.token_digest,
    )  # fmt: skip


def exp(nats: float) -> float:
    """e to the power of nats; inf beyond float64."""
    return math.inf if nats >= 700 else math.exp(nats)


def _per(nats: float, count: int) -> float | None:
    return exp(nats / count) if count else None


def difference(
    a: Perplexity, b: Perplexity, *, level: float = LEVEL, resamples: int = RESAMPLES, seed: int = 0
) -> Difference:
    """b less a, paired: of the same drawn segments of the texts, as neighbouring tokens are alike.

    Raises ParameterError for results of different texts.
    """
    if a.text_digest != b.text_digest:
        raise ParameterError("the two results are of different texts and cannot be paired")
    one, other = paired(a.segments, b.segments)

    def interval(denominator: int, nats: float) -> Interval:
        return paired_block_bootstrap(
            one[:, 0] / nats, one[:, denominator], other[:, 0] / nats, other[:, denominator],
            level=level, resamples=resamples, seed=seed,
        ).interval  # fmt: skip

    same = a.token_digest == b.token_digest
    return Difference(interval(2, _NATS_PER_BIT), interval(1, 1.0) if same else None)
