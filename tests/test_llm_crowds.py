"""`LLM` with many requests and several threads, on a small model."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from models.small_models import write_gguf

import kvik
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
    assert receipt.params.keys() == asdict(kvik.SamplingParams()).keys() and receipt.params["seed"] is not None
    assert receipt.outputs == tuple(c.token_ids for c in done.choices)
    assert receipt.finish_reasons == tuple(c.finish_reason for c in done.choices)
    again = make(path).generate([list(receipt.prompt)], kvik.SamplingParams(**receipt.params))[0]
    assert again.choices == done.choices and again.receipt == receipt
