"""Runs in Kvik's environment: milliseconds of sampling a step of 16 sequences; one JSON object on stdout.

kvik_sampling.py '{"mode": "rows", "model": …, "rows": OUT.npy, "seen": OUT.npy}'
    real logits [16, V] f32 of places in a text, and of each the tokens before it [16, 256] i32
kvik_sampling.py '{"mode": "sample", "rows": …, "seen": …, "threads": 2, "repeat": 200}'
    median milliseconds by case
kvik_sampling.py '{"mode": "step", "model": …, "threads": 2, "new": 64}'
    median milliseconds of a decode step of 16 sequences, greedy
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

import kvik
from bench.sampling_cases import CASES, SEEN, SEQUENCES
from kvik import _native
from kvik.decoding import DecodingState, Sampler, sample_rows

TEXT = (
    "The lighthouse keeper wrote in his book every evening: the wind, the sea, and which ships had passed. In the morning "
    "he climbed the stairs, cleaned the lamp and counted the birds that had struck the glass during the night. "
)


def rows(request: dict[str, Any]) -> dict[str, Any]:
    llm = kvik.LLM(request["model"])
    ids = (llm.tokenizer.encode(TEXT) * SEEN)[: SEEN + 5 * SEQUENCES]
    logits = llm.score([ids], reduce=False)[0].logits
    assert logits is not None
    places = [SEEN + 5 * row for row in range(SEQUENCES)]
    np.save(request["rows"], logits[places])
    draw = np.random.default_rng(0)  # distinct, as a long text's tokens are
    seen = [draw.permutation(logits.shape[1])[:SEEN].astype(np.int32) for _ in places]
    for row, place in enumerate(places):
        own = sorted(set(ids[:place]))
        seen[row][: len(own)] = own
        assert len(set(seen[row].tolist())) > SEEN * 0.9
    np.save(request["seen"], np.stack(seen))
    return {"rows": len(places)}


def sample(request: dict[str, Any]) -> dict[str, Any]:
    logits, seen = np.load(request["rows"]), np.load(request["seen"])
    pool = _native.Pool(request["threads"])
    vocabulary = logits.shape[1]
    found = {}
    for name, fields in CASES.items():
        params = kvik.SamplingParams(**fields)  # type: ignore[arg-type]
        samplers = [Sampler(vocabulary, params, seed) for seed in range(SEQUENCES)]
        states = [DecodingState(params, prompt.tolist(), vocabulary) for prompt in seen]
        took = []
        for position in range(request["repeat"]):
            begun = perf_counter()
            requests = [sampler.request(position, state) for sampler, state in zip(samplers, states, strict=True)]
            sample_rows(logits, requests, pool=pool, in_place=True)
            took.append(perf_counter() - begun)
        found[name] = median(took) * 1e3
    return found


def step(request: dict[str, Any]) -> dict[str, Any]:
    llm = kvik.LLM(request["model"], engine=kvik.EngineParams(threads=request["threads"]))
    prompts = [f"{row}. {TEXT}" for row in range(SEQUENCES)]
    took: list[float] = []
    llm.engine.on_step = lambda stats: took.append(stats.matrices + stats.attention + stats.rest + stats.python)
    llm.generate(prompts, kvik.SamplingParams(temperature=0.0, max_tokens=request["new"], ignore_eos=True))
    return {"step": median(took[8:]) * 1e3}


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    print(json.dumps({"rows": rows, "sample": sample, "step": step}[asked["mode"]](asked)))
