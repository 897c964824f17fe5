"""How sure a figure is: intervals by bootstrap, tests of paired differences, correlation.

Everything here is a pure function of numbers and a seed: the same arguments give the same result. An interval of level
0.95 is the percentile interval of Efron 1979, "Bootstrap methods: another look at the jackknife"; of one value alone
nothing is known about the spread, so its interval reaches from -inf to inf.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kvik.errors import ParameterError

__all__ = [
    "Bootstrapped",
    "Equivalence",
    "Interval",
    "average_ranks",
    "block_bootstrap",
    "bootstrap_mean",
    "bootstrap_sums",
    "bootstrap_test",
    "equivalence",
    "paired_block_bootstrap",
    "paired_bootstrap",
    "pearson",
    "permutation_test",
    "spearman",
]

Floats = NDArray[np.float64]
Equivalence = Literal["equivalent", "different", "undecided"]

LEVEL, RESAMPLES, PERMUTATIONS = 0.95, 2000, 10_000
_DRAWN_AT_ONCE = 1 << 18  # indices held at a time: they stay in the cache, and memory does not grow with resamples
_TIE = 1e-12  # sums this near to the observed one, relative to what is added, count as equal to it


class Interval(NamedTuple):
    """A figure and the bounds it lies between, at the level that was asked for."""

    value: float
    low: float
    high: float


class Bootstrapped(NamedTuple):
    """standard_error: the standard deviation of the figure over the resamples; inf where nothing is known of it."""

    interval: Interval
    standard_error: float


def bootstrap_mean(values: ArrayLike, *, level: float = LEVEL, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """The mean of values [N] with its interval: the values are drawn anew, with replacement.

    Raises ParameterError for no values, for what is not finite, and for settings out of their range.
    """
    found = _numbers("values", values)
    return bootstrap_sums(
        found[:, None], lambda sums: sums[:, 0] / len(found), level=level, resamples=resamples, seed=seed
    ).interval


def bootstrap_sums(
    rows: ArrayLike,
    figure: Callable[[Floats], Floats],
    *,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Bootstrapped:
    """A figure of sums with its interval: the rows [N, C] are drawn anew, with replacement, and added up.

    figure: of sums [R, C] the R figures. A resample whose figure is no number (nothing in it to divide by) does not count.
    """
    _check(level, resamples, seed)
    table = np.asarray(rows, np.float64)
    if table.ndim != 2 or not len(table):
        raise ParameterError(f"rows must be a table with at least one row, got shape {list(table.shape)}")
    if not np.isfinite(table).all():
        raise ParameterError(f"rows must be finite, row {int((~np.isfinite(table)).any(axis=1).argmax())} is not")
    with np.errstate(all="ignore"):  # figures that are no numbers are left out below
        value = float(figure(table.sum(axis=0, keepdims=True))[0])
        drawn = np.concatenate([figure(sums) for sums in _resampled(table, resamples, seed)])
    drawn = drawn[~np.isnan(drawn)]
    if len(table) == 1 or not len(drawn):
        return Bootstrapped(Interval(value, -math.inf, math.inf), math.inf)
    return Bootstrapped(_interval(value, drawn, level), _deviation(drawn))


def block_bootstrap(
    numerators: ArrayLike,
    denominators: ArrayLike,
    *,
    transform: Callable[[Floats], Floats] | None = None,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Bootstrapped:
    """sum(numerators) / sum(denominators) with its interval, over blocks [B] that are drawn anew, with replacement.

    Values that lie near each other are alike, so whole blocks of neighbours are drawn, not values (Carlstein 1986, "The
    use of subseries values for estimating the variance"). transform: of ratios, like np.exp for a perplexity.
    denominators: at least 0 each and above 0 together.
    """
    top, bottom = _ratio("", numerators, denominators)
    of = transform if transform is not None else _same
    return bootstrap_sums(
        np.stack([top, bottom], axis=1), lambda sums: of(sums[:, 0] / sums[:, 1]), level=level, resamples=resamples, seed=seed
    )  # fmt: skip


def paired_block_bootstrap(
    numerators_a: ArrayLike,
    denominators_a: ArrayLike,
    numerators_b: ArrayLike,
    denominators_b: ArrayLike,
    *,
    compare: Callable[[Floats, Floats], Floats] = lambda a, b: b - a,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Bootstrapped:
    """Two ratios over the same blocks [B], compared: both are made of the same drawn blocks.

    compare: of ratios a [R] and b [R]; for perplexities from nats, `lambda a, b: np.exp(b) - np.exp(a)` is their
    difference and `lambda a, b: np.exp(b - a)` their ratio.
    """
    table = np.stack(
        [*_ratio(" of a", numerators_a, denominators_a), *_ratio(" of b", numerators_b, denominators_b, numerators_a)],
        axis=1,
    )
    return bootstrap_sums(
        table, lambda sums: compare(sums[:, 0] / sums[:, 1], sums[:, 2] / sums[:, 3]),
        level=level, resamples=resamples, seed=seed,
    )  # fmt: skip


def paired_bootstrap(
    a: ArrayLike, b: ArrayLike, *, level: float = LEVEL, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """The mean of b - a over pairs [N] with its interval; the pairs are drawn anew, with replacement."""
    return bootstrap_mean(_differences(a, b), level=level, resamples=resamples, seed=seed)


def bootstrap_test(a: ArrayLike, b: ArrayLike, *, resamples: int = RESAMPLES, seed: int = 0) -> float:
    """Two-sided p-value of "the mean of b - a is 0": how often a mean of drawn pairs is as far from the observed mean as
    that is from 0, the observed one counted in.

    In (0, 1]. Efron and Tibshirani 1993, "An introduction to the bootstrap", 16.4; Koehn 2004, "Statistical significance
    tests for machine translation evaluation".
    """
    _check(LEVEL, resamples, seed)
    gaps = _differences(a, b)
    if not gaps.any() or len(gaps) == 1:  # of one pair nothing is known about the spread
        return 1.0
    sums = np.concatenate([found[:, 0] for found in _resampled(gaps[:, None], resamples, seed)])
    far = np.count_nonzero(np.abs(sums - gaps.sum()) >= _as_far(gaps))
    return (far + 1) / (resamples + 1)


def permutation_test(a: ArrayLike, b: ArrayLike, *, resamples: int = PERMUTATIONS, seed: int = 0) -> float:
    """Two-sided p-value of "a and b could be swapped in any pair": over flips of the signs of the differences, how often
    their mean is as far from 0 as the observed one.

    In (0, 1]. All flips where there are no more of them than `resamples`; else so many random ones and the observed one
    (Fisher 1935; Phipson and Smyth 2010, "Permutation p-values should never be zero").
    """
    _check(LEVEL, resamples, seed)
    gaps = _differences(a, b)
    gaps = gaps[gaps != 0]  # flipping them changes nothing
    if not len(gaps):
        return 1.0
    exact = len(gaps) < 63 and 1 << len(gaps) <= resamples
    flips = _all_flips(len(gaps)) if exact else _random_flips(len(gaps), resamples, seed)
    bound = _as_far(gaps)
    far = sum(int(np.count_nonzero(np.abs(2 * (part @ gaps) - gaps.sum()) >= bound)) for part in flips)
    return far / (1 << len(gaps)) if exact else (far + 1) / (resamples + 1)


def equivalence(interval: Interval, margin: float) -> Equivalence:
    """What the interval of a difference says of it.

    equivalent: the whole interval lies within ± margin (two one-sided tests, each at (1 - level) / 2: Schuirmann 1987).
    different: it does not, and 0 is outside of it. undecided: neither; more samples would tell.
    Raises ParameterError for a margin below 0.
    """
    if not margin >= 0 or math.isinf(margin):
        raise ParameterError(f"margin must be a number of at least 0, got {margin}")
    if -margin < interval.low and interval.high < margin:
        return "equivalent"
    return "different" if interval.low > 0 or interval.high < 0 else "undecided"


def pearson(
    x: ArrayLike, y: ArrayLike, *, level: float = LEVEL, resamples: int = RESAMPLES, seed: int = 0
) -> Interval | None:
    """Linear correlation of pairs [N] in [-1, 1] with its interval over drawn pairs; None where x or y is constant.

    At least 3 pairs. Resamples in which one of them is constant do not count.
    """
    return _correlation(x, y, _same, level, resamples, seed)


def spearman(
    x: ArrayLike, y: ArrayLike, *, level: float = LEVEL, resamples: int = RESAMPLES, seed: int = 0
) -> Interval | None:
    """Correlation of the ranks of pairs [N], as `pearson`; equal values share the mean of their ranks."""
    return _correlation(x, y, average_ranks, level, resamples, seed)


def average_ranks(values: Floats) -> Floats:
    """Ranks from 1 of values [N]; equal ones share the mean of theirs."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    ranks: Floats = (last - (counts - 1) / 2)[place]
    return ranks


def _correlation(
    x: ArrayLike, y: ArrayLike, of: Callable[[Floats], Floats], level: float, resamples: int, seed: int
) -> Interval | None:
    _check(level, resamples, seed)
    one, other = _pair("x", x, "y", y)
    if len(one) < 3:
        raise ParameterError(f"a correlation needs at least 3 pairs, got {len(one)}")
    value = _coefficient(of(one), of(other))
    if value is None:
        return None
    random = _random(seed)
    drawn = []
    for _ in range(resamples):
        chosen = random.integers(len(one), size=len(one))
        found = _coefficient(of(one[chosen]), of(other[chosen]))
        if found is not None:
            drawn.append(found)
    return _interval(value, np.array(drawn), level) if drawn else Interval(value, -math.inf, math.inf)


def _coefficient(x: Floats, y: Floats) -> float | None:
    if x.min() == x.max() or y.min() == y.max():
        return None
    x, y = x - x.mean(), y - y.mean()
    x, y = x / np.abs(x).max(), y / np.abs(y).max()  # squares stay within float64
    return float(np.clip(x @ y / np.sqrt((x @ x) * (y @ y)), -1, 1))


def _resampled(table: Floats, resamples: int, seed: int) -> Iterator[Floats]:
    """Sums [R, C] of the rows of a table [N, C], N of them drawn with replacement for each; R are `resamples` in all."""
    random, n = _random(seed), len(table)
    step = max(1, _DRAWN_AT_ONCE // n)
    for start in range(0, resamples, step):
        count = min(step, resamples - start)
        drawn = random.integers(n, size=(count, n))
        drawn += (np.arange(count) * n)[:, None]
        times = np.bincount(drawn.ravel(), minlength=count * n).reshape(count, n)
        yield times @ table


def _all_flips(n: int) -> Iterator[Floats]:
    yield (np.arange(1 << n)[:, None] >> np.arange(n) & 1).astype(np.float64)


def _random_flips(n: int, resamples: int, seed: int) -> Iterator[Floats]:
    random = _random(seed)
    step = max(1, _DRAWN_AT_ONCE // n)
    for start in range(0, resamples, step):
        count = min(step, resamples - start)
        octets = np.frombuffer(random.bytes(count * (n + 7 >> 3)), np.uint8).reshape(count, -1)
        yield np.unpackbits(octets, axis=1, count=n).astype(np.float64)


def _as_far(gaps: Floats) -> float:
    """From where on a sum counts as far from 0 as that of the gaps, whatever order they are added in."""
    return float(abs(gaps.sum()) - _TIE * np.abs(gaps).sum())


def _random(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(seed))


def _interval(value: float, drawn: Floats, level: float) -> Interval:
    drawn = np.sort(drawn)  # infinities among them would make nan of an interpolated quantile
    if not np.isfinite(drawn).all():
        last = len(drawn) - 1
        low, high = drawn[math.floor(last * (1 - level) / 2)], drawn[math.ceil(last * (1 + level) / 2)]
    else:
        low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, float(low), float(high))


def _deviation(drawn: Floats) -> float:
    return float(drawn.std(ddof=1)) if len(drawn) > 1 and np.isfinite(drawn).all() else math.inf


def _same(values: Floats) -> Floats:
    return values


def _check(level: float, resamples: int, seed: int) -> None:
    if not 0 < level < 1:
        raise ParameterError(f"level must be between 0 and 1, got {level}")
    if resamples < 1:
        raise ParameterError(f"resamples must be at least 1, got {resamples}")
    if not 0 <= seed < 2**64:
        raise ParameterError(f"seed must be in [0, {2**64 - 1}], got {seed}")


def _numbers(name: str, values: ArrayLike) -> Floats:
    found = np.asarray(values, np.float64)
    if found.ndim != 1 or not len(found):
        raise ParameterError(f"{name} must be numbers in one row, at least one, got shape {list(found.shape)}")
    if not np.isfinite(found).all():
        wrong = int((~np.isfinite(found)).argmax())
        raise ParameterError(f"{name} must be finite, number {wrong} is {found[wrong]}")
    return found


def _pair(name_a: str, a: ArrayLike, name_b: str, b: ArrayLike) -> tuple[Floats, Floats]:
    one, other = _numbers(name_a, a), _numbers(name_b, b)
    if len(one) != len(other):
        raise ParameterError(f"{name_a} and {name_b} must be pairs, got {len(one)} and {len(other)} numbers")
    return one, other


def _differences(a: ArrayLike, b: ArrayLike) -> Floats:
    one, other = _pair("a", a, "b", b)
    return other - one


def _ratio(
    whose: str, numerators: ArrayLike, denominators: ArrayLike, beside: ArrayLike | None = None
) -> tuple[Floats, Floats]:
    top, bottom = _pair(f"numerators{whose}", numerators, f"denominators{whose}", denominators)
    if beside is not None:
        _pair("numerators of a", beside, f"numerators{whose}", top)
    if (bottom < 0).any() or not bottom.sum() > 0:
        raise ParameterError(f"denominators{whose} must be at least 0 each and above 0 together")
    return top, bottom
