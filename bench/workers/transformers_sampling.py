"""Runs in the environment of transformers: milliseconds of its logits processors and a multinomial draw, by case.

transformers_sampling.py '{"rows": IN.npy, "seen": IN.npy, "threads": 2, "repeat": 50}'
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from transformers import generation

from bench.sampling_cases import CASES


def processors(fields: dict[str, float]) -> generation.LogitsProcessorList:
    """In the order in which `generate` builds them."""
    made: list[Any] = []
    if fields.get("repetition_penalty", 1.0) != 1.0:
        made.append(generation.RepetitionPenaltyLogitsProcessor(fields["repetition_penalty"]))
    if fields["temperature"] not in (0.0, 1.0):
        made.append(generation.TemperatureLogitsWarper(fields["temperature"]))
    if "top_k" in fields:
        made.append(generation.TopKLogitsWarper(int(fields["top_k"])))
    if "top_p" in fields:
        made.append(generation.TopPLogitsWarper(fields["top_p"]))
    if "min_p" in fields:
        made.append(generation.MinPLogitsWarper(fields["min_p"]))
    if "typical_p" in fields:
        made.append(generation.TypicalLogitsWarper(fields["typical_p"]))
    return generation.LogitsProcessorList(made)


@torch.inference_mode()
def main(request: dict[str, Any]) -> dict[str, float]:
    torch.set_num_threads(request["threads"])
    torch.manual_seed(0)
    logits, seen = (
        torch.from_numpy(np.load(request["rows"])),
        torch.from_numpy(np.load(request["seen"]).astype(np.int64)),
    )
    found = {}
    for name, fields in CASES.items():
        chain, took = processors(dict(fields)), []
        for _ in range(request["repeat"]):
            begun = perf_counter()
            scores = chain(seen, logits)
            if fields["temperature"]:
                torch.multinomial(torch.softmax(scores, -1), 1)
            else:
                scores.argmax(-1)
            took.append(perf_counter() - begun)
        found[name] = median(took) * 1e3
    return found


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
