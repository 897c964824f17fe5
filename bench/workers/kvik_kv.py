"""Runs in Kvik's environment: what KV formats and eviction cost and save; one JSON object on stdout.

kvik_kv.py '{"mode": …, "model": …, "threads": 2, "seed": "0/3", "settings": {NAME: [KV, EVICT], …}, …}'
    bytes       "tokens": bytes held after so many tokens, and tokens kept
    quality     "weights", "reference", "text", "window", "tokens": each setting's divergence from the reference's cache
    decode      "depth", "new", "repeat": tokens per second behind so many tokens, the settings in turns
    stream      "text", "tokens", "positions", "sinks", "window", "new": a long text with constant memory
    recall      "task", "tokens", "items", "task_seed", "more": which items each setting answers, question inside and after
    prefill     "tokens", "repeat": seconds to the second token, the settings in turns
    capacity    "kv_bytes", "prompt", "new", "requests": sequences that ran at once in so many bytes
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from time import perf_counter
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np

import kvik
from bench.trace import token_ids
from kvik.params.cache import cache_params

Found = dict[str, Any]
POOL = 2 << 30


def build(request: Found, *, weights: str = "auto", cache: Any = None, **engine: Any) -> kvik.LLM:
    params = kvik.EngineParams(threads=request["threads"], **{"kv_bytes": POOL, **engine})
    return kvik.LLM(request["model"], weights=weights, cache=cache, engine=params)


def caches(request: Found) -> dict[str, Any]:
    """CacheParams of the settings, by name."""
    return {name: cached(kv, evict) for name, (kv, evict) in request["settings"].items()}


def cached(kv: str, evict: str = "none") -> Any:
    return cache_params(kv, evict, kvik.CacheParams())


def greedy(new: int) -> kvik.SamplingParams:
    return kvik.SamplingParams(max_tokens=new, temperature=0.0, ignore_eos=True)


# --- bytes and quality


def bytes_held(request: Found) -> Found:
    """The first token is of the prompt, the second comes of a row behind the event."""
    llm = build(request)
    prompt, found = token_ids(random.Random(request["seed"]), request["tokens"] - 1), {}
    for name, cache in caches(request).items():
        (answer,) = llm.generate([prompt], greedy(2), cache=cache)
        usage = answer.usage
        found[name] = {"bytes": usage.kv_bytes_now, "peak": usage.kv_bytes_peak, "kept": usage.kv_tokens_kept}
    return found


def quality(request: Found) -> Found:
    from kvik.evaluation.divergence import divergence

    text, found = Path(request["text"]).read_text(), {}
    reference = build(request, weights=request["weights"], cache=cached(request["reference"]))
    for name, cache in caches(request).items():
        model = build(request, weights=request["weights"], cache=cache)
        begun = perf_counter()
        result = divergence(model, reference, [text], window=request["window"], tokens=request["tokens"], flips=0)
        found[name] = {
            "perplexity": result.perplexity, "reference": result.reference_perplexity, "ratio": result.perplexity_ratio,
            "interval": result.ratio_interval, "same_top": result.same_top, "kl": result.kl_mean,
            "predictions": result.tokens, "seconds": perf_counter() - begun,
        }  # fmt: skip
    return found


# --- speed


def in_turns(request: Found, measure: Callable[[str, Any, int], float]) -> dict[str, list[float]]:
    """A figure of each setting in every round, in random order; the first round does not count."""
    draw, settings = random.Random(request["seed"]), caches(request)
    found: dict[str, list[float]] = {name: [] for name in settings}
    for number in range(request["repeat"] + 1):
        for name in draw.sample(list(settings), len(settings)):
            found[name].append(measure(name, settings[name], number))
    return {name: values[1:] for name, values in found.items()}


def decode(request: Found) -> Found:
    """Prompts are the same in all rounds, so that what the index keeps is computed once."""
    llm = build(request)
    prompt, held = token_ids(random.Random(request["seed"]), request["depth"]), {}

    def rate(name: str, cache: Any, number: int) -> float:
        (answer,) = llm.generate([prompt], greedy(request["new"]), cache=cache)
        held[name] = answer.usage.kv_bytes_now
        return (request["new"] - 1) / answer.stats.decode

    rates = in_turns(request, rate)
    return {"rates": rates, "held": held, "matrix_bytes": llm.info.matrix_bytes}


def prefill(request: Found) -> Found:
    """To the second token: scorers choose before its row."""
    llm = build(request, prefix_sharing=False)

    def seconds(name: str, cache: Any, number: int) -> float:
        prompt = token_ids(random.Random(f"{request['seed']}/{number}"), request["tokens"])
        begun = perf_counter()
        llm.generate([prompt], greedy(2), cache=cache)
        return perf_counter() - begun

    return {"seconds": in_turns(request, seconds)}


def capacity(request: Found) -> Found:
    """Requests that all come at once. fits: most that ran at once; held: bytes of one at its end, the mean."""
    found = {}
    for name, cache in caches(request).items():
        llm = build(request, kv_bytes=request["kv_bytes"], max_sequences=256, prefix_sharing=False)
        running: list[int] = []
        llm.engine.on_step = lambda step, running=running: running.append(step.running)
        draw = random.Random(request["seed"])
        prompts = [token_ids(draw, request["prompt"]) for _ in range(request["requests"])]
        begun = perf_counter()
        answers = llm.generate(prompts, greedy(request["new"]), cache=cache)
        found[name] = {
            "fits": max(running), "held": float(np.mean([answer.usage.kv_bytes_now for answer in answers])),
            "seconds": perf_counter() - begun, "preemptions": llm.engine.stats.preemptions,
        }  # fmt: skip
    return found


# --- a long text


def stream(request: Found) -> Found:
    """Losses at evenly spaced places: with the first and last tokens kept, and of these computed anew each time."""
    from kvik.evaluation.statistics import paired_bootstrap

    llm = build(request)
    sinks, window, tokens = request["sinks"], request["window"], request["tokens"]
    ids = llm.tokenizer.encode(Path(request["text"]).read_text(), add_special=False)[:tokens]
    if len(ids) < tokens:
        raise SystemExit(f"the text has {len(ids)} tokens, not {tokens}")
    cache = cached("f16", f"streamingllm:sinks={sinks},window={window}")
    places = np.linspace(sinks + window, tokens - 1, request["positions"]).astype(int)
    begun = perf_counter()
    (whole,) = llm.score([ids], first=1, cache=cache)
    scored = perf_counter() - begun
    again, anew = [], 0.0
    for place in places.tolist():
        part = [*ids[:sinks], *ids[place - window : place + 1]]
        begun = perf_counter()
        (one,) = llm.score([part], first=len(part) - 1, cache=cached("f16"))
        anew += perf_counter() - begun
        again.append(-float(one.logprobs[0]))
    held, step = {}, 0.0
    for length in sorted({min(tokens, length) for length in (2048, 8192, 32768, tokens)}):
        (answer,) = llm.generate([ids[: length - request["new"]]], greedy(request["new"]), cache=cache)
        held[length], step = answer.usage.kv_bytes_now, answer.stats.decode / (request["new"] - 1)
    gap = paired_bootstrap(again, losses := [-float(whole.logprobs[place - whole.first]) for place in places.tolist()])
    return {
        "perplexity": float(np.exp(np.mean(losses))), "recomputed": float(np.exp(np.mean(again))),
        "ratio": [float(np.exp(each)) for each in gap], "losses": losses, "losses_recomputed": again,
        "scored_s": scored / tokens, "recompute_s": anew / len(places), "step_s": step, "held": held,
    }  # fmt: skip


# --- recall


def recall(request: Found) -> Found:
    """All settings of an item at once: they share what was computed before anything goes."""
    from dataclasses import replace

    from kvik.evaluation.tasks import PLACES, answer_params, compared, given, recall_items

    llm, settings = build(request, max_sequences=32), caches(request)
    count, tokens, more = request["items"], request["tokens"], request["more"]
    items = recall_items(request["task"], llm.tokenizer, count, tokens, seed=request["task_seed"], **more)
    right: dict[str, list[bool]] = {f"{name}, {place}": [] for name in settings for place in PLACES} | {"full": []}
    for item in items:
        params = answer_params(item)
        (answer,) = llm.generate([item.prompt], params, cache=cached("f16"))
        right["full"].append(given(item, answer.choices[0].token_ids))
        asked = {
            f"{name}, {place}": replace(cache, policy=replace(cache.policy, at=item.at(place)))
            for name, cache in settings.items() for place in PLACES
        }  # fmt: skip
        requests = ((name, llm.request(item.prompt, params, cache=cache)) for name, cache in asked.items())
        for name, found in llm.complete_each(requests):
            if isinstance(found, Exception):
                raise found
            right[name].append(given(item, found.choices[0].token_ids))
    full = recalled_of(right["full"])
    found = {}
    for name, each in right.items():
        beside = compared(full, recalled_of(each))
        found[name] = {
            "share": recalled_of(each).share.value, "points": 100 * beside.difference.value,
            "low": 100 * beside.difference.low, "high": 100 * beside.difference.high, "p": beside.p,
        }  # fmt: skip
    return {"found": found, "right": right}


def recalled_of(right: list[bool]) -> Any:
    from kvik.evaluation.statistics import bootstrap_mean
    from kvik.evaluation.tasks import Recalled

    return Recalled(bootstrap_mean(right), tuple(right))


MODES: Mapping[str, Callable[[Found], Found]] = {
    "bytes": bytes_held, "quality": quality, "decode": decode, "stream": stream, "recall": recall, "prefill": prefill,
    "capacity": capacity,
}  # fmt: skip


def main() -> None:
    request = json.loads(sys.argv[1])
    print(json.dumps(MODES[request["mode"]](request)))


if __name__ == "__main__":
    main()
