"""The noise: the published generator, its key, its quality, and the elementary functions below it."""

from __future__ import annotations

import math

import numpy as np
import pytest

from kvik.decoding import noise
from kvik.decoding.elementary import exact_exp, exact_log
from kvik.errors import ParameterError

IDS = np.arange(49152)


# Known answers of Random123's kat_vectors for philox4x32 with 10 rounds: counter, key, result.
@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, 2**64 - 1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0x299F31D0A4093822,
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter: tuple[int, ...], key: int, expected: tuple[int, ...]) -> None:
    words = noise.philox(noise.Words(*(np.array([word], np.uint64) for word in counter)), key)
    assert tuple(int(word[0]) for word in words) == expected


def test_a_token_reads_its_own_word() -> None:
    seed, sample, position = 0x0123456789ABCDEF, 3, 777
    got = noise.integers(seed, sample, position, IDS[:2000])
    seen = set()
    for token in (0, 1, 15, 16, 47, 48, 63, 64, 100, 1999):
        place = (16 * (token // 64) + token % 16, token // 16 % 4)
        seen.add(place)
        high, low = (
            int(
                noise.philox(
                    noise.Words(*(np.array([w], np.uint64) for w in (place[0], position, sample, stream))), seed
                )[place[1]][0]
            )
            for stream in (0, 1)
        )
        assert int(got[token]) == high << 32 | low
    assert len(seen) == 10
    assert np.unique(got).size == got.size


def test_noise_of_a_token_depends_on_its_key_only() -> None:
    whole = noise.gumbel(5, 1, 9, IDS)
    some = np.array([49151, 3, 3, 70, 0])
    np.testing.assert_array_equal(noise.gumbel(5, 1, 9, some), whole[some])
    np.testing.assert_array_equal(noise.gumbel(5, 1, 9, IDS.reshape(2, -1)), whole.reshape(2, -1))
    for other in (noise.gumbel(6, 1, 9, IDS), noise.gumbel(5, 2, 9, IDS), noise.gumbel(5, 1, 10, IDS)):
        assert not np.isclose(other, whole, rtol=0, atol=1e-9).any()


@pytest.mark.parametrize(("component", "bits"), [("seed", 64), ("sample", 32), ("position", 32), ("token", 20)])
def test_every_key_bit_flips_half_of_the_result(component: str, bits: int) -> None:
    ids = np.arange(0, 2000, 2)
    key = {"seed": 12345678901234567, "sample": 5, "position": 300}
    base = noise.integers(key["seed"], key["sample"], key["position"], ids)
    for bit in range(bits):
        changed = dict(key)
        tokens = ids ^ (1 << bit) if component == "token" else ids
        if component != "token":
            changed[component] ^= 1 << bit
        flipped = base ^ noise.integers(changed["seed"], changed["sample"], changed["position"], tokens)
        each = np.array([((flipped >> np.uint64(b)) & np.uint64(1)).mean() for b in range(64)])
        # 1000 fair coins a bit: standard deviation 0.0158; 5.5 of them over 64 bits x 148 key bits
        assert np.abs(each - 0.5).max() < 0.087, (component, bit)


def test_uniform_by_chi_square() -> None:
    for bits in (slice(0, 8), slice(24, 32), slice(32, 40), slice(56, 64)):
        h = np.concatenate([noise.integers(1, 0, position, IDS) for position in range(8)])
        digits = (h >> np.uint64(bits.start)) & np.uint64(255)
        counts = np.bincount(digits.astype(np.int64), minlength=256)
        expected = h.size / 256
        chi = float(((counts - expected) ** 2 / expected).sum())
        assert 150 < chi < 370  # 255 degrees of freedom: 5 standard deviations


def _rows(axis: str) -> list[np.ndarray]:
    keys = {
        "seed": [(s, 0, 0) for s in range(40)],
        "sample": [(0, s, 0) for s in range(40)],
        "position": [(0, 0, p) for p in range(40)],
    }
    return [noise.gumbel(*key, IDS[:20000]) for key in keys[axis]]


@pytest.mark.parametrize("axis", ["seed", "sample", "position"])
def test_neighbouring_keys_are_not_correlated(axis: str) -> None:
    correlation = np.corrcoef(_rows(axis))
    off = correlation[~np.eye(len(correlation), dtype=bool)]
    assert np.abs(off).max() < 5.0 / math.sqrt(20000)


def test_neighbouring_tokens_are_not_correlated() -> None:
    g = np.concatenate([noise.gumbel(2, 0, p, IDS) for p in range(4)])
    for lag in (1, 2, 4, 15, 16, 17, 32, 48, 63, 64, 128, 1024):
        assert abs(np.corrcoef(g[:-lag], g[lag:])[0, 1]) < 5.0 / math.sqrt(g.size)


def test_gumbel_distribution() -> None:
    g = np.sort(np.concatenate([noise.gumbel(7, 0, p, IDS) for p in range(4)]))
    n = g.size
    empirical = np.arange(n) / n
    cdf = np.exp(-np.exp(-g))
    assert np.abs(cdf - empirical).max() < 2.0 / math.sqrt(n)  # Kolmogorov-Smirnov at 7e-4
    assert abs(g.mean() - 0.5772156649) < 5 * math.sqrt(math.pi**2 / 6 / n)
    assert abs(g.var() / (math.pi**2 / 6) - 1) < 0.03


def test_uniform_is_open_and_fine_near_zero() -> None:
    h = np.array([0, 1, 2**20, 2**63, 2**64 - 1], np.uint64)
    v = noise.uniform(h)
    assert v[0] == 2.0**-65 and v[1] == 1.5 * 2.0**-64 and v[2] == (2.0**20 + 0.5) * 2.0**-64
    assert v[4] == 1 - 2.0**-53 and (v > 0).all() and (v < 1).all()


@pytest.mark.parametrize(
    ("seed", "sample", "position", "token"),
    [(-1, 0, 0, 0), (2**64, 0, 0, 0), (0, -1, 0, 0), (0, 2**32, 0, 0), (0, 0, -1, 0), (0, 0, 2**32, 0), (0, 0, 0, -1)],
)
def test_keys_out_of_range_are_refused(seed: int, sample: int, position: int, token: int) -> None:
    with pytest.raises(ParameterError, match="must be in"):
        noise.integers(seed, sample, position, [token])


def test_largest_keys_are_accepted() -> None:
    assert np.isfinite(noise.gumbel(2**64 - 1, 2**32 - 1, 2**32 - 1, np.array([2**32 - 1]))).all()


def test_exact_exp_and_log_are_accurate() -> None:
    x = -np.concatenate(
        [[0.0, 700.0], np.random.default_rng(0).exponential(30, 20000).clip(0, 700), np.logspace(-300, 2.8, 500)]
    )
    np.testing.assert_allclose(exact_exp(x), np.exp(x), rtol=1e-14)
    assert exact_exp(-np.inf) == exact_exp(-700.0) and exact_exp(0.0) == 1.0
    y = np.concatenate(
        [np.logspace(-307, 300, 20000), np.random.default_rng(1).random(20000), 1 - np.logspace(-15, -1, 100), [5e-324]]
    )
    np.testing.assert_allclose(exact_log(y), np.log(y), rtol=2e-15)
    assert exact_log(1.0) == 0.0


def test_exponential_variate_keeps_its_precision_near_zero() -> None:
    # the largest noise a token can have, from h = 0: v = 2^-65
    smallest = 2.0**-65
    assert -exact_log(smallest) == pytest.approx(65 * math.log(2), rel=1e-15)
