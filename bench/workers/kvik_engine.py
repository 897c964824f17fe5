"""Runs in Kvik's environment: what only Kvik's own engine can tell of many requests; one JSON object on stdout.

kvik_engine.py '{"mode": …, "model": …, "threads": 2, "seed": "0/3", "repeat": 3, …}'
    api       "count", "prompt", "new": seconds of LLM.generate of that many equal requests at once
    waste     "count": slots allocated but not used, over a trace of mixed lengths that all arrive at once
    samples   "samples", "prompt", "new": bytes that samples of one prompt share
    beams     "prompts", "new", "beams": seconds of a beam search for each prompt; bytes that its beams share
    grammar   "counts", "new": tokens per second of JSON by a schema and of free text, by sequences at once
    prefix    "prompt", "tail": time to first token of a prompt whose first tokens are cached, and of a new one
    index     "count", "prompt", "new": seconds with and without the prefix index, no two prompts alike

What is Kvik's own stands in the functions `build`, `params` and `counted`.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import kvik
from bench.trace import Work, equal_requests, mean_length, poisson_trace, preallocation_waste, token_ids

BLOCK_TOKENS = 16
CACHE_BYTES = 1 << 30
MOST_SEQUENCES = 64

Found = dict[str, Any]


def build(request: Found, *, prefix_sharing: bool = True) -> kvik.LLM:
    engine = kvik.EngineParams(
        threads=request["threads"], kv_bytes=CACHE_BYTES, max_batch_tokens=512, max_sequences=MOST_SEQUENCES,
        prefix_sharing=prefix_sharing,
    )  # fmt: skip
    return kvik.LLM(request["model"], engine=engine)


def params(new: int, n: int = 1) -> kvik.SamplingParams:
    """Greedy and of fixed length; samples of one prompt are drawn, since greedy ones would be one answer n times."""
    drawn = {"temperature": 1.0, "seed": 0} if n > 1 else {"temperature": 0.0}
    return kvik.SamplingParams(max_tokens=new, ignore_eos=True, n=n, **drawn)


def counted(llm: kvik.LLM) -> Found:
    """The engine's totals since the last reset."""
    names = (
        "steps", "tokens", "blocks_used_sum", "slots_unused_sum", "blocks_peak", "blocks_unshared_peak",
        "prefix_hit_tokens", "preemptions",
    )  # fmt: skip
    return {name: getattr(llm.engine.stats, name) for name in names}


def generate(llm: kvik.LLM, works: list[Work]) -> float:
    """Seconds of all requests together; every answer must be whole."""
    begun = perf_counter()
    answers = llm.generate([work.prompt for work in works], [params(work.new_tokens) for work in works])
    seconds = perf_counter() - begun
    for work, answer in zip(works, answers, strict=True):
        if len(answer.choices[0].token_ids) != work.new_tokens:
            raise SystemExit(f"an answer has {len(answer.choices[0].token_ids)} tokens, not {work.new_tokens}")
    return seconds


def api(request: Found) -> Found:
    llm = build(request)

    def once(number: int) -> float:
        return generate(
            llm, equal_requests(f"{request['seed']}/{number}", request["count"], request["prompt"], request["new"])
        )

    once(0)
    return {"seconds": [once(number) for number in range(1, request["repeat"] + 1)]}


def waste(request: Found) -> Found:
    llm, works = build(request), poisson_trace(request["seed"], request["count"])
    llm.engine.stats.reset()
    generate(llm, works)
    found = counted(llm)
    longest = max(len(work.prompt) + work.new_tokens for work in works)
    return {
        **found,
        "waste": found["slots_unused_sum"] / (BLOCK_TOKENS * found["blocks_used_sum"]),
        "mean_tokens": mean_length(works),
        "preallocated_longest": preallocation_waste(works, longest),
        "preallocated_context": preallocation_waste(works, llm.info.context_length),
    }


def samples(request: Found) -> Found:
    llm = build(request)
    llm.engine.stats.reset()
    prompt = token_ids(random.Random(request["seed"]), request["prompt"])
    (answer,) = llm.generate([prompt], params(request["new"], request["samples"]))
    if [len(choice.token_ids) for choice in answer.choices] != [request["new"]] * request["samples"]:
        raise SystemExit("not every sample is whole")
    found = counted(llm)
    return {**found, "saved": 1 - found["blocks_peak"] / found["blocks_unshared_peak"]}


def beams(request: Found) -> Found:
    """One search after another; the first one warms up."""
    llm = build(request)
    search = kvik.BeamParams(num_beams=request["beams"], max_tokens=request["new"], ignore_eos=True)
    seconds, usages, shares = [], [], []
    for prompt in request["prompts"]:
        llm.engine.stats.reset()
        begun = perf_counter()
        (answer,) = llm.generate([prompt], search)
        seconds.append(perf_counter() - begun)
        if len(answer.choices[0].token_ids) != request["new"]:
            raise SystemExit(f"an answer has {len(answer.choices[0].token_ids)} tokens, not {request['new']}")
        usages.append(answer.usage)
        shares.append(llm.engine.stats.python / seconds[-1])
    return {
        "seconds": seconds[1:], "python": shares[1:],
        "kv_bytes": [usage.kv_bytes_peak for usage in usages[1:]],
        "kv_bytes_unshared": [usage.kv_bytes_unshared for usage in usages[1:]],
    }  # fmt: skip


PEOPLE = {
    "type": "array", "minItems": 50, "items": {
        "type": "object", "additionalProperties": False, "required": ["name", "age", "city", "tags"], "properties": {
            "name": {"type": "string", "maxLength": 40}, "age": {"type": "integer", "minimum": 0, "maximum": 120},
            "city": {"type": "string", "maxLength": 60},
            "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "maxItems": 3},
        },
    },
}  # fmt: skip
"""Fifty people: more than any answer here has room for, so that both kinds have as many tokens."""


def grammar(request: Found) -> Found:
    """Both kinds in random order, from the last first token to the end; the first round does not count."""
    llm, draw = build(request), random.Random(request["seed"])
    prompt = llm.chat_ids([{"role": "user", "content": "Describe fifty people as JSON."}])
    kinds = {"json": {"grammar": kvik.Grammar.json_schema(PEOPLE)}, "free": {"ignore_eos": True}}

    def rate(kind: str, count: int) -> float:
        wanted = [
            kvik.SamplingParams(temperature=0.7, top_k=50, top_p=0.9, seed=i, max_tokens=request["new"], **kinds[kind])
            for i in range(count)
        ]
        answers = llm.generate([prompt] * count, wanted)
        for answer in answers:
            if len(answer.choices[0].token_ids) != request["new"]:
                raise SystemExit(f"an answer has {len(answer.choices[0].token_ids)} tokens, not {request['new']}")
        return count * (request["new"] - 1) / max(a.stats.decode for a in answers if a.stats)

    found: Found = {}
    for count in request["counts"]:
        rates: dict[str, list[float]] = {kind: [] for kind in kinds}
        for _ in range(request["repeat"] + 1):
            for kind in draw.sample(list(kinds), len(kinds)):
                rates[kind].append(rate(kind, count))
        found |= {f"{kind}_{count}": values[1:] for kind, values in rates.items()}
    return found


def prefix(request: Found) -> Found:
    llm, draw = build(request), random.Random(request["seed"])

    def first_token(ids: list[int]) -> float:
        begun = perf_counter()
        generate(llm, [Work(ids, 1)])
        return perf_counter() - begun

    cold, warm, hits = [], [], []
    for _ in range(request["repeat"] + 1):
        shared = token_ids(draw, request["prompt"])
        cold.append(first_token(shared + token_ids(draw, request["tail"])))
        llm.engine.stats.reset()
        warm.append(first_token(shared + token_ids(draw, request["tail"])))
        hits.append(llm.engine.stats.prefix_hit_tokens)
    return {"cold_s": cold[1:], "warm_s": warm[1:], "hit_tokens": hits[1:]}


def index(request: Found) -> Found:
    """Both engines compute the same prompts in random order; the first round does not count."""
    draw = random.Random(request["seed"])
    llms = {"on": build(request), "off": build(request, prefix_sharing=False)}
    seconds: dict[str, list[float]] = {name: [] for name in llms}
    for number in range(request["repeat"] + 1):
        works = equal_requests(f"{request['seed']}/{number}", request["count"], request["prompt"], request["new"])
        for name in draw.sample(list(llms), len(llms)):
            seconds[name].append(generate(llms[name], works))
    if hits := llms["on"].engine.stats.prefix_hit_tokens:
        raise SystemExit(f"{hits} tokens were found in the index; the prompts should all differ")
    return {name: values[1:] for name, values in seconds.items()}


MODES: dict[str, Callable[[Found], Found]] = {
    "api": api, "waste": waste, "samples": samples, "beams": beams, "grammar": grammar, "prefix": prefix, "index": index,
}  # fmt: skip


def main() -> None:
    request = json.loads(sys.argv[1])
    print(json.dumps(MODES[request["mode"]](request)))


if __name__ == "__main__":
    main()
