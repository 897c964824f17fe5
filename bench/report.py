"""The report of a run: verdicts, tables and the plot."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from bench import loading, same_file
from bench.common import (
    Target,
    Verdict,
    bootstrap_median,
    drawing,
    markdown_table,
    number,
    paired_ratios,
    spread,
    verdict,
    verdict_table,
)
from bench.quality import Quality, quality_table
from bench.results import MB, Figures, Phase, Results, failed_table, fastest

KL_CLOSE = 0.01


def quality_name(engine: str) -> str:
    """The contender of bench.quality behind a job: OpenVINO's attention backends run the same graph."""
    return engine.removesuffix(" PA").removesuffix(" SDPA")


def kl(results: Results, engine: str) -> float | None:
    found = results.quality.get(quality_name(engine))
    return found.kl if isinstance(found, Quality) else None


def equal_quality(results: Results, engine: str) -> bool | None:
    """None when either quality is not known."""
    ours, theirs = kl(results, "kvik"), kl(results, engine)
    return None if ours is None or theirs is None else theirs <= results.kl_tolerance * ours


# --- verdicts


def against(results: Results, phase: Phase, target: Target, engines: Iterable[str]) -> Verdict:
    """Kvik ÷ the fastest of the engines."""
    best = fastest(results, phase, engines)
    if best is None:
        return verdict(target, [], "no such engine measured, or its quality not known")
    return verdict(target, results.ratios(phase, best), best)


def verdicts(results: Results) -> list[Verdict]:
    """Every target of the project's speed section, in its order."""
    llama = [engine for engine in results.engines() if engine.startswith("llama.cpp")]
    same = [engine for engine in llama if engine.startswith("llama.cpp Q4_1")]
    equal = [engine for engine in llama if equal_quality(results, engine)]
    close = [engine for engine in llama if (found := kl(results, engine)) is not None and found <= KL_CLOSE]
    openvino = [engine for engine in results.engines() if engine.startswith("openvino Q4_1")]
    plans: list[tuple[Phase, str, float, list[str]]] = [
        ("decode", "llama.cpp, same file", 2.0, same),
        ("decode", "llama.cpp's fastest of equal quality", 1.7, equal),
        ("decode", f"llama.cpp's fastest with KL ≤ {KL_CLOSE}", 1.7, close),
        ("prefill", "llama.cpp's fastest of equal quality", 2.2, equal),
        ("prefill", f"llama.cpp's fastest with KL ≤ {KL_CLOSE}", 2.2, close),
        ("prefill", "OpenVINO, same file", 1.5, openvino),
    ]
    answers = [
        against(results, phase, Target(f"{phase} ÷ {text}", bound, unit="×"), engines)
        for phase, text, bound, engines in plans
    ]
    share = paired_ratios(results.by_block("kvik", "read_gb_s"), results.by_block("bandwidth", "gb_s"))
    own = paired_ratios(results.by_block("kvik", "read_gb_s"), results.by_block("kvik", "own_bandwidth_gb_s"))
    others = [1 - found["step_matrices_ms"] / step_ms(found) for found in results.figures.get("kvik", {}).values()]
    answers += [
        verdict(Target("read bandwidth inside the matrices ÷ bench/bandwidth.c", 0.85), share),
        verdict(Target("read bandwidth inside the matrices ÷ kvik's own measure", 0.85), own),
        verdict(Target("share of a step that is not matrices", 0.15, "at most"), others),
        verdict(
            Target("start to first token, second start", 0.45, "at most", " s"),
            list(results.by_block("start kvik", "first_s").values()),
            f"llama.cpp: {spread(results.interval('start llama.cpp', 'first_s'))} s",
        ),
        memory_verdict(results),
        verdict(
            Target("decode beside a busy process ÷ alone", 0.4),
            list(results.by_block("foreign kvik", "kept").values()),
            f"llama.cpp: {spread(results.interval('foreign llama.cpp', 'kept'))}",
        ),
    ]
    return answers


def step_ms(found: Figures) -> float:
    return sum(found[f"step_{name}_ms"] for name in ("matrices", "attention", "rest", "python"))


def memory_verdict(results: Results) -> Verdict:
    target = Target("peak memory over weights + KV", 150.0, "at most", " MB")
    if results.model is None:
        return verdict(target, [])
    known = results.model.weights + results.model.kv_token * results.tokens
    over = [(peak - known) / MB for peak in results.by_block("kvik", "peak_rss_bytes").values()]
    weights, cache = results.model.weights / MB, results.model.kv_token * results.tokens / MB
    return verdict(target, over, f"weights {number(weights)} MB, KV of {results.tokens} tokens {number(cache)} MB")


# --- tables


def speed_table(results: Results) -> str:
    rows = []
    for engine in results.engines():
        divergence, equal = kl(results, engine), equal_quality(results, engine)
        row = [engine]
        for phase in ("decode", "prefill"):
            ratios = results.ratios(phase, engine) if engine != "kvik" else []
            row += [spread(results.interval(engine, phase)), spread(bootstrap_median(ratios)) if ratios else "–"]
        peak = results.interval(engine, "peak_rss_bytes")
        row += [
            "–" if divergence is None else f"{divergence:.5f}",
            {None: "–", True: "yes", False: "no"}[equal if engine != "kvik" else None],
            "–" if peak is None else number(peak.median / MB),
        ]
        rows.append(row)
    header = ["engine", "decode (tok/s)", "Kvik ÷ it", "prefill (tok/s)", "Kvik ÷ it", "KL", "equal quality", "peak MB"]
    return markdown_table(header, rows)


def other_tables(results: Results) -> str:
    """Where a step goes, bandwidth, starts, the foreign process, decode at depth."""
    parts = []
    if "kvik" in results.figures:
        total = bootstrap_median([step_ms(found) for found in results.figures["kvik"].values()])
        rows = [
            [name, spread(results.interval("kvik", f"step_{name}_ms")),
             f"{100 * results.median('kvik', f'step_{name}_ms') / total.median:.1f} %"]
            for name in ("matrices", "attention", "rest", "python")
        ]  # fmt: skip
        rows.append(["whole step", spread(total), ""])
        parts.append(markdown_table(["part of Kvik's decode step", "ms", "share"], rows))
    wanted = [
        ("read bandwidth, best pass (GB/s)", "bandwidth", "gb_s"),
        ("read bandwidth, median pass (GB/s)", "bandwidth", "median_gb_s"),
        ("Kvik's own measure of it (GB/s)", "kvik", "own_bandwidth_gb_s"),
        ("Kvik reads inside the matrices (GB/s)", "kvik", "read_gb_s"),
        ("Kvik loads in (s)", "kvik", "load_s"),
        ("Kvik's first token of the prompt after (s)", "kvik", "first_token_s"),
        ("start to first token, Kvik (s)", "start kvik", "first_s"),
        ("start to first token, llama.cpp (s)", "start llama.cpp", "first_s"),
        ("decode alone, Kvik (tok/s)", "foreign kvik", "idle"),
        ("decode beside a busy process, Kvik (tok/s)", "foreign kvik", "disturbed"),
        ("kept, Kvik", "foreign kvik", "kept"),
        ("decode alone, llama.cpp (tok/s)", "foreign llama.cpp", "idle"),
        ("decode beside a busy process, llama.cpp (tok/s)", "foreign llama.cpp", "disturbed"),
        ("kept, llama.cpp", "foreign llama.cpp", "kept"),
    ]
    deep = [job for job in results.figures if job.startswith("depth ")]
    wanted += [(f"decode at depth, {job.removeprefix('depth ')} (tok/s)", job, "decode") for job in deep]
    rows = [[text, spread(found)] for text, job, name in wanted if (found := results.interval(job, name))]
    parts.append(markdown_table(["figure", "median (95 % interval)"], rows))
    return "\n\n".join(parts)


def report(results: Results) -> str:
    """The whole report as Markdown."""
    lines = [f"- {name}: {value}" for name, value in results.context.items()]
    parts = [
        "# Kvik beside other engines", "\n".join(lines),
        "Figures are medians over the blocks with bootstrap 95 % intervals; ratios are taken block by block. A peer is "
        f"of equal quality when its KL to the dequantized weights is at most {results.kl_tolerance} times Kvik's.",
        "## Targets", verdict_table([*verdicts(results), *same_file.verdicts(results), *loading.verdicts(results)]),
        "## Speed", speed_table(results),
        "## Where it goes", other_tables(results),
    ]  # fmt: skip
    if same_file.measured(results):
        parts += ["## Other files", same_file.table(results)]
    if loading.measured(results):
        parts += ["## Loading", loading.table(results)]
    if results.quality:
        parts += ["## Quality", quality_table(results.quality)]
    if results.failures:
        parts += ["## Failed", failed_table(results)]
    return "\n\n".join(parts) + "\n"


# --- plot


def plot(results: Results, path: Path) -> None:
    """Tokens per second of every engine with its interval; hollow marks are not of Kvik's quality. SVG or PNG."""
    pyplot = drawing()
    engines = sorted(results.engines(), key=lambda engine: results.median(engine, "decode"))
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 0.36 * len(engines) + 1.6), sharey=True)
    phases: Sequence[Phase] = ("decode", "prefill")
    for axis, phase in zip(axes, phases, strict=True):
        for row, engine in enumerate(engines):
            found = results.interval(engine, phase)
            if found is None:
                continue
            ours = engine == "kvik"
            colour = "#c0392b" if ours else "#34495e"
            axis.hlines(row, found.low, found.high, color=colour, linewidth=2)
            hollow = equal_quality(results, engine) is False
            axis.plot(found.median, row, "o", color=colour, markerfacecolor="white" if hollow else colour)
            ratios = [] if ours else results.ratios(phase, engine)
            text = number(found.median) + (f"   Kvik {number(bootstrap_median(ratios).median)}×" if ratios else "")
            axis.annotate(text, (found.median, row), (8, -3), textcoords="offset points", fontsize=8, color=colour)
        axis.set_xscale("log")
        axis.set_title(f"{phase}, tokens per second")
        low, high = axis.get_xlim()
        axis.set_xlim(low, high * 4)
        axis.grid(axis="x", alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(range(len(engines)), engines)
    note = "bars: bootstrap 95 % interval of the median; hollow: worse quality than Kvik's"
    figure.text(0.01, 0.01, note, fontsize=8)
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=140, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)
