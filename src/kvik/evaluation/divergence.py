"""What a setting costs: how far a model's next-token distributions are from a reference's, over the same texts.

The figure is KL(reference || model) of each prediction, in nats (Kullback and Leibler 1951): what is lost on average by
who expects the model's distribution where the reference's is true; 0 says that nothing changed. Both models run in
lockstep, in the windows that perplexity is measured in.
"""

from __future__ import annotations

import heapq
from array import array
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvik.errors import DataError, ParameterError
from kvik.evaluation.lockstep import (
    Compared,
    Distributions,
    VocabularyTokens,
    check_models,
    compared_rows,
    limited_windows,
)
from kvik.evaluation.perplexity import Text, as_texts, exp
from kvik.evaluation.rows import Compare, NativeCompare
from kvik.evaluation.statistics import Interval, bootstrap_sums
from kvik.evaluation.window_scores import position_ranges
from kvik.evaluation.windows import Size, Window, window_size

__all__ = ["DEFAULT_WINDOW", "Divergence", "Flip", "Position", "Token", "divergence"]

Floats = NDArray[np.float64]

DEFAULT_WINDOW = 512
_CONTEXT_TOKENS = 16  # shown before a flip
_MOST_BLOCKS = 4096
_COUNT, _KL, _NLL, _REFERENCE_NLL = range(4)
_SHARES = tuple(10.0 ** (-k / 10) for k in range(51))  # 1 to 0.00001


class Token(NamedTuple):
    """text: U+FFFD for bytes that are no UTF-8 by themselves."""

    id: int
    text: str


class Flip(NamedTuple):
    """A prediction whose most probable token changed.

    text: which of the texts, from 0; offset: bytes of it before the token; context: the end of what came before in the
    window. reference, model: what each held for the most probable; came: what stands in the text. kl: of this prediction.
    """

    text: int
    offset: int
    context: str
    reference: Token
    model: Token
    came: Token
    kl: float


class Position(NamedTuple):
    """Predictions that have `first` to `last` tokens before them in their window: their mean KL and share of same best."""

    first: int
    last: int
    predictions: int
    kl: float
    same_top: float


@dataclass(frozen=True)
class Divergence:
    """A model against a reference.

    Attributes:
        tokens: predictions compared: all but a text's first token where nothing comes before it.
        kl_mean, kl_median, kl_p99, kl_max: of KL(reference || model) of a prediction, nats; p99 is what 99 of 100 do not
            pass.
        kl_interval: of kl_mean, at 95 %, by bootstrap over windows; None of a single one, or where a KL is infinite.
        same_top: share of predictions whose most probable token is the same, of equals the one with the lowest id.
        num_flipped: predictions where it is another. flipped: those of the largest KL, the largest first.
        perplexity, reference_perplexity: of the texts, by the model and by the reference.
        perplexity_ratio: the one over the other; NaN where both are infinite. ratio_interval: of it, as kl_interval, from the same drawn windows.
        window, stride: see `windows.Size`.
        by_position: by the number of tokens that came before in the window.
        kl_above: pairs of a share of the predictions and the KL that so many reach.
    """

    tokens: int
    kl_mean: float
    kl_interval: Interval | None
    kl_median: float
    kl_p99: float
    kl_max: float
    same_top: float
    num_flipped: int
    flipped: tuple[Flip, ...]
    perplexity: float
    reference_perplexity: float
    perplexity_ratio: float
    ratio_interval: Interval | None
    window: int
    stride: int
    by_position: tuple[Position, ...]
    kl_above: tuple[tuple[float, float], ...]


def _unwatched(done: int, size: int) -> None:
    """Progress that nobody watches."""


def divergence(
    model: Distributions,
    reference: Distributions,
    texts: str | Iterable[Text],
    *,
    window: int | None = None,
    stride: int | None = None,
    tokens: int | None = None,
    flips: int = 20,
    compare: Compare | None = None,
    progress: Callable[[int, int], None] = _unwatched,
) -> Divergence:
    """The model against the reference, on the texts.

    Args:
        model, reference: see `Distributions`. Their vocabularies must be the same; the reference's tokenizer cuts the texts.
        texts: each a string or the pieces of one; a string is one text.
        window: most tokens of a window, 2 to the shorter context; None is 512, or the context where that is less.
        stride: tokens that each window after the first predicts anew, 1 to window - 1; None is window - 1.
        tokens: predictions after which it ends, at least 1; None goes to the end of the texts.
        flips: most entries of `flipped`, at least 0.
        compare: what compares rows of logits; None is the native kernel on all cores.
        progress: called with the predictions done, and the bytes of text before the window that is under way.

    Held are 8 bytes a prediction, for the quantiles. Raises ParameterError for settings out of range, for models without
    whole distributions and for two vocabularies, DataError for texts without a prediction and for logits that are not
    numbers.
    """
    check_models(model, reference)
    context = min(model.info.context_length, reference.info.context_length)
    size = window_size(min(DEFAULT_WINDOW, context) if window is None else window, stride, context)
    for name, value, low in (("tokens", 1 if tokens is None else tokens, 1), ("flips", flips, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise ParameterError(f"{name} must be an integer of at least {low}, got {value!r}")
    compare = NativeCompare() if compare is None else compare
    found = _Found(reference.tokenizer, size, flips)
    for text, part in limited_windows(reference.tokenizer, as_texts(texts), size, tokens):
        found.begin_window(text, part)
        with closing(compared_rows(model, reference, part, compare)) as compared:
            for rows in compared:
                found.add(rows)
                progress(len(found.kl), found.bytes)
    if not len(found.kl):
        raise DataError("the texts have no token to predict; give longer ones")
    return found.result()


class _Found:
    """What adds up over predictions and windows.

    kl: of each prediction. blocks [B, 4]: predictions, KL and both nll of each window, or of neighbouring ones together.
    bytes: of the texts before the window.
    """

    def __init__(self, tokenizer: VocabularyTokens, size: Size, flips: int) -> None:
        self.size = size
        self.kl = array("d")
        self.flips = _Flips(tokenizer, flips)
        self._blocks = [np.zeros(4)]
        self._windows, self._merged = 0, 1  # windows begun, and how many of them a block is of
        self._starts = position_ranges(size.window)
        self._positions = np.zeros((len(self._starts), 3))  # predictions, KL, same best
        self._text, self._window = 0, Window([], 0, 0, np.empty(0, np.int64))
        self._base = self.bytes = 0

    def begin_window(self, text: int, window: Window) -> None:
        if text != self._text:
            self._base += self._window.start + int(self._window.sizes.sum())
        self.bytes = self._base + window.start
        self._text, self._window = text, window
        if self._windows // self._merged == _MOST_BLOCKS:
            self._blocks = [a + b for a, b in zip(self._blocks[::2], self._blocks[1::2], strict=True)]
            self._merged *= 2
        if self._windows and self._windows % self._merged == 0:
            self._blocks.append(np.zeros(4))
        self._windows += 1

    def add(self, rows: Compared) -> None:
        found = rows.figures
        self.kl.frombytes(np.ascontiguousarray(found.kl, np.float64).tobytes())
        same = found.base_best == found.other_best
        self._blocks[-1] += [len(same), found.kl.sum(), -found.other_logprob.sum(), -found.base_logprob.sum()]
        places = np.searchsorted(self._starts, np.arange(rows.first, rows.first + len(same)), side="right") - 1
        np.add.at(self._positions, places, np.stack([np.ones(len(same)), found.kl, same], axis=1))
        self.flips.add(self._text, self._window, rows)

    def result(self) -> Divergence:
        kl, blocks = np.array(self.kl), np.stack(self._blocks)
        count, total, nll, reference_nll = blocks.sum(axis=0)
        with np.errstate(over="ignore", invalid="ignore"):  # a perplexity beyond float64 is infinite
            return Divergence(
                tokens=len(kl),
                kl_mean=float(total / count), kl_interval=_interval(blocks, [_COUNT, _KL], _mean),
                kl_median=_quantile(kl, 0.5), kl_p99=_quantile(kl, 0.99), kl_max=float(kl.max()),
                same_top=1 - self.flips.count / len(kl), num_flipped=self.flips.count, flipped=self.flips.result(),
                perplexity=exp(nll / count), reference_perplexity=exp(reference_nll / count),
                perplexity_ratio=exp((nll - reference_nll) / count),
                ratio_interval=_interval(blocks, [_COUNT, _NLL, _REFERENCE_NLL], _ratio),
                window=self.size.window, stride=self.size.stride, by_position=self._by_position(),
                kl_above=tuple((share, _quantile(kl, 1 - share)) for share in _SHARES if share * len(kl) >= 1),
            )  # fmt: skip

    def _by_position(self) -> tuple[Position, ...]:
        ends = [*self._starts[1:], self.size.window]
        return tuple(
            Position(first, end - 1, int(count), float(kl / count), float(same / count))
            for first, end, (count, kl, same) in zip(self._starts, ends, self._positions, strict=True)
            if count
        )


class _Flips:
    """Counts predictions whose best token changed, and keeps those with the largest KL; of equals the first."""

    def __init__(self, tokenizer: VocabularyTokens, most: int) -> None:
        self.count = 0
        self._tokenizer, self._most = tokenizer, most
        self._kept: list[tuple[float, int, Flip]] = []  # a heap, the smallest KL and the latest first

    def add(self, text: int, window: Window, rows: Compared) -> None:
        found = rows.figures
        for row in np.flatnonzero(found.base_best != found.other_best).tolist():
            self.count += 1
            kl = float(found.kl[row])
            if self._most and (len(self._kept) < self._most or kl > self._kept[0][0]):
                best = int(found.base_best[row]), int(found.other_best[row])
                entry = kl, -self.count, self._flip(text, window, rows.first + row, best, kl)
                (heapq.heappush if len(self._kept) < self._most else heapq.heapreplace)(self._kept, entry)

    def _flip(self, text: int, window: Window, at: int, best: tuple[int, int], kl: float) -> Flip:
        """at: index in the window of the token that came."""
        offset = window.start + int(window.sizes[: at - window.first].sum())
        before = window.ids[max(0, at - _CONTEXT_TOKENS) : at]
        pieces = [self._tokenizer.piece(token, after) for after, token in zip([None, *before], before, strict=False)]
        reference, model, came = (self._token(token, before[-1]) for token in (*best, window.ids[at]))
        return Flip(text, offset, b"".join(pieces).decode(errors="replace"), reference, model, came, kl)

    def _token(self, token: int, after: int) -> Token:
        known = token < self._tokenizer.vocab_size  # logits may be padded
        return Token(token, self._tokenizer.piece(token, after).decode(errors="replace") if known else "")

    def result(self) -> tuple[Flip, ...]:
        return tuple(flip for _, _, flip in sorted(self._kept, key=lambda entry: entry[:2], reverse=True))


def _mean(sums: Floats) -> Floats:
    found: Floats = sums[:, 1] / sums[:, 0]
    return found


def _ratio(sums: Floats) -> Floats:
    found: Floats = np.exp((sums[:, 1] - sums[:, 2]) / sums[:, 0])
    return found


def _interval(blocks: Floats, columns: list[int], figure: Callable[[Floats], Floats]) -> Interval | None:
    """The interval of a figure of sums of these columns; None where nothing is known of its spread."""
    if len(blocks) < 2 or not np.isfinite(blocks[:, columns]).all():
        return None
    return bootstrap_sums(blocks[:, columns], figure).interval


def _quantile(values: Floats, share: float) -> float:
    """Interpolated, unless some are infinite."""
    method = "linear" if np.isfinite(values).all() else "inverted_cdf"
    return float(np.quantile(values, share, method=method))  # type: ignore[call-overload] # method is one of those it takes
