"""The report on evaluation: verdicts and tables."""

from __future__ import annotations

import numpy as np

from bench.agreement import Beside, beside, overlap, read_keys
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
from bench.evaluation_jobs import LAYOUTS, LLAMA, METRICS, REFERENCE, SCORED, Inputs
from bench.results import MB, Results, failed_table, fastest

PERPLEXITY = "perplexity "
KVIK = f"{PERPLEXITY}kvik"
TRANSFORMERS = "transformers bf16"
SAME_FILE = "llama.cpp Q4_1"
EQUAL = (SAME_FILE, TRANSFORMERS)
"""Engines whose weights are Kvik's: what they find must be the same."""


def of(results: Results, begin: str) -> list[str]:
    """Jobs that measured something, by how their names begin; Kvik first."""
    found = [job for job in results.figures if job.startswith(begin)]
    return sorted(found, key=lambda job: (not job.endswith("kvik"), job))


# --- verdicts


def faster(results: Results, target: Target, ours: str, theirs: str | None, figure: str) -> Verdict:
    """A rate of one job ÷ that of another, block by block."""
    if theirs is None:
        return verdict(target, [], "no peer measured")
    return verdict(target, paired_ratios(results.by_block(ours, figure), results.by_block(theirs, figure)), theirs)


def verdicts(results: Results, inputs: Inputs) -> list[Verdict]:
    same = fastest(results, "tok_s", of(results, PERPLEXITY + SAME_FILE))
    plain = fastest(results, "tok_s", of(results, PERPLEXITY + TRANSFORMERS))
    long = fastest(results, "tok_s", of(results, "longppl plain"))
    both = paired_ratios(results.by_block("divergence kvik", "seconds"), results.by_block(KVIK, "seconds"))
    return [
        faster(results, Target("perplexity ÷ llama-perplexity, same file", 3.0, unit="×"), KVIK, same, "tok_s"),
        faster(results, Target("perplexity ÷ transformers in bf16", 1.8, unit="×"), KVIK, plain, "tok_s"),
        verdict(Target("time of the divergence of two layouts ÷ that of one perplexity", 2.2, "at most", "×"), both),
        faster(results, Target("LongPPL ÷ a window at a time", 3.0, unit="×"), "longppl kvik", long, "tok_s"),
        *(faster(results, Target(f"{name} ÷ {package}", 1.0, unit="×"), f"{name} kvik",
                 fastest(results, "pairs_s", of(results, f"{name} {package}")), "pairs_s")
          for name, package in METRICS.items()),
        *(verdict(Target(f"difference of the mean loss to Kvik's ÷ its standard error, {engine}", 1.0, "at most"),
                  [found.errors])
          for engine, found in agreement(inputs).items() if engine.startswith(EQUAL)),
    ]  # fmt: skip


def agreement(inputs: Inputs) -> dict[str, Beside]:
    """Every engine whose losses were written down, beside Kvik; nothing where Kvik's were not."""
    ours = inputs.losses("kvik")
    engines = [*(f"llama.cpp {name} fa={flash}" for name, flash in LLAMA), TRANSFORMERS]
    if not ours.exists():
        return {}
    return {
        engine: beside(np.load(ours), np.load(path), SCORED)
        for engine in engines if (path := inputs.losses(engine)).exists()
    }  # fmt: skip


# --- tables


def speed_table(results: Results, begin: str, ours: str) -> str:
    """Time of the evaluation alone and of the process from its start, each with what Kvik is of it."""
    rows = []
    for job in of(results, begin):
        row = [job.removeprefix(begin), spread(results.interval(job, "tok_s"))]
        row.append(ratios(results, ours, job, "seconds"))
        row += [spread(results.interval(job, "whole_s")), ratios(results, ours, job, "whole_s")]
        peak = results.interval(job, "peak_rss_bytes")
        row.append("–" if peak is None else number(peak.median / MB))
        rows.append(row)
    header = ["engine", "tokens/s", "Kvik ÷ it", "with loading (s)", "Kvik ÷ it", "peak MB"]
    return markdown_table(header, rows)


def ratios(results: Results, ours: str, theirs: str, figure: str) -> str:
    """How many times Kvik is faster, of times."""
    found = paired_ratios(results.by_block(theirs, figure), results.by_block(ours, figure)) if theirs != ours else []
    return spread(bootstrap_median(found)) if found else "–"


def agreement_table(results: Results, inputs: Inputs) -> str:
    """The same tokens in the same windows: the second halves, which llama-perplexity scores."""
    rows = [["kvik", exact(results.median("agreement kvik", "perplexity")), "–", "–"]]
    for engine, found in agreement(inputs).items():
        low, high = found.difference.low, found.difference.high
        cells = [exact(found.perplexity), f"{found.difference.median:+.5f} ({low:+.5f} – {high:+.5f})"]
        rows.append([engine, *cells, number(found.errors)])
    header = ["engine", "perplexity", "mean loss less Kvik's (nats)", "÷ standard error of Kvik's"]
    return markdown_table(header, rows)


def exact(value: float) -> str:
    return f"{value:.4f}"


def other_table(results: Results, inputs: Inputs) -> str:
    wanted = [
        ("perplexity of the whole text, Kvik's own windows", KVIK, "perplexity"),
        ("standard error of its mean loss (nats)", KVIK, "standard_error"),
        ("perplexity of the whole text, transformers", PERPLEXITY + TRANSFORMERS, "perplexity"),
        ("one perplexity (s)", KVIK, "seconds"),
    ]
    for job, layout in LAYOUTS.items():
        wanted += [
            (f"divergence of {layout} from {REFERENCE} (s)", job, "seconds"),
            (f"mean KL of {layout} (nats)", job, "kl_mean"),
            (f"same best token, {layout}", job, "same_top"),
        ]
    for name, package in METRICS.items():
        for job in (f"{name} kvik", f"{name} {package}"):
            wanted.append((f"{job} (pairs/s)", job, "pairs_s"))
            wanted += [(f"{job}, {figure}", job, figure) for figure in figures_of(results, job) if figure != "pairs_s"]
    rows = [[text, spread(found)] for text, job, name in wanted if (found := results.interval(job, name))]
    return markdown_table(["figure", "median (95 % interval)"], rows)


def figures_of(results: Results, job: str) -> list[str]:
    return sorted({name for found in results.figures.get(job, {}).values() for name in found})


def keys_table(inputs: Inputs) -> str:
    """LongPPL and its key tokens by both; the last measurements of each."""
    sides = {name: read_keys(path) for name in ("kvik", "plain") if (path := inputs.keys(name)).exists()}
    rows = [
        [name, "none" if found.value is None else exact(found.value), str(sum(map(len, found.keys)))]
        for name, found in sides.items()
    ]
    table = markdown_table(["engine", "LongPPL", "key tokens"], rows)
    if len(sides) == 2:
        shared = overlap(*sides.values())
        table += f"\n\nKey tokens of both ÷ of either: {'none' if shared is None else f'{shared:.4f}'}."
    return table


def report(results: Results, inputs: Inputs) -> str:
    """The whole report as Markdown."""
    parts = [
        "# Evaluation", "\n".join(f"- {name}: {value}" for name, value in results.context.items()),
        "Figures are medians over the blocks with bootstrap 95 % intervals; ratios are taken block by block.",
        "## Targets", verdict_table(verdicts(results, inputs)),
    ]  # fmt: skip
    if of(results, PERPLEXITY):
        parts += ["## Perplexity", speed_table(results, PERPLEXITY, KVIK)]
    if agreement(inputs):
        parts += ["## The same result", agreement_table(results, inputs)]
    if of(results, "longppl "):
        parts += ["## LongPPL", speed_table(results, "longppl ", "longppl kvik"), keys_table(inputs)]
    parts += ["## Other figures", other_table(results, inputs)]
    if results.failures:
        parts += ["## Failed", failed_table(results)]
    return "\n\n".join(parts) + "\n"
