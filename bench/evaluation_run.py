"""Measures evaluation: perplexity, divergence, LongPPL and metrics beside the tools for them, in blocks of random order."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from bench import BenchError, contenders
from bench.contenders import Settings
from bench.evaluation_jobs import ECHO, LAYOUTS, LONG, REFERENCE, SHORT, SLIDE, WINDOW, Inputs, make_inputs, plan
from bench.evaluation_report import report
from bench.jobs import check
from bench.options import results_folder, run_parser
from bench.peers import Peers, chosen, run_command, say
from bench.results import Results, machine
from bench.side_by_side import Run

BLOCKS = 10
ONCE = "agreement "
"""Jobs whose figures are the same each time: measured once, before the blocks."""


def arguments() -> argparse.ArgumentParser:
    parser = run_parser(
        "evaluation", __doc__, "jobs with commas, by their names or how these begin: agreement, perplexity, "
        "'perplexity llama.cpp Q4_1', divergence, longppl, rouge, bleu", blocks=BLOCKS, repeat=5, plots=False,
    )  # fmt: skip
    default = Inputs.__dataclass_fields__
    parser.add_argument("--windows", type=int, default=default["windows"].default, help=f"of {WINDOW:,} tokens, at "
                        "least 2 [%(default)s]")  # fmt: skip
    parser.add_argument("--long-texts", type=int, default=default["long_texts"].default, help=f"of {LONG:,} tokens, "
                        "for LongPPL [%(default)s]")  # fmt: skip
    parser.add_argument("--samples", type=int, default=default["samples"].default, help="pairs of texts of about 100 "
                        "words, for the metrics [%(default)s]")  # fmt: skip
    return parser


def settings_of(options: argparse.Namespace) -> Settings:
    least = {"repeat": 1, "threads": 1, "windows": 2, "long_texts": 1, "samples": 1}
    for name, bound in least.items():
        if getattr(options, name) < bound:
            raise BenchError(f"--{name.replace('_', '-')} must be at least {bound}, got {getattr(options, name)}")
    peers = Peers(options.root.expanduser().absolute())
    return Settings(
        peers=peers, kvik_python=options.kvik_python, model=peers.variant("Q4_1"), threads=options.threads,
        repeat=options.repeat, seed=options.seed,
    )  # fmt: skip


def context(settings: Settings, inputs: Inputs, options: argparse.Namespace) -> dict[str, object]:
    return {
        **machine(), "blocks": options.blocks, "seed": settings.seed, "threads": settings.threads,
        "model": settings.model.name,
        "perplexity": f"{inputs.windows * WINDOW:,} tokens of English in windows of {WINDOW:,}",
        "divergence": f"{' and '.join(LAYOUTS.values())} against {REFERENCE}, the same text",
        "LongPPL": f"{inputs.long_texts} texts of {LONG:,} tokens, windows of {SHORT:,} slid by {SLIDE:,}; the last {ECHO:,} repeat the first",
        "metrics": f"{inputs.samples} pairs of texts of about 100 words, {settings.repeat} repeats in a measurement",
    }  # fmt: skip


def measure(run: Run, names: Sequence[str], blocks: int) -> None:
    once = [name for name in names if name.startswith(ONCE)]
    rest = [name for name in names if name not in once]
    if (not once or run.blocks(once, 1)) and rest:
        run.blocks(rest, blocks)


def work(options: argparse.Namespace) -> int:
    settings = settings_of(options)
    inputs = Inputs(results_folder(options.out, "evaluation-"), options.windows, options.long_texts, options.samples)
    jobs = plan(settings, inputs)
    names = chosen(jobs, options.only, options.skip)
    check(jobs, names)
    settings.need_kvik()  # its tokenizer cuts the texts, whoever reads them
    inputs.folder.mkdir(parents=True, exist_ok=True)
    say("warm-up: kvik packs the model and cuts the texts")
    contenders.start_kvik(settings)
    results = Results(context={**context(settings, inputs, options), "text": make_inputs(settings, inputs)["sha256"]})
    run = Run(jobs, settings.seed, inputs.folder, results)
    measure(run, names, options.blocks)
    return run.publish(report(results, inputs), options.table, None, None)


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(lambda: work(arguments().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
