"""`kv` and `evict` over HTTP: the same tokens as in the library, and what usage and /metrics say of them."""

from __future__ import annotations

import pytest
from server.conftest import NAMED, events

from kvik import CacheParams, SamplingParams, SnapKV

PATH = "/v1/completions"
PROMPT = "The rivers of Europe are long and old, and many a town lies on one of them. " * 5
GREEDY = {**NAMED, "prompt": PROMPT, "max_tokens": 12, "temperature": 0, "ignore_eos": True}
CACHES = [
    ({"kv": "int8"}, CacheParams(k="int8", v="int8")),
    ({"kv": {"k": "int8", "v": "int4", "group_size": 32, "rotate": True}},
     CacheParams(k="int8", v="int4", group_size=32, rotate=True)),
    ({"evict": "snapkv:budget=40%,window=16"}, CacheParams(policy=SnapKV(budget=0.4, window=16))),
    ({"kv": "int4", "evict": {"policy": "snapkv", "budget": "40%", "window": 16, "heads": "ada"}},
     CacheParams(k="int4", v="int4", policy=SnapKV(budget=0.4, window=16), heads="ada")),
    ({"evict": "streamingllm:sinks=4,window=32"}, CacheParams(policy="streamingllm:sinks=4,window=32")),
]  # fmt: skip


def wanted(llm, cache, **more):
    params = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True, **more)
    return llm.llm.generate([PROMPT], params, cache=cache)[0]


@pytest.mark.parametrize(("fields", "cache"), CACHES)
def test_as_in_the_library(client, llm, fields, cache) -> None:
    want = wanted(llm, cache)
    body = {**GREEDY, **fields, "receipt": True}
    last = {"stream": True, "stream_options": {"include_usage": True}}
    whole, streamed, _ = client.together((PATH, body), (PATH, {**body, **last}), (PATH, GREEDY))
    found = whole.json()
    assert found["choices"][0]["text"] == want.text
    assert found["receipt"]["cache"] == cache.as_dict() == want.receipt.cache
    usage = found["usage"]
    assert (usage["kv_bytes_now"], usage["kv_tokens_kept"]) == (want.usage.kv_bytes_now, want.usage.kv_tokens_kept)
    assert usage["kv_bytes_peak"] >= usage["kv_bytes_now"] > 0
    pieces = events(streamed.text)
    assert "".join(c["text"] for piece in pieces for c in piece["choices"]) == want.text
    assert pieces[-1]["usage"]["kv_tokens_kept"] == usage["kv_tokens_kept"]


def test_a_chat_has_them(client) -> None:
    plain = client.chat("Name a river. " * 20, max_tokens=4, temperature=0)
    small = client.chat("Name a river. " * 20, max_tokens=4, temperature=0, kv="int8", evict="h2o:budget=25%")
    assert small["usage"]["kv_bytes_now"] < 0.5 * plain["usage"]["kv_bytes_now"]
    assert small["usage"]["kv_tokens_kept"] < 0.4 * plain["usage"]["kv_tokens_kept"]


def test_several_prompts_are_counted_together(client) -> None:
    one, two = (client.complete(prompts, max_tokens=4, temperature=0) for prompts in (PROMPT, [PROMPT, PROMPT + "x"]))
    assert two["usage"]["kv_tokens_kept"] == pytest.approx(2 * one["usage"]["kv_tokens_kept"], abs=2)


def test_echoed_prompts_are_scored_with_the_cache(client, llm) -> None:
    cache, ids = CacheParams(k="int4", v="int4"), tuple(llm.llm.tokenizer.encode(PROMPT * 2))
    asked = {"max_tokens": 0, "echo": True, "logprobs": 0}
    found = client.complete(list(ids), kv="int4", **asked)
    (want,) = llm.llm.score([ids], cache=cache)
    got = found["choices"][0]["logprobs"]["token_logprobs"]
    assert got[1:] == pytest.approx(want.logprobs.tolist(), abs=1e-9)
    full = client.complete(list(ids), **asked)["choices"][0]["logprobs"]["token_logprobs"]
    assert full != got and "kv_bytes_now" not in found["usage"]
    # an eviction behind the prompt changes none of its scores; one that only scores has no such place
    kept = client.complete(list(ids), evict="snapkv:budget=40%,window=16", **{**asked, "max_tokens": 2})
    assert kept["choices"][0]["logprobs"]["token_logprobs"][: len(ids)] == full
    error = client.refused(PATH, {**NAMED, "prompt": PROMPT, "evict": "snapkv:budget=40%,window=16", **asked})
    assert error["param"] == "evict" and "a text has none: give at or every" in error["message"]


def test_metrics_count_evictions(client) -> None:
    def metric(name: str) -> float:
        text = client.get("/metrics").text
        return float(
            next(line for line in text.splitlines() if line.startswith(f"kvik:{name}_total")).rpartition(" ")[2]
        )

    before = metric("kv_evictions"), metric("kv_evicted_tokens")
    usage = client.complete(PROMPT, max_tokens=2, evict="snapkv:budget=40,window=16")["usage"]
    assert metric("kv_evictions") == before[0] + 1
    assert metric("kv_evicted_tokens") == before[1] + usage["prompt_tokens"] - 40
    assert metric("num_parked") >= 0 and metric("num_restored") >= 0
