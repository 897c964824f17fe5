"""Kvik and llama.cpp on the same files beyond the default one: bf16 from a safetensors folder, a 1B shape in Q4_K_M."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from bench import jobs
from bench.common import Target, Verdict, bootstrap_median, markdown_table, number, paired_ratios, spread, verdict
from bench.contenders import Settings
from bench.jobs import FLASH, Job
from bench.peers import Peers
from bench.results import MB, Phase, Results, fastest

TARGETS: dict[Phase, float] = {"decode": 1.2, "prefill": 1.5}


@dataclass(frozen=True)
class SameFile:
    """A model both engines run.

    Attributes:
        name: what its jobs begin with.
        ours: the file or folder Kvik runs; BenchError where it is missing.
        theirs: llama.cpp's file with the same weights.
        peers: what llama.cpp's jobs are called, less the setting of flash attention.
        prompt, new: tokens of prefill and decode; None are the run's own.
    """

    name: str
    ours: Callable[[Peers], Path]
    theirs: Callable[[Peers], Path]
    peers: str
    prompt: int | None = None
    new: int | None = None

    @property
    def job(self) -> str:
        """The name of Kvik's job."""
        return f"{self.name} {jobs.KVIK}"

    def work(self, settings: Settings) -> Settings:
        """The settings with this model's tokens."""
        return replace(settings, prompt=self.prompt or settings.prompt, new=self.new or settings.new)

    def plan(self, settings: Settings) -> dict[str, Job]:
        """Kvik on the file; llama.cpp where no other job has it."""
        common = self.work(settings)
        found = {self.job: jobs.kvik(common, lambda: self.ours(settings.peers))}
        if self.peers.startswith(self.name):
            found |= jobs.llama(common, self.peers, lambda: self.theirs(settings.peers))
        return found


FILES = (
    # llama.cpp's BF16 file is measured for the default model already
    SameFile("bf16", Peers.bf16_folder, lambda peers: peers.variant("BF16"), "llama.cpp BF16"),
    SameFile("q4_k_m", Peers.q4_k_m, Peers.q4_k_m, "q4_k_m llama.cpp", prompt=128, new=32),
)


def same_file(settings: Settings) -> dict[str, Job]:
    return {name: job for file in FILES for name, job in file.plan(settings).items()}


def peers_of(file: SameFile) -> list[str]:
    return [f"{file.peers} fa={flash}" for flash in FLASH]


def measured(results: Results) -> list[SameFile]:
    return [file for file in FILES if results.figures.get(file.job)]


def verdicts(results: Results) -> list[Verdict]:
    """Both phases of each measured file beside llama.cpp at its fastest on it."""
    found = []
    for file in measured(results):
        for phase, bound in TARGETS.items():
            target = Target(f"{phase} ÷ llama.cpp, {file.name}", bound, unit="×")
            best = fastest(results, phase, peers_of(file))
            ratios = paired_ratios(results.by_block(file.job, phase), results.by_block(best or "", phase))
            found.append(verdict(target, ratios, best or "llama.cpp not measured"))
    return found


def table(results: Results) -> str:
    """Tokens per second of both engines on each file, and block by block what Kvik is of the other."""
    rows = []
    for file in measured(results):
        for name in (file.job, *(peer for peer in peers_of(file) if peer in results.figures)):
            row = [name]
            for phase in TARGETS:
                ours, theirs = results.by_block(file.job, phase), results.by_block(name, phase)
                ratios = [] if name == file.job else paired_ratios(ours, theirs)
                row += [spread(results.interval(name, phase)), spread(bootstrap_median(ratios)) if ratios else "–"]
            peak = results.interval(name, "peak_rss_bytes")
            rows.append([*row, "–" if peak is None else number(peak.median / MB)])
    header = ["file and engine", "decode (tok/s)", "Kvik ÷ it", "prefill (tok/s)", "Kvik ÷ it", "peak MB"]
    return markdown_table(header, rows)


def description(settings: Settings) -> str:
    """What these files' jobs compute, for the head of the report."""
    each = [(file.name, file.work(settings)) for file in FILES]
    return "; ".join(f"{name}: {work.prompt} tokens of prefill, {work.new} of decode" for name, work in each)
