"""Rows of logits reduced as they are made, and two models' rows compared: against plain float64, and bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from native.tiny import config, definition, executor, make_pass, tokens, weights

from kvik import _native
from kvik.ops import Pass, Reduced
from kvik.ops.reduction import empty_reduced, reduce_logits
from kvik.weights.layouts import Layout

ISAS = _native.isa_available()
SIZES = (1, 3, 16, 37, 511, 512, 513, 1300)


def rows_of(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    """Logits with a few tokens far above the others, and some that are equal."""
    found = rng.normal(-3, 4, (rows, columns)) + 12 * (rng.random((rows, columns)) < 0.01)
    return np.round(found * 8).astype(np.float32) / 8 if rng.random() < 0.5 else found.astype(np.float32)


def plain(logits: np.ndarray, targets: np.ndarray, top: int) -> Reduced:
    wide = logits.astype(np.float64)
    best = wide.max(axis=1)
    total = best + np.log(np.exp(wide - best[:, None]).sum(axis=1))
    ids = np.argsort(-wide, axis=1, kind="stable")[:, :top].astype(np.int32)
    return Reduced(total, logits[np.arange(len(logits)), targets], ids, np.take_along_axis(logits, ids, 1))


def same(some: Any, others: Any) -> bool:
    return all(np.array_equal(a, b, equal_nan=True) for a, b in zip(some, others, strict=True))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from(SIZES), st.integers(1, 5), st.integers(0, 1300))
def test_figures_of_rows(seed: int, columns: int, rows: int, top: int) -> None:
    rng, top = np.random.default_rng(seed), min(top, columns)
    logits, targets = rows_of(rng, rows, columns), rng.integers(0, columns, rows).astype(np.int32)
    want = plain(logits, targets, top)
    got = reduce_logits(logits, targets, top)
    assert np.abs(got.logsumexp - want.logsumexp).max() < 5e-7
    assert same(got[1:], want[1:])
    for isa in ISAS:
        other = empty_reduced(rows, top)
        _native.reduce_logits(_native.Pool(2), logits, targets, *other, isa=isa)
        assert same(other, got), isa


def test_the_sum_is_right_for_a_whole_vocabulary() -> None:
    rng = np.random.default_rng(4)
    logits = rng.normal(0, 3, (20, 152_064)).astype(np.float32)
    targets = np.zeros(20, np.int32)
    got, want = reduce_logits(logits, targets, 0), plain(logits, targets, 0)
    assert np.abs(got.logsumexp - want.logsumexp).max() < 3e-7


@pytest.mark.parametrize("columns", [40, 513, 1300])
def test_what_is_not_finite_is_seen(columns: int) -> None:
    logits = np.zeros((6, columns), np.float32)
    logits[0, columns - 1] = np.nan
    logits[1, 0] = np.inf
    logits[2] = -np.inf
    logits[3, 1:] = -np.inf
    logits[4, ::2] = -np.inf
    logits[5, 7] = np.finfo(np.float32).max
    for isa in ISAS:
        found = empty_reduced(6, 2)
        _native.reduce_logits(None, logits, np.zeros(6, np.int32), *found, isa=isa)
        assert np.isnan(found.logsumexp[:3]).all()
        assert found.logsumexp[3] == 0 and found.logsumexp[4] == pytest.approx(np.log(columns // 2))
        assert found.logsumexp[5] == np.finfo(np.float32).max
        assert found.top_ids[3:].tolist() == [[0, 1], [1, 3], [7, 0]]


# ---- in a program

SMALL: dict[str, Any] = {"num_layers": 1, "windows": (None,)}
HEADS = [
    (98, {}, Layout.INT8), (1100, {}, Layout.INT8), (1100, {}, Layout.BF16), (1100, {"tied_embeddings": True}, Layout.F32),
    (512, {}, Layout.INT4_MIN),
]  # fmt: skip


def reducing(work: Pass, rows: Any, targets: Any, top: int) -> Pass:
    return work._replace(
        logit_rows=np.empty(0, np.int32),
        reduce_rows=np.array(rows, np.int32),
        targets=np.array(targets, np.int32),
        top=top,
    )


@pytest.mark.parametrize(("vocabulary", "shape", "layout"), HEADS)
def test_reduced_rows_are_the_kept_ones_reduced(vocabulary: int, shape: dict[str, Any], layout: Layout) -> None:
    """The same bits, whatever rows are beside them, with any threads and instruction set; columns of padding never count."""
    c = config(vocab_size=vocabulary, **SMALL, **shape)
    made, rng = weights(c, layout), np.random.default_rng(3)
    work = make_pass([(tokens(vocabulary, 150), 0, range(10, 20)), (tokens(vocabulary, 7, 1), 0, [3])])
    targets = rng.integers(0, vocabulary, 157).astype(np.int32)
    logits = executor(c, made).run(work).copy()
    want = reduce_logits(logits, targets, 20)
    for isa, threads in ((ISAS[0], 1), *((isa, 3) for isa in ISAS)):
        runner = executor(c, made, isa=isa, threads=threads)
        for count, top in ((157, 20), (1, 0), (2, 7), (70, 3)):
            rows = np.sort(rng.choice(157, count, replace=False))
            assert runner.run(reducing(work, rows, targets[rows], top)).shape == (0, vocabulary)
            got = runner.reduced()
            assert same(got[:2], (figures[rows] for figures in want[:2])), (isa, threads)
            assert same(got[2:], (figures[rows, :top] for figures in want[2:])), (isa, threads)
    plainly = plain(logits, targets, 20)
    assert np.abs(want.logsumexp - plainly.logsumexp).max() < 5e-7 and same(want[1:], plainly[1:])


def test_kept_and_reduced_rows_in_one_pass() -> None:
    c = config(vocab_size=1100)
    runner = executor(c, weights(c, Layout.INT8))
    work = make_pass([(tokens(1100, 30), 0, [0, 1]), (tokens(1100, 9, 3), 0, [5])])
    logits = runner.run(work).copy()
    kept, reduced = np.array([3, 38], np.int32), np.array([3, 29], np.int32)
    both = work._replace(logit_rows=kept, reduce_rows=reduced, targets=np.array([1099, 0], np.int32), top=2)
    assert np.array_equal(runner.run(both), logits[kept])
    assert same(runner.reduced(), reduce_logits(logits[reduced], both.targets, 2))
    runner.run(work)
    assert all(len(figures) == 0 for figures in runner.reduced())


@pytest.mark.parametrize("layout", [Layout.F32, Layout.INT8])
def test_the_definition_reduces_alike(layout: Layout) -> None:
    c = config(vocab_size=1100, windows=(70, None, 24))
    made = weights(c, layout)
    work = make_pass([(tokens(1100, 150), 0, range(10, 20)), (tokens(1100, 7, 1), 0, [3])])
    rows, targets = np.arange(20, 157), np.random.default_rng(1).integers(0, 1100, 137)
    defined, native = definition(c, made, kv="f32"), executor(c, made, kv="f32")
    work = reducing(work, rows, targets, 3)
    assert defined.run(work).shape == (0, 1100)
    native.run(work)
    want, got = defined.reduced(), native.reduced()
    bound = 2e-5 if layout == Layout.F32 else 3e-2
    scale = np.abs(want.top_logits).max()
    for a, b in zip(want, got, strict=True):
        if a.dtype != np.int32:
            assert np.abs(a - b).max() <= bound * scale
    if layout == Layout.F32:
        assert (want.top_ids == got.top_ids).mean() > 0.99
    logits = defined.run(work._replace(logit_rows=work.reduce_rows)).copy()
    plainly = plain(logits, targets, 3)
    assert np.abs(defined.reduced().logsumexp - plainly.logsumexp).max() < 1e-9
    assert same(defined.reduced()[1:], plainly[1:])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reduce_rows": [2]}, "row to reduce"), ({"reduce_rows": [-1]}, "row to reduce"), ({"targets": [98]}, "target"),
        ({"targets": [-1]}, "target"), ({"targets": [0, 1]}, "differ in length"), ({"top": 99}, "more best tokens"),
    ],
)  # fmt: skip
def test_reduced_rows_are_checked(change: dict[str, Any], message: str) -> None:
    c = config()
    runner = executor(c, weights(c, Layout.INT8))
    work = reducing(make_pass([([5, 6], 0, [0])]), [1], [0], 1)
    runner.run(work)
    changed = work._replace(**{k: v if k == "top" else np.array(v, np.int32) for k, v in change.items()})
    with pytest.raises(ValueError, match=message):
        runner.run(changed)


def peak_bytes() -> int:
    (line,) = (one for one in Path("/proc/self/status").read_text().splitlines() if one.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def test_all_rows_of_logits_never_exist() -> None:
    """512 rows of 100,000 logits would be 205 MB."""
    c = config(vocab_size=100_000, **SMALL)
    runner = executor(c, weights(c, Layout.INT8), threads=2, max_rows=512)
    work = reducing(make_pass([(tokens(100_000, 512), 0, range(32))]), range(512), tokens(100_000, 512, 1), 5)
    runner.run(work._replace(reduce_rows=work.reduce_rows[:40], targets=work.targets[:40]))
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    except OSError:
        pytest.skip("the peak of memory cannot be read here")
    before = peak_bytes()
    runner.run(work)
    assert peak_bytes() - before < 20_000_000


# ---- two models


def compared(
    base: np.ndarray, other: np.ndarray, targets: np.ndarray, threads: int | None = None, isa: str = ""
) -> list[Any]:
    rows = len(base)
    out: list[Any] = [np.empty(rows) for _ in range(3)] + [np.empty(rows, np.int32) for _ in range(2)]
    pool = None if threads is None else _native.Pool(threads)
    _native.compare_logits(pool, base, other, targets, *out, isa=isa)
    return out


def plainly_compared(base: np.ndarray, other: np.ndarray, targets: np.ndarray) -> list[Any]:
    def log_softmax(x: np.ndarray) -> np.ndarray:
        wide = x.astype(np.longdouble)
        wide = wide - wide.max(axis=1, keepdims=True)
        return wide - np.log(np.exp(wide).sum(axis=1, keepdims=True))

    p, q = log_softmax(base), log_softmax(other)
    at = np.arange(len(base))
    return [
        (np.exp(p) * (p - q)).sum(axis=1),
        p[at, targets],
        q[at, targets],
        base.argmax(axis=1),
        other.argmax(axis=1),
    ]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from(SIZES), st.sampled_from([1e-3, 0.1, 3.0]))
def test_two_rows_compared(seed: int, columns: int, noise: float) -> None:
    rng = np.random.default_rng(seed)
    base = rows_of(rng, 3, columns)
    other = (base + rng.normal(0, noise, base.shape)).astype(np.float32)
    targets = rng.integers(0, columns, 3).astype(np.int32)
    got, want = compared(base, other, targets), plainly_compared(base, other, targets)
    # a common error of the exponentials cancels; what differs weighs with log p - log q, whose square KL is like
    assert (np.abs(got[0] - want[0]) <= 1e-13 + 1e-12 * np.sqrt(np.abs(want[0]))).all()
    assert np.abs(got[1] - want[1]).max() < 2e-12 and np.abs(got[2] - want[2]).max() < 2e-12
    assert same(got[3:], want[3:])
    for isa in ISAS:
        assert same(compared(base, other, targets, 2, isa), got), isa


def test_a_row_against_itself_is_exactly_zero_away() -> None:
    base = rows_of(np.random.default_rng(1), 8, 1300)
    got = compared(base, base, np.arange(8, dtype=np.int32))
    assert not got[0].any() and same([got[1]], [got[2]]) and same([got[3]], [got[4]])


def test_rows_compared_may_lie_apart() -> None:
    rng = np.random.default_rng(2)
    wide, targets = rng.normal(0, 2, (2, 9, 80)).astype(np.float32), np.zeros(9, np.int32)
    whole = compared(wide[0, :, :70].copy(), wide[1, :, :70].copy(), targets)
    assert same(compared(wide[0, :, :70], wide[1, :, :70], targets, 3), whole)
    with pytest.raises(ValueError, match="contiguous"):
        compared(wide[0, :, ::2], wide[1, :, ::2], targets)


def test_infinite_logits_of_two_models() -> None:
    """What the base gives nothing adds nothing; what only the base gives something makes infinity; the rest is damage."""
    base, other = np.zeros((7, 600), np.float32), np.ones((7, 600), np.float32)
    base[0, 300:] = -np.inf
    other[1, 5] = -np.inf
    base[2, 4] = other[2, 4] = -np.inf
    base[3, 599], other[4, 0], base[5], other[6, 1] = np.nan, np.inf, -np.inf, np.nan
    for isa in ISAS:
        kl, p, q, p_best, q_best = compared(base, other, np.full(7, 5, np.int32), isa=isa)
        assert kl[0] == pytest.approx(np.log(2)) and kl[1] == np.inf and kl[2] == pytest.approx(0, abs=1e-15)
        assert p[0] == pytest.approx(-np.log(300)) and q[1] == -np.inf
        assert np.isnan(kl[3:]).all() and np.isnan(p[3:]).all() and np.isnan(q[3:]).all()
        assert p_best[3:].tolist() == [-1, 0, -1, 0] and q_best[3:].tolist() == [0, -1, 0, -1]


@pytest.mark.parametrize(
    ("shapes", "target", "message"),
    [
        (((2, 5), (2, 6)), 0, "two vocabularies"), (((2, 5), (3, 5)), 0, "one entry a row"),
        (((2, 5), (2, 5)), 5, "outside the vocabulary"), (((2, 5), (2, 5)), -1, "outside the vocabulary"),
    ],
)  # fmt: skip
def test_rows_to_compare_are_checked(shapes: Any, target: int, message: str) -> None:
    base, other = (np.zeros(shape, np.float32) for shape in shapes)
    with pytest.raises(ValueError, match=message):
        compared(base, other, np.full(2, target, np.int32))
