"""The native program: the same bits whatever the batch, chunks, blocks, threads and instruction set."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from native.tiny import address, assert_invariant, config, definition, executor, make_pass, tokens, weights

from kvik import _native
from kvik.errors import ParameterError
from kvik.ops.pages import BLOCK_TOKENS
from kvik.weights.layouts import Layout, input_rounding

SHAPES = [
    {},
    {"tied_embeddings": True, "windows": (70, None, 24)},
    {"num_heads": 4, "num_kv_heads": 1, "head_size": 80, "hidden_size": 64},
    {"num_heads": 3, "num_kv_heads": 3, "head_size": 32, "intermediate_size": 100, "hidden_size": 50},
    {"num_heads": 2, "num_kv_heads": 1, "head_size": 256, "num_layers": 1},
]


@pytest.mark.parametrize("kv", ["f32", "f16"])
@pytest.mark.parametrize("layout", [Layout.F32, Layout.BF16, Layout.INT8, Layout.INT4_MIN])
@pytest.mark.parametrize("shape", SHAPES)
def test_native_equals_the_definition(shape: dict[str, object], layout: Layout, kv: str) -> None:
    c = config(**shape)
    kind = input_rounding(layout)
    made = weights(c, layout)
    work = make_pass([(tokens(c.vocab_size, 150), 0, range(10, 20)), (tokens(c.vocab_size, 7, 1), 0, [3])])
    want, got = definition(c, made, kv=kv).run(work), executor(c, made, kv=kv).run(work)
    # A rounding that falls on the other side of a half moves an int8 step; without integers only sums differ.
    bound = {("f32", False): 2e-5, ("f16", False): 2e-3}.get((kv, kind is not None), 3e-2)
    assert np.abs(got - want).max() <= bound * np.abs(want).max()
    if bound > 1e-3:
        assert np.abs(got - want).mean() <= 4e-3 * np.abs(want).max()


@pytest.mark.parametrize("layout", [Layout.F32, Layout.INT4_MIN])
@pytest.mark.parametrize("shape", SHAPES)
def test_bits_are_invariant(shape: dict[str, object], layout: Layout) -> None:
    c = config(**shape)
    made = weights(c, layout)
    assert_invariant(lambda **how: executor(c, made, **how), c.vocab_size)


def test_logits_only_where_asked() -> None:
    c = config()
    runner = executor(c, weights(c, Layout.INT8))
    work = make_pass([(tokens(c.vocab_size, 20), 0, [0, 1]), (tokens(c.vocab_size, 9, 3), 0, [5])])
    every = runner.run(work).copy()
    some = np.array([4, 19, 28], np.int32)
    assert np.array_equal(runner.run(work._replace(logit_rows=some)), every[some])
    assert runner.run(work._replace(logit_rows=some[:0])).shape == (0, c.vocab_size)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": [97, 0]}, "vocabulary"), ({"tokens": [-1, 0]}, "vocabulary"), ({"slots": [0, 2]}, "consecutive"),
        ({"slots": [15, 16]}, "slot outside"), ({"blocks": [address(64)]}, "block out"), ({"blocks": [-1]}, "block out"),
        ({"blocks": [address(64) - 1]}, "block out"), ({"layouts": [1]}, "not registered"), ({"layouts": [-1]}, "not registered"),
        ({"shifts": [1]}, "shift"), ({"shifts": [-1]}, "shift"), ({"shifts": [0, 0]}, "match the shifts"),
        ({"shifts": [0, 0], "block_spans": [0, 1, 1]}, "more tables"), ({"layouts": [0, 0]}, "spans do not match"),
        ({"spans": [0, 1]}, "cover the rows"), ({"spans": [0, 0, 2], "layouts": [0, 0]}, "ascend"),
        ({"block_spans": [0, 2]}, "cover the blocks"), ({"logit_rows": [2]}, "logit row"), ({"positions": [-1, 0]}, "position"),
    ],
)  # fmt: skip
def test_a_pass_is_checked(change: dict[str, list[int]], message: str) -> None:
    c = config()
    runner = executor(c, weights(c, Layout.F32))
    work = make_pass([([1, 2], 0, [0])])
    with pytest.raises(ValueError, match=message):
        runner.run(work._replace(**{k: np.array(v, np.int32) for k, v in change.items()}))
    runner.run(work)


def test_sizes_the_kernels_lack_are_refused() -> None:
    for shape in ({"head_size": 24}, {"head_size": 272}, {"num_heads": 65, "num_kv_heads": 1}):
        c = config(**shape)
        with pytest.raises((ValueError, ParameterError), match="head"):
            executor(c, weights(c, Layout.F32))


def test_a_block_has_as_many_tokens_on_both_sides() -> None:
    assert _native.KV_BLOCK_TOKENS == BLOCK_TOKENS


def test_spans_are_checked_before_the_rows_they_lead_to() -> None:
    c = config()
    runner = executor(c, weights(c, Layout.F32))
    work = make_pass([([1, 2, 3], 0, [0])])
    for spans in ([0, 1_000_000, 3], [0, -5, 3]):
        changed = work._replace(
            spans=np.array(spans, np.int32), layouts=np.zeros(2, np.int32), block_spans=np.array([0, 1, 1], np.int32),
            shifts=np.zeros(2, np.int32),
        )  # fmt: skip
        with pytest.raises(ValueError, match="ascend"):
            runner.run(changed)


def test_threads_the_system_does_not_give_are_an_error() -> None:
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (1 << 29, 1 << 29)); "
        "from kvik import _native; _native.Pool(200)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    )
    assert done.returncode == 1 and "cannot start thread" in done.stderr


def test_measured_times_cover_the_step() -> None:
    c = config()
    runner = executor(c, weights(c, Layout.F32))
    runner.run(make_pass([(tokens(c.vocab_size, 100), 0, range(7))]))
    times = runner.times()
    assert times.matrices > 0 and times.attention > 0 and times.rest > 0
