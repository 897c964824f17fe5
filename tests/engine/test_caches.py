"""Formats and policies in the loop without a model: what is admitted, what it takes, what is parked and given back."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from engine.fakes import HEADS, HEADS_AND_WINDOW, LAYOUT, Script, Seeing, Shape, make_engine, run_out, seeing
from engine.small_engines import small_engine

from kvik.cache.storage import PoolSize
from kvik.engine import admission
from kvik.engine.engine import Engine
from kvik.engine.request import Chunk
from kvik.engine.scheduler import Step
from kvik.engine.sequence import Group
from kvik.errors import ParameterError
from kvik.llm import score_result
from kvik.params import TOVA, BeamParams, CacheParams, SamplingParams, StreamingLLM, cache_params
from kvik.text.tokenizer import Tokenizer

STREAM = CacheParams(policy="streamingllm:sinks=4,window=60")
INT4 = CacheParams(k="int4", v="int4", group_size=16)
CACHES = {
    "f16": CacheParams(), "int8": CacheParams(k="int8", v="int8"), "int4": INT4,
    "streaming": STREAM, "streaming int4": CacheParams(k="int4", v="int4", group_size=16, policy=STREAM.policy),
    "snapkv": CacheParams(policy="snapkv:budget=50%,window=8"), "h2o": CacheParams(policy="h2o:budget=25%,every=16"),
    "int4 tova": CacheParams(k="int4", v="int4", group_size=16, policy="tova:budget=64,every=32"),
    "ada": CacheParams(policy="keydiff:budget=30%,every=8", heads="ada"),
    "int8 pyramid": CacheParams(k="int8", v="int8", group_size=32, policy="keydiff:budget=40%", layers="pyramid"),
}  # fmt: skip
PROMPT = tuple(i * 7 % 96 for i in range(100))


def add(
    made: Engine, tokens: int | None = 60, *, prompt: Any = PROMPT, cache: CacheParams | None = None,
    chunks: list[Chunk] | None = None, **params: Any,
) -> Group:  # fmt: skip
    wanted = SamplingParams(**{"max_tokens": tokens, "ignore_eos": True, "seed": 1} | params)
    return made.add(made.request(tuple(prompt), wanted, cache=cache), ([] if chunks is None else chunks).append)


def tokens_of(group: Group) -> list[tuple[int, ...]]:
    assert group.error is None
    return [sample.choice().token_ids for sample in group.samples]


@pytest.mark.parametrize("name", CACHES)
@pytest.mark.parametrize("samples", [1, 3])
def test_what_is_admitted_runs_by_itself(small_tokenizer: Tokenizer, name: str, samples: int) -> None:
    """In the least pool that takes it, and what is less is refused with both numbers."""
    build = lambda slabs: seeing(small_tokenizer, HEADS_AND_WINDOW, slabs, any_format=True, max_batch_tokens=24)  # noqa: E731
    plenty = build(400)
    least = plenty.admission.slabs(100, 60, samples, CACHES[name])
    each = plenty.scheduler.pool.slab_bytes
    message = f"160 tokens.* need {least * each} bytes of KV cache and kv_bytes allows {(least - 1) * each}"
    with pytest.raises(ParameterError, match=message):
        add(build(least - 1), cache=CACHES[name], n=samples)
    groups = []
    for made in (plenty, build(least)):
        groups.append(add(made, cache=CACHES[name], n=samples))
        run_out(made)
    assert tokens_of(groups[0]) == tokens_of(groups[1]) and groups[1].times.preemptions == 0


@pytest.mark.parametrize("every", [8, 16])
def test_layers_with_windows_count_all_tokens_after_an_event(small_tokenizer: Tokenizer, every: int) -> None:
    """They evict nothing: in the least pool their blocks must be there, too."""
    cache = CacheParams(policy=TOVA(budget=1, every=every))
    plenty = small_engine(small_tokenizer, "windows", max_batch_tokens=24)
    least = plenty.admission.slabs(2, 60, 3, cache)
    made = small_engine(small_tokenizer, "windows", least, max_batch_tokens=24)
    group = add(made, prompt=PROMPT[:2], cache=cache, n=3, temperature=1.0)
    run_out(made)
    assert group.error is None and group.times.preemptions == 0


@pytest.mark.parametrize("name", CACHES)
def test_beams_are_preempted_at_any_step(small_tokenizer: Tokenizer, name: str) -> None:
    answers = []
    for every in (0, 1, 7):
        made, chunks = seeing(small_tokenizer, HEADS, any_format=True, max_batch_tokens=40), list[Chunk]()
        params = BeamParams(num_beams=3, num_return_sequences=2, max_tokens=40, ignore_eos=True)
        group = made.add(made.request(PROMPT, params, cache=CACHES[name]), chunks.append)
        steps, step = 0, Step()
        while made.step():
            made.scheduler.check_integrity()
            steps += 1
            if every and steps % every == 0 and group in made.scheduler.running and step.preemptions < 60:
                made.scheduler._preempt(group, step)
                made.scheduler.check_integrity()
                group.lost_alone = 0
                assert made.scheduler.pool.num_held == 0
        assert group.error is None
        if every == 7:
            assert (step.parked > 0) == (CACHES[name].policy is not None)
        answers.append([chunk.token_ids for chunk in chunks])
    assert answers[0] == answers[1] == answers[2]


def test_streaming_goes_on_beyond_the_context(small_tokenizer: Tokenizer) -> None:
    made, long = seeing(small_tokenizer, LAYOUT, max_batch_tokens=32), [i % 90 for i in range(500)]
    with pytest.raises(ParameterError, match="the prompt has 500 tokens; the context holds 400"):
        add(made, prompt=long)
    with pytest.raises(ParameterError, match="the text to score has 500 tokens; the context holds 400"):
        made.score_request(tuple(long))
    group, held = add(made, 300, prompt=long, cache=STREAM), set()
    while made.step():
        made.scheduler.check_integrity()
        if not group.done and group.samples[0].num_generated > 1:
            held.add(made.scheduler.pool.held_bytes)
    (usage,) = [sample.usage for sample in group.samples]
    assert usage is not None and usage.completion_tokens == 300
    block = LAYOUT.block_bytes[0]
    assert max(held) == (1 + 5) * block and min(held) >= (1 + 4) * block
    assert usage.kv_bytes_peak == (1 + 4 + 2) * block  # while the prompt came, 32 tokens at a time
    assert 64 <= usage.kv_tokens_kept <= 96
    scored = made.add_score(made.score_request(tuple(long), first=450, cache=STREAM))
    run_out(made)
    assert len(score_result(scored).logprobs) == 50


def test_a_stream_without_an_end_is_cancelled(small_tokenizer: Tokenizer) -> None:
    made = seeing(small_tokenizer, LAYOUT, 12, max_batch_tokens=32)
    group = add(made, None, cache=STREAM)
    for _ in range(700):
        made.step()
    assert group.samples[0].num_generated > 600
    made.cancel(group)
    run_out(made)


def test_evicted_sequences_leave_room_for_others(small_tokenizer: Tokenizer) -> None:
    """At 25 % of the tokens, 0.9 / 25 % as many run at once in the same bytes."""
    prompt, full, shape = tuple(i % 97 for i in range(2048)), 32, Shape(context_length=4000)
    size = PoolSize(full * (2048 // 16 + 1), shape.slab_bytes)
    cache = CacheParams(policy="keydiff:budget=512,every=16")
    made = make_engine(Script(98), small_tokenizer, shape, size, cache, max_sequences=500, max_batch_tokens=2048)
    for _ in range(120):
        made.add(made.request(prompt, SamplingParams(max_tokens=60)), lambda chunk: None)
    most = 0
    while made.step():
        evicted = sum(s.cache.evicted_at > 0 for group in made.scheduler.running for s in group.sequences)
        most = max(most, evicted)
    assert most >= 0.9 / 0.25 * full


def test_a_mixed_batch_frees_what_its_formats_save(small_tokenizer: Tokenizer) -> None:
    made = seeing(small_tokenizer, HEADS, any_format=True, prefix_sharing=False)
    groups = [add(made, 100, prompt=[i, *PROMPT * 2], cache=cache) for i, cache in enumerate((CacheParams(), INT4) * 2)]
    for _ in range(20):
        made.step()
    f16, int4, *_ = (group.held_bytes() for group in groups)
    layout = HEADS.layout(INT4)
    assert int4 == layout.bytes_at(groups[1].sequences[0].num_computed) < 0.6 * f16
    assert made.scheduler.pool.held_bytes == 2 * (f16 + int4)
    run_out(made)


def test_what_was_evicted_waits_outside_the_pool(small_tokenizer: Tokenizer) -> None:
    made = seeing(small_tokenizer, HEADS, cache=CACHES["h2o"])
    want = tokens_of(settled(seeing(small_tokenizer, HEADS, cache=CACHES["h2o"])))
    group = add(made)
    while not made.stats.evictions:
        made.step()
    rows = made.executor.rows  # type: ignore[attr-defined]
    made.scheduler._preempt(group, Step())
    assert group.parked is not None and group.parked.nbytes > 0 and made.scheduler.pool.num_held == 0
    run_out(made)
    assert isinstance(made.executor, Seeing)
    assert tokens_of(group) == want and made.stats.restored == 1
    assert made.executor.rows - rows == 160 - 1 - 101  # nothing was computed twice
    again = add(made)
    while made.stats.evictions < 5:
        made.step()
    made.scheduler._preempt(again, Step())
    made.cancel(again)
    assert again.parked is None and made.scheduler.pool.num_held == 0
    usage = again.samples[0].usage
    assert usage is not None and usage.kv_bytes_now == 0 < usage.kv_bytes_peak


def settled(made: Engine) -> Group:
    group = add(made)
    run_out(made)
    return group


def test_caches_that_differ_share_no_prefix(small_tokenizer: Tokenizer) -> None:
    made = seeing(small_tokenizer, HEADS, any_format=True)
    caches = [CacheParams(), CacheParams(k="bf16", v="bf16"), CacheParams(rotate=True), INT4, STREAM]
    for cache in caches:
        add(made, 5, cache=cache)
        run_out(made)
    assert made.stats.prefix_hit_tokens == 0
    for cache in caches:
        add(made, 5, cache=cache)
        run_out(made)
    assert made.stats.prefix_hit_tokens == len(caches) * 96
    before = made.stats.prefix_hit_tokens
    add(made, 5, cache=CACHES["snapkv"])  # sees its last 8 rows itself; blocks before its event are those of f16
    run_out(made)
    assert made.stats.prefix_hit_tokens - before == 80
    before = made.stats.prefix_hit_tokens
    add(made, 5, cache=CACHES["h2o"])
    run_out(made)
    assert made.stats.prefix_hit_tokens == before


def test_samples_share_what_they_keep(small_tokenizer: Tokenizer) -> None:
    made = seeing(small_tokenizer, HEADS, cache=CacheParams(policy="snapkv:budget=64,window=8"))
    group = add(made, 8, n=4, temperature=1.0)
    made.step(), made.step()
    assert [s.cache.evicted_at for s in group.sequences] == [100] * 4 and made.stats.evictions == 4
    block = HEADS.block_bytes[0]
    assert group.held_bytes() == (64 // 16 + 4) * block
    run_out(made)
    (usage,) = [s.usage for s in group.samples if s.usage is not None]
    assert usage.kv_bytes_peak == (-(-100 // 16) + 64 // 16) * block  # the event, when both are there


@pytest.mark.parametrize(
    ("cache", "message"),
    [
        (CacheParams(policy="snapkv:budget=200"), "budget 200 is above the prompt's 100 tokens"),
        (CacheParams(policy="snapkv:budget=10%,window=32"), "budget 10% keeps 10 of 100 tokens"),
        (CacheParams(policy="streamingllm:sinks=4,window=397"), "397 tokens; the model's context is 400"),
        ("int8", "cache must be CacheParams, got 'int8'"),
    ],
)
def test_what_makes_no_sense_is_refused(small_tokenizer: Tokenizer, cache: Any, message: str) -> None:
    made = seeing(small_tokenizer, HEADS)
    with pytest.raises(ParameterError, match=message):
        add(made, cache=cache)
    assert not made.has_work


def test_learned_positions_do_not_stream(small_tokenizer: Tokenizer) -> None:
    made = seeing(small_tokenizer, Shape(rope=None))
    with pytest.raises(ParameterError, match="learned"):
        add(made, cache=STREAM)


def test_an_event_that_fails_ends_its_request_only(small_tokenizer: Tokenizer) -> None:
    made = seeing(small_tokenizer, HEADS)
    first, second = add(made, cache=CACHES["snapkv"]), add(made)

    def failing(*_: Any) -> Any:
        raise RuntimeError("no eviction")

    made.executor.evict = failing  # type: ignore[method-assign]
    run_out(made)
    assert isinstance(first.error, RuntimeError) and second.error is None
    assert [s.finish_reason for s in (*first.samples, *second.samples)] == ["error", "length"]


@pytest.mark.parametrize("kv", ["f16", "bf16", "f32", "int8", "int4", "k8v4"])
def test_a_budget_for_everything_evicts_nothing(small_tokenizer: Tokenizer, kv: str) -> None:
    """The same bits as without a policy, natively."""
    answers = []
    for policy in (None, "h2o:budget=100%,every=8", "keydiff:budget=10000,every=8", "snapkv:budget=100,at=100"):
        made = small_engine(small_tokenizer, "windows", any_format=True)
        group = add(made, cache=cache_params(kv, policy, CacheParams()), logprobs=0, n=2)
        run_out(made)
        assert made.stats.evictions == 0
        answers.append([sample.choice() for sample in group.samples])
    assert all(answer == answers[0] for answer in answers)


@pytest.mark.parametrize("kv", ["f16", "int8", "k8v4", "int4"])
def test_what_an_event_leaves_is_what_is_reported(small_tokenizer: Tokenizer, kv: str) -> None:
    made = small_engine(small_tokenizer, "grouped heads", any_format=True, max_batch_tokens=512, prefix_sharing=False)
    cache = cache_params(kv, "snapkv:budget=25%,window=8", CacheParams())
    groups = [
        add(made, 4, prompt=[i % 95 for i in range(320)], cache=one) for one in (replace(cache, policy=None), cache)
    ]
    run_out(made)
    whole, left = (group.samples[0].usage for group in groups)
    layout = made.admission.layout(cache)
    assert whole is not None and left is not None
    assert (whole.kv_bytes_now, left.kv_bytes_now) == (layout.bytes_at(323), layout.bytes_at(83))
    assert (whole.kv_tokens_kept, left.kv_tokens_kept) == (323, 83)
    assert left.kv_bytes_peak >= layout.bytes_at(320) + layout.bytes_at(80) > whole.kv_bytes_now
    assert left.kv_bytes_unshared == left.kv_bytes_peak


def test_only_what_decides_a_layout_counts_as_one(small_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients may send as many budgets as they like; an engine remembers the last caches only."""
    monkeypatch.setattr(admission, "MOST_LAYOUTS", 3)
    monkeypatch.setattr(admission, "MOST_CACHES", 4)
    made = small_engine(small_tokenizer, "grouped heads")
    for budget in range(1, 20):
        made.request(PROMPT, SamplingParams(), cache=CacheParams(policy=TOVA(budget=budget, every=8)))
    assert len(made.admission._layouts) == 4
    assert made.admission.layout(CacheParams(policy=TOVA(budget=1))) is made.layout
    for window in (8, 9):
        made.request(PROMPT, SamplingParams(), cache=CacheParams(policy=StreamingLLM(window=window)))
    with pytest.raises(ParameterError, match="3 different layouts already"):
        made.request(PROMPT, SamplingParams(), cache=CacheParams(policy=StreamingLLM(window=10)))
    made.request(PROMPT, SamplingParams(), cache=CacheParams(policy=StreamingLLM(window=8)))  # forgotten, but known
