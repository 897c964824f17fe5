from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench import quality as other_implementation
from kvik.errors import ParameterError
from kvik.evaluation import rows as rows_module
from kvik.evaluation.rows import NativeCompare, compare_rows, kl_divergence, log_softmax


def logits(seed: int, rows: int = 20, vocabulary: int = 300) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 4, (rows, vocabulary)).astype(np.float32)


def test_log_softmax_is_the_definition_and_survives_large_logits() -> None:
    x = logits(0).astype(np.float64)
    assert np.allclose(log_softmax(x), np.log(np.exp(x) / np.exp(x).sum(axis=1, keepdims=True)), atol=1e-12)
    far = log_softmax(logits(0) + np.float32(1e6))
    assert np.exp(far).sum(axis=1) == pytest.approx(np.ones(20)) and far.dtype == np.float64


def test_kl_of_two_known_distributions() -> None:
    p, q = np.array([[0.5, 0.25, 0.25]]), np.array([[0.25, 0.25, 0.5]])
    assert kl_divergence(np.log(p), np.log(q)) == pytest.approx([0.25 * np.log(2)])
    assert kl_divergence(np.log(p), np.log(p))[0] == 0.0
    # a fair coin against a bent one: log 2 + the mean of -log q
    bent = np.array([[0.9, 0.1]])
    wanted = -np.log(2) - 0.5 * np.log(0.9 * 0.1)
    assert kl_divergence(np.log([[0.5, 0.5]]), np.log(bent)) == pytest.approx([wanted])


def test_kl_where_one_side_gives_nothing() -> None:
    half, sure = np.array([[np.log(0.5), np.log(0.5)]]), np.array([[0.0, -np.inf]])
    assert kl_divergence(sure, half) == pytest.approx([np.log(2)])
    assert kl_divergence(half, sure)[0] == np.inf
    assert kl_divergence(sure, sure)[0] == 0.0


def test_kl_agrees_with_the_benchmark_s_own() -> None:
    p, q = log_softmax(logits(1)), log_softmax(logits(2))
    assert kl_divergence(p, q) == pytest.approx(other_implementation.divergence(p, q), rel=1e-12)
    assert (kl_divergence(p, q) > 0).all()


def test_small_differences_are_not_lost() -> None:
    """KL is about the variance of the difference over 2: float32 arithmetic would see nothing of 1e-10."""
    base = logits(3, rows=50).astype(np.float64)
    gap = np.random.default_rng(4).normal(0, 1e-5, base.shape)
    p = log_softmax(base)
    mass = np.exp(p)
    variance = (mass * gap**2).sum(axis=1) - (mass * gap).sum(axis=1) ** 2
    assert kl_divergence(p, log_softmax(base + gap)) == pytest.approx(variance / 2, rel=1e-3)


def test_rows_in_blocks_are_the_rows_at_once(monkeypatch) -> None:
    base, other, targets = logits(5), logits(6), np.arange(20) * 7
    whole = compare_rows(base, other, targets)
    monkeypatch.setattr(rows_module, "_BLOCK_ELEMENTS", 3 * 300)
    for one, two in zip(whole, compare_rows(base, other, targets), strict=True):
        assert np.array_equal(one, two)
    probabilities = np.exp(base.astype(np.float64))
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    assert whole.base_logprob == pytest.approx(np.log(probabilities[np.arange(20), targets]))
    assert np.array_equal(whole.base_best, base.argmax(axis=1))
    assert np.array_equal(whole.other_best, other.argmax(axis=1))


@pytest.mark.parametrize("threads", [1, 3])
def test_the_native_kernel_is_the_definition(threads: int) -> None:
    compare = NativeCompare(threads)
    for seed, vocabulary in ((1, 5), (2, 300), (3, 4999)):
        base = logits(seed, 30, vocabulary)
        near = base + np.random.default_rng(9).normal(0, 1e-3, base.shape).astype(np.float32)
        base[3], base[4, 1:] = 0.0, -np.inf  # all the same; one certain
        near[4, 1:] = -np.inf
        targets = np.arange(30) % vocabulary
        targets[4] = 0
        for other in (near, logits(seed + 10, 30, vocabulary), base):
            found, wanted = compare(base, other, targets), compare_rows(base, other, targets)
            assert np.allclose(found.kl, wanted.kl, rtol=1e-7, atol=1e-13)
            assert np.allclose(found.base_logprob, wanted.base_logprob, rtol=0, atol=1e-12)
            assert np.allclose(found.other_logprob, wanted.other_logprob, rtol=0, atol=1e-12)
            assert np.array_equal(found.base_best, wanted.base_best)
            assert np.array_equal(found.other_best, wanted.other_best)
        same = compare(base, base.copy(), targets)
        assert not same.kl.any() and np.array_equal(same.base_logprob, same.other_logprob)


@pytest.mark.parametrize("compare", [compare_rows, NativeCompare(1)], ids=["definition", "native"])
def test_two_vocabularies_are_refused(compare) -> None:
    with pytest.raises(ParameterError, match="cannot be compared"):
        compare(logits(0), logits(0, vocabulary=301), np.zeros(20, int))
    with pytest.raises(ParameterError, match="cannot be compared"):
        compare(logits(0), logits(0), np.zeros(19, int))
