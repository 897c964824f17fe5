"""Kvik and llama.cpp on random-weight Q4_1 models of 1B, 4B and 8B, where memory bandwidth rules everyone."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from bench import contenders
from bench.common import (
    Target,
    Verdict,
    bootstrap_median,
    markdown_table,
    number,
    paired_ratios,
    spread,
    verdict,
    verdict_table,
)
from bench.contenders import Settings
from bench.jobs import KVIK, Job, bandwidth, check, kvik, llama
from bench.model_bytes import ModelBytes, model_bytes
from bench.options import results_folder, run_parser
from bench.peers import SIZES, Peers, chosen, run_command, say
from bench.results import MB, Results, failed_table, fastest, machine
from bench.side_by_side import Run

BLOCKS = 5
TARGET = 1.0


def jobs(settings: Settings) -> dict[str, Job]:
    """bandwidth, and for every size Kvik and llama.cpp with and without flash attention."""

    def sized(size: str) -> Callable[[], Path]:
        return lambda: settings.peers.sized(size)

    found = {"bandwidth": bandwidth(settings)}
    for size in SIZES:
        found[f"{size} {KVIK}"] = kvik(settings, sized(size))
        found |= llama(settings, f"{size} llama.cpp", sized(size))
    return found


def report(results: Results, settings: Settings, sizes: Sequence[str]) -> str:
    rows, verdicts = [], []
    for size in sizes:
        whole = model_bytes(settings.peers.sized(size))
        engines = [name for name in results.figures if name.startswith(f"{size} ")]
        for name in sorted(engines):
            rows.append(row(results, name, whole.read))
        peer = fastest(results, "decode", [name for name in engines if "llama.cpp" in name])
        target = Target(f"{size}: decode ÷ llama.cpp", TARGET, unit="×")
        ratios = paired_ratios(results.by_block(f"{size} kvik", "decode"), results.by_block(peer or "", "decode"))
        verdicts += [verdict(target, ratios, peer or ""), memory(results, size, whole, settings)]
    header = ["model and engine", "decode (tok/s)", "weights read (GB/s)", "÷ bandwidth", "prefill (tok/s)", "peak MB"]
    context = [f"- {name}: {value}" for name, value in results.context.items()]
    context.append(f"- read bandwidth: {spread(results.interval('bandwidth', 'gb_s'))} GB/s (bench/bandwidth.c)")
    parts = ["# Kvik by model size", "\n".join(context), verdict_table(verdicts), markdown_table(header, rows)]
    if results.failures:
        parts.append(failed_table(results))
    return "\n\n".join(parts) + "\n"


def row(results: Results, name: str, read: int) -> list[str]:
    rates = {block: rate * read / 1e9 for block, rate in results.by_block(name, "decode").items()}
    share = paired_ratios(rates, results.by_block("bandwidth", "gb_s"))
    peak = results.interval(name, "peak_rss_bytes")
    return [
        name,
        spread(results.interval(name, "decode")),
        spread(bootstrap_median(list(rates.values()))) if rates else "–",
        spread(bootstrap_median(share)) if share else "–",
        spread(results.interval(name, "prefill")),
        "–" if peak is None else number(peak.median / MB),
    ]


def memory(results: Results, size: str, whole: ModelBytes, settings: Settings) -> Verdict:
    known = whole.weights + whole.kv_token * (max(settings.prompt, settings.new) + 1)
    over = [(peak - known) / MB for peak in results.by_block(f"{size} kvik", "peak_rss_bytes").values()]
    target = Target(f"{size}: peak memory over weights + KV", 150.0, "at most", " MB")
    return verdict(target, over, f"weights {number(whole.weights / MB)} MB")


def arguments() -> argparse.ArgumentParser:
    parser = run_parser(
        "sizes", __doc__, "with commas: 1B, '8B kvik', bandwidth, …", blocks=BLOCKS, repeat=2, plots=False
    )
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=32)
    return parser


def work(options: argparse.Namespace) -> int:
    peers = Peers(options.root.expanduser().absolute())
    settings = Settings(
        peers=peers, kvik_python=options.kvik_python, model=Path(), threads=options.threads,
        prompt=options.prompt_tokens, new=options.new_tokens, repeat=options.repeat, seed=options.seed,
    )  # fmt: skip
    plan = jobs(settings)
    names = chosen(plan, options.only, options.skip)
    sizes = [size for size in SIZES if any(name.startswith(f"{size} ") for name in names)]
    check(plan, names)
    out = results_folder(options.out, "sizes-")
    for folder in (out, *([options.table.parent] if options.table else [])):
        folder.mkdir(parents=True, exist_ok=True)
    results = Results()
    results.context = {
        **machine(), "blocks": options.blocks, "repeats in a measurement": options.repeat, "seed": options.seed,
        "threads": options.threads, "prefill": f"{options.prompt_tokens} tokens",
        "decode": f"{options.new_tokens} tokens, from an empty context",
    }  # fmt: skip
    for size in sizes:
        if f"{size} kvik" in names:
            say(f"warm-up: kvik packs {size}")
            contenders.start_kvik(replace(settings, model=peers.sized(size)))
    run = Run(plan, settings.seed, out, results)
    run.blocks(names, options.blocks)
    return run.publish(report(results, settings, sizes), options.table, None, None)


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(lambda: work(arguments().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
