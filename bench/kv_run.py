"""Measures KV formats and eviction: bytes, quality, speed, recall, and a text without end."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial

from bench import BenchError, contenders
from bench.contenders import Settings
from bench.jobs import check
from bench.kv_jobs import (
    BYTES_AT,
    CAPACITY,
    DEPTH,
    PREFILL,
    RECALL,
    RECENT,
    SINKS,
    WINDOW,
    Sizes,
    in_blocks,
    plan,
)
from bench.kv_report import plot, report
from bench.kv_settings import ALLOCATED, SCORERS
from bench.options import results_folder, run_parser
from bench.peers import Peers, chosen, run_command, say
from bench.results import Results, machine
from bench.side_by_side import Run

BLOCKS = 5
DEFAULTS = {"tokens": 24_576, "items": 500, "stream_tokens": 100_000, "positions": 500, "depth": DEPTH, "requests": CAPACITY["requests"],
    "prefill": PREFILL,
}  # fmt: skip
MEANT = {
    "tokens": "predictions of a quality job", "items": "of each recall task", "stream_tokens": "of the long text",
    "positions": "of the long text that are scored", "depth": "tokens behind which is decoded",
    "requests": "of the capacity, all at once", "prefill": "tokens of the prompts that scorers are timed on",
}  # fmt: skip
LEAST = {"stream_tokens": 4096, "tokens": 2, "depth": 128}


def arguments() -> argparse.ArgumentParser:
    parser = run_parser(
        "kv", __doc__, "jobs with commas, by their names or how these begin: bytes, quality, 'quality int4', end-to-end, stream, "
        "recall, 'recall needle', capacity, decode, 'decode llama.cpp', prefill", blocks=BLOCKS, repeat=3, plots=True,
    )  # fmt: skip
    for name, value in DEFAULTS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value, help=f"{MEANT[name]} [%(default)s]")
    parser.add_argument("--scorers", default=";".join((*SCORERS, *ALLOCATED)), help="policies of the bytes and the recall "
                        "tasks, with semicolons, 'snapkv,heads=ada' with an allocator [%(default)s]")  # fmt: skip
    return parser


def settings_of(options: argparse.Namespace) -> Settings:
    for name in ("repeat", "threads", *DEFAULTS):
        if getattr(options, name) < (least := LEAST.get(name, 1)):
            raise BenchError(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(options, name)}")
    peers = Peers(options.root.expanduser().absolute())
    return Settings(
        peers=peers, kvik_python=options.kvik_python, model=peers.variant("Q4_1"), threads=options.threads,
        repeat=options.repeat, seed=options.seed,
    )  # fmt: skip


def sizes_of(options: argparse.Namespace) -> Sizes:
    scorers = tuple(part.strip() for part in options.scorers.split(";") if part.strip())
    for name in scorers:
        if name.partition(",")[0] not in SCORERS:
            raise BenchError(f"--scorers: there is no {name!r}; there are: {', '.join(SCORERS)}")
    numbers = {name: getattr(options, name) for name in DEFAULTS}
    return Sizes(folder=results_folder(options.out, "kv-"), scorers=scorers, **numbers)


def context(settings: Settings, sizes: Sizes, options: argparse.Namespace) -> dict[str, object]:
    tasks = "; ".join(f"{name}, prompts of {task.tokens:,} tokens" for name, task in RECALL.items())
    return {
        **machine(), "blocks": options.blocks, "repeats in a measurement": settings.repeat, "seed": settings.seed,
        "threads": settings.threads, "model": settings.model.name, "bytes": f"of a sequence of {BYTES_AT:,} tokens",
        "quality": f"{sizes.tokens:,} predictions in windows of {WINDOW:,}, against keys and values in f32",
        "recall": f"{sizes.items} items a task: {tasks}", "prefill": f"{sizes.prefill:,} tokens",
        "long text": f"{sizes.stream_tokens:,} tokens, {SINKS} + {RECENT:,} of them kept, {sizes.positions} places",
        "decode": f"behind {sizes.depth:,} tokens",
    }  # fmt: skip


def measure(run: Run, names: Sequence[str], blocks: int) -> None:
    """What is the same each time comes once, before the blocks."""
    rest = in_blocks(names)
    once = [name for name in names if name not in rest]
    if (not once or run.blocks(once, 1)) and rest:
        run.blocks(rest, blocks)


def work(options: argparse.Namespace) -> int:
    settings, sizes = settings_of(options), sizes_of(options)
    jobs = plan(settings, sizes)
    names = chosen(jobs, options.only, options.skip)
    check(jobs, names)
    sizes.folder.mkdir(parents=True, exist_ok=True)
    sizes.write_text()
    if any("llama.cpp" not in name for name in names):
        say("warm-up: kvik packs the model")
        contenders.start_kvik(settings)
    results = Results(context=context(settings, sizes, options))
    run = Run(jobs, settings.seed, sizes.folder, results)
    measure(run, names, options.blocks)
    return run.publish(report(results), options.table, partial(plot, results), options.plot)


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(lambda: work(arguments().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
