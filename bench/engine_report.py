"""The report on many requests and long contexts: verdicts, tables and the plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bench.common import (
    Target,
    Verdict,
    bootstrap_median,
    drawing,
    markdown_table,
    paired_ratios,
    spread,
    verdict,
    verdict_table,
)
from bench.engine_jobs import (
    BEAMS,
    DEPTHS,
    GRAMMAR_COUNTS,
    KVIK_SEQUENCES,
    LONG_PROMPT,
    REFERENCES,
    SEQUENCES,
    SHARE,
    STREAMS,
)
from bench.results import Results, failed_table, fastest


def of(results: Results, begin: str) -> list[str]:
    """Jobs that measured something, by how their names begin; Kvik first."""
    found = [job for job in results.figures if job.startswith(begin)]
    return sorted(found, key=lambda job: (not job.endswith("kvik"), job))


def reference(results: Results) -> str | None:
    """The server whose capacity set the common rate."""
    return next((name for name in REFERENCES if f"capacity {name}" in results.figures), None)


# --- verdicts


def ratio(results: Results, target: Target, ours: str, theirs: str | None, figure: str) -> Verdict:
    """A figure of one job ÷ that of another, block by block."""
    if theirs is None:
        return verdict(target, [], "no peer measured")
    return verdict(target, paired_ratios(results.by_block(ours, figure), results.by_block(theirs, figure)), theirs)


def own(results: Results, target: Target, job: str, figure: str, note: str = "") -> Verdict:
    """A figure of a job itself."""
    return verdict(target, list(results.by_block(job, figure).values()), note)


def verdicts(results: Results) -> list[Verdict]:
    """Every target, in the order of the sections."""
    return [
        *batch_verdicts(results), *deep_verdicts(results), *http_verdicts(results), *decoding_verdicts(results),
        *cache_verdicts(results),
    ]  # fmt: skip


def batch_verdicts(results: Results) -> list[Verdict]:
    llama, vllm = of(results, "batch llama.cpp"), fastest(results, "decode_16", of(results, "batch vllm"))
    kvik = "batch kvik"
    single = paired_ratios(results.by_block(kvik, "decode_4"), results.by_block(kvik, "decode_1"))

    def against_llama(count: int) -> Verdict:
        figure = f"decode_{count}"
        target = Target(f"decode, {count} sequences ÷ llama.cpp's fastest", 2.8, unit="×")
        return ratio(results, target, kvik, fastest(results, figure, llama), figure)

    return [
        against_llama(16),
        ratio(results, Target("decode, 16 sequences ÷ vLLM", 4.0, unit="×"), kvik, vllm, "decode_16"),
        against_llama(32),
        verdict(Target("decode, 4 sequences ÷ 1 sequence, Kvik", 3.0, unit="×"), single),
    ]


def deep_verdicts(results: Results) -> list[Verdict]:
    llama = of(results, "deep llama.cpp")
    plans = [(f"decode_{depth}", f"decode behind {depth} tokens", 2.5) for depth in DEPTHS]
    plans.append((f"prefill_{LONG_PROMPT}", f"prefill of {LONG_PROMPT} tokens", 2.0))
    return [
        ratio(results, Target(f"{text} ÷ llama.cpp's fastest", bound, unit="×"), "deep kvik",
              fastest(results, figure, llama), figure)
        for figure, text, bound in plans
    ]  # fmt: skip


def http_verdicts(results: Results) -> list[Verdict]:
    name = reference(results) or REFERENCES[0]
    peer = f"arrivals {name}" if reference(results) else None

    def beside(text: str, figure: str) -> Verdict:
        target = Target(f"{text} ÷ {name}, at {SHARE:.0%} of the capacity of {name}", 0.5, "at most", "×")
        return ratio(results, target, "arrivals kvik", peer, figure)

    steady = Target(f"p99 ÷ median of inter-token latency at {SHARE:.0%} of Kvik's capacity", 4.0, "at most", "×")
    return [
        beside("time to first token", "first_s"),
        beside("inter-token latency", "gap_s"),
        own(results, steady, "own-rate kvik", "gap_p99_over_median"),
        own(results, Target(f"{STREAMS} streams over HTTP ÷ LLM.generate", 0.95), "http kvik", "kept"),
    ]


def decoding_verdicts(results: Results) -> list[Verdict]:
    target = Target(f"beam search, {BEAMS} beams ÷ transformers in bf16", 8.0, unit="×")
    return [
        ratio(results, target, "beams kvik", "beams transformers", "tok_s"),
        own(results, Target(f"Python's share of a step, {BEAMS} beams", 0.1, "at most"), "beams kvik", "python"),
        *(own(results, Target(f"JSON by a schema ÷ free text, {count} sequences", 0.9), "grammar kvik", f"kept_{count}")
          for count in GRAMMAR_COUNTS),
    ]  # fmt: skip


def cache_verdicts(results: Results) -> list[Verdict]:
    before = f"preallocated: {spread(results.interval('waste kvik', 'preallocated_longest'))}"
    return [
        own(results, Target("slots allocated and unused", 0.04, "at most"), "waste kvik", "waste", before),
        own(results, Target("saved of 16 samples' unshared bytes", 0.8), "samples kvik", "saved"),
        own(results, Target("time to first token, warm prefix of 2,000 ÷ cold", 0.05, "at most"), "prefix kvik",
            "warm_over_cold"),
        own(results, Target("time with prefix index ÷ without, no hits", 1.01, "at most"), "index kvik", "cost"),
        *(own(results, Target(f"Python's share of a step, {count} sequences", 0.1, "at most"), "batch kvik",
              f"python_{count}") for count in (1, 16, 64)),
    ]  # fmt: skip


# --- tables


def speeds(results: Results, begin: str, ours: str, columns: Sequence[tuple[str, str]]) -> str:
    """Figures (name, heading) of the jobs that begin so, each with what Kvik is of it."""
    rows = []
    for job in of(results, begin):
        row = [job.removeprefix(begin)]
        for figure, _ in columns:
            ratios = paired_ratios(results.by_block(ours, figure), results.by_block(job, figure)) if job != ours else []
            cell = spread(results.interval(job, figure))
            row.append(cell + (f", Kvik {spread(bootstrap_median(ratios))}×" if ratios else ""))
        rows.append(row)
    return markdown_table(["engine", *(heading for _, heading in columns)], rows)


def http_table(results: Results) -> str:
    wanted = [
        ("requests/s", "rate"), ("first token, median (s)", "first_s"), ("p99", "first_p99_s"),
        ("between tokens, median (s)", "gap_s"), ("p99", "gap_p99_s"), ("tokens/s", "tok_s"),
        ("chunks per token", "chunks_per_token"), ("generator late by (s)", "late_s"),
    ]  # fmt: skip
    rows = []
    for job in (*of(results, "capacity "), *of(results, "arrivals "), *of(results, "own-rate ")):
        names = ["capacity" if name == "rate" and job.startswith("capacity") else name for _, name in wanted]
        rows.append([job, *(spread(results.interval(job, name)) for name in names)])
    return markdown_table(["job", *(text for text, _ in wanted)], rows)


def other_table(results: Results) -> str:
    wanted = [
        (f"{STREAMS} streams over HTTP (tok/s)", "http kvik", "http_tok_s"),
        (f"{STREAMS} requests through LLM.generate (tok/s)", "http kvik", "api_tok_s"),
        ("mean tokens of a sequence", "waste kvik", "mean_tokens"),
        ("slots unused, blocks of 16", "waste kvik", "waste"),
        ("slots unused, the trace's longest preallocated", "waste kvik", "preallocated_longest"),
        ("slots unused, the whole context preallocated", "waste kvik", "preallocated_context"),
        ("blocks of 16 samples, most at once", "samples kvik", "blocks_peak"),
        ("the same without sharing", "samples kvik", "blocks_unshared_peak"),
        (f"beam search, {BEAMS} beams (tok/s of the answer)", "beams kvik", "tok_s"),
        ("the same, transformers in bf16", "beams transformers", "tok_s"),
        ("most bytes of keys and values, its beams sharing", "beams kvik", "kv_bytes"),
        ("the same, a copy for each beam", "beams kvik", "kv_bytes_unshared"),
        ("first token behind 2,000 new tokens (s)", "prefix kvik", "cold_s"),
        ("first token behind 2,000 cached tokens (s)", "prefix kvik", "warm_s"),
        ("prompts that all differ, with the index (s)", "index kvik", "on"),
        ("prompts that all differ, without (s)", "index kvik", "off"),
    ]
    wanted += [(f"Python's share of a step, {n} sequences", "batch kvik", f"python_{n}") for n in KVIK_SEQUENCES]
    rows = [[text, spread(found)] for text, job, name in wanted if (found := results.interval(job, name))]
    return markdown_table(["figure", "median (95 % interval)"], rows)


def report(results: Results) -> str:
    """The whole report as Markdown."""
    parts = [
        "# Many requests and long contexts", "\n".join(f"- {name}: {value}" for name, value in results.context.items()),
        "Figures are medians over the blocks with bootstrap 95 % intervals; ratios are taken block by block.",
        "## Targets", verdict_table(verdicts(results)),
    ]  # fmt: skip
    if of(results, "batch "):
        columns = [(f"decode_{count}", f"{count}") for count in SEQUENCES]
        parts += ["## Decode by sequences (tok/s of all)", speeds(results, "batch ", "batch kvik", columns)]
    if of(results, "deep "):
        columns = [(f"decode_{depth}", f"decode behind {depth}") for depth in DEPTHS]
        columns.append((f"prefill_{LONG_PROMPT}", f"prefill of {LONG_PROMPT}"))
        parts += ["## One long sequence (tok/s)", speeds(results, "deep ", "deep kvik", columns)]
    if of(results, "capacity "):
        parts += ["## Over HTTP", http_table(results)]
    parts += ["## Kvik's engine", other_table(results)]
    if results.failures:
        parts += ["## Failed", failed_table(results)]
    return "\n\n".join(parts) + "\n"


# --- plot


def plot(results: Results, path: Path) -> None:
    """Decode by sequences and by depth, every engine a line with its intervals. SVG or PNG."""
    pyplot = drawing()
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.5))
    sections = (("batch ", SEQUENCES, "sequences"), ("deep ", DEPTHS, "tokens before"))
    for axis, (begin, places, label) in zip(axes, sections, strict=True):
        for job in of(results, begin):
            found = {at: one for at in places if (one := results.interval(job, f"decode_{at}"))}
            errors = [
                [one.median - one.low for one in found.values()],
                [one.high - one.median for one in found.values()],
            ]
            ours = {"color": "#c0392b", "linewidth": 2.5} if job.endswith("kvik") else {"linewidth": 1}
            medians = [one.median for one in found.values()]
            axis.errorbar(list(found), medians, yerr=errors, marker="o", label=job.removeprefix(begin), **ours)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks(places, [str(at) for at in places])
        axis.set_xlabel(label)
        axis.set_ylabel("tokens per second")
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=7)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=140, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)
