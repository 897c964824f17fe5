"""Attention's kernels over full and packed slots: the definition's numbers, and the same bits however rows and partitions are
divided, on every instruction set."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from native.pages import ISAS, Floats, Unit, attend, defined, unit

from kvik.params import KVFormat

FORMATS: tuple[KVFormat, ...] = get_args(KVFormat)
ONE = 2**24


def numbers(seed: int, slots: int, size: int, rows: int, group: int) -> tuple[Floats, Floats, Floats, Floats]:
    """Keys with channels of unequal size, values, queries peaked here and there, queries for sinks."""
    rng = np.random.default_rng(seed)
    k = rng.standard_normal((slots, size)) * np.exp(rng.standard_normal(size)) + 2 * rng.standard_normal(size)
    v = rng.standard_normal((slots, size)) * np.exp(rng.standard_normal((slots, 1)))
    q, sink_q = rng.standard_normal((2, rows, group * size)) * np.exp(rng.standard_normal((2, rows, 1)))
    k, v, q, sink_q = (x.astype(np.float32) for x in (k, v, q, sink_q))
    return k, v, q, sink_q


def close(got: Floats, want: np.ndarray, v: Floats) -> bool:
    return bool(np.all(np.abs(got - want.reshape(got.shape)) <= 2e-4 * np.abs(v).max()))


@settings(max_examples=40, deadline=None)
@given(
    formats=st.tuples(st.sampled_from(FORMATS), st.sampled_from(FORMATS)),
    group_size=st.sampled_from([16, 32, 64, 128]),
    size=st.sampled_from([16, 64, 80, 128, 256]),
    group=st.sampled_from([1, 3, 7]),
    slots=st.integers(1, 420),
    rows=st.integers(1, 20),
    keep=st.sampled_from([0, 16, 80]),
    streaming=st.sampled_from([(0, 0), (0, 5), (0, 40), (0, 150), (4, 40), (16, 100), (70, 130)]),
    shift=st.sampled_from([0, 37]),
    seed=st.integers(0, 1000),
)
def test_any_cache_and_any_division(
    formats: tuple[KVFormat, KVFormat],
    group_size: int,
    size: int,
    group: int,
    slots: int,
    rows: int,
    keep: int,
    streaming: tuple[int, int],
    shift: int,
    seed: int,
) -> None:
    sinks, window = streaming
    keep = max(keep, -(-sinks // 16) * 16)
    rows = min(rows, slots)
    first = slots - rows
    k, v, q, sink_q = numbers(seed, slots, size, rows, group)
    told = {"window": window, "sinks": sinks, "sink_q": sink_q if sinks else None}
    tile = max(1, min(rows, 64 // group))
    results = []
    for isa in ISAS:
        made = unit(isa, k, v, formats, group_size, keep, shift, gone=-1)
        if not results:
            want, _ = defined(made, q, first, group, **told)  # type: ignore[arg-type]
        results += [attend(made, q, first, group, tile=t, shares=s, **told) for t, s in ((1, 1), (tile, 1), (tile, 3))]  # type: ignore[arg-type]
    assert close(results[0], want, v)
    assert all(np.array_equal(results[0], x) for x in results[1:])


@pytest.mark.parametrize(
    "formats", [("f16", "f16"), ("bf16", "f32"), ("int8", "int8"), ("int4", "int4"), ("int8", "f16")], ids="-".join
)
@pytest.mark.parametrize("streaming", [(0, 0), (0, 150), (4, 150)])
def test_blocks_that_no_row_sees_are_not_touched(
    formats: tuple[KVFormat, KVFormat], streaming: tuple[int, int]
) -> None:
    sinks, window = streaming
    k, v, q, sink_q = numbers(1, 395, 64, 1, 3)
    told = {"window": window, "sinks": sinks, "sink_q": sink_q if sinks else None}
    for isa in ISAS:
        whole = unit(isa, k, v, formats, keep=16, gone=-1)
        gone = 395 - window if window and not sinks else 0
        some = unit(isa, k, v, formats, keep=16, gone=gone)
        want, got = (attend(x, q, 394, 3, **told) for x in (whole, some))  # type: ignore[arg-type]
        assert np.array_equal(got, want)


@pytest.mark.parametrize("formats", [("f16", "f16"), ("int8", "int4"), ("int4", "f32")], ids="-".join)
@pytest.mark.parametrize("streaming", [(0, 0), (4, 100)])
def test_sums_of_probabilities(formats: tuple[KVFormat, KVFormat], streaming: tuple[int, int]) -> None:
    sinks, window = streaming
    slots, rows, group = 300, 40, 3
    k, v, q, sink_q = numbers(2, slots, 64, rows, group)
    told = {"window": window, "sinks": sinks, "sink_q": sink_q if sinks else None}
    observed = (7, 33)
    found = []
    for isa in ISAS:
        made = unit(isa, k, v, formats, keep=16, shift=5, gone=-1)
        plain = attend(made, q, slots - rows, group, **told)  # type: ignore[arg-type]
        for tile in (1, 5, 21):
            sums = np.full(slots, 1000, np.int64)
            out = attend(made, q, slots - rows, group, tile=tile, sums=sums, observed=observed, **told)  # type: ignore[arg-type]
            assert np.array_equal(out, plain)
            found.append(sums - 1000)
    _, p = defined(made, q, slots - rows, group, **told)  # type: ignore[arg-type]
    want = p[slice(*observed)].sum((0, 1)) * ONE
    queries = (observed[1] - observed[0]) * group
    assert np.abs(found[0] - want).max() <= 1e-5 * queries * ONE + queries
    assert abs(found[0].sum() / ONE - queries) < 1e-3
    assert all(np.array_equal(found[0], x) for x in found)


def check_alike(made: list[Unit], q: Floats, group: int) -> Floats:
    results = [attend(x, q, len(x.k) - len(q), group, tile=len(q)) for x in made]
    assert all(np.array_equal(results[0], x, equal_nan=True) for x in results)
    return results[0]


@pytest.mark.parametrize("kv", ["int8", "int4"])
def test_groups_of_zeros_and_of_constants(kv: KVFormat) -> None:
    k, v, q, _ = numbers(3, 256, 64, 2, 3)
    k[:64], v[64:128] = 0.0, 0.0
    k[128:192], v[128:192] = 0.5, -0.25
    made = [unit(isa, k, v, (kv, kv)) for isa in ISAS]
    assert close(check_alike(made, q, 3), defined(made[0], q, 254, 3)[0], v)
    zeros = [unit(isa, k * 0, v * 0, (kv, kv)) for isa in ISAS]
    assert not check_alike(zeros, q, 3).any()
    assert np.isfinite(check_alike(made, q * 0, 3)).all()


@pytest.mark.parametrize("kv", ["int8", "int4"])
@pytest.mark.parametrize("size", [1e-6, 1e4])
def test_tiny_and_huge_numbers(kv: KVFormat, size: float) -> None:
    k, v, q, _ = numbers(4, 256, 64, 2, 3)
    k, v = np.clip(k * size, -6e4, 6e4).astype(np.float32), np.clip(v * size, -6e4, 6e4).astype(np.float32)
    q = (q / np.float32(size)).astype(np.float32)
    made = [unit(isa, k, v, (kv, kv)) for isa in ISAS]
    assert close(check_alike(made, q, 3), defined(made[0], q, 254, 3)[0], v)


@pytest.mark.parametrize("kv", ["f16", "int8", "int4"])
def test_infinities_do_no_harm_elsewhere(kv: KVFormat) -> None:
    k, v, q, _ = numbers(5, 256, 64, 2, 3)
    k[70, 3], v[80, 4], q[0, 5] = np.inf, np.nan, np.inf
    for isa in ISAS:
        assert attend(unit(isa, k, v, (kv, kv)), q, 254, 3, tile=2).shape == q.shape
