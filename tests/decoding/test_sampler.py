"""The native sampler against the definition: same kept set, same token, same log-probabilities; and its edges."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
from decoding.conftest import random_edits, random_params

from kvik import _native
from kvik.decoding import (
    DecodingState,
    DrawRequest,
    Edits,
    Sampler,
    best_rows,
    noise,
    sample_rows,
    sample_rows_by_definition,
)
from kvik.decoding.best import best_rows_by_definition
from kvik.decoding.pipeline import apply
from kvik.errors import KvikError, ParameterError
from kvik.params import SamplingParams

MakeRow = Callable[[np.random.Generator, int, str], np.ndarray]
RARE_POSITION = 5150801
SIZES = (1, 2, 3, 15, 16, 17, 63, 64, 65, 255, 256, 257, 1000, 1025, 5001)


def assert_same(row: np.ndarray, request: DrawRequest) -> None:
    before = row.copy()
    (native,) = sample_rows(row[None], [request])
    assert sample_rows(row[None], [request], in_place=True) == [native]
    (defined,) = sample_rows_by_definition(row[None], [request])
    np.testing.assert_array_equal(row, before)
    context = f"V={row.size} {request}"
    assert native.token_id == defined.token_id, context
    assert [t for t, _ in native.top] == [t for t, _ in defined.top], context
    ours, theirs = (
        np.array([native.logprob, *(x for _, x in native.top)]),
        np.array([defined.logprob, *(x for _, x in defined.top)]),
    )
    np.testing.assert_allclose(np.exp(ours), np.exp(theirs), atol=1e-6, rtol=0, err_msg=context)
    np.testing.assert_allclose(ours, theirs, atol=2e-6, rtol=1e-12, err_msg=context)
    assert not np.isnan(ours).any()


def random_request(rng: np.random.Generator, size: int) -> DrawRequest:
    seed, sample, position = int(rng.integers(2**63)) * 2, int(rng.integers(2**32)), int(rng.integers(2**32))
    return DrawRequest(random_params(rng, size), seed, sample, position, random_edits(rng, size))


@pytest.mark.parametrize("size", SIZES)
def test_native_draws_as_defined(size: int, kind: str, make_row: MakeRow) -> None:
    rng = np.random.default_rng(size)
    for _ in range(12):
        assert_same(make_row(rng, size, kind), random_request(rng, size))


@pytest.mark.parametrize("size", [49152, 50257])
def test_native_draws_as_defined_on_the_full_vocabulary(size: int, kind: str, make_row: MakeRow) -> None:
    rng = np.random.default_rng(7)
    row = make_row(rng, size, kind)
    for _ in range(12):
        assert_same(row, random_request(rng, size))


FILTERS = [
    {"top_k": 1},
    {"top_k": 50},
    {"top_k": 3000},
    {"top_k": 49151},
    {"top_p": 0.0},
    {"top_p": 0.5},
    {"top_p": 0.9},
    {"top_p": 0.999},
    {"min_p": 0.05},
    {"min_p": 1e-5},
    {"temperature": 1.5},
    {"temperature": 3.0, "top_p": 0.95},
    {"temperature": 0.7, "top_k": 50, "top_p": 0.9},
    {"temperature": 2.0, "top_k": 20000, "top_p": 0.8, "min_p": 1e-4},
    {"typical_p": 0.2},
    {"typical_p": 0.95, "temperature": 2.0},
    {"epsilon_cutoff": 3e-4},
    {"eta_cutoff": 3e-4},
    {"top_n_sigma": 1.0},
    {"top_n_sigma": 5.0, "temperature": 3.0},
    {"xtc_probability": 1.0},
    {"xtc_probability": 1.0, "xtc_threshold": 1e-3, "temperature": 1.5},
]


@pytest.mark.parametrize("options", FILTERS, ids=str)
def test_same_kept_set_and_probabilities_on_the_full_vocabulary(
    options: dict[str, float], kind: str, make_row: MakeRow
) -> None:
    params = SamplingParams(**options, logprobs_mode="processed", logprobs=0)  # type: ignore[arg-type]
    object.__setattr__(params, "logprobs", 49152)  # above the public range, to see every kept token
    row = make_row(np.random.default_rng(11), 49152, kind)
    (drawn,) = sample_rows(row[None], [Sampler(row.size, params, 3).request(5)])
    expected = apply(row, params)
    got = np.full(row.size, -np.inf)
    got[[token for token, _ in drawn.top]] = [logprob for _, logprob in drawn.top]
    np.testing.assert_array_equal(got > -np.inf, expected > -np.inf)
    np.testing.assert_allclose(np.exp(got), np.exp(expected), atol=1e-6, rtol=0)


def test_a_row_is_drawn_alike_alone_in_any_batch_and_in_any_order(make_row: MakeRow) -> None:
    rng = np.random.default_rng(5)
    rows = np.stack(
        [make_row(rng, 3000, kind) for kind in ("normal", "peaked", "flat", "ties", "equal", "holes") for _ in range(6)]
    )
    requests = [DrawRequest(random_params(rng, 3000), i, i, i, random_edits(rng, 3000)) for i in range(len(rows))]
    alone = [sample_rows(rows[i : i + 1], requests[i : i + 1])[0] for i in range(len(rows))]
    assert sample_rows(rows, requests) == alone
    before = rows.copy()
    assert sample_rows(rows, requests, pool=_native.Pool(3), in_place=True) == alone
    np.testing.assert_array_equal(rows, before)
    order = rng.permutation(len(rows))
    assert sample_rows(rows[order], [requests[i] for i in order]) == [alone[i] for i in order]
    assert sample_rows(rows[::2], requests[::2]) == alone[::2]  # strided rows
    assert len({drawn.token_id for drawn in alone}) > 20


def test_every_instruction_set_gives_the_same_bits(kind: str, make_row: MakeRow) -> None:
    rng = np.random.default_rng(9)
    for size in (*SIZES, 49152):
        row = make_row(rng, size, kind)
        requests = [random_request(rng, size) for _ in range(8)]
        rows = np.broadcast_to(row, (len(requests), size))
        portable = sample_rows(rows, requests, isa="portable")
        for isa in _native.isa_available():
            assert sample_rows(rows, requests, isa=isa) == portable


def test_an_unknown_instruction_set_is_refused() -> None:
    with pytest.raises(ValueError, match="no instruction set pentium"):
        sample_rows(np.zeros((1, 4), np.float32), [DrawRequest(SamplingParams(), 0, 0, 0)], isa="pentium")


def test_the_vocabulary_behind_a_token_does_not_change_its_noise() -> None:
    # what speculation builds on: equal distributions draw equal tokens at equal keys
    row = np.zeros(500, np.float32)
    longer = np.concatenate([row, np.full(700, -np.inf, np.float32)])
    for position in range(50):
        request = DrawRequest(SamplingParams(), 1, 0, position)
        assert sample_rows(row[None], [request])[0].token_id == sample_rows(longer[None], [request])[0].token_id


def test_greedy_takes_the_lowest_id_of_equals_and_reports_the_raw_logprob() -> None:
    row = np.zeros(49152, np.float32)
    row[[700, 701, 40000]] = 3.0
    drawn = Sampler(row.size, SamplingParams(temperature=0.0, logprobs=2), 0).sample(row, 0)
    expected = 3.0 - np.log(49149 + 3 * np.exp(3.0))
    assert drawn.token_id == 700 and drawn.logprob == pytest.approx(expected, abs=1e-6)
    assert [t for t, _ in drawn.top] == [700, 701]
    processed = SamplingParams(temperature=0.0, logprobs=2, logprobs_mode="processed")
    assert Sampler(row.size, processed, 0).sample(row, 0) == (700, 0.0, ((700, 0.0),))


def test_raw_logprobs_do_not_depend_on_the_filters(make_row: MakeRow) -> None:
    row = make_row(np.random.default_rng(0), 5000, "peaked")
    reference = Sampler(5000, SamplingParams(logprobs=20), 0).sample(row, 0).top
    for options in ({"temperature": 0.0}, {"top_p": 0.1}, {"top_k": 3, "temperature": 2.0}, {"min_p": 0.5}):
        assert Sampler(5000, SamplingParams(logprobs=20, **options), 9).sample(row, 3).top == reference  # type: ignore[arg-type]


def test_the_race_runs_again_where_all_noise_is_low() -> None:
    # the exponential variate of this key is above 16, which happens once in nine million draws
    assert -noise.gumbel(0, 0, RARE_POSITION, [0])[0] > np.log(16)
    assert_same(np.zeros(1, np.float32), DrawRequest(SamplingParams(), 0, 0, RARE_POSITION))


@pytest.mark.parametrize("options", [{}, {"temperature": 0.0}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.5}], ids=str)
@pytest.mark.parametrize("mode", ["raw", "processed"])
def test_nothing_left_is_no_token(options: dict[str, float], mode: str) -> None:
    params = SamplingParams(min_tokens=1, logprobs=3, logprobs_mode=mode, **options)  # type: ignore[arg-type]
    state = DecodingState(params, [0], 2, end_ids=(0, 1))
    banned = Sampler(2, params, 0).sample(np.array([1, 2], np.float32), 0, state)
    assert banned.token_id is None and banned.logprob == -np.inf
    assert [t for t, _ in banned.top] == ([1, 0] if mode == "raw" else [])
    assert Sampler(2, params, 0).sample(np.full(2, -np.inf, np.float32), 0) == (None, -np.inf, ())


@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf])
@pytest.mark.parametrize("place", [0, 16, 999, 1000])
@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"top_p": 0.9}], ids=str)
def test_damaged_logits_are_refused_by_name(bad: float, place: int, options: dict[str, float]) -> None:
    rows = np.zeros((3, 1001), np.float32)
    rows[1, place] = bad
    requests = [Sampler(1001, SamplingParams(**options), 0).request(70 + i) for i in range(3)]  # type: ignore[arg-type]
    with pytest.raises(KvikError, match=f"position 71: .*token {place} is"):
        sample_rows(rows, requests)


def test_logits_are_only_read() -> None:
    row = np.linspace(-3, 3, 100, dtype=np.float32)
    row.flags.writeable = False
    params = SamplingParams(top_k=5, min_tokens=1, logprobs=3)
    sampler, state = Sampler(100, params, 0), DecodingState(params, [0], 100, end_ids=(99,))
    one = sampler.sample(row, 0, state)
    assert sample_rows(np.broadcast_to(row, (4, 100)), [sampler.request(0, state)] * 4, in_place=True) == [one] * 4
    assert one.token_id != 99


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab_size": 0}, "vocab_size"),
        ({"vocab_size": 2**20 + 1}, "vocab_size"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**64}, "seed"),
        ({"sample_index": -1}, "sample_index"),
    ],
)
def test_sampler_ranges(options: dict[str, object], message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        Sampler(**({"vocab_size": 10, "params": SamplingParams(), "seed": 0} | options))  # type: ignore[arg-type]


def test_shapes_are_checked() -> None:
    sampler = Sampler(10, SamplingParams(), 0)
    with pytest.raises(ParameterError, match="shape"):
        sampler.sample(np.zeros(11, np.float32), 0)
    with pytest.raises(ParameterError, match="float32"):
        sample_rows(np.zeros((1, 10)), [sampler.request(0)])
    with pytest.raises(ParameterError, match="float32"):
        sample_rows(np.zeros((2, 10), np.float32), [sampler.request(0)])
    assert sample_rows(np.zeros((0, 10), np.float32), []) == []


def call_native(**changes: object) -> None:
    arguments: dict[str, object] = {
        "logits": np.zeros((1, 10), np.float32),
        "reals": reals(),
        "integers": whole(0, 0, 0, 0, 0, 0),
        "edits": [None],
        "outcomes": np.zeros(1, np.uint8),
        "tokens": np.zeros(1, np.int32),
        "logprobs": np.zeros(1),
        "counts": np.zeros(1, np.int32),
        "top_ids": np.zeros((1, 2), np.int32),
        "top_logprobs": np.zeros((1, 2)),
    }
    _native.sample_rows(**(arguments | changes))  # type: ignore[arg-type]


def reals(at: int = 0, value: float = 1.0) -> np.ndarray:
    made = np.array([[1.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.1]])
    made[0, at] = value
    return made


def whole(*values: int) -> np.ndarray:
    return np.array([values], np.uint64)


def ids(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def floats(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


@pytest.mark.parametrize(
    "changes",
    [
        {"logits": np.zeros((2, 10), np.float32)},
        {"logits": np.zeros((1, 0), np.float32)},
        {"logits": np.zeros((1, 20), np.float32)[:, ::2]},
        *({"reals": reals(at, bad)} for at in range(9) for bad in (-1.0, np.nan, 1e7) if (at, bad) != (0, 1e7)),
        {"reals": reals(3, 0.0)},
        {"reals": np.ones((1, 2))},
        {"integers": whole(0, 2**32, 0, 0, 0, 0)},
        {"integers": whole(0, 0, 2**32, 0, 0, 0)},
        {"integers": whole(0, 0, 0, 2**32, 0, 0)},
        {"integers": whole(0, 0, 0, 0, 3, 0)},
        {"integers": whole(0, 0, 0, 0, 0, 2)},
        {"edits": []},
        {"edits": [Edits(banned=ids(10))]},
        {"edits": [Edits(banned=ids(-1))]},
        {"edits": [Edits(seen=ids(3), repetition=0.0)]},
        {"edits": [Edits(seen=ids(3), repetition=np.inf)]},
        {"edits": [Edits(seen=ids(3), repetition=np.nan)]},
        {"edits": [Edits(bias_ids=ids(3))]},
        {"edits": [Edits(bias_ids=ids(3), biases=floats(1, 2))]},
        {"edits": [Edits(bias_ids=ids(3), biases=floats(np.nan))]},
        {"edits": [Edits(dry_ids=ids(3), dry_penalties=floats(np.inf))]},
        {"edits": [Edits(counted=ids(3))]},
        {"edits": [Edits(counted=ids(3), counts=ids(1), presence=np.inf)]},
        {"edits": [Edits(mask=np.zeros(2, np.uint32))]},
        {"edits": [(None,)]},
        {"tokens": np.zeros(2, np.int32)},
        {"top_logprobs": np.zeros((1, 3))},
    ],
)
def test_native_code_checks_every_range_itself(changes: dict[str, object]) -> None:
    call_native()
    with pytest.raises(ValueError, match="sampler: "):
        call_native(**changes)


def test_edits_in_place_need_rows_of_their_own() -> None:
    rows = np.lib.stride_tricks.as_strided(np.zeros(10, np.float32), (2, 10), (0, 4))
    requests = [DrawRequest(SamplingParams(), 0, 0, 0, Edits(banned=ids(1)))] * 2
    with pytest.raises(ValueError, match="rows overlap"):
        sample_rows(rows, requests, in_place=True)


@pytest.mark.parametrize("count", [1, 2, 9, 300])
def test_best_rows_are_as_defined(count: int, kind: str, make_row: MakeRow) -> None:
    rng = np.random.default_rng(count)
    for size in (1, 2, 17, 300, 5001, 49152):
        rows = np.stack([make_row(rng, size, kind) for _ in range(4)])
        edits = [random_edits(rng, size) for _ in rows]
        want = best_rows_by_definition(rows, edits, count)
        got = best_rows(rows, edits, count, pool=_native.Pool(2))
        np.testing.assert_array_equal(got.found, want.found)
        np.testing.assert_allclose(got.logprobs, want.logprobs, rtol=2e-6, atol=3e-6)
        unlike = got.ids != want.ids  # only where the normaliser's last bit decides
        np.testing.assert_allclose(got.logprobs[unlike], want.logprobs[unlike], rtol=2e-6, atol=3e-6)
        assert unlike.mean() < 0.02
        for isa in _native.isa_available():
            for mine, theirs in zip(best_rows(rows, edits, count, isa=isa), got, strict=True):
                np.testing.assert_array_equal(mine, theirs)


def test_best_rows_of_ties_and_nothing() -> None:
    rows = np.array([[1, 3, 3, 2], [-np.inf] * 4, [0, -np.inf, -np.inf, 0]], np.float32)
    best = best_rows(rows, [None, None, Edits(banned=ids(0))], 3)
    assert best.ids.tolist() == [[1, 2, 3], [-1, -1, -1], [3, -1, -1]] and best.found.tolist() == [3, 0, 1]
    assert best.logprobs[0, 0] == pytest.approx(-np.log(2 + np.exp(-1) + np.exp(-2)), abs=1e-6)
    assert best.logprobs[2].tolist() == [pytest.approx(-np.log(2), abs=1e-6), -np.inf, -np.inf]  # not normalised again
    with pytest.raises(KvikError, match="token 2 is nan"):
        best_rows(np.array([[0, 1, np.nan]], np.float32), [None], 1)
    with pytest.raises(ParameterError, match="count"):
        best_rows(rows, [None] * 3, 0)


IDS, FLOATS, WORDS = np.arange(4, dtype=np.int32), np.ones(4, np.float32), np.full(2, 7, np.uint32)


@pytest.mark.parametrize("row", [sample_rows, best_rows], ids=["sample", "best"])
@pytest.mark.parametrize(
    "change", [lambda a: a.astype(np.int64), lambda a: np.repeat(a, 2)[::2], list, lambda a: a[None]]
)
@pytest.mark.parametrize(
    "field", ["bias_ids", "biases", "banned", "mask", "seen", "counted", "counts", "dry_ids", "repeated"]
)
def test_arrays_of_edits_are_taken_as_they_are_or_refused(row, change, field: str) -> None:
    whole = Edits(IDS, FLOATS, IDS, WORDS, IDS, 2.0, IDS, IDS + 1, 0.5, 0.5, IDS, FLOATS, IDS)
    edits = whole._replace(**{field: change(getattr(whole, field))})
    logits = np.zeros((1, 40), np.float32)
    with pytest.raises(ValueError, match="an edit's array must be contiguous int32, float32 or uint32"):
        sample_rows(logits, [DrawRequest(SamplingParams(), 0, 0, 0, edits)]) if row is sample_rows else row(
            logits, [edits], 2
        )


NO_MEMORY = """
import resource, sys
import numpy as np
from kvik import _native
from kvik.decoding import DrawRequest, Edits, sample_rows
from kvik.params import SamplingParams
rows = np.zeros((3, 2**20), np.float32)
edits = Edits(bias_ids=np.arange(5, dtype=np.int32), biases=np.ones(5, np.float32))
pool = _native.Pool(2) if sys.argv[1] == "pool" else None
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, ((pages + 300) * resource.getpagesize(),) * 2)
try:
    sample_rows(rows, [DrawRequest(SamplingParams(), 0, 0, 0, edits)] * 3, pool=pool, in_place=True)
except MemoryError:
    print("no memory", rows.any())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory are Linux's")
@pytest.mark.parametrize("threads", ["alone", "pool"])
def test_a_row_is_as_before_where_memory_ends(threads: str) -> None:
    # every piece of 64 KiB comes from the system, so that the race's 4 MiB are what is refused
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", NO_MEMORY, threads]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.stdout == "no memory False\n", run.stderr
