"""What `llama-perplexity` prints: perplexity, time, and the loss of each window."""

from __future__ import annotations

import math
import re
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bench import BenchError

_RUNNING = re.compile(r"\[(\d+)\]([^,\s\[]+),")
_ESTIMATE = re.compile(r"Final estimate: PPL = (\S+) \+/- (\S+)")
_TOKENIZATION = re.compile(r"tokenization took (\S+) ms")
_TOTAL = re.compile(r"total time = +(\S+) ms")
_SAME = 1e-4  # relative; both figures are printed with four decimals


class LlamaPerplexity(NamedTuple):
    """perplexity, error: as it says, the latter its standard error over tokens.

    seconds: of the evaluation alone, without loading, warm-up and tokenization.
    nll: [windows], the summed loss of each window's scored tokens in nats.
    """

    perplexity: float
    error: float
    seconds: float
    nll: NDArray[np.float64]


def read(stdout: str, log: str, windows: int, scored: int) -> LlamaPerplexity:
    """scored: tokens of a window that count. Raises BenchError for output that does not tell all of it.

    After each window stdout has the perplexity so far, of which the windows' own losses are taken apart; the rest is in
    the log, on stderr.
    """
    perplexity, error = (number(part, "its final estimate") for part in one(_ESTIMATE, log, "final estimate"))
    (total,) = (number(part, "its total time") for part in one(_TOTAL, log, "total time"))
    (tokens,) = (number(part, "its tokenization") for part in one(_TOKENIZATION, log, "time of the tokenization"))
    seen = _RUNNING.findall(stdout)
    if [int(at) for at, _ in seen] != list(range(1, windows + 1)):
        raise BenchError(f"llama-perplexity told of {len(seen)} windows, not of {windows} in order")
    so_far = np.array([number(value, f"the perplexity after window {at}") for at, value in seen])
    if abs(so_far[-1] / perplexity - 1) > _SAME:
        raise BenchError(f"llama-perplexity says {perplexity} in the end, but {so_far[-1]} after its last window")
    if total <= tokens:
        raise BenchError(f"llama-perplexity says {total} ms in all, but {tokens} ms for the tokenization")
    sums = np.log(so_far) * scored * np.arange(1, windows + 1)
    return LlamaPerplexity(perplexity, error, (total - tokens) / 1e3, np.diff(sums, prepend=0.0))


def one(pattern: re.Pattern[str], text: str, what: str) -> tuple[str, ...]:
    """The groups of the only match."""
    found = list(pattern.finditer(text))
    if len(found) != 1:
        raise BenchError(f"llama-perplexity printed {len(found) or 'no'} {what}: {text.strip()[-200:]!r}")
    return found[0].groups()


def number(text: str, what: str) -> float:
    """A finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise BenchError(f"llama-perplexity: {what} is {text[:40]!r}, not a number above 0")
    return value
