"""Texts scored window by window: which windows go together, what is kept of their scores, and what adds up."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvik.errors import DataError
from kvik.evaluation.model import Scorer, TextTokens
from kvik.evaluation.segments import SEGMENT_BYTES, SegmentSums
from kvik.evaluation.windows import Size, Window, text_windows

__all__ = [
    "GROUP_TOKENS",
    "CountedText",
    "Group",
    "GroupScores",
    "Position",
    "Totals",
    "group_windows",
    "new_digest",
    "score_group",
]

GROUP_TOKENS = 16_384
"""Tokens that are scored in one call, unless a window has more."""
_DIGEST_BYTES = 16

Ints = NDArray[np.int64]
Sums = tuple[tuple[int, float], ...]


class Position(NamedTuple):
    """Predictions that have `first` to `last` tokens before them in their window, and their mean nll in nats."""

    first: int
    last: int
    predictions: int
    nll: float


class GroupScores(NamedTuple):
    """What a group's scores come to. number: of the group, from 0; tokens: digest of its windows.

    segments: nats by segment of 2,048 bytes; positions: nats by range of positions in the window.
    """

    number: int
    tokens: str
    segments: Sums
    positions: Sums


class Group(NamedTuple):
    """Windows that are scored together.

    segments, positions [P]: the segment of text, and the range of positions in the window, of each prediction; sizes [P]:
    its bytes. end: bytes of all texts before what comes next.
    """

    number: int
    windows: list[Window]
    segments: Ints
    positions: Ints
    sizes: Ints
    end: int

    @property
    def digest(self) -> str:
        found = new_digest()
        for window in self.windows:
            found.update(np.array([len(window.ids), window.first, *window.ids], "<i8").tobytes())
        return found.hexdigest()


class Totals:
    """What adds up over texts and groups.

    texts, texts_without: read so far, and those of them without a prediction; empty: those without a byte. bytes, words: of
    the others, less first tokens that are not predicted. bytes_done: of the texts, scored.
    """

    def __init__(self, size: Size) -> None:
        self.size = size
        self.texts = self.texts_without = self.empty = self.bytes = self.words = 0
        self.predictions = self.bytes_done = 0
        self.segments = SegmentSums()
        self.starts = position_ranges(size.window)
        self._positions = np.zeros((len(self.starts), 2))
        self._texts, self._tokens = new_digest(), new_digest()

    def text(self, read: CountedText, windows: int, unpredicted: int) -> None:
        """A text that has ended. unpredicted: bytes of a first token that nothing comes before."""
        self.texts += 1
        self._texts.update(read.digest())
        if windows:
            self.bytes += read.bytes - unpredicted
            self.words += read.words
        else:
            self.texts_without += 1
            self.empty += not read.bytes

    def add(self, group: Group, scores: GroupScores) -> None:
        """A group with its scores. DataError where these are of other windows."""
        at, inverse, counts = np.unique(group.segments, return_inverse=True, return_counts=True)
        ranges, range_counts = np.unique(group.positions, return_counts=True)
        if [s for s, _ in scores.segments] != at.tolist() or [p for p, _ in scores.positions] != ranges.tolist():
            raise DataError(f"the figures of group {scores.number} of windows are of other tokens")
        self.segments.add(
            at,
            np.array([nll for _, nll in scores.segments]),
            counts,
            np.bincount(inverse, group.sizes).astype(np.int64),
        )
        self._positions[ranges] += np.stack([range_counts, [nll for _, nll in scores.positions]], axis=1)
        for window in group.windows:
            self._tokens.update(np.array(window.ids[window.first :], "<i8").tobytes())
        self.predictions += len(group.segments)
        self.bytes_done = group.end

    def by_position(self) -> tuple[Position, ...]:
        """See `Perplexity`; ranges without a prediction are left out."""
        ends = [*self.starts[1:], self.size.window]
        return tuple(
            Position(first, end - 1, int(count), float(nll / count))
            for first, end, (count, nll) in zip(self.starts, ends, self._positions, strict=True)
            if count
        )

    def without(self) -> str:
        """How many texts have no prediction, and why."""
        if not self.texts:
            return "there are no texts"
        single = self.texts_without - self.empty
        counts = [f"{self.empty} empty"] * (self.empty > 0) + [f"{single} of one token"] * (single > 0)
        return f"{self.texts} {'text' if self.texts == 1 else 'texts'}, {' and '.join(counts)}"

    @property
    def text_digest(self) -> str:
        return self._texts.hexdigest()

    @property
    def token_digest(self) -> str:
        return self._tokens.hexdigest()


class CountedText:
    """A text's pieces as they pass, with their UTF-8 bytes, words and digest."""

    def __init__(self, pieces: Iterable[str]) -> None:
        self._pieces = pieces
        self._hash = new_digest()
        self._in_word = False
        self.bytes = self.words = 0

    def __iter__(self) -> Iterator[str]:
        for piece in self._pieces:
            data = piece.encode("utf-8", "surrogatepass")  # the tokenizer says what is wrong with those
            self._hash.update(data)
            self.bytes += len(data)
            if piece:
                self.words += len(piece.split()) - (self._in_word and not piece[0].isspace())
                self._in_word = not piece[-1].isspace()
            yield piece

    def digest(self) -> bytes:
        return self._hash.digest()


def group_windows(tokenizer: TextTokens, texts: Iterable[Iterable[str]], size: Size, totals: Totals) -> Iterator[Group]:
    """The texts' windows, as many together as have 16,384 tokens. `totals` hears of each text as it ends.

    texts: the pieces of each.
    """
    waiting: list[tuple[Window, int]] = []
    number = tokens = 0
    for window, base in _windows(tokenizer, texts, size, totals):
        if waiting and tokens + len(window.ids) > GROUP_TOKENS:
            yield _group(number, waiting, totals.starts)
            waiting, tokens, number = [], 0, number + 1
        waiting.append((window, base))
        tokens += len(window.ids)
    if waiting:
        yield _group(number, waiting, totals.starts)


def _windows(
    tokenizer: TextTokens, texts: Iterable[Iterable[str]], size: Size, totals: Totals
) -> Iterator[tuple[Window, int]]:
    """Each window with the bytes of the texts before its own."""
    base = 0
    for text in texts:
        read, count, unpredicted = CountedText(text), 0, 0
        for window in text_windows(tokenizer, read, size):
            unpredicted = window.start if not count else unpredicted
            count += 1
            yield window, base
        totals.text(read, count, unpredicted)
        base += read.bytes


def _group(number: int, windows: list[tuple[Window, int]], starts: list[int]) -> Group:
    offsets = [base + window.start + np.cumsum(window.sizes) - window.sizes for window, base in windows]
    before = [np.arange(window.first, len(window.ids)) for window, _ in windows]
    sizes = np.concatenate([window.sizes for window, _ in windows])
    last, base = windows[-1]
    return Group(
        number, [window for window, _ in windows], np.concatenate(offsets) // SEGMENT_BYTES,
        np.searchsorted(starts, np.concatenate(before), side="right") - 1, sizes, base + last.start + int(last.sizes.sum()),
    )  # fmt: skip


def score_group(model: Scorer, group: Group) -> GroupScores:
    """The model's figures of a group. DataError for a log-probability that is not finite."""
    results = model.score([w.ids for w in group.windows], first=[w.first for w in group.windows])
    nll = -np.concatenate([np.asarray(result.logprobs, np.float64) for result in results])
    if nll.shape != group.segments.shape:
        raise DataError(f"{len(group.segments)} log-probabilities were asked for, the model gave {len(nll)}")
    if not np.isfinite(nll).all():
        wrong = -nll[~np.isfinite(nll)][0]
        raise DataError(f"the model gives a token the log-probability {wrong}: such texts have no perplexity")
    return GroupScores(group.number, group.digest, _sums(group.segments, nll), _sums(group.positions, nll))


def _sums(keys: Ints, nll: NDArray[np.float64]) -> Sums:
    at, inverse = np.unique(keys, return_inverse=True)
    return tuple(zip(at.tolist(), np.bincount(inverse, nll).tolist(), strict=True))


def position_ranges(window: int) -> list[int]:
    """Where ranges of positions begin, below a window: every half octave."""
    steps = range(2 * window.bit_length() + 1)
    return sorted({start for k in steps if (start := round(2 ** (k / 2))) < window})


def new_digest() -> hashlib.blake2b:
    """Of 16 bytes."""
    return hashlib.blake2b(digest_size=_DIGEST_BYTES)
