"""Gumbel noise without a generator: a pure function of (seed, sample index, position, token id).

Construction: Philox4x32-10, the counter-based bijection of Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as
easy as 1, 2, 3" (SC 2011). The key is the seed (two 32-bit words); the counter's words are block, position, sample
index and stream. A call yields four words, shared among tokens so that sixteen lanes of native code need no shuffle:
token t reads word (t / 16) mod 4 of block 16 * (t / 64) + t mod 16. Stream 0 holds the high, stream 1 the low 32 bits
of a token's 64-bit integer h, stream 2 the coin of a position; further streams are free for other uses of the key.

h becomes v = (h + 1/2) / 2^64 in (0, 1), an exponential variate -ln(1 - v), and the Gumbel variate -ln(-ln(1 - v)).
Large noise, which decides draws, comes from v near 0, where float64 resolves every h: no token of probability above
1e-19 is out of reach. Adding Gumbel noise to log-probabilities and taking the largest draws from the distribution
(Gumbel 1954; Maddison, Tarlow and Minka, "A* sampling", 2014).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvik.decoding.elementary import Float64, exact_log
from kvik.errors import ParameterError

__all__ = [
    "COIN_STREAM",
    "HIGH_STREAM",
    "LOW_STREAM",
    "MAX_POSITION",
    "MAX_SAMPLE",
    "MAX_SEED",
    "MAX_TOKEN",
    "coin",
    "gumbel",
    "integers",
    "philox",
    "uniform",
]

UInt64 = npt.NDArray[np.uint64]

MAX_SEED = 2**64 - 1
MAX_SAMPLE = MAX_POSITION = MAX_TOKEN = 2**32 - 1
HIGH_STREAM, LOW_STREAM, COIN_STREAM = 0, 1, 2

MULTIPLIER = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
KEY_STEP = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
WORD = np.uint64(0xFFFFFFFF)
HALF = np.uint64(32)
LARGEST = 1.0 - 2.0**-53


class Words(NamedTuple):
    """Four 32-bit words, each as uint64 of one shape."""

    w0: UInt64
    w1: UInt64
    w2: UInt64
    w3: UInt64


def philox(counter: Words, key: int) -> Words:
    """Philox4x32-10 of counters (words below 2^32, any one shape) under a 64-bit key, its low half first."""
    c0, c1, c2, c3 = counter
    k0, k1 = key & 0xFFFFFFFF, key >> 32
    for _ in range(ROUNDS):
        a, b = MULTIPLIER[0] * c0, MULTIPLIER[1] * c2
        c0, c1, c2, c3 = (b >> HALF) ^ c1 ^ np.uint64(k0), b & WORD, (a >> HALF) ^ c3 ^ np.uint64(k1), a & WORD
        k0, k1 = (k0 + KEY_STEP[0]) & 0xFFFFFFFF, (k1 + KEY_STEP[1]) & 0xFFFFFFFF
    return Words(c0, c1, c2, c3)


def _bounded(name: str, value: int, high: int) -> int:
    if not 0 <= value <= high:
        raise ParameterError(f"{name} must be in [0, {high}], got {value}")
    return int(value)


def integers(seed: int, sample_index: int, position: int, token_ids: npt.ArrayLike) -> UInt64:
    """The 64-bit integers h of token_ids (any shape, in [0, 2^32 - 1]).

    seed is in [0, 2^64 - 1], sample_index and position (of the token being drawn) in [0, 2^32 - 1]; ParameterError
    otherwise.
    """
    key = _bounded("seed", seed, MAX_SEED)
    sample = np.uint64(_bounded("sample index", sample_index, MAX_SAMPLE))
    at = np.uint64(_bounded("position", position, MAX_POSITION))
    ids = np.asarray(token_ids)
    if ids.size and (int(ids.min()) < 0 or int(ids.max()) > MAX_TOKEN):
        raise ParameterError(f"token ids must be in [0, {MAX_TOKEN}], got {ids.min()} to {ids.max()}")
    t = ids.astype(np.uint64)
    block = (t >> np.uint64(6)) * np.uint64(16) + (t & np.uint64(15))
    word = ((t >> np.uint64(4)) & np.uint64(3)).astype(np.intp)
    halves = []
    for stream in (HIGH_STREAM, LOW_STREAM):
        counter = Words(block, np.full_like(block, at), np.full_like(block, sample), np.full_like(block, stream))
        halves.append(np.choose(word, philox(counter, key)))
    return (halves[0] << HALF) | halves[1]


def uniform(h: UInt64) -> Float64:
    """v = (h + 1/2) / 2^64 as float64, in [2^-65, 1 - 2^-53], any shape; exact for h below 2^52."""
    return np.minimum((h.astype(np.float64) + 0.5) * 2.0**-64, LARGEST)


def gumbel(seed: int, sample_index: int, position: int, token_ids: npt.ArrayLike) -> Float64:
    """Standard Gumbel noise of token_ids, the same shape, in (-3.61, 45.06); ranges as `integers`."""
    v = uniform(integers(seed, sample_index, position, token_ids))
    rest = 1.0 - v
    # log1p(-v), exact to rounding where 1 - v is rounded (Kahan): ln(u) * v / (u - 1) with u = 1 - v
    tiny = rest == 1.0
    exponential = np.where(tiny, v, exact_log(rest) * (v / np.where(tiny, -1.0, rest - 1.0)))
    return -exact_log(exponential)


def coin(seed: int, sample_index: int, position: int) -> float:
    """A number in (0, 1), one for each position: what is done with probability p is done where it is below p.

    Ranges as `integers`. Words 0 and 1 of block 0 of stream 2 are the high and low half of its h.
    """
    key = _bounded("seed", seed, MAX_SEED)
    sample = _bounded("sample index", sample_index, MAX_SAMPLE)
    at = _bounded("position", position, MAX_POSITION)
    words = philox(Words(*(np.array([word], np.uint64) for word in (0, at, sample, COIN_STREAM))), key)
    return float(uniform((words.w0 << HALF) | words.w1)[0])
