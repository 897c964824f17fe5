"""The report on KV formats and eviction: verdicts, tables and the plot."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bench.common import (
    Interval,
    Target,
    Verdict,
    drawing,
    markdown_table,
    number,
    paired_ratios,
    spread,
    verdict,
    verdict_table,
)
from bench.kv_jobs import LLAMA, QUALITY, RECALL
from bench.kv_settings import BOTH, FORMATS, FULL, QUALITY_TARGETS, SCORERS, SHARES, nominal
from bench.results import MB, Results, failed_table

PLACES = ("inside", "after")
DECODE, BYTES, RECALLED = "decode kvik", "bytes", "recall "
FULL_CACHE = "full: share"
SOLVED = 0.6
"""Share of the items that the full cache must answer."""


def figure(results: Results, job: str, name: str) -> float | None:
    found = results.interval(job, name)
    return None if found is None else found.median


def settings_in(results: Results, job: str, ending: str) -> list[str]:
    """Settings of which a job tells a figure, in its order."""
    blocks = results.figures.get(job, {})
    names = dict.fromkeys(name for found in blocks.values() for name in found)
    return [name.removesuffix(ending) for name in names if name.endswith(ending)]


def own(results: Results, target: Target, job: str, name: str, note: str = "") -> Verdict:
    return verdict(target, list(results.by_block(job, name).values()), note)


def worst(target: Target, found: Iterable[tuple[str, float | None]]) -> Verdict:
    """The one of several named figures that is furthest on the wrong side; the note says which."""
    known = [(value, name) for name, value in found if value is not None]
    if not known:
        return verdict(target, [])
    value, name = max(known) if target.sense == "at most" else min(known)
    return verdict(target, [value], name)


# --- verdicts


def verdicts(results: Results) -> list[Verdict]:
    return [
        *format_verdicts(results), *llama_verdicts(results), *stream_verdicts(results), *scorer_verdicts(results),
        *recall_verdicts(results),
    ]  # fmt: skip


def format_verdicts(results: Results) -> list[Verdict]:
    found = []
    for name, bound in QUALITY_TARGETS.items():
        found += [
            own(results, Target(f"{name}: bytes ÷ f16", bound.bytes, "at most"), BYTES, f"{name}: ratio"),
            own(results, Target(f"{name}: perplexity over the f32 cache's", bound.perplexity, "at most", " %"),
                f"quality {name}", "change", interval_note(results, f"quality {name}")),
            own(results, Target(f"{name}: the same best token", bound.top, unit=" %"), f"quality {name}", "top"),
            own(results, Target(f"{name}: decode over f16's ÷ fewer bytes", 0.85, unit="×"), DECODE, f"{name}: of_bytes"),
        ]  # fmt: skip
    return found


def interval_note(results: Results, job: str) -> str:
    low, high = (figure(results, job, name) for name in ("low", "high"))
    return "" if low is None or high is None else f"over windows: {low:+.3f} to {high:+.3f} %"


def llama_verdicts(results: Results) -> list[Verdict]:
    theirs = "decode llama.cpp q4_0"
    ratios = paired_ratios(results.by_block(DECODE, "int4"), results.by_block(theirs, "decode"))
    return [verdict(Target("int4: decode ÷ llama.cpp's with q4_0", 6.0, unit="×"), ratios)]


def stream_verdicts(results: Results) -> list[Verdict]:
    change = figure(results, "stream", "change")
    away = Target("StreamingLLM: perplexity away from recomputing", 5.0, "at most", " %")
    return [
        own(results, Target("StreamingLLM: most bytes ÷ fewest", 1.0, "at most", "×"), "stream", "growth"),
        verdict(away, [] if change is None else [abs(change)], interval_note(results, "stream")),
        own(results, Target("StreamingLLM: a new token ÷ recomputing", 20.0, unit="×"), "stream", "speed"),
    ]


def scorer_verdicts(results: Results) -> list[Verdict]:
    evicting = [name for name in settings_in(results, BYTES, ": ratio") if name.endswith("%") and name != BOTH]
    held = ((name, of_nominal(results, name)) for name in evicting)
    fits = ((name, figure(results, "capacity", f"{name}: of_promised"))
            for name in settings_in(results, "capacity", ": of_promised") if name != FULL)  # fmt: skip
    return [
        worst(Target("scorers: bytes ÷ nominal, the most", 1.05, "at most"), held),
        worst(Target("sequences at once ÷ what fewer bytes promise, the fewest", 0.9), fits),
        *(own(results, Target(f"{name}: time added to prefill", 0.1, "at most"), "prefill", f"{name}: cost")
          for name in SCORERS),
        own(results, Target(f"{BOTH}: bytes ÷ f16", 0.09, "at most"), BYTES, f"{BOTH}: ratio"),
    ]  # fmt: skip


def of_nominal(results: Results, name: str) -> float | None:
    ratio = figure(results, BYTES, f"{name}: ratio")
    return None if ratio is None else ratio / nominal(name)


def recall_verdicts(results: Results) -> list[Verdict]:
    """The best policy at 25 % of each task, for the question inside and after."""
    found = []
    for task in RECALL:
        job = RECALLED + task
        found.append(own(results, Target(f"{task}: answered with the full cache", SOLVED), job, FULL_CACHE))
        for place in PLACES:
            target = Target(f"{task}, question {place}: points lost at 25 %, the best", 2.0, "at most")
            name = best(results, job, place)
            losses = (
                [] if name is None else [-value for value in results.by_block(job, f"{name}, {place}: points").values()]
            )
            found.append(verdict(target, losses, name or ""))
    return found


def best(results: Results, job: str, place: str, share: int = 25) -> str | None:
    """The setting with f16 at a share that answers most, picked on the items it is reported on."""
    ending = f", {place}: share"
    names = [name for name in settings_in(results, job, ending) if name.endswith(f" {share} %") and name != BOTH]
    return max(names, key=lambda name: figure(results, job, name + ending) or 0.0, default=None)


# --- tables


def bytes_table(results: Results) -> str:
    rows = []
    for name in settings_in(results, BYTES, ": ratio"):
        over = of_nominal(results, name) if name.endswith("%") and name != BOTH else None
        kept = figure(results, BYTES, f"{name}: kept")
        rows.append([name, three(figure(results, BYTES, f"{name}: ratio")), three(over), number(kept)])
    return markdown_table(["cache", "bytes ÷ f16", "÷ nominal", "tokens kept"], rows)


def three(value: float | None) -> str:
    """Three decimals."""
    return "–" if value is None else f"{value:.3f}"


def quality_table(results: Results) -> str:
    """f16 only rounds: the control."""
    rows = []
    for begin in QUALITY:
        for name in (FULL, *FORMATS):
            job = f"{begin} {name}"
            if (change := figure(results, job, "change")) is not None:
                value, top = figure(results, job, "perplexity"), figure(results, job, "top")
                interval = interval_note(results, job).removeprefix("over windows: ") or "–"
                rows.append([job, number(value), f"{change:+.3f} %", interval, f"{top:.2f} %"])
    return markdown_table(["weights and cache", "perplexity", "over the f32 cache", "95 %", "same best token"], rows)


def decode_table(results: Results) -> str:
    rows = []
    for name in settings_in(results, DECODE, ": faster"):
        cells = [
            results.interval(DECODE, one) for one in (name, f"{name}: faster", f"{name}: fewer", f"{name}: of_bytes")
        ]
        rows.append([f"kvik {name}", *map(spread, cells)])
    for kv in LLAMA:
        if found := results.interval(f"decode llama.cpp {kv}", "decode"):
            rows.append([f"llama.cpp {kv}", spread(found), "–", "–", "–"])
    return markdown_table(["engine and cache", "tokens/s", "÷ f16", "fewer bytes", "of these"], rows)


def stream_table(results: Results) -> str:
    wanted = [
        ("perplexity at the places, streamed", "perplexity"), ("the same, recomputed each time", "recomputed"),
        ("recomputing ÷ a new token", "speed"), ("recomputing ÷ a token of a scored text", "scored"),
        ("bytes held (MB)", "held"), ("most bytes ÷ fewest", "growth"),
    ]  # fmt: skip
    rows = []
    for text, name in wanted:
        if (value := figure(results, "stream", name)) is not None:
            rows.append([text, number(value / MB if name == "held" else value)])
    return markdown_table(["figure", "value"], rows)


def recall_table(results: Results, task: str) -> str:
    """Percent answered and points lost with 95 % intervals; each column a share of the tokens."""
    job, rows = RECALLED + task, list[list[str]]()
    for place in PLACES:
        names = settings_in(results, job, f", {place}: share")
        kinds = dict.fromkeys(name.rsplit(" ", 2)[0] for name in names)
        for kind in kinds:
            cells = [recall_cell(results, job, f"{kind} {share} %, {place}") for share in SHARES]
            rows.append([kind, place, *cells])
    full = figure(results, job, FULL_CACHE) or 0.0
    header = ["policy", "question", *(f"{share} %" for share in SHARES)]
    return f"Full cache: {100 * full:.1f} % of {number(figure(results, job, 'items'))} items.\n\n" + markdown_table(
        header, rows
    )


def recall_cell(results: Results, job: str, name: str) -> str:
    share, points, low, high = (figure(results, job, f"{name}: {one}") for one in ("share", "points", "low", "high"))
    if share is None or points is None or low is None or high is None:
        return "–"
    return f"{100 * share:.1f} % ({points:+.1f}: {low:+.1f} to {high:+.1f})"


def capacity_table(results: Results) -> str:
    rows = []
    for name in settings_in(results, "capacity", ": more"):
        cells = (figure(results, "capacity", f"{name}: {one}") for one in ("fits", "more", "promised", "of_promised"))
        rows.append([name, *map(number, cells)])
    return markdown_table(["cache", "at once", "÷ f16", "fewer bytes promise", "of these"], rows)


def prefill_table(results: Results) -> str:
    rows = [[name, spread(found)] for name in SCORERS if (found := results.interval("prefill", f"{name}: cost"))]
    return markdown_table(["policy at 25 %", "time added ÷ prefill"], rows)


def report(results: Results) -> str:
    """The whole report as Markdown."""
    parts = [
        "# The KV cache: fewer bits, fewer tokens",
        "\n".join(f"- {name}: {value}" for name, value in results.context.items()),
        "Speeds are medians over the blocks with bootstrap 95 % intervals, ratios taken round by round; the rest is measured once.",
        "## Targets", verdict_table(verdicts(results)),
    ]  # fmt: skip
    sections = [
        ("Bytes", BYTES, bytes_table), ("Quality", "quality ", quality_table), ("End to end", "end-to-end ", quality_table),
        ("Decode", "decode ", decode_table), ("A text without end", "stream", stream_table),
        *((f"Recall: {task}", RECALLED + task, lambda found, task=task: recall_table(found, task)) for task in RECALL),
        ("Sequences at once", "capacity", capacity_table), ("Scoring", "prefill", prefill_table),
    ]  # fmt: skip
    shown = set()
    for title, begin, table in sections:
        if any(job.startswith(begin) for job in results.figures) and table not in shown:
            parts += [f"## {title}", table(results)]
            shown.add(table)
    if results.failures:
        parts += ["## Failed", failed_table(results)]
    return "\n\n".join(parts) + "\n"


# --- plot


def plot(results: Results, path: Path) -> None:
    """Perplexity by bytes, decode by cache, recall by share of the tokens. SVG or PNG."""
    pyplot = drawing()
    figures, axes = pyplot.subplots(1, 2 + len(RECALL), figsize=(4.4 * (2 + len(RECALL)), 4))
    for begin, colour in zip(QUALITY, ("#c0392b", "#34495e"), strict=True):
        points = [
            (ratio, change, name) for name in (FULL, *FORMATS)
            if (ratio := figure(results, BYTES, f"{name}: ratio")) and (change := figure(results, f"{begin} {name}", "change")) is not None
        ]  # fmt: skip
        axes[0].plot([x for x, _, _ in points], [y for _, y, _ in points], "o-", color=colour, label=begin)
        for x, y, name in points:
            axes[0].annotate(name, (x, y), (4, 4), textcoords="offset points", fontsize=8)
    axes[0].set(xlabel="bytes ÷ f16", ylabel="perplexity over the f32 cache, %")
    bars = {f"kvik {name}": results.interval(DECODE, name) for name in settings_in(results, DECODE, ": faster")}
    bars |= {f"llama.cpp {kv}": results.interval(f"decode llama.cpp {kv}", "decode") for kv in LLAMA}
    for row, (name, found) in enumerate((name, found) for name, found in bars.items() if found):
        draw_bar(axes[1], row, name, found)
    axes[1].set(xlabel="decode, tokens per second", yticks=[])
    for axis, task in zip(axes[2:], RECALL, strict=True):
        draw_recall(axis, results, task)
    for axis in axes:
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=7)
    figures.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figures.savefig(path, dpi=140, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figures)


def draw_bar(axis: Any, row: int, name: str, found: Interval) -> None:
    colour = "#c0392b" if name.startswith("kvik") else "#34495e"
    axis.barh(row, found.median, xerr=[[found.median - found.low], [found.high - found.median]], color=colour)
    axis.annotate(
        f"{name}  {number(found.median)}", (0, row), (4, -3), textcoords="offset points", fontsize=8, color="white"
    )


def draw_recall(axis: Any, results: Results, task: str) -> None:
    """Question inside: lines; after: dashes. The full cache is the grey line."""
    job = RECALLED + task
    for place, style in zip(PLACES, ("-", "--"), strict=True):
        names = settings_in(results, job, f", {place}: share")
        for at, kind in enumerate(dict.fromkeys(name.rsplit(" ", 2)[0] for name in names)):
            found = {share: figure(results, job, f"{kind} {share} %, {place}: share") for share in SHARES}
            known = {share: 100 * value for share, value in found.items() if value is not None}
            label = kind if place == PLACES[0] else None
            axis.plot(list(known), list(known.values()), style, marker="o", color=f"C{at}", label=label)
    if (full := figure(results, job, FULL_CACHE)) is not None:
        axis.axhline(100 * full, color="grey", linewidth=1)
    axis.set(xlabel="tokens kept, %", ylabel="answered, %", title=f"{task} (dashes: question after)", ylim=(0, 102))
