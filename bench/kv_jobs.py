"""What is measured of KV formats and eviction: one job per question, by name."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from bench import contenders, evaluation_text
from bench.common import middle
from bench.contenders import Measurement, Settings
from bench.jobs import Job, of_llama
from bench.kv_settings import FORMATS, FULL, SCORERS, KvSetting, evicting, formats

TIMEOUT = 4 * 3600
BYTES_AT, DEPTH, DEPTH_NEW = 4096, 7936, 48
WINDOW = 4096
SINKS, RECENT = 4, 1020
CHARACTERS_A_TOKEN = 5  # more than English has here, so that the text is long enough
QUALITY = {"quality": "f32", "end-to-end": "auto"}
"""Weights by the job's name: "auto" is the file's, with activations in 8 bits."""


class Task(NamedTuple):
    """One of kvik.evaluation.tasks, tokens of its prompts, settings of its own; the full cache answers most."""

    task: str
    tokens: int
    more: dict[str, int]


RECALL: Mapping[str, Task] = {
    "needle": Task("needle", 1024, {}), "needles": Task("needle", 1024, {"needles": 4}),
    "keys": Task("keys", 512, {"digits": 2}),
}  # fmt: skip
"""By the job's name."""
TASK_SEED = 1  # lengths, digits and the policies with an allocator were tried out on items of seed 0

PREFILL = 4096
CAPACITY = {"prompt": 1024, "new": 512, "kv_bytes": 256 << 20, "requests": 80}
"""Answers of at least half a prompt's length: while they come, prompts get three tokens a step and sequence."""
LLAMA = ("f16", "q4_0")
"""Formats of llama.cpp's cache."""


@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Attributes:
        folder: of the run.
        tokens: predictions of the quality jobs.
        items: of each recall task.
        stream_tokens, positions: of the long text, and places of it that are scored.
        scorers: policies of the recall tasks and the bytes, as kv_settings writes them.
        depth: tokens behind which is decoded.
        requests: of the capacity.
        prefill: tokens of the prompts that scorers are timed on.
    """

    folder: Path
    tokens: int
    items: int
    stream_tokens: int
    positions: int
    scorers: tuple[str, ...]
    depth: int = DEPTH
    requests: int = CAPACITY["requests"]
    prefill: int = PREFILL

    @property
    def text(self) -> Path:
        return self.folder / "text.txt"

    def write_text(self) -> None:
        self.text.write_text(
            evaluation_text.english(CHARACTERS_A_TOKEN * max(self.tokens, self.stream_tokens) + 20_000)
        )


def ask(settings: Settings, mode: str, seed: object, named: Mapping[str, KvSetting], **more: Any) -> Any:
    request = {
        "mode": mode, "model": str(settings.model), "threads": settings.threads, "repeat": settings.repeat,
        "seed": f"{settings.seed}/{mode}/{seed}", "settings": named, **more,
    }  # fmt: skip
    python, env = settings.kvik_python, settings.kvik_env()
    found, _ = contenders.run_worker(python, "kvik_kv.py", json.loads(json.dumps(request)), env, timeout=TIMEOUT)
    return found


# --- once


def held_bytes(settings: Settings, sizes: Sizes, block: int) -> Measurement:
    """Bytes of a sequence of 4,096 tokens over those of f16, and tokens kept."""
    named = {**formats(), **evicting(sizes.scorers)}
    found = ask(settings, "bytes", block, named, tokens=BYTES_AT)
    figures = {}
    for name, each in found.items():
        figures |= {f"{name}: ratio": each["bytes"] / found[FULL]["bytes"], f"{name}: kept": float(each["kept"])}
    return Measurement({**figures, "bytes": float(found[FULL]["bytes"])}, found)


def quality(settings: Settings, sizes: Sizes, weights: str, name: str) -> Measurement:
    """Against the same weights with keys and values in f32."""
    found = ask(settings, "quality", 0, {name: KvSetting(name)}, weights=weights, reference="f32", text=str(sizes.text),
                window=WINDOW, tokens=sizes.tokens)[name]  # fmt: skip
    low, high = (found["interval"] or [found["ratio"]] * 3)[1:]
    figures = {
        "perplexity": found["perplexity"], "change": 100 * (found["ratio"] - 1), "low": 100 * (low - 1),
        "high": 100 * (high - 1), "top": 100 * found["same_top"], "kl": found["kl"],
        "predictions": float(found["predictions"]),
    }  # fmt: skip
    return Measurement(figures, found)


def stream(settings: Settings, sizes: Sizes) -> Measurement:
    found = ask(settings, "stream", 0, {}, text=str(sizes.text), tokens=sizes.stream_tokens, positions=sizes.positions,
                sinks=SINKS, window=RECENT, new=64)  # fmt: skip
    held = found["held"].values()
    value, low, high = (100 * (ratio - 1) for ratio in found["ratio"])
    figures = {
        "perplexity": found["perplexity"], "recomputed": found["recomputed"], "change": value, "low": low, "high": high,
        "speed": found["recompute_s"] / found["step_s"], "scored": found["recompute_s"] / found["scored_s"],
        "held": float(max(held)), "growth": max(held) / min(held),
    }  # fmt: skip
    return Measurement(figures, found)


def recall(settings: Settings, sizes: Sizes, task: str) -> Measurement:
    asked = {**RECALL[task]._asdict(), "items": sizes.items, "task_seed": TASK_SEED}
    found = ask(settings, "recall", 0, evicting(sizes.scorers), **asked)
    figures = {
        f"{name}: {figure}": float(value) for name, each in found["found"].items() for figure, value in each.items()
    }
    return Measurement({**figures, "items": float(sizes.items)}, found)


def capacity(settings: Settings, sizes: Sizes) -> Measurement:
    """How many run at once in the same bytes, over the f16 cache's, and over what their bytes promise."""
    named = {**formats(), **evicting(["keydiff"])}
    found = ask(settings, "capacity", 0, named, **{**CAPACITY, "requests": sizes.requests})
    full, figures = found[FULL], {}
    for name, each in found.items():
        more, promised = each["fits"] / full["fits"], full["held"] / each["held"]
        figures |= {f"{name}: fits": float(each["fits"]), f"{name}: more": more, f"{name}: promised": promised}
        figures[f"{name}: of_promised"] = more / promised
    return Measurement(figures, found)


# --- in every block


def decode(settings: Settings, sizes: Sizes, block: int) -> Measurement:
    """of_bytes: how much faster than f16, over how many fewer bytes a step reads, matrices and cache together."""
    named = {**formats(), **{name: each for name, each in evicting(["snapkv"]).items() if "25 %" in name}}
    found = ask(settings, "decode", block, named, depth=sizes.depth, new=DEPTH_NEW)
    rates, read = found["rates"], {name: found["matrix_bytes"] + held for name, held in found["held"].items()}
    figures = {}
    for name, each in rates.items():
        ratios = [mine / full for mine, full in zip(each, rates[FULL], strict=True)]
        figures |= {name: middle(each), f"{name}: faster": middle(ratios), f"{name}: fewer": read[FULL] / read[name]}
        figures[f"{name}: of_bytes"] = middle(ratios) * read[name] / read[FULL]
    return Measurement(figures, found)


def decode_llama(settings: Settings, sizes: Sizes, kv: str) -> Measurement:
    """With flash attention, which its integer values need."""
    tests, _ = contenders.llama_bench(
        replace(settings, repeat=1), settings.peers.variant("Q4_1"), 1, "-p", "0", "-n", "32", "-d", str(sizes.depth),
        "-ctk", kv, "-ctv", kv,
    )  # fmt: skip
    return Measurement({"decode": middle(tests[-1]["samples_ts"])}, tests)


def prefill(settings: Settings, sizes: Sizes, block: int) -> Measurement:
    """cost: the part that a policy adds to the time of a prompt."""
    named = {FULL: KvSetting(), **{name: KvSetting(FULL, f"{name}:budget=25%") for name in SCORERS}}
    found = ask(settings, "prefill", block, named, tokens=sizes.prefill)["seconds"]
    figures = {f"{FULL}: seconds": middle(found[FULL])}
    for name in SCORERS:
        figures[f"{name}: cost"] = middle(
            [mine / full - 1 for mine, full in zip(found[name], found[FULL], strict=True)]
        )
    return Measurement(figures, found)


# --- all of them


def plan(settings: Settings, sizes: Sizes) -> dict[str, Job]:
    """Every job by name. Names begin with what --only and --skip go by."""

    def ours(measure: Callable[[int], Measurement]) -> Job:
        return Job(measure, settings.need_kvik)

    def once(measure: Callable[..., Measurement], *more: Any) -> Job:
        return ours(lambda block: measure(settings, sizes, *more))

    found = {"bytes": ours(partial(held_bytes, settings, sizes))}
    for job, weights in QUALITY.items():
        found |= {f"{job} {name}": once(quality, weights, name) for name in (FULL, *FORMATS)}
    found |= {"stream": once(stream), **{f"recall {task}": once(recall, task) for task in RECALL}}
    found |= {"capacity": once(capacity), "decode kvik": ours(partial(decode, settings, sizes))}
    for kv in LLAMA:
        found[f"decode llama.cpp {kv}"] = of_llama(
            settings, lambda: settings.peers.variant("Q4_1"), lambda block, kv=kv: decode_llama(settings, sizes, kv)
        )
    return {**found, "prefill": ours(partial(prefill, settings, sizes))}


def in_blocks(names: Iterable[str]) -> list[str]:
    """The jobs that are measured in every block: those of speed."""
    return [name for name in names if name.startswith(("decode ", "prefill"))]
