"""`LLM` with many requests and several threads, on a small model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models.small_models import write_gguf

import kvik
from kvik.engine.receipt import cache_of, params_of, receipt_from_json, receipt_to_json
from kvik.engine.request import Request

PROMPTS = [f"text {i}" for i in range(9)]
PARAMS = [kvik.SamplingParams(max_tokens=20, seed=i, ignore_eos=True) for i in range(9)]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder: Path = tmp_path_factory.mktemp("crowds")
    return str(write_gguf(folder / "small.gguf"))


def make(path: str, **engine: Any) -> kvik.LLM:
    return kvik.LLM(path, engine=kvik.EngineParams(**{"threads": 1, "kv_bytes": 2**20} | engine))


def outputs(done: list[kvik.Completion]) -> list[Any]:
    return [c.choices for c in done]


@pytest.mark.parametrize("engine", [{}, {"max_sequences": 1, "max_waiting": 0}, {"max_sequences": 2, "max_waiting": 1}])
def test_threads_that_want_more_than_there_is_room_for_get_all_answers(path: str, engine: dict[str, int]) -> None:
    llm = make(path, **engine)
    want = [make(path).generate(p, q)[0].choices for p, q in zip(PROMPTS, PARAMS, strict=True)]
    scored = [s.logprobs.tolist() for s in llm.score(PROMPTS)]
    with ThreadPoolExecutor(4) as pool:
        generated = [pool.submit(llm.generate, PROMPTS, PARAMS) for _ in range(3)]
        scores = [pool.submit(llm.score, PROMPTS) for _ in range(2)]
        for future in generated:
            assert outputs(future.result(60)) == want
        for future in scores:
            assert [s.logprobs.tolist() for s in future.result(60)] == scored
    assert llm.engine.scheduler.pool.num_held == 0


def test_a_stream_that_nobody_reads_holds_up_nobody(path: str) -> None:
    llm = make(path, max_sequences=1, max_waiting=0)
    stream = llm.stream("abc", PARAMS[0])
    first = next(stream)
    assert len(llm.generate(PROMPTS, PARAMS)) == 9 and len(llm.score(PROMPTS)) == 9
    chunks = [first, *stream]
    assert tuple(t for c in chunks for t in c.token_ids) == llm.generate("abc", PARAMS[0])[0].choices[0].token_ids


def test_answers_come_as_they_finish_and_closing_cancels(path: str) -> None:
    llm = make(path, max_sequences=3)
    lengths = [30, 2, 9, 1]
    requests = [
        (i, llm.request("abc", kvik.SamplingParams(max_tokens=n, ignore_eos=True))) for i, n in enumerate(lengths)
    ]
    answers = llm.complete_each(requests)
    assert [next(answers)[0] for _ in range(3)] == [1, 3, 2]
    answers.close()  # type: ignore[attr-defined]
    assert llm.engine.scheduler.pool.num_held == 0 and llm.engine.stats.cancelled == 1


def test_requests_are_taken_as_they_may_run_and_may_be_late(path: str) -> None:
    llm = make(path, max_sequences=2)
    request = llm.request("abc", kvik.SamplingParams(max_tokens=3, ignore_eos=True))
    taken: list[int | None] = []

    def source() -> Iterator[tuple[int, Request] | None]:
        for key in (0, None, 1, None, None, None, 2, 3, 4):
            taken.append(key)
            yield None if key is None else (key, request)

    answers = llm.complete_each(source())
    assert next(answers)[0] == 0 and 1 in taken and 2 not in taken
    assert [key for key, _ in answers] == [1, 2, 3, 4]


def test_the_receipt_repeats_the_answer(path: str) -> None:
    llm = make(path)
    done = llm.generate("abc", kvik.SamplingParams(max_tokens=9, n=2, logprobs=1))[0]
    receipt = done.receipt
    assert receipt is not None and receipt.version == kvik.__version__
    assert receipt.prompt == done.prompt_tokens and receipt.model["path"] == path
    assert receipt.model.keys() == {"name", "path", "digest", "weights", "kv", "executor", "device", "isa"}
    assert receipt.cache == kvik.CacheParams().as_dict()
    assert receipt.params.keys() == asdict(kvik.SamplingParams()).keys() and receipt.params["seed"] is not None
    assert receipt.outputs == tuple(c.token_ids for c in done.choices)
    assert receipt.finish_reasons == tuple(c.finish_reason for c in done.choices)
    again = make(path).generate([list(receipt.prompt)], kvik.SamplingParams(**receipt.params))[0]
    assert again.choices == done.choices and again.receipt == receipt


CACHES = [
    kvik.CacheParams(k="int8", v="int4", group_size=16, rotate=True),
    kvik.CacheParams(policy="snapkv:budget=50%,window=4", layers="pyramid"),
    kvik.CacheParams(policy="streamingllm:sinks=2,window=20"),
]


def test_each_prompt_has_its_cache_and_the_receipt_says_so(path: str) -> None:
    llm, prompts, params = make(path), [f"{i} and some more text than that" for i in range(3)], PARAMS[:3]
    done = llm.generate(prompts, params, cache=CACHES)
    assert [c.choices for c in llm.generate(prompts, params)] != outputs(done)
    for prompt, wanted, cache, one in zip(prompts, params, CACHES, done, strict=True):
        own = kvik.LLM(path, cache=cache, engine=kvik.EngineParams(threads=1, kv_bytes=2**20))
        assert own.info.cache == cache and own.info.kv == cache.kv
        assert own.generate(prompt, wanted)[0].choices == one.choices
        chunks = list(llm.stream(prompt, wanted, cache=cache))
        assert tuple(t for c in chunks for t in c.token_ids) == one.choices[0].token_ids
        receipt = receipt_from_json(receipt_to_json(one.receipt), "r.json")  # type: ignore[arg-type]
        assert receipt == one.receipt and cache_of(receipt) == cache and receipt.model["kv"] == "f16"
        again = llm.generate([list(receipt.prompt)], params_of(receipt), cache=cache_of(receipt))[0]
        assert again.choices == one.choices
        text = [*one.prompt_tokens, *one.choices[0].token_ids]
        (scored,) = llm.score([text], first=len(one.prompt_tokens), cache=cache)
        raw = llm.generate(prompt, replace(wanted, logprobs=0), cache=cache)[0].choices[0].logprobs
        assert raw is not None and np.allclose(scored.logprobs, [t.logprob for t in raw], atol=1e-5)
        rows = [rows.logits.copy() for rows in llm.score_rows(text, first=len(one.prompt_tokens), cache=cache)]
        assert sum(map(len, rows)) == len(text) - len(one.prompt_tokens)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cache": {**CACHES[0].as_dict(), "k": "int5"}}, "cache: k must be one of"),
        ({"cache": {**CACHES[0].as_dict(), "more": 1}}, "cache has an unknown field 'more'"),
        ({"cache": None}, "cache is no object"),
    ],
)
def test_a_receipt_of_no_cache_is_none(path: str, change: dict[str, Any], message: str) -> None:
    receipt = make(path).generate("abc", PARAMS[0])[0].receipt
    assert receipt is not None
    text = json.dumps(json.loads(receipt_to_json(receipt)) | change)
    with pytest.raises(kvik.DataError, match=f"^r.json: is no receipt: {message}"):
        receipt_from_json(text, "r.json")


def test_what_is_wrong_with_a_cache_is_said_at_once(path: str) -> None:
    llm = make(path)
    for call, message in (
        (lambda: kvik.LLM(path, kv="f16", cache=CACHES[0]), "kv and cache both say how the KV cache is kept"),
        (lambda: kvik.LLM(path, kv="q8"), "kv must be one of"),
        (lambda: kvik.LLM(path, cache="int8"), "cache must be CacheParams, got 'int8'"),
        (lambda: llm.generate("a", cache="int8"), "cache must be CacheParams or a list of these"),
        (lambda: llm.generate(["a", "b"], cache=CACHES), "cache has 3 entries for 2 prompts"),
        (lambda: llm.score("ab", cache=CACHES[1]), "snapkv evicts at the prompt's length, and a text has none"),
        (lambda: llm.stream("ab", cache={}), "cache must be CacheParams, got {}"),
    ):
        with pytest.raises(kvik.ParameterError, match=message):
            call()
