"""What the engine did, as plain data: of one step and in total."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import NamedTuple

__all__ = ["EngineStats", "StepStats"]


class StepStats(NamedTuple):
    """Of one step.

    tokens: computed; prompt_tokens of them belong to prompts (and to what was computed before a preemption), the others
    were drawn before. generated: tokens drawn. running, waiting: sequences and requests, after the step.
    prefix_query_tokens: looked up in the cache; prefix_hit_tokens of them not computed, because it had them. blocks_used: held by tables, counted once;
    blocks_unshared: as many as without sharing; slots_unused: of the held ones, in 16ths of a block. evictions: sequences
    that gave tokens up; evicted_tokens: how many, the mean over layers and KV heads. parked, restored: requests whose blocks
    were moved out of the pool, and back.
    Seconds by where the time went; python is what remains.
    """

    tokens: int
    prompt_tokens: int
    generated: int
    running: int
    waiting: int
    prefix_query_tokens: int
    prefix_hit_tokens: int
    preemptions: int
    copies: int
    blocks_used: int
    blocks_unshared: int
    slots_unused: int
    matrices: float
    attention: float
    rest: float
    python: float
    evictions: int = 0
    evicted_tokens: float = 0.0
    parked: int = 0
    restored: int = 0


@dataclass
class EngineStats:
    """Totals since the engine began (or `reset`).

    Sums of StepStats by name; steps; requests that arrived, finished, failed or were cancelled; blocks_used_sum,
    blocks_unshared_sum and slots_unused_sum over steps, blocks_peak and blocks_unshared_peak of one.
    """

    steps: int = 0
    requests: int = 0
    finished: int = 0
    cancelled: int = 0
    failed: int = 0
    tokens: int = 0
    prompt_tokens: int = 0
    generated: int = 0
    prefix_query_tokens: int = 0
    prefix_hit_tokens: int = 0
    preemptions: int = 0
    copies: int = 0
    blocks_used_sum: int = 0
    blocks_unshared_sum: int = 0
    slots_unused_sum: int = 0
    blocks_peak: int = 0
    blocks_unshared_peak: int = 0
    matrices: float = 0.0
    attention: float = 0.0
    rest: float = 0.0
    python: float = 0.0
    evictions: int = 0
    evicted_tokens: float = 0.0
    parked: int = 0
    restored: int = 0

    def reset(self) -> None:
        """Count from zero again."""
        for f in fields(self):
            setattr(self, f.name, f.default)

    def add(self, step: StepStats) -> None:
        self.steps += 1
        self.tokens += step.tokens
        self.prompt_tokens += step.prompt_tokens
        self.generated += step.generated
        self.prefix_query_tokens += step.prefix_query_tokens
        self.prefix_hit_tokens += step.prefix_hit_tokens
        self.preemptions += step.preemptions
        self.copies += step.copies
        self.blocks_used_sum += step.blocks_used
        self.blocks_unshared_sum += step.blocks_unshared
        self.slots_unused_sum += step.slots_unused
        self.blocks_peak = max(self.blocks_peak, step.blocks_used)
        self.blocks_unshared_peak = max(self.blocks_unshared_peak, step.blocks_unshared)
        self.matrices += step.matrices
        self.attention += step.attention
        self.rest += step.rest
        self.python += step.python
        self.evictions += step.evictions
        self.evicted_tokens += step.evicted_tokens
        self.parked += step.parked
        self.restored += step.restored
