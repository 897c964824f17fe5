"""Kept sets against transformers' logits processors, in float64.

They agree wherever nothing ties. They differ by definition in three places, each asserted below: at a tie with the k-th
token TopKLogitsWarper keeps all of them and Kvik k; TopPLogitsWarper leaves the order of equals to its sort, Kvik takes
the lower ids; at p = 1 it keeps tokens that no sum can need, as `apply` does, where 1 is off, but not `filters.top_p`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from transformers.generation.logits_process import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from kvik.decoding import filters
from kvik.decoding.pipeline import apply
from kvik.params import SamplingParams


def warp(row: np.ndarray, *warpers: Callable[..., torch.Tensor]) -> np.ndarray:
    scores = torch.from_numpy(row.astype(np.float64))[None]
    for warper in warpers:
        scores = warper(None, scores)
    return torch.log_softmax(scores, -1)[0].numpy()


def agree(ours: np.ndarray, theirs: np.ndarray) -> None:
    np.testing.assert_array_equal(ours > -np.inf, theirs > -np.inf)
    np.testing.assert_allclose(np.exp(ours), np.exp(theirs), atol=1e-12)


@pytest.mark.parametrize("kind", ["normal", "peaked", "flat"])
@pytest.mark.parametrize("size", [1, 17, 1000, 49152])
def test_same_kept_set(kind: str, size: int, make_row: Callable[..., np.ndarray]) -> None:
    rng = np.random.default_rng(size)
    row = make_row(rng, size, kind)
    row = row[np.sort(np.unique(row, return_index=True)[1])]  # no ties
    for value in (0.3, 1.0, 1.7):
        agree(apply(row, SamplingParams(temperature=value)), warp(row, TemperatureLogitsWarper(value)))
    for k in (1, 5, 50, 5000):
        agree(apply(row, SamplingParams(top_k=k)), warp(row, TopKLogitsWarper(k)))
    for p in (0.0, 0.1, 0.5, 0.9, 0.99):
        agree(apply(row, SamplingParams(top_p=p)), warp(row, TopPLogitsWarper(p)))
    for p in (0.001, 0.05, 0.5):
        agree(apply(row, SamplingParams(min_p=p)), warp(row, MinPLogitsWarper(p)))
    for p in (0.1, 0.2, 0.5, 0.9, 0.99):
        agree(apply(row, SamplingParams(typical_p=p)), warp(row, TypicalLogitsWarper(p)))
    for p in (1e-5, 3e-4, 0.01, 0.3):
        agree(apply(row, SamplingParams(epsilon_cutoff=p)), warp(row, EpsilonLogitsWarper(p)))
        agree(apply(row, SamplingParams(eta_cutoff=p)), warp(row, EtaLogitsWarper(p)))
    params = SamplingParams(temperature=0.7, top_k=50, top_p=0.9, min_p=0.02)
    chain = (TemperatureLogitsWarper(0.7), TopKLogitsWarper(50), TopPLogitsWarper(0.9), MinPLogitsWarper(0.02))
    agree(apply(row, params), warp(row, *chain))


def test_where_they_differ() -> None:
    tied = np.array([1, 2, 2, 2, 0], np.float32)
    assert (warp(tied, TopKLogitsWarper(2)) > -np.inf).sum() == 3
    assert np.flatnonzero(apply(tied, SamplingParams(top_k=2)) > -np.inf).tolist() == [1, 2]
    assert (warp(tied, TopPLogitsWarper(0.5)) > -np.inf).sum() == 2
    assert np.flatnonzero(apply(tied, SamplingParams(top_p=0.5)) > -np.inf).tolist() == [1, 2]
    far = np.array([0, -50], np.float32)
    assert (warp(far, TopPLogitsWarper(1.0)) > -np.inf).sum() == 2
    assert (filters.top_p(filters.checked(far), 1.0) > -np.inf).sum() == 1
    assert (apply(far, SamplingParams(top_p=1.0)) > -np.inf).sum() == 2
