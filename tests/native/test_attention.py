"""Attention's division of work and its windows: the same bits whatever is divided, and nothing read that nobody sees."""

from __future__ import annotations

from collections.abc import Iterator

import native.tiny
import numpy as np
import pytest
from native.tiny import config, executor, make_pass, tokens, weights

from kvik import _native
from kvik.cache.storage import allocate_cache
from kvik.ops.native_ops import NativeExecutor
from kvik.weights.layouts import Layout

WINDOWED = {"windows": (70, 33, 24)}
REACH = 70


def whole(runner: NativeExecutor, ids: list[int], table: list[int]) -> np.ndarray:
    return runner.run(make_pass([(ids, 0, table)])).copy()


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[np.ndarray]]:
    """The memory of the executors that a test makes."""
    made: list[np.ndarray] = []

    def allocate(size: int) -> np.ndarray:
        made.append(allocate_cache(size))
        return made[-1]

    monkeypatch.setattr(native.tiny, "allocate_cache", allocate)
    yield made


@pytest.mark.parametrize("kv", ["f32", "f16"])
@pytest.mark.parametrize("count", [1, 2, 3, 20, 60])
def test_blocks_before_every_window_are_not_read(count: int, kv: str, cache: list[np.ndarray]) -> None:
    c = config(**WINDOWED)
    made, ids, table = weights(c, Layout.F32), tokens(c.vocab_size, 300), list(range(20))
    want = whole(executor(c, made, kv=kv, max_rows=300), ids, table)
    for isa in _native.isa_available():
        for threads in (1, 3):
            runner = executor(c, made, kv=kv, isa=isa, threads=threads)
            memory = cache[-1].reshape(64, -1)
            runner.run(make_pass([(ids[:128], 0, table)]))
            for at in range(128, len(ids), count):
                gone = max(0, at + 1 - REACH) // 16
                memory[table[:gone]] = 0xFF  # NaN, in f16 and in f32
                some = ids[at : at + count]
                got = runner.run(make_pass([(some, at, [-1] * gone + table[gone:])])).copy()
                assert np.array_equal(got, want[at : at + len(some)]), (isa, threads, at)


def test_only_blocks_before_every_window_may_be_gone() -> None:
    c = config(**WINDOWED)
    made, ids, table = weights(c, Layout.F32), tokens(c.vocab_size, 128), list(range(9))
    runner = executor(c, made)
    whole(runner, ids, table)
    runner.run(make_pass([([1, 2], 128, [-1, -1, -1, *table[3:]])]))  # slot 59 is the first that is seen
    for blocks in ([-1] * 4 + table[4:], [*table[:8], -1], [-2, *table[1:]]):
        with pytest.raises(ValueError, match="block out"):
            runner.run(make_pass([([1, 2], 128, blocks)]))
    unlimited = executor(config(windows=(70, None, 24)), made)
    whole(unlimited, ids, table)
    with pytest.raises(ValueError, match="block out"):
        unlimited.run(make_pass([([1, 2], 128, [-1, *table[1:]])]))


@pytest.mark.parametrize("windows", [(None,) * 3, (70, None, 24)])
def test_a_long_sequence_among_short_ones_keeps_its_bits(windows: tuple[int | None, ...]) -> None:
    c = config(windows=windows)
    made, ids, table = weights(c, Layout.F32), tokens(c.vocab_size, 500), list(range(32))
    want = whole(executor(c, made, max_rows=512), ids, table)
    for threads in (1, 2, 5):
        runner = executor(c, made, threads=threads)
        for at in (0, 250):
            runner.run(make_pass([(ids[at : at + 250], at, table)]))
        shorts = [([i], 0, [40 + i]) for i in range(12)]
        for place in (0, 5, 12):
            beside = [*shorts[:place], (ids[499:], 499, table), *shorts[place:]]
            assert np.array_equal(runner.run(make_pass(beside))[place], want[499]), (threads, place)
