"""Random requests in random schedules: each must say what it says alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from kvik.engine.engine import Engine
from kvik.engine.request import Chunk, Request
from kvik.engine.scheduler import Step
from kvik.engine.sequence import Group
from kvik.engine.stats import StepStats
from kvik.params import BeamParams, CacheParams, SamplingParams, parse_kv

Rng = np.random.Generator
TOKENS = 64


class Answer(NamedTuple):
    """A sample as its chunks say it."""

    tokens: tuple[int, ...]
    text: str
    logprobs: tuple[Any, ...]
    reason: str | None


@dataclass
class Totals:
    """Of many schedules."""

    preemptions: int = 0
    splits: int = 0
    copies: int = 0
    hits: int = 0
    cancelled: int = 0
    requests: int = 0
    parked: int = 0


@dataclass
class Job:
    prompt: tuple[int, ...]
    params: SamplingParams | BeamParams
    arrives: int
    cancelled_at: int | None = None
    cache: CacheParams | None = None
    group: Group | None = None
    chunks: list[Chunk] = field(default_factory=list)

    @property
    def answers(self) -> list[Answer]:
        found = []
        for index in range(self.params.num_answers):
            mine = [c for c in self.chunks if c.index == index]
            found.append(Answer(
                tuple(t for c in mine for t in c.token_ids), "".join(c.text for c in mine),
                tuple(x for c in mine for x in c.logprobs or ()), mine[-1].finish_reason if mine else None,
            ))  # fmt: skip
        return found


def random_params(rng: Rng, tokens: int = TOKENS) -> SamplingParams:
    pick = lambda *options: options[int(rng.integers(len(options)))]  # noqa: E731
    return SamplingParams(
        n=pick(1, 1, 1, 2, 3), max_tokens=tokens, min_tokens=pick(0, 0, tokens // 3), temperature=pick(0.0, 0.7, 1.3),
        top_k=pick(0, 20), top_p=pick(1.0, 0.9), min_p=pick(0.0, 0.05), seed=int(rng.integers(100)),
        stop=pick((), (), ("ab", "x1"), ("Q",)), ignore_eos=bool(rng.integers(2)), logprobs=pick(None, 0, 2),
        logprobs_mode=pick("raw", "processed"),
    )  # fmt: skip


def random_beams(rng: Rng, tokens: int = TOKENS) -> BeamParams:
    pick = lambda *options: options[int(rng.integers(len(options)))]  # noqa: E731
    beams, groups = pick((2, 1), (3, 1), (3, 1), (2, 2))
    return BeamParams(
        num_beams=beams, num_return_sequences=int(rng.integers(1, beams + 1)), max_tokens=tokens,
        min_tokens=pick(0, 0, tokens // 3), length_penalty=pick(1.0, 0.0, -0.5, 2.0), early_stopping=pick(True, False, "never"),
        no_repeat_ngram_size=pick(0, 0, 2, 3), repetition_penalty=pick(1.0, 1.0, 1.3), num_beam_groups=groups,
        diversity_penalty=pick(0.0, 0.7) if groups > 1 else 0.0, stop=pick((), (), ("ab", "x1"), ("Q",)),
        ignore_eos=bool(rng.integers(2)), logprobs=pick(None, 0, 2),
    )  # fmt: skip


FORMATS = ("f16", "f16", "f32", "int8", "int4", "k8v4", "k16v8", "int4/f32")
POLICIES = (
    None, "streamingllm:sinks=4,window=30", "streamingllm:sinks=17,window=70", "h2o:budget=30%,every=16",
    "h2o:budget=20", "snapkv:budget=50%,window=2", "snapkv:budget=30%,window=2,at=40,every=32", "tova:budget=24,every=16",
    "keydiff:budget=30%,every=32", "expectedattention:budget=40%,window=8,every=24,sinks=1", "keydiff:budget=1.0,every=8",
)  # fmt: skip


def random_cache(rng: np.random.Generator) -> CacheParams:
    pick = lambda options: options[int(rng.integers(len(options)))]  # noqa: E731
    k, v = parse_kv(pick(FORMATS))
    packed = {"group_size": pick((16, 32, 64)), "keep_first": pick((0, 4, 20))} if "int" in k + v else {}
    policy = pick(POLICIES)
    spread = {}
    if policy is not None and not policy.startswith("streamingllm"):
        spread = {"layers": pick(("uniform", "pyramid"))}
        if not policy.startswith("tova"):
            spread["heads"] = pick(("uniform", "ada"))
    return CacheParams(k=k, v=v, rotate=bool(rng.integers(2)), policy=policy, **packed, **spread)


def random_jobs(rng: Rng, vocab: int, count: int, tokens: int = TOKENS) -> list[Job]:
    """Prompts some of which begin alike; arrivals close together."""
    stems = [rng.integers(0, vocab, 80).tolist() for _ in range(2)]
    jobs = []
    for _ in range(count):
        stem = stems[int(rng.integers(2))][: int(rng.integers(0, 80))]
        own = rng.integers(0, vocab, int(rng.integers(1, 30))).tolist()
        cancelled = int(rng.integers(1, 60)) if rng.random() < 0.1 else None
        jobs.append(Job((*stem, *own), random_params(rng, tokens), int(rng.integers(0, 20)), cancelled))
    return jobs


def check_statistics(made: Engine, stats: StepStats) -> None:
    """What a step reports, against the tables."""
    sequences = [s for group in made.scheduler.running for s in group.sequences]
    held = [pair for s in sequences for pair in s.cache.held()]
    assert stats.blocks_unshared == len(held) and stats.blocks_used == len(set(held))
    unused = sum(
        -(s.cache.num_tokens - shift) % 16
        for s in sequences
        for table, shift in zip(s.cache.layout.tables, s.cache.arrays.shifts, strict=True)
        if not table.packed
    )
    assert stats.slots_unused == unused
    assert stats.running == sum(group.width for group in made.scheduler.running) and stats.waiting == len(
        made.scheduler.waiting
    )


def scored_from(job: Job) -> int:
    """First token of a prompt that is scored; behind its middle where a policy needs something to evict from."""
    return 1 if job.cache is None or job.cache.scorer is None else len(job.prompt) // 2 + 1


def pool_for(made: Callable[[int], Engine], jobs: list[Job], share: float) -> int:
    """Slabs for a share of what all jobs need at once, but for each of them alone."""
    probe = made(1)
    each = [
        probe.admission.slabs(len(j.prompt), j.params.max_tokens or 0, j.params.num_sequences, j.cache) for j in jobs
    ]
    return max(max(each), int(share * sum(each)))


def run_schedule(
    made: Engine, jobs: list[Job], rng: Rng, totals: Totals, scores: list[Any] | None = None, preempted: float = 0.0
) -> None:
    """All jobs through the engine; the books are checked after each step.

    preempted: how often, per step, the youngest is though there is room.
    """
    step, seen = 0, list[StepStats]()
    made.on_step = seen.append
    waiting = sorted(jobs, key=lambda job: job.arrives)
    while waiting or made.has_work:
        while waiting and waiting[0].arrives <= step:
            job = waiting.pop(0)
            salt = "" if len(job.prompt) % 5 else "other"
            request: Request = made.request(job.prompt, job.params, salt, job.cache)
            job.group = made.add(request, job.chunks.append)
            if scores is not None and rng.random() < 0.2:
                scores.append(
                    made.add_score(
                        made.score_request(job.prompt, reduce=False, first=scored_from(job), cache=job.cache)
                    )
                )
        for job in jobs:
            if job.cancelled_at is not None and job.group is not None and step >= job.arrives + job.cancelled_at:
                made.cancel(job.group)
        if preempted and rng.random() < preempted and made.scheduler.running:
            by_force, youngest = Step(), made.scheduler.running[-1]
            made.scheduler._preempt(youngest, by_force)
            youngest.lost_alone = 0
            totals.preemptions, totals.parked = totals.preemptions + 1, totals.parked + by_force.parked
        stepped = made.step()
        for error in (job.group.error for job in jobs if job.group is not None and job.group.error is not None):
            raise error
        if stepped:
            check_statistics(made, seen[-1])
        made.scheduler.check_integrity()
        step += 1
        assert step < 20_000, "a schedule without an end"
    assert made.scheduler.pool.num_held == 0
    assert made.scheduler.pool.num_free_slabs == made.scheduler.pool.num_slabs
    totals.preemptions += made.stats.preemptions
    totals.copies += made.stats.copies
    totals.hits += made.stats.prefix_hit_tokens
    totals.cancelled += made.stats.cancelled
    totals.requests += len(jobs)
    totals.parked += made.stats.parked


def alone(made: Engine, job: Job) -> list[Answer]:
    """The job by itself in an engine."""
    single = Job(job.prompt, job.params, 0)
    made.add(made.request(job.prompt, job.params, cache=job.cache), single.chunks.append)
    while made.step():
        pass
    return single.answers


def assert_same(job: Job, want: list[Answer]) -> None:
    """The same to the last bit; what was cancelled is a beginning of it, but for beams, the best of which changes."""
    if isinstance(job.params, BeamParams) and job.answers[0].reason == "cancelled":
        return
    for got, whole in zip(job.answers, want, strict=True):
        if got.reason != "cancelled":
            assert got == whole
            continue
        assert got.tokens == whole.tokens[: len(got.tokens)]
        assert got.logprobs == whole.logprobs[: len(got.logprobs)]
