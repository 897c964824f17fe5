"""Measures Kvik beside its peers: blocks in random order, every contender once in each block."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from bench import BenchError, contenders, loading, same_file
from bench.common import block_orders, run_child
from bench.jobs import FLASH, Job, check, default_model
from bench.model_bytes import model_bytes
from bench.options import results_folder, run_parser
from bench.peers import REPOSITORY, Peers, chosen, run_command, say
from bench.quality import WINDOWS, Quality, read_quality
from bench.report import plot, quality_name, report
from bench.results import ENGINES, KL_TOLERANCE, Results, machine

BLOCKS = 10
QUALITY = "quality"
SHOWN = (
    "decode", "prefill", "gb_s", "first_s", "kept", "pack_s", "weights_s", "read_s", "over_file_mb", "decode_16",
    "capacity", "gap_s", "tok_s", "perplexity", "pairs_s", "change", "top", "speed", "full: share", "int4",
)  # fmt: skip


class Run:
    """One run; every measurement is in the JSON file as soon as it is made."""

    def __init__(self, jobs: Mapping[str, Job], seed: int, out: Path, results: Results) -> None:
        self.jobs, self.seed, self.out, self.results = jobs, seed, out, results
        self.raw: list[dict[str, Any]] = []

    def save(self) -> None:
        plain = {name: item if isinstance(item, str) else asdict(item) for name, item in self.results.quality.items()}
        whole = {
            "context": self.results.context, "model": self.results.model, "quality": plain,
            "failures": self.results.failures, "measurements": self.raw,
        }  # fmt: skip
        fresh = self.out / "raw.json.new"
        fresh.write_text(json.dumps(whole, indent=1))
        fresh.replace(self.out / "raw.json")

    def blocks(self, names: Sequence[str], count: int) -> bool:
        """Ctrl-C ends the measurements, and the report covers what there is. False: it was pressed."""
        try:
            for block, order in enumerate(block_orders(names, count, self.seed)):
                for name in order:
                    self.measure(block, name)
                say(f"block {block + 1} of {count} done")
        except KeyboardInterrupt:
            say("stopped: the report covers what there is")
            return False
        finally:
            self.save()
        return True

    def publish(self, text: str, table: Path | None, draw: Callable[[Path], None] | None, picture: Path | None) -> int:
        """The report on stdout, in the run's folder and where else it is wanted, with its plot; the exit code."""
        print(text)
        for path in filter(None, (self.out / "report.md", table)):
            path.write_text(text)
        if draw is not None:
            for path in filter(None, (self.out / "plot.svg", self.out / "plot.png", picture)):
                draw(path)
        say(f"raw figures and report are in {self.out}")
        return 1 if self.results.failures else 0

    def measure(self, block: int, name: str) -> None:
        load, started = os.getloadavg()[0], time.time()
        entry: dict[str, Any] = {"block": block, "job": name, "started": started, "load": load}
        try:
            figures, entry["raw"] = self.jobs[name].measure(block)
        except BenchError as error:
            entry["failed"] = str(error)
            self.results.failures.setdefault(name, []).append(str(error))
            say(f"  {name}: FAILED: {error}")
        else:
            entry["figures"] = figures
            self.results.figures.setdefault(name, {})[block] = figures
            say(f"  {name}: " + ", ".join(f"{key} {figures[key]:.3g}" for key in SHOWN if key in figures))
        entry["seconds"] = time.time() - started
        self.raw.append(entry)
        self.save()


def plan(settings: contenders.Settings) -> dict[str, Job]:
    """Every job by name. Names begin with what --only and --skip go by."""
    return {**default_model(settings), **same_file.same_file(settings), **loading.loading(settings)}


def warm_up(settings: contenders.Settings, names: Sequence[str]) -> None:
    """A first start packs the weights and fills the page cache; it is not measured."""
    others = {file.job: file for file in same_file.FILES}
    if any(name.endswith("kvik") and name not in others for name in names):
        say("warm-up: kvik packs the model")
        contenders.start_kvik(settings)
    for name in (name for name in names if name in others):
        say(f"warm-up: kvik packs {others[name].name}")
        contenders.start_kvik(replace(settings, model=others[name].ours(settings.peers)))
    if any("llama.cpp" in name for name in names):
        contenders.start_llama(settings)


def measure_quality(
    settings: contenders.Settings, names: Sequence[str], windows: int, path: Path
) -> dict[str, Quality | str]:
    """bench.quality in a process of its own: it holds hundreds of megabytes."""
    wanted = {quality_name(name) for name in names if name.startswith(ENGINES)}
    if any(name.startswith("llama.cpp") for name in wanted):
        wanted |= {f"llama.cpp F32 fa={flash}" for flash in FLASH}
    say("quality: logits of every engine on the same tokens, some minutes")
    run_child(
        [sys.executable, "-m", "bench.quality", "--root", settings.peers.root, "--kvik-python", settings.kvik_python,
         "--model", settings.model, "--threads", str(settings.threads), "--windows", str(windows), "--out", path,
         "--only", ",".join(sorted(wanted))],
        env=settings.kvik_env(), cwd=REPOSITORY, timeout=3600,
    )  # fmt: skip
    return read_quality(path)


def arguments() -> argparse.ArgumentParser:
    parser = run_parser(
        "run", __doc__, "contenders with commas, by their names or how these begin: kvik, llama.cpp, 'llama.cpp Q4_1', openvino, "
        "transformers, bandwidth, start, foreign, bf16, q4_k_m, load, quality", blocks=BLOCKS, repeat=3, plots=True,
    )  # fmt: skip
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--depth", type=int, default=0, help="also decode behind this many tokens, for information")
    parser.add_argument("--model", type=Path, help="GGUF for Kvik [the same Q4_1 file as llama.cpp]")
    parser.add_argument("--quality-from", type=Path, help="quality.json of an earlier run, instead of measuring it")
    parser.add_argument("--quality-windows", type=int, default=WINDOWS, help="windows of 512 tokens [%(default)s]")
    parser.add_argument("--kl-tolerance", type=float, default=KL_TOLERANCE, help="equal quality: KL at most this many "
                        "times Kvik's [%(default)s]")  # fmt: skip
    return parser


def settings_of(options: argparse.Namespace, peers: Peers) -> contenders.Settings:
    for name in ("repeat", "threads", "prompt_tokens", "new_tokens"):
        if getattr(options, name) < 1:
            raise BenchError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(options, name)}")
    return contenders.Settings(
        peers=peers, kvik_python=options.kvik_python, model=options.model or peers.variant("Q4_1"),
        threads=options.threads, prompt=options.prompt_tokens, new=options.new_tokens, depth=options.depth,
        repeat=options.repeat, seed=options.seed,
    )  # fmt: skip


def work(options: argparse.Namespace) -> int:
    settings = settings_of(options, Peers(options.root.expanduser().absolute()))
    jobs = plan(settings)
    names = chosen([*jobs, QUALITY], options.only, options.skip)
    with_quality = QUALITY in names
    names = [name for name in names if name != QUALITY]
    check(jobs, names)
    for path in (options.plot, options.table):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
    out = results_folder(options.out)
    out.mkdir(parents=True, exist_ok=True)
    tokens = max(options.prompt_tokens, options.new_tokens) + 1
    results = Results(kl_tolerance=options.kl_tolerance, tokens=tokens)
    results.context = {
        **machine(), "blocks": options.blocks, "repeats in a measurement": options.repeat, "seed": options.seed,
        "threads": options.threads, "prefill": f"{options.prompt_tokens} tokens",
        "decode": f"{options.new_tokens} tokens, from an empty context", "model": settings.model.name,
        "other files": same_file.description(settings),
    }  # fmt: skip
    if "kvik" in names:
        results.model = model_bytes(settings.model)
    run = Run(jobs, settings.seed, out, results)
    warm_up(settings, names)
    if options.quality_from:
        results.quality = read_quality(options.quality_from)
    elif with_quality:
        results.quality = measure_quality(settings, names, options.quality_windows, out / "quality.json")
    run.blocks(names, options.blocks)
    draw = partial(plot, results) if results.engines() else None
    return run.publish(report(results), options.table, draw, options.plot)


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(lambda: work(arguments().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
