"""Runs in Kvik's environment: times a start, or later starts beside plain reads of the packed file; one JSON object.

kvik_load.py '{"mode": "pack", "model": …}'                  the first start in $KVIK_HOME: packs the weights
kvik_load.py '{"mode": "load", "model": …, "repeat": 5}'     later ones, and the packed file read, in turns

All of it in one process, after everything is imported and the file is in the page cache.
"""

from __future__ import annotations

import json
import os
import random
import sys
from pathlib import Path
from time import perf_counter
from typing import Any

import kvik.llm  # noqa: F401 - what a start imports is not what is measured here
from kvik.models.loading import load_model

CHUNK = 1 << 20


class Stages:
    """Notes when each stage of loading was first and last heard of."""

    def __init__(self) -> None:
        self.seen: dict[str, list[float]] = {}

    def __call__(self, stage: str, done: int, total: int) -> None:
        self.seen.setdefault(stage, []).append(perf_counter())

    def seconds(self, stage: str) -> float:
        if stage not in self.seen:
            raise SystemExit(f"no stage {stage!r} in this start, only: {', '.join(self.seen) or 'none'}")
        return self.seen[stage][-1] - self.seen[stage][0]


def start(model: str) -> tuple[float, Stages]:
    """Seconds of a start, until the weights are ready to compute with."""
    stages = Stages()
    begun = perf_counter()
    load_model(model, "auto", stages)
    return perf_counter() - begun, stages


def packed_file() -> Path:
    found = list(Path(os.environ["KVIK_HOME"]).glob("packed/*/weights-auto.kvik"))
    if len(found) != 1:
        raise SystemExit(f"the store holds {len(found)} packed files, not one")
    return found[0]


def read_in_chunks(path: Path) -> float:
    """Seconds of reading the file once, into the same megabyte again and again: the least that touches every byte."""
    buffer = bytearray(CHUNK)
    begun = perf_counter()
    with open(path, "rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
    return perf_counter() - begun


def read_whole(path: Path) -> float:
    """Seconds of reading the file once into memory of its own."""
    begun = perf_counter()
    buffer = bytearray(path.stat().st_size)
    with open(path, "rb", buffering=0) as file:
        at = 0
        while got := file.readinto(memoryview(buffer)[at:]):
            at += got
    return perf_counter() - begun


def later(model: str, repeat: int) -> dict[str, list[float]]:
    path, draw = packed_file(), random.Random(0)
    found: dict[str, list[float]] = {"load_s": [], "weights_s": [], "read_s": [], "read_whole_s": []}

    def load() -> None:
        seconds, stages = start(model)
        found["load_s"].append(seconds)
        found["weights_s"].append(stages.seconds("load"))

    turns = [
        load,
        lambda: found["read_s"].append(read_in_chunks(path)),
        lambda: found["read_whole_s"].append(read_whole(path)),
    ]
    for _ in range(repeat + 1):
        for turn in draw.sample(turns, len(turns)):
            turn()
    return {name: values[1:] for name, values in found.items()}


def main() -> None:
    request: dict[str, Any] = json.loads(sys.argv[1])
    if request["mode"] == "pack":
        seconds, stages = start(request["model"])
        print(json.dumps({"seconds": seconds, "packing_s": stages.seconds("pack")}))
    else:
        print(json.dumps(later(request["model"], request["repeat"])))


if __name__ == "__main__":
    main()
