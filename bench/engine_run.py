"""Measures many requests and long contexts: Kvik, llama.cpp and vLLM, in blocks of random order."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from bench import BenchError, contenders
from bench.contenders import Settings
from bench.engine_jobs import Traffic, plan
from bench.engine_report import plot, report
from bench.jobs import check
from bench.options import results_folder, run_parser
from bench.peers import Peers, chosen, run_command, say
from bench.results import Results, machine
from bench.side_by_side import Run

BLOCKS, CAPACITY_BLOCKS = 10, 3
CAPACITY = "capacity "


def arguments() -> argparse.ArgumentParser:
    parser = run_parser(
        "engine", __doc__, "jobs with commas, by their names or how these begin: batch, 'batch kvik', deep, capacity, arrivals, "
        "own-rate, http, beams, grammar, waste, samples, prefix, index", blocks=BLOCKS, repeat=3, plots=True,
    )  # fmt: skip
    parser.add_argument("--capacity-blocks", type=int, default=CAPACITY_BLOCKS, help="times each server's capacity is "
                        "measured before the other blocks [%(default)s]")  # fmt: skip
    parser.add_argument("--prompt-tokens", type=int, default=128, help="of the batches [%(default)s]")
    parser.add_argument("--new-tokens", type=int, default=64, help="of the batches [%(default)s]")
    parser.add_argument("--requests", type=int, default=100, help="of a trace over HTTP [%(default)s]")
    parser.add_argument("--at-once", type=int, default=32, help="requests under way at saturation [%(default)s]")
    parser.add_argument("--model", type=Path, help="GGUF for Kvik [the same Q4_1 file as llama.cpp]")
    return parser


def settings_of(options: argparse.Namespace) -> Settings:
    for name in ("repeat", "threads", "prompt_tokens", "new_tokens", "requests", "at_once", "capacity_blocks"):
        if getattr(options, name) < 1:
            raise BenchError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(options, name)}")
    peers = Peers(options.root.expanduser().absolute())
    return Settings(
        peers=peers, kvik_python=options.kvik_python, model=options.model or peers.variant("Q4_1"),
        threads=options.threads, prompt=options.prompt_tokens, new=options.new_tokens, repeat=options.repeat,
        seed=options.seed,
    )  # fmt: skip


def context(settings: Settings, load: Traffic, options: argparse.Namespace) -> dict[str, object]:
    return {
        **machine(), "blocks": options.blocks, "repeats in a measurement": settings.repeat, "seed": settings.seed,
        "threads": settings.threads, "model": settings.model.name, "vLLM's numbers": contenders.vllm_dtype(),
        "batches": f"prompts of {settings.prompt} tokens, {settings.new} new ones; peers decode without sampling or greedily",
        "arrivals": f"{load.requests} requests; prompts of 32 to 1,024 tokens, answers of 16 to 256, log-uniform",
    }  # fmt: skip


def measure(run: Run, load: Traffic, names: Sequence[str], options: argparse.Namespace) -> None:
    """Capacities first, since they set the rates of the arrivals."""
    first = [name for name in names if name.startswith(CAPACITY)]
    going_on = not first or run.blocks(first, options.capacity_blocks)
    for name in first:
        found = run.results.interval(name, "capacity")
        if found is not None:
            load.capacities[name.removeprefix(CAPACITY)] = found.median
            run.results.context[f"{name}, requests/s"] = f"{found.median:.3g}"
    rest = [name for name in names if name not in first]
    if going_on and rest:
        run.blocks(rest, options.blocks)


def work(options: argparse.Namespace) -> int:
    settings = settings_of(options)
    load = Traffic(options.requests, options.at_once)
    jobs = plan(settings, load)
    names = chosen(jobs, options.only, options.skip)
    check(jobs, names)
    out = results_folder(options.out, "engine-")
    out.mkdir(parents=True, exist_ok=True)
    results = Results(context=context(settings, load, options))
    if any(name.endswith("kvik") for name in names):
        say("warm-up: kvik packs the model")
        contenders.start_kvik(settings)
    run = Run(jobs, settings.seed, out, results)
    measure(run, load, names, options)
    return run.publish(report(results), options.table, partial(plot, results), options.plot)


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(lambda: work(arguments().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
