"""Policies: their texts, exact budgets, and when they evict."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import kvik
from kvik.params import H2O, POLICIES, TOVA, ExpectedAttention, KeyDiff, Scorer, SnapKV, StreamingLLM
from kvik.params.eviction import parse_policy, policy_of, policy_text

SHARES = st.one_of(
    st.floats(0.0, 1.0, exclude_min=True), st.integers(1, 1000).map(lambda x: x / 1000), st.integers(1, 100).map(lambda x: x / 100)
)  # fmt: skip
BUDGETS = st.one_of(SHARES, st.integers(1, 2**30))


@given(BUDGETS, st.none() | st.integers(1, 10**6), st.integers(0, 10**6), st.floats(0.0, 1.0))
def test_texts_round_trip(budget: float, at: int | None, every: int, recent: float) -> None:
    for policy in (H2O(budget=budget, at=at, every=every, recent=recent), KeyDiff(budget=budget, at=at, every=every)):
        assert parse_policy(policy_text(policy)) == policy
        assert type(parse_policy(policy_text(policy)).budget) is type(budget)  # type: ignore[union-attr]


def test_texts() -> None:
    assert parse_policy("none") is None and policy_text(None) == "none"
    assert parse_policy(" SnapKV : budget = 25% , window=32") == SnapKV(budget=0.25, window=32)
    assert parse_policy("streamingllm:sinks=4,window=2044") == StreamingLLM()
    assert parse_policy("h2o:budget=512") == H2O(budget=512)
    assert parse_policy("tova:budget=1") == TOVA(budget=1) != TOVA(budget=1.0) == parse_policy("tova:budget=1.0")
    assert parse_policy("tova:budget=.1%,at=none") == TOVA(budget=0.001)
    assert policy_text(SnapKV(budget=0.1)) == "snapkv:budget=10%,every=0,window=32,kernel=7"
    assert policy_text(SnapKV(budget=1.0, at=9)) == "snapkv:budget=100%,at=9,every=0,window=32,kernel=7"
    assert [parse_policy(name) for name in POLICIES] == [kind() for kind in POLICIES.values()]
    assert policy_of(None) is None and policy_of("none") is None and policy_of(TOVA()) == TOVA()


@pytest.mark.parametrize(
    ("text", "line"),
    [("snapvk", "policy must be one of none, streamingllm, h2o, snapkv, tova, keydiff, expectedattention, got 'snapvk'; "
                "did you mean 'snapkv'?"),
     ("snapkv:windw=3", "a field of snapkv must be one of budget, at, every, window, kernel, got 'windw'; did you mean 'window'?"),
     ("snapkv:window", "policy snapkv: expected FIELD=VALUE, got 'window'"),
     ("snapkv:window=", "policy snapkv: expected FIELD=VALUE, got 'window='"),
     ("snapkv:window=32,,", "policy snapkv: expected FIELD=VALUE, got ''"),
     ("snapkv:window=32,window=32", "policy snapkv: window is given twice"),
     ("snapkv:window=many", "window must be a number, got 'many'"),
     ("snapkv:window=32%", "window must be a number, got '32%'"),
     ("snapkv:window=32.5", "window must be an integer, got 32.5"),
     ("none:budget=3", "policy 'none' takes no fields, got 'budget'"),
     ("h2o:budget=0", "budget must be in [1, 1073741824], got 0"),
     ("h2o:budget=-5", "budget must be in [1, 1073741824], got -5"),
     ("h2o:budget=0%", "budget (a share of the tokens) must be above 0, got 0.0"),
     ("h2o:budget=101%", "budget (a share of the tokens) must be finite and in [0, 1], got 1.01"),
     ("h2o:budget=nan", "budget (a share of the tokens) must be finite and in [0, 1], got nan"),
     ("h2o:budget=1e-400", "budget (a share of the tokens) must be above 0, got 0.0"),
     ("h2o:every=-1", "every must be in [0, 1073741824], got -1"),
     ("h2o:at=0", "at must be in [1, 1073741824], got 0"),
     ("h2o:recent=1.5", "recent must be finite and in [0, 1], got 1.5"),
     ("streamingllm:sinks=0", "sinks must be in [1, 1024], got 0"),
     ("streamingllm:window=0", "window must be in [1, 1073741824], got 0"),
     ("streamingllm:budget=4", "a field of streamingllm must be one of sinks, window, got 'budget'"),
     ("snapkv:kernel=4", "kernel must be odd, got 4"),
     ("snapkv:window=0", "window must be in [1, 4096], got 0"),
     ("snapkv:every=16", "every must be 0 or at least window (32), got 16"),
     ("snapkv:budget=31", "budget 31 is below the 32 that snapkv always keeps (window=32)"),
     ("expectedattention:budget=3", "budget 3 is below the 4 that expectedattention always keeps (sinks=4)"),
     ("expectedattention:window=1", "window must be in [2, 4096], got 1"),
     ("expectedattention:future=0", "future must be in [1, 65536], got 0")],
)  # fmt: skip
def test_wrong_texts(text: str, line: str) -> None:
    with pytest.raises(kvik.ParameterError, match=re.escape(line)):
        parse_policy(text)


@pytest.mark.parametrize("budget", [True, None, "0.5", float("inf"), -0.1, 10**40])
def test_wrong_budgets(budget: Any) -> None:
    for kind in (H2O, SnapKV, TOVA, KeyDiff, ExpectedAttention):
        with pytest.raises(kvik.ParameterError, match="budget"):
            kind(budget=budget)


def test_shares_are_exact() -> None:
    assert TOVA(budget=0.1).kept(10) == 1 and int(0.29 * 100) == 28 and TOVA(budget=0.29).kept(100) == 29
    assert TOVA(budget=0.001).kept(999) == 1 and TOVA(budget=0.001).kept(2999) == 2
    assert TOVA(budget=1.0).kept(12345) == 12345 and TOVA(budget=7).kept(3) == 7
    assert H2O(budget=0.5, recent=0.7).protected(10) == (0, 7) and SnapKV().protected(100) == (0, 32)
    assert ExpectedAttention(sinks=9).protected(100) == (9, 0) and KeyDiff().protected(100) == TOVA().protected(
        100
    ) == (0, 0)


@pytest.mark.parametrize(
    ("policy", "prompt", "line"),
    [(SnapKV(budget=0.25), 100, "budget 25% keeps 25 of 100 tokens and is below the 32 that snapkv always keeps (window=32)"),
     (SnapKV(budget=0.25, at=60), 1000, "budget 25% keeps 15 of 60 tokens and is below the 32 that snapkv always keeps (window=32)"),
     (ExpectedAttention(budget=0.01), 200, "budget 1% keeps 2 of 200 tokens and is below the 4 that expectedattention"),
     (H2O(budget=512, every=0), 511, "budget 512 is above the prompt's 511 tokens, so that nothing would be evicted"),
     (TOVA(budget=512, every=0, at=300), 800, "budget 512 is above at, which is 300 tokens"),
     (SnapKV(budget=64), None, "snapkv evicts at the prompt's length, and a text has none: give at or every"),
     (SnapKV(budget=0.25, every=64), None, "budget 25% keeps 16 of 64 tokens and is below the 32")],
)  # fmt: skip
def test_what_makes_no_sense_for_a_prompt(policy: Scorer, prompt: int | None, line: str) -> None:
    with pytest.raises(kvik.ParameterError, match=re.escape(line)):
        policy.check(prompt)
    with pytest.raises(kvik.ParameterError, match=re.escape(line)):
        kvik.CacheParams(policy=policy).check(prompt)  # type: ignore[arg-type]


def test_what_makes_sense_for_a_prompt() -> None:
    for policy in (SnapKV(budget=0.25), H2O(budget=512), H2O(budget=128, every=0), StreamingLLM(), TOVA(budget=1.0)):
        policy.check(128)
    SnapKV(budget=64, at=100).check(None)
    SnapKV(budget=64, every=64).check(None)
    TOVA(budget=0.1).check(None)
    kvik.CacheParams().check(None)


def test_when_events_are() -> None:
    assert SnapKV().event(100, 0) == SnapKV().event(100, 100) == 100 and SnapKV().event(100, 101) is None
    assert SnapKV(at=40).event(100, 0) == 40 and SnapKV().event(None, 0) is None
    assert [TOVA(every=10).event(25, start, 10) for start in (0, 26, 35, 36)] == [25, 35, 35, 45]
    assert [TOVA(every=10, at=7).event(25, start) for start in (0, 8, 18)] == [7, 17, 27]
    # nothing to evict yet: the first event is where the cache holds more than the budget
    assert TOVA(budget=50, every=10).event(25, 0) == 55 and TOVA(budget=55, every=10).event(25, 0) == 65
    assert TOVA(budget=50, every=10).event(None, 0) == 60 and TOVA(budget=0.5, every=10).event(None, 0) == 10
    assert SnapKV(budget=100).event(100, 0) is None and TOVA(budget=1.0).event(100, 0) is None


@given(
    BUDGETS.filter(lambda x: x <= 200),
    st.none() | st.integers(1, 60),
    st.none() | st.integers(1, 60),
    st.integers(0, 9),
)
def test_events_are_where_slots_go(budget: float, at: int | None, prompt: int | None, every: int) -> None:
    """The closed form against a walk over all tokens."""
    policy, gone, found, start = TOVA(budget=budget, at=at, every=every), 0, [], 0
    first = at or prompt or every or None
    for tokens in range(1, 200):
        due = (
            first is not None and tokens >= first and (tokens == first or (every > 0 and (tokens - first) % every == 0))
        )
        if due and policy.kept(tokens) < tokens - gone:
            found.append(tokens)
            gone = tokens - policy.kept(tokens)
    gone, told = 0, []
    while (event := policy.event(prompt, start, Fraction(gone))) is not None and event < 200:
        told.append(event)
        gone, start = event - policy.kept(event), event + 1
    assert told == found
