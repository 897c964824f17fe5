"""What loading costs: the first start, which packs the weights, and later ones beside reading the packed file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.common import Target, Verdict, markdown_table, middle, paired_ratios, run_child, spread, verdict
from bench.contenders import Measurement, Settings, last_json
from bench.jobs import Job
from bench.peers import REPOSITORY, Peers
from bench.results import MB, Results

WORKER = REPOSITORY / "bench" / "workers" / "kvik_load.py"
LOAD_TARGET = 1.2
PACK_TARGET = 300.0
REPEAT = 5
READS = {"read_whole_s": "into memory", "read_s": "1 MiB at a time"}
"""The two ways of reading a file once: kept, as loading it would, and through one buffer that stays in the cache."""


def models(settings: Settings) -> dict[str, Callable[[], Path]]:
    """The models by the names of their jobs: the default one, its bf16 folder, the 1B file."""
    peers: Peers = settings.peers
    return {
        "load default": lambda: settings.model,
        "load bf16": peers.bf16_folder,
        "load q4_k_m": peers.q4_k_m,
    }


def loading(settings: Settings) -> dict[str, Job]:
    """One job a model: both starts, in a model store of their own that is gone afterwards."""

    def job(name: str, model: Callable[[], Path]) -> Job:
        def of_model() -> Settings:
            return replace(settings, model=model())

        return Job(lambda block: load(of_model(), name), lambda: of_model().need_kvik())

    return {name: job(name, model) for name, model in models(settings).items()}


def load(settings: Settings, name: str) -> Measurement:
    """The first start in a fresh store, its peak memory over the source file; then later starts and plain reads."""
    model = settings.model
    with fresh_store(settings.peers, name) as store:
        first, peak = worker(settings, store, {"mode": "pack", "model": str(model)})
        later, _ = worker(settings, store, {"mode": "load", "model": str(model), "repeat": REPEAT})
    figures = {
        "pack_s": first["seconds"], "pack_peak_bytes": float(peak), "over_file_mb": (peak - weight_bytes(model)) / MB,
        **{name: middle(later[name]) for name in ("load_s", "weights_s", *READS)},
    }  # fmt: skip
    return Measurement(figures, {"pack": first, "load": later})


@contextmanager
def fresh_store(peers: Peers, name: str) -> Iterator[Path]:
    store = peers.work() / f"store-{name.replace(' ', '-')}"
    shutil.rmtree(store, ignore_errors=True)
    try:
        yield store
    finally:
        shutil.rmtree(store, ignore_errors=True)


def worker(settings: Settings, store: Path, request: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """What kvik_load.py printed, and its peak memory."""
    done = run_child([settings.kvik_python, WORKER, json.dumps(request)], env={"KVIK_HOME": str(store)}, cwd=REPOSITORY)
    return last_json(done, WORKER.name), done.peak_rss_bytes


def weight_bytes(model: Path) -> int:
    """Bytes of a model's file, or of the weights in a folder."""
    files = [model] if model.is_file() else sorted(model.glob("*.safetensors"))
    return sum(file.stat().st_size for file in files)


def verdicts(results: Results) -> list[Verdict]:
    """Each measured model: loading against reading in either way, memory of packing over the file."""
    found = []
    for job in measured(results):
        model = job.removeprefix("load ")
        for name, way in READS.items():
            target = Target(f"loading the weights ÷ reading the packed file {way}, {model}", LOAD_TARGET, "at most")
            ratios = paired_ratios(results.by_block(job, "weights_s"), results.by_block(job, name))
            found.append(verdict(target, ratios))
        over = list(results.by_block(job, "over_file_mb").values())
        target = Target(f"peak memory of packing over the file, {model}", PACK_TARGET, "at most", " MB")
        found.append(verdict(target, over))
    return found


def measured(results: Results) -> list[str]:
    return [job for job in results.figures if job.startswith("load ")]


def table(results: Results) -> str:
    rows = []
    for job in sorted(measured(results)):
        seconds = [spread(results.interval(job, name)) for name in ("pack_s", "load_s", "weights_s", *READS)]
        peak = results.median(job, "pack_peak_bytes") / MB
        rows.append([job.removeprefix("load "), *seconds, f"{peak:.0f}"])
    header = [
        "model", "first start (s)", "later start (s)", "its weights (s)", *(f"read {way} (s)" for way in READS.values()),
        "peak MB of packing",
    ]  # fmt: skip
    return markdown_table(header, rows)
