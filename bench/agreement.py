"""Whether engines find the same perplexity: their losses on the same tokens, window by window."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bench import BenchError
from bench.common import LEVEL, RESAMPLES, Interval

Losses = NDArray[np.float64]


class Beside(NamedTuple):
    """An engine beside Kvik. perplexity: over the same tokens.

    difference: of its mean loss to Kvik's in nats, with the bootstrap interval over pairs of windows.
    errors: size of that difference in standard errors of Kvik's mean loss, by bootstrap over windows.
    """

    perplexity: float
    difference: Interval
    errors: float


def beside(ours: Losses, theirs: Losses, scored: int, seed: int = 0) -> Beside:
    """ours, theirs: [windows], summed losses of each window's `scored` tokens. Windows are drawn anew, with replacement:
    tokens near each other are alike, windows hardly (Carlstein 1986)."""
    if ours.shape != theirs.shape or ours.ndim != 1 or not ours.size:
        raise BenchError(f"losses of {ours.shape} and {theirs.shape} windows cannot be compared")
    picks = np.random.default_rng(seed).integers(0, ours.size, (RESAMPLES, ours.size))
    error = float((ours[picks].mean(axis=1) / scored).std())
    gaps = (theirs - ours) / scored
    low, high = np.quantile(gaps[picks].mean(axis=1), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    middle = float(gaps.mean())
    if error == 0:
        raise BenchError("one window tells nothing of the standard error")
    found = Interval(middle, float(low), float(high))
    return Beside(float(np.exp(theirs.mean() / scored)), found, abs(middle) / error)


class Keys(NamedTuple):
    """LongPPL of one engine. value: None where there is no key token. keys: of each text, by index of the token."""

    value: float | None
    keys: list[list[int]]


def save_keys(path: Path, found: Keys) -> None:
    path.write_text(json.dumps(found._asdict()))


def read_keys(path: Path) -> Keys:
    return Keys(**json.loads(path.read_text()))


def overlap(a: Keys, b: Keys) -> float | None:
    """Key tokens of both ÷ those of either (Jaccard); None where neither has any."""
    sides = [{(text, key) for text, keys in enumerate(one.keys) for key in keys} for one in (a, b)]
    either = sides[0] | sides[1]
    return len(sides[0] & sides[1]) / len(either) if either else None
