"""Where the time of a request and of the engine went, as tables for people and as plain data."""

from __future__ import annotations

import math
from statistics import median
from typing import TYPE_CHECKING, Any

from kvik.cli.output import aligned, amount, note, plain

if TYPE_CHECKING:
    from kvik.engine.engine import Engine
    from kvik.engine.request import RequestStats

__all__ = ["engine_report", "print_engine", "print_request"]

_REQUEST = [
    ("queue", "from its arrival until its first token was computed"),
    ("prefill", "from then until its first token was out"),
    ("decode", "from then to its end"),
    ("first_token", "from its arrival to its first token"),
]


def engine_report(engine: Engine) -> dict[str, Any]:
    """The engine's totals by name, with wasted_share: of the slots in held blocks, those without a token (over steps)."""
    from kvik.cache.layout import BLOCK_TOKENS

    stats = engine.stats
    slots = stats.blocks_used_sum * BLOCK_TOKENS
    wasted = min(1.0, stats.slots_unused_sum / slots) if slots else None
    return {**plain(stats), "wasted_share": wasted}


def print_request(stats: RequestStats) -> None:
    """A request's times, on stderr."""
    rows = [["request", "", ""]]
    rows += [[f"  {name}", _milliseconds(getattr(stats, name)), meaning] for name, meaning in _REQUEST]
    gaps = sorted(stats.inter_token)
    if gaps:
        p99 = gaps[math.ceil(0.99 * len(gaps)) - 1]
        shown = f"99 of 100 up to {_milliseconds(p99)}, longest {_milliseconds(gaps[-1])}"
        rows.append(["  inter_token", _milliseconds(median(gaps)), f"median between two tokens; {shown}"])
    rows.append(["  cached_tokens", str(stats.cached_tokens), "prompt tokens that were in the cache already"])
    rows.append(["  preemptions", str(stats.preemptions), "times its blocks were taken from it"])
    note("\n".join(aligned(rows, "<><")))


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1e3 * seconds:.2f} ms"


def print_engine(engine: Engine) -> None:
    """The engine's totals, on stderr."""
    s = engine_report(engine)
    pool = engine.scheduler.pool
    whole = s["matrices"] + s["attention"] + s["rest"] + s["python"]
    wasted = "-" if s["wasted_share"] is None else f"{s['wasted_share']:.1%}"
    rows = [
        ["engine", "", ""],
        ["  steps", str(s["steps"]), f"{s['requests']} requests, {s['cancelled']} of them cancelled, {s['failed']} failed"],
        ["  tokens", str(s["tokens"]), f"computed, {s['prompt_tokens']} of them of prompts; {s['generated']} drawn"],
        ["  prefix hits", str(s["prefix_hit_tokens"]), "tokens not computed, because the cache had them"],
        ["  preemptions", str(s["preemptions"]), "requests whose blocks were taken for older ones"],
        ["  blocks, peak", str(s["blocks_peak"]), f"{s['blocks_unshared_peak']} if none were shared; "
         f"the pool has {amount(pool.num_slabs * pool.slab_bytes)}"],
        *([["  evictions", str(s["evictions"]), f"{s['evicted_tokens']:.0f} tokens given up, the mean over layers and heads"]]
          if s["evictions"] else []),
        *([["  parked", str(s["parked"]), f"times a request's blocks were moved out of the pool; {s['restored']} times back"]]
          if s["parked"] else []),
        ["  slots wasted", wasted, "of those in held blocks, mean over steps"],
        *([f"  {part}", _milliseconds(s[part]), f"{s[part] / whole:.1%} of the time" if whole else ""]
          for part in ("matrices", "attention", "rest", "python")),
    ]  # fmt: skip
    note("\n".join(aligned(rows, "<><")))
