"""What a weights format costs: one model beside a more exact form of itself, on the same text."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from kvik.errors import DataError, ParameterError
from kvik.evaluation.divergence import RowFigures, compare_rows

__all__ = ["TEXT_NAME", "WINDOW", "Quality", "Scorer", "measure_quality", "offline_text", "summary", "text_windows"]

WINDOW = 512
TEXT_NAME = (
    f"the language reference inside Python {sys.version_info.major}.{sys.version_info.minor} (pydoc_data.topics)"
)
_CHARACTERS_A_TOKEN = 32  # no tokenizer needs as many for ordinary text: what is cut before it is encoded

Ids = Sequence[int]


class Scorer(Protocol):
    """A model that gives logits for tokens: `kvik.LLM` is one. Each result has `logits` [N, V]."""

    def score(self, inputs: Sequence[Ids], *, reduce: bool = True) -> Sequence[Any]: ...


@dataclass(frozen=True)
class Quality:
    """One form of a model against a more exact one.

    Attributes:
        tokens: predictions compared.
        kl_mean, kl_p99: KL(exact || this) of a prediction in nats: mean, and what 99 of 100 do not pass.
        same_top: share of predictions whose best token is the same.
        perplexity: of the text, by this form; base_perplexity: by the exact one; perplexity_ratio: the one over the other.
    """

    tokens: int
    kl_mean: float
    kl_p99: float
    same_top: float
    perplexity: float
    base_perplexity: float
    perplexity_ratio: float


def offline_text() -> str:
    """English text that every Python has: `TEXT_NAME` says which."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def text_windows(
    encode: Callable[[str], Ids], text: str, tokens: int, *, size: int = WINDOW, bos: int | None = None
) -> list[list[int]]:
    """The text's first `tokens` predictions, in windows of `size` tokens; the last may be shorter.

    encode: text to ids, nothing added. bos: put in front of each window, where the model's texts begin so.
    Raises ParameterError for a size or number out of range, DataError for a text without a token to predict.
    """
    if tokens < 1 or size < 2:
        raise ParameterError(f"windows of at least 2 tokens and at least 1 prediction are needed, got {size}, {tokens}")
    ids = list(encode(text[: _CHARACTERS_A_TOKEN * (tokens + size)]))
    front = [] if bos is None else [bos]
    found: list[list[int]] = []
    while tokens > 0:
        window = front + ids[: min(size, tokens + 1) - len(front)]
        if len(window) < 2:
            break
        ids = ids[len(window) - len(front) :]
        tokens -= len(window) - 1
        found.append(window)
    if not found:
        raise DataError("the text has no token to predict; give a longer one")
    return found


def measure_quality(
    base: Scorer, other: Scorer, windows: Sequence[Ids], progress: Callable[[int, int], None]
) -> Quality:
    """`other` against `base`, window by window: no more than one window's logits of the two are held.

    progress: called with predictions done and in all.
    """
    total, done = sum(len(window) - 1 for window in windows), 0
    progress(0, total)
    rows = []
    for figures in _compared(base, other, windows):
        rows.append(figures)
        done += len(figures.kl)
        progress(done, total)
    return summary(RowFigures(*(np.concatenate(column) for column in zip(*rows, strict=True))))


def _compared(base: Scorer, other: Scorer, windows: Sequence[Ids]) -> Iterator[RowFigures]:
    for window in windows:
        yield compare_rows(_logits(base, window), _logits(other, window), np.array(window[1:], np.int64))


def _logits(model: Scorer, window: Ids) -> NDArray[np.float32]:
    (scored,) = model.score([window], reduce=False)
    logits: NDArray[np.float32] = scored.logits
    return logits[:-1]


def summary(rows: RowFigures) -> Quality:
    """The figures of all rows together."""
    nll, base_nll = -rows.other_logprob.mean(), -rows.base_logprob.mean()
    with np.errstate(over="ignore"):  # a perplexity beyond float64 is infinite
        return Quality(
            tokens=rows.kl.size,
            kl_mean=float(rows.kl.mean()),
            kl_p99=float(np.quantile(rows.kl, 0.99)),
            same_top=float(rows.same_top.mean()),
            perplexity=float(np.exp(nll)),
            base_perplexity=float(np.exp(base_nll)),
            perplexity_ratio=float(np.exp(nll - base_nll)),
        )
