"""Measures what sampling a step of 16 sequences takes: Kvik, transformers' processors, llama.cpp's sampler chain."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bench import BenchError, contenders
from bench.common import Target, Verdict, markdown_table, paired_ratios, run_child, spread, verdict, verdict_table
from bench.contenders import Measurement, Settings, last_json
from bench.jobs import Job, check
from bench.options import results_folder, run_parser
from bench.peers import REPOSITORY, Peers, chosen, run_command, say
from bench.results import Results, failed_table, machine
from bench.sampling_cases import CASES, SEEN, SEQUENCES
from bench.side_by_side import Run

BLOCKS = 10
SHARES = {"combined": 3.0, "top-p": 5.0, "temperature": 5.0}
"""Percent of a decode step of 16 sequences that sampling may take."""


def arguments() -> argparse.ArgumentParser:
    parser = run_parser(
        "decoding",
        __doc__,
        "jobs with commas: kvik, step, transformers, llama.cpp",
        blocks=BLOCKS,
        repeat=100,
        plots=False,
    )
    parser.add_argument("--model", type=Path, help="GGUF whose logits are sampled [the peers' Q4_1 file]")
    return parser


class Sampling:
    """The jobs; the rows that all sample are made first, from the model."""

    def __init__(self, settings: Settings, out: Path) -> None:
        self.settings = settings
        self.rows, self.seen = out / "rows.npy", out / "seen.npy"

    def jobs(self) -> dict[str, Job]:
        peers = self.settings.peers
        return {
            "kvik": Job(lambda block: self.kvik("sample"), self.settings.need_kvik),
            "step": Job(lambda block: self.kvik("step"), self.settings.need_kvik),
            "transformers": Job(lambda block: self.transformers(), lambda: peers.python("transformers")),
            "llama.cpp": Job(lambda block: self.llama(), lambda: peers.llama("llama-bench")),
        }

    def kvik(self, mode: str) -> Measurement:
        asked = {
            "mode": mode, "rows": str(self.rows), "seen": str(self.seen), "threads": self.settings.threads,
            "repeat": 2 * self.settings.repeat, "model": str(self.settings.model), "new": 64,
        }  # fmt: skip
        env = self.settings.kvik_env()
        found, _ = contenders.run_worker(self.settings.kvik_python, "kvik_sampling.py", asked, env)
        return Measurement(found, found)

    def transformers(self) -> Measurement:
        asked = {
            "rows": str(self.rows), "seen": str(self.seen), "threads": self.settings.threads,
            "repeat": max(3, self.settings.repeat // 5),
        }  # fmt: skip
        python = self.settings.peers.python("transformers")
        found, _ = contenders.run_worker(python, "transformers_sampling.py", asked)
        return Measurement(found, found)

    def llama(self) -> Measurement:
        program = self.program()
        raw_rows, raw_seen = self.rows.with_suffix(".f32"), self.seen.with_suffix(".i32")
        np.load(self.rows).tofile(raw_rows)
        np.load(self.seen).tofile(raw_seen)
        names = ("temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty")
        off = (1.0, 0, 1.0, 0.0, 1.0, 1.0)
        cases = [
            ":".join((name, *(str(fields.get(field, value)) for field, value in zip(names, off, strict=True))))
            for name, fields in CASES.items()
        ]
        repeat = str(max(3, self.settings.repeat // 5))
        command = [program, raw_rows, raw_seen, str(SEQUENCES), str(SEEN), repeat, *cases]
        found = last_json(run_child(command), program.name)
        return Measurement(found, found)

    def program(self) -> Path:
        """bench/llama_sampling.cpp against the peers' llama.cpp, built where it is missing or older."""
        library = self.settings.peers.llama("llama-bench").parent
        source = REPOSITORY / "bench" / "llama_sampling.cpp"
        program = self.settings.peers.work() / "llama_sampling"
        if not program.exists() or program.stat().st_mtime < source.stat().st_mtime:
            tree = library.parent.parent / "sdist" / "llama.cpp"
            includes = [f"-I{tree / part / 'include'}" for part in ("", "ggml")]
            command = [
                os.environ.get("CXX", "g++"), "-std=c++17", "-O2", *includes, str(source), f"-L{library}", "-lllama",
                f"-Wl,-rpath,{library}", f"-Wl,-rpath-link,{library}", "-o", str(program),
            ]  # fmt: skip
            built = subprocess.run(command, capture_output=True, text=True)
            if built.returncode:
                raise BenchError(f"{source.name} does not build: {built.stderr[-500:]}")
        return program


def verdicts(results: Results) -> list[Verdict]:
    step = results.by_block("step", "step")
    found = []
    for case, share in SHARES.items():
        parts = [100 * ratio for ratio in paired_ratios(results.by_block("kvik", case), step)]
        found.append(verdict(Target(f"sampling ÷ step of {SEQUENCES}, {case}", share, "at most", " %"), parts))
    return found


def report(results: Results) -> str:
    peers = [name for name in ("kvik", "transformers", "llama.cpp") if name in results.figures]
    rows = [[case, *(spread(results.interval(peer, case)) for peer in peers)] for case in CASES]
    step = spread(results.interval("step", "step"))
    parts = [
        "# Sampling", "\n".join(f"- {name}: {value}" for name, value in results.context.items()),
        verdict_table(verdicts(results)), f"A decode step of {SEQUENCES} sequences, greedy: {step} ms.",
        markdown_table([f"ms a step of {SEQUENCES}", *peers], rows),
    ]  # fmt: skip
    if results.failures:
        parts.append(failed_table(results))
    return "\n\n".join(parts) + "\n"


def work(options: argparse.Namespace) -> int:
    peers = Peers(options.root.expanduser().absolute())
    settings = Settings(
        peers=peers, kvik_python=options.kvik_python, model=options.model or peers.variant("Q4_1"),
        threads=options.threads, repeat=options.repeat, seed=options.seed,
    )  # fmt: skip
    out = results_folder(options.out, "decoding-")
    sampling = Sampling(settings, out)
    jobs = sampling.jobs()
    names = chosen(jobs, options.only, options.skip)
    check(jobs, names)
    out.mkdir(parents=True, exist_ok=True)
    say("warm-up: kvik packs the model and makes the rows")
    contenders.start_kvik(settings)
    sampling.kvik("rows")
    results = Results(context={
        **machine(), "threads": options.threads, "model": settings.model.name,
        "rows": f"real logits; the repetition penalty looks at {SEEN} tokens",
        "llama.cpp": "one thread, which is how it samples; the candidates are filled from the logits each time",
    })  # fmt: skip
    run = Run(jobs, settings.seed, out, results)
    run.blocks(names, options.blocks)
    return run.publish(report(results), options.table, None, None)


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(lambda: work(arguments().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
