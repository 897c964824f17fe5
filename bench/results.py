"""Raw figures of a run by job and block, and what surrounds them."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from bench.common import Interval, bootstrap_median, markdown_table, paired_ratios
from bench.model_bytes import ModelBytes
from bench.quality import Quality

KL_TOLERANCE = 1.1
MB = 1e6
ENGINES = ("kvik", "llama.cpp", "openvino", "transformers")
"""What the names of the jobs begin with that do the common work: the default model, prefill and decode."""

Phase = Literal["prefill", "decode"]
Figures = Mapping[str, float]


@dataclass
class Results:
    """Figures by job and block, and what surrounds them.

    Attributes:
        figures: job -> block -> name -> figure.
        quality: contender of bench.quality -> its quality, or why there is none.
        model: of the file Kvik ran; None where Kvik was not measured.
        context: printed above the tables.
        failures: job -> what went wrong, one line each.
        kl_tolerance: a peer is of equal quality when its KL is at most this many times Kvik's.
    """

    figures: dict[str, dict[int, Figures]] = field(default_factory=dict)
    quality: dict[str, Quality | str] = field(default_factory=dict)
    model: ModelBytes | None = None
    tokens: int = 0
    context: dict[str, Any] = field(default_factory=dict)
    failures: dict[str, list[str]] = field(default_factory=dict)
    kl_tolerance: float = KL_TOLERANCE

    def by_block(self, job: str, name: str) -> dict[int, float]:
        return {block: found[name] for block, found in self.figures.get(job, {}).items() if name in found}

    def interval(self, job: str, name: str) -> Interval | None:
        values = list(self.by_block(job, name).values())
        return bootstrap_median(values) if values else None

    def median(self, job: str, name: str) -> float:
        found = self.interval(job, name)
        return found.median if found else 0.0

    def engines(self) -> list[str]:
        """Jobs that measured prefill or decode of the common work, Kvik first."""
        return sorted((job for job in self.figures if job.startswith(ENGINES)), key=lambda job: (job != "kvik", job))

    def ratios(self, phase: Phase, peer: str) -> list[float]:
        return paired_ratios(self.by_block("kvik", phase), self.by_block(peer, phase))


def fastest(results: Results, figure: str, engines: Iterable[str]) -> str | None:
    """The engine with the highest median of a figure."""
    found = [engine for engine in engines if results.by_block(engine, figure)]
    return max(found, key=lambda engine: results.median(engine, figure), default=None)


def failed_table(results: Results) -> str:
    """Every job that failed, how often, and why the last time."""
    rows = [[job, str(len(why)), why[-1].splitlines()[0]] for job, why in results.failures.items()]
    return markdown_table(["failed", "times", "last reason"], rows)


def machine() -> dict[str, Any]:
    """What is worth knowing about the machine and the moment."""
    model = "unknown processor"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    return {
        "processor": f"{model}, {len(os.sched_getaffinity(0))} cores",
        "system": f"{platform.system()} {platform.release()}",
        "measured": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }
