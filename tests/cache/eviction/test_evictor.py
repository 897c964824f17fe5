"""What each policy keeps, against plain loops over attention of random models; chunks, forks, restarts; refusals."""

from __future__ import annotations

import weakref

import numpy as np
import pytest
from cache.eviction.simulated import Shape, Simulation, numbers, one_thread, rope_table
from hypothesis import given, settings
from hypothesis import strategies as st

from kvik.cache.eviction import Evictor
from kvik.errors import KvikError, ParameterError
from kvik.params import CacheParams

ONCE = ["h2o:budget=25%,every=0", "h2o:budget=12,recent=0.25", "snapkv:budget=50%,window=4,kernel=3", "snapkv:budget=9,window=8,kernel=5",
        "snapkv:budget=25%,window=1,kernel=1", "tova:budget=30%", "keydiff:budget=40%", "expectedattention:budget=50%,window=16,future=5",
        "expectedattention:budget=9,window=64,sinks=2,future=9", "keydiff:budget=1"]  # fmt: skip
AGAIN = ["h2o:budget=25%,every=7", "h2o:budget=12,every=1", "snapkv:budget=10,window=4,kernel=3,every=9", "tova:budget=6,every=5",
         "tova:budget=60%,every=4", "keydiff:budget=8,every=6", "expectedattention:budget=8,window=12,every=5,sinks=1"]  # fmt: skip
SPREADS = [("uniform", "uniform"), ("pyramid", "uniform"), ("uniform", "ada"), ("pyramid", "ada")]


one_thread = pytest.fixture(autouse=True)(one_thread)


def params(policy: str, layers: str = "uniform", heads: str = "uniform") -> CacheParams:
    return CacheParams(policy=policy, layers=layers, heads="uniform" if policy.startswith("tova") else heads)  # type: ignore[arg-type]


@pytest.mark.parametrize("policy", ONCE)
@pytest.mark.parametrize(("layers", "heads"), SPREADS)
def test_kept_at_the_prompts_end(policy: str, layers: str, heads: str) -> None:
    shape = Shape()
    simulation = Simulation(params(policy, layers, heads), 45, 40, rope=rope_table(shape), seed=len(policy))
    simulation.advance(42)
    (at, kept), *others = simulation.events
    assert at == 40 and not others
    whole = simulation.params.scorer.kept(40)  # type: ignore[union-attr]
    assert kept.counts.dtype == kept.kept.dtype == np.int32 and (kept.counts[1] == -1).all()
    assert kept.counts[[0, 2]].sum() == 4 * whole
    assert kept.kept.shape == (3, 2, kept.counts.max()) and kept.counts.max() <= simulation.evictor.most_kept(40, 42)
    if layers == "uniform":
        assert (kept.counts[[0, 2]].sum(1) == 2 * whole).all()
    if heads == "uniform" or policy.startswith("tova"):
        assert (kept.counts[:, 0] == kept.counts[:, 1]).all()


@pytest.mark.parametrize("policy", AGAIN)
@pytest.mark.parametrize(("layers", "heads"), SPREADS)
def test_kept_at_every_event(policy: str, layers: str, heads: str) -> None:
    simulation = Simulation(params(policy, layers, heads), 60, 24, seed=7)
    simulation.advance(60)
    assert [at for at, _ in simulation.events][:2] == [24, 24 + simulation.params.scorer.every]  # type: ignore[union-attr]
    for at, kept in simulation.events:
        assert kept.counts[[0, 2]].sum() == 4 * simulation.params.scorer.kept(at)  # type: ignore[union-attr]
        assert kept.counts.max() <= simulation.evictor.most_kept(24, 60)


@settings(max_examples=20, deadline=None)
@given(
    st.sampled_from(ONCE + AGAIN),
    st.sampled_from(SPREADS),
    st.lists(st.integers(1, 20), min_size=1),
    st.integers(0, 99),
)
def test_chunks_change_nothing(policy: str, spread: tuple[str, str], chunks: list[int], seed: int) -> None:
    shape = Shape(num_layers=2, windows=(None, None), num_heads=2)
    given_ = numbers(shape, 40, seed)
    whole, parts = (
        Simulation(params(policy, *spread), 40, 20, shape=shape, numbers_=given_, scale=0.5) for _ in range(2)
    )
    whole.advance(40)
    for chunk in chunks:
        parts.advance(min(chunk, 40 - parts.computed))
    parts.advance(40 - parts.computed)
    assert [at for at, _ in whole.events] == [at for at, _ in parts.events]
    for (_, a), (_, b) in zip(whole.events, parts.events, strict=True):
        assert np.array_equal(a.kept, b.kept) and np.array_equal(a.counts, b.counts)


@pytest.mark.parametrize(
    "policy",
    ["h2o:budget=12,every=8", "snapkv:budget=12,window=6,every=8", "expectedattention:budget=12,window=12,every=8"],
)
@pytest.mark.parametrize("at", [20, 24, 29])
def test_forks_go_their_own_ways(policy: str, at: int) -> None:
    one = Simulation(params(policy), 48, 24, seed=3)
    one.advance(at)
    other = Simulation(params(policy), 48, 24, seed=3)
    other.evictor, other.computed, other.events = one.evictor.fork(), at, list(one.events)
    other.tables = [[list(table) for table in heads] for heads in one.tables]
    other.probabilities = one.probabilities.clone()
    changed = [x.clone() for x in one.numbers]
    for x in changed:
        x[:, at:] = x[:, at:].flip(1)
    other.numbers = type(one.numbers)(*changed)
    one.advance(48 - at)  # each is compared with the reference at its events
    other.advance(48 - at)
    assert [at for at, _ in one.events] == [at for at, _ in other.events] == [24, 32, 40]
    assert any(not np.array_equal(a.kept, b.kept) for (_, a), (_, b) in zip(one.events, other.events, strict=True))


@pytest.mark.parametrize(
    "policy", ["h2o:budget=10", "snapkv:budget=10,window=6", "expectedattention:budget=10,window=9"]
)
def test_a_restart_forgets(policy: str) -> None:
    simulation = Simulation(params(policy), 30, 24)
    simulation.advance(22)
    simulation.evictor.restart()
    simulation.computed = 0
    simulation.tables = [[[] for _ in heads] for heads in simulation.tables]
    simulation.probabilities.zero_()
    simulation.advance(30)
    assert simulation.evictor.has_evicted and len(simulation.events) == 1


@pytest.mark.parametrize(
    ("policy", "prompt", "hits"),
    [("h2o", 100, 0), ("snapkv", 100, 68), ("snapkv:at=40,window=8", 100, 32), ("snapkv:at=200", 100, 99), ("tova", 100, 99),
     ("keydiff", 100, 99), ("keydiff:at=50", 100, 50), ("expectedattention", 100, 0), ("expectedattention:window=32", 100, 68),
     ("snapkv:budget=100", 100, 99), ("tova:budget=120,every=64", 100, 99), ("tova", None, 63)],
)  # fmt: skip
def test_hits_of_prefixes(policy: str, prompt: int | None, hits: int) -> None:
    made = Evictor.of(params(policy), Shape(), prompt, None)
    assert made is not None and made.hits_allowed(99) == hits


def test_what_is_observed() -> None:
    made = Evictor.of(params("snapkv:budget=40,window=8,every=20"), Shape(), 100, None)
    assert made is not None
    assert made.observation(0, 92) is None and made.next_event(0) == 100
    first = made.observation(64, 36, 5)
    assert first is not None and (first.sequence, first.first, first.end) == (5, 92, 100)
    assert (
        first.sums is not None
        and first.queries is None
        and first.sums.shape[:2] == (3, 2)
        and first.sums.shape[2] >= 100
    )
    assert first.sums.flags.c_contiguous and first.sums.dtype == np.int64
    with pytest.raises(KvikError, match=r"rows \[90, 101\) cross the eviction at 100"):
        made.observation(90, 11)
    with pytest.raises(KvikError, match="no eviction is due at 99 tokens"):
        made.choose(99, lambda layer, head, what: np.zeros((99, 8), np.float32))
    made.evicted(made.choose(100, lambda layer, head, what: np.zeros((100, 8), np.float32)))
    assert made.next_event(100) == 120 and made.observation(100, 12) is None
    again = made.observation(100, 13)
    assert again is not None and (again.first, again.end) == (112, 120)
    assert again.sums is not None and again.sums.shape[2] >= 53 and not again.sums.any()
    queries = Evictor.of(params("expectedattention:window=16"), Shape(), 10, None)
    assert queries is not None
    watched = queries.observation(0, 4)
    assert watched is not None and watched.queries is not None
    assert (watched.first, watched.end, watched.sums, watched.queries.shape) == (0, 10, None, (3, 10, 32))
    keys = Evictor.of(params("keydiff"), Shape(), 10, None)
    assert keys is not None and keys.observation(0, 10) is None


def test_a_window_longer_than_all_tokens_keeps_its_first_queries() -> None:
    """Both events observe rows from the very first on: the second has those of the first, and more."""
    made = Evictor.of(params("expectedattention:budget=5,window=64,every=8"), Shape(), 10, None)
    assert made is not None
    watched = made.observation(0, 10)
    assert watched is not None and watched.queries is not None
    watched.queries[:] = 1
    made.evicted(made.choose(10, lambda layer, head, what: np.ones((10, 8), np.float32)))
    again = made.observation(10, 8)
    assert again is not None and again.queries is not None
    assert (again.first, again.end, again.queries.shape) == (0, 18, (3, 18, 32))
    assert again.queries[:, :10].all() and not again.queries[:, 10:].any()


@pytest.mark.parametrize("policy", ["h2o:every=0", "snapkv:window=4", "expectedattention:window=4"])
def test_memory_goes_with_the_last_event(policy: str) -> None:
    made = Evictor.of(params(policy), Shape(), 20, None)
    assert made is not None
    watched = made.observation(0, 20)
    assert watched is not None
    memory = weakref.ref(watched.sums if watched.sums is not None else watched.queries)
    made.evicted(made.choose(20, lambda layer, head, what: np.ones((20, 8), np.float32)))
    del watched
    assert memory() is None and made.next_event(20) is None and made.observation(20, 100) is None


def test_the_sums_grow_with_the_rows() -> None:
    made = Evictor.of(params("h2o:at=5000"), Shape(num_layers=1, windows=(None,)), 10, None)
    assert made is not None
    sizes = []
    for first in range(0, 5000, 100):
        observation = made.observation(first, 100)
        assert observation is not None and observation.sums is not None
        observation.sums[:, :, : first + 100] += 1
        sizes.append(observation.sums.shape[2])
    assert sizes[0] < 500 and sizes[-1] == 5000 and len(set(sizes)) < 8
    assert observation.sums[0, 0, 0] == 50 and observation.sums[0, 0, 4999] == 1


def test_policies_without_scores_or_layers() -> None:
    assert Evictor.of(CacheParams(), Shape(), 10, None) is None
    assert Evictor.of(CacheParams(policy="streamingllm"), Shape(), 10, None) is None
    with pytest.raises(ParameterError, match="h2o has nothing to evict: every layer has a window of its own"):
        Evictor.of(CacheParams(policy="h2o"), Shape(windows=(4, 5, 6)), 10, None)


def test_keys_and_scores_that_are_no_numbers() -> None:
    for value in (0.0, np.nan, np.inf):
        made = Evictor.of(params("keydiff:budget=5"), Shape(), 20, None)
        assert made is not None
        keys = np.full((20, 8), value, np.float32)
        with np.errstate(all="ignore"):
            kept = made.choose(20, lambda layer, head, what, keys=keys: keys)
        assert kept.kept[0, 0].tolist() == [15, 16, 17, 18, 19]  # of equal ones the later
