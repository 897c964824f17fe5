"""`AsyncLLM` on a small model: the same answers as `LLM`, for any number of readers, fast, slow or gone."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from models.small_models import write_gguf

import kvik
from kvik.async_llm import MAX_BUFFERED, AsyncLLM, joined
from kvik.engine.request import Chunk, RequestStats, TokenLogprobs, Usage
from kvik.errors import TryAgainError

PARAMS = {"max_tokens": 40, "seed": 3, "ignore_eos": True}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("async") / "small.gguf")


@pytest.fixture
def model(path: Path) -> Iterator[AsyncLLM]:
    with make(path) as made:
        yield made
        made.llm.engine.scheduler.check_integrity()


def make(path: Path, **engine: Any) -> AsyncLLM:
    return AsyncLLM(str(path), engine=kvik.EngineParams(**{"threads": 1, "kv_bytes": 2**20} | engine))


def params(**changes: Any) -> kvik.SamplingParams:
    return kvik.SamplingParams(**PARAMS | changes)


async def read(chunks: Any) -> list[Chunk]:
    return [chunk async for chunk in chunks]


async def until(condition: Any) -> None:
    for _ in range(2000):
        if condition():
            return
        await asyncio.sleep(0.002)
    raise AssertionError("it did not happen")


def test_a_beam_search_among_samples(model: AsyncLLM) -> None:
    search = kvik.BeamParams(num_beams=3, num_return_sequences=2, max_tokens=20, trace=True)
    asked = [params(n=2), search, params(seed=4), search]

    async def run() -> list[list[Chunk]]:
        return await asyncio.gather(*(read(model.generate("and then", one)) for one in asked))

    heard = asyncio.run(run())
    whole = model.llm.generate(["and then"] * 4, asked)
    assert [c.finish_reason is not None for c in heard[1]] == [True, True]
    for chunks, done in zip(heard, whole, strict=True):
        for choice in done.choices:
            mine = [c for c in chunks if c.index == choice.index]
            assert "".join(c.text for c in mine) == choice.text
            assert tuple(t for c in mine for t in c.token_ids) == choice.token_ids
    assert heard[1][-1].usage is not None and [c._replace(usage=None, stats=None) for c in heard[1]] == [
        c._replace(usage=None, stats=None) for c in heard[3]
    ]
    assert whole[1].beams is not None and len(whole[1].beams) == max(len(c.token_ids) for c in whole[1].choices)
    assert whole[0].beams is None and whole[0].choices[0].score is None
    stream = model.llm.stream("and then", search)
    assert [c.text for c in stream] == [c.text for c in whole[1].choices] and stream.completion is not None


def test_a_beam_search_whose_reader_leaves(model: AsyncLLM) -> None:
    slowed(model)

    async def run() -> None:
        chunks = model.generate("and then", kvik.BeamParams(num_beams=4, max_tokens=200, ignore_eos=True))
        reading = asyncio.create_task(read(chunks))
        await until(lambda: held(model) > 0)
        reading.cancel()
        await chunks.aclose()
        await until(lambda: held(model) == 0 and not model.num_requests)

    asyncio.run(run())


def held(model: AsyncLLM) -> int:
    return model.llm.engine.scheduler.pool.num_held


def slowed(model: AsyncLLM, seconds: float = 0.005) -> list[int]:
    """Each step takes a while; how many there were."""
    step, count = model.llm.engine.step, [0]

    def slow() -> bool:
        count[0] += 1
        threading.Event().wait(seconds)
        return step()

    model.llm.engine.step = slow  # type: ignore[method-assign]
    return count


def test_chunks_are_those_of_the_synchronous_answer(model: AsyncLLM) -> None:
    wanted = [params(n=2, logprobs=1), params(temperature=0), params(stop=("Q", "ab")), params(max_tokens=1)]
    want = [model.llm.generate(f"n{i}", p)[0] for i, p in enumerate(wanted)]

    async def all_at_once() -> list[list[Chunk]]:
        return await asyncio.gather(*(read(model.generate(f"n{i}", p)) for i, p in enumerate(wanted)))

    for chunks, whole in zip(asyncio.run(all_at_once()), want, strict=True):
        for choice in whole.choices:
            mine = [c for c in chunks if c.index == choice.index]
            assert "".join(c.text for c in mine) == choice.text
            assert tuple(t for c in mine for t in c.token_ids) == choice.token_ids
            assert tuple(x for c in mine for x in c.logprobs or ()) == (choice.logprobs or ())
            assert [c.finish_reason for c in mine if c.finish_reason] == [choice.finish_reason]
        (usage,) = [c.usage for c in chunks if c.usage]
        assert usage.completion_tokens == whole.usage.completion_tokens and chunks[-1].stats is not None


def test_each_request_has_its_cache(model: AsyncLLM) -> None:
    """The window of the model's layers is 32: all but the packed format is refused by name."""
    packed = kvik.CacheParams(k="int8", v="int4", group_size=16)

    async def run() -> tuple[list[list[Chunk]], Any]:
        both = (read(model.generate("abc" * 20, params(), cache=cache)) for cache in (None, packed))
        return await asyncio.gather(*both), await model.score("abc" * 20, cache=packed)

    answers, scored = asyncio.run(run())
    for cache, chunks in zip((None, packed), answers, strict=True):
        done = model.llm.generate("abc" * 20, params(), cache=cache)[0]
        assert tuple(t for c in chunks for t in c.token_ids) == done.choices[0].token_ids
    assert scored.logprobs.tolist() == model.llm.score("abc" * 20, cache=packed)[0].logprobs.tolist()
    with pytest.raises(kvik.ParameterError, match="policy is tova; all layers of this model have a window"):
        model.generate("abc", cache=kvik.CacheParams(policy="tova"))


def test_complete_and_score_are_the_synchronous_ones(model: AsyncLLM) -> None:
    want, scored = model.llm.generate("abc", params())[0], model.llm.score("hello there", top=2)[0]

    async def both() -> Any:
        request = model.llm.request("abc", params())
        return await asyncio.gather(model.complete(request), model.score("hello there", top=2))

    completion, score = asyncio.run(both())
    assert completion.choices == want.choices and completion.receipt == want.receipt
    assert (score.logprobs == scored.logprobs).all() and score.top == scored.top


@pytest.mark.parametrize("read_first", [0, 2])
def test_aclose_cancels_and_frees(model: AsyncLLM, read_first: int) -> None:
    """Also where nothing was asked for yet."""
    count = slowed(model)

    async def leave() -> int:
        chunks = model.generate("abc", params(max_tokens=100))
        for _ in range(read_first):
            await anext(chunks)
        await until(lambda: count[0] > 3)
        await chunks.aclose()
        before = count[0]
        await until(lambda: model.num_requests == 0)
        with pytest.raises(StopAsyncIteration):
            await anext(chunks)
        return count[0] - before

    assert asyncio.run(leave()) <= 2 and held(model) == 0
    assert model.llm.engine.stats.cancelled == 1


def test_cancelling_the_task_cancels_the_request(model: AsyncLLM) -> None:
    slowed(model)

    async def leave() -> None:
        tasks = [asyncio.create_task(read(model.generate("abc", params(max_tokens=100)))),
                 asyncio.create_task(model.complete(model.llm.request("abc", params(max_tokens=100))))]  # fmt: skip
        await until(lambda: model.llm.engine.stats.generated > 6)
        for task in tasks:
            task.cancel()
        assert all(isinstance(x, asyncio.CancelledError) for x in await asyncio.gather(*tasks, return_exceptions=True))
        await until(lambda: model.num_requests == 0)

    asyncio.run(leave())
    assert held(model) == 0 and model.llm.engine.stats.cancelled == 2


def test_leaving_a_score_cancels_it(path: Path) -> None:
    async def leave(model: AsyncLLM) -> None:
        task = asyncio.create_task(model.score([5] * model.llm.info.context_length))
        await until(lambda: model.llm.engine.stats.steps > 0)
        task.cancel()
        assert isinstance((await asyncio.gather(task, return_exceptions=True))[0], asyncio.CancelledError)
        await until(lambda: model.num_requests == 0)

    with make(path, max_batch_tokens=4) as model:
        slowed(model, 0.02)
        asyncio.run(leave(model))
        assert held(model) == 0 and model.llm.engine.stats.cancelled == 1


def test_a_broken_engine_tells_every_reader(model: AsyncLLM) -> None:
    def broken() -> bool:
        raise KeyboardInterrupt  # what no `except Exception` holds up

    model.llm.engine.step = broken  # type: ignore[method-assign]

    async def ask() -> list[Any]:
        return await asyncio.gather(*(one() for _ in range(3)), return_exceptions=True)

    async def one() -> list[Chunk]:
        return await read(model.generate("abc", params()))

    first, later = asyncio.run(ask()), asyncio.run(ask())
    assert all("the engine's thread ended: KeyboardInterrupt()" in str(error) for error in (*first, *later))


def test_a_slow_reader_holds_up_nobody_and_misses_nothing(model: AsyncLLM) -> None:
    slow, fast = params(max_tokens=100, n=3, logprobs=0), params(max_tokens=100)
    want = model.llm.generate("abc", slow)[0]

    async def both() -> tuple[list[Chunk], int]:
        chunks = model.generate("abc", slow)
        first = [await anext(chunks)]
        await read(model.generate("other", fast))  # ends though nobody reads the first
        await until(lambda: model.num_requests == 0)
        waiting = len(chunks._answer._ticket.stream.ready)  # type: ignore[attr-defined]
        return first + await read(chunks), waiting

    chunks, waiting = asyncio.run(both())
    assert waiting <= MAX_BUFFERED + 3 < 300 - MAX_BUFFERED
    for choice in want.choices:
        mine = [c for c in chunks if c.index == choice.index]
        assert tuple(t for c in mine for t in c.token_ids) == choice.token_ids
        assert "".join(c.text for c in mine) == choice.text and mine[-1].finish_reason == choice.finish_reason
        assert tuple(x for c in mine for x in c.logprobs or ()) == choice.logprobs
    assert sum(c.usage is not None for c in chunks) == sum(c.stats is not None for c in chunks) == 1


def test_joined_chunks_lose_nothing() -> None:
    usage, stats = Usage(1, 2, 0, 3, 4, 5, 4), RequestStats(0.0, 0.0, 0.0, None, (), 0, 0)
    noted = tuple(TokenLogprobs(t, -1.0, ()) for t in (7, 8))
    first = Chunk(1, "a", (7,), noted[:1])
    assert joined(first, Chunk(1, "b", (8,), noted[1:], "stop", usage, stats)) == Chunk(
        1, "ab", (7, 8), noted, "stop", usage, stats
    )
    assert joined(first, Chunk(1, "", (), None, "cancelled", usage, stats)).logprobs == noted[:1]
    assert joined(Chunk(1, "a", (7,)), Chunk(1, "b", (8,))) == Chunk(1, "ab", (7, 8))


def test_many_event_loops(model: AsyncLLM) -> None:
    want = [model.llm.generate(f"n{i}", params(seed=i))[0].choices[0].token_ids for i in range(12)]
    got: dict[int, tuple[int, ...]] = {}

    def one(i: int) -> None:
        chunks = asyncio.run(gather(i))
        got[i] = tuple(t for c in chunks for t in c.token_ids)

    async def gather(i: int) -> list[Chunk]:
        return await read(model.generate(f"n{i}", params(seed=i)))

    threads = [threading.Thread(target=one, args=(i,)) for i in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [got[i] for i in range(12)] == want and held(model) == 0


def test_a_closed_loop_is_cancelled(model: AsyncLLM) -> None:
    slowed(model)
    loop = asyncio.new_event_loop()

    async def begin() -> Any:
        return model.generate("abc", params(max_tokens=100))

    chunks = loop.run_until_complete(begin())
    loop.close()

    async def wait() -> None:
        await until(lambda: model.num_requests == 0)

    asyncio.run(wait())
    assert held(model) == 0 and model.llm.engine.stats.cancelled == 1
    del chunks


def test_too_many_are_refused_and_bad_ones_at_the_call(path: Path) -> None:
    with make(path, max_sequences=1, max_waiting=2) as model:
        slowed(model)

        async def crowd() -> None:
            running = [model.generate("abc", params()) for _ in range(3)]
            with pytest.raises(TryAgainError, match="max_waiting is 2"):
                model.generate("abc", params())
            with pytest.raises(kvik.ParameterError, match="the prompt is empty"):
                model.generate("", params())
            for chunks in running:
                assert (await read(chunks))[-1].finish_reason == "length"
            assert await read(model.generate("abc", params()))

        asyncio.run(crowd())


def test_drain_lets_what_runs_end_and_takes_no_more(model: AsyncLLM) -> None:
    slowed(model)

    async def drain() -> None:
        task = asyncio.create_task(read(model.generate("abc", params())))
        await until(lambda: model.num_requests == 1)
        assert not await model.drain(0.01)
        with pytest.raises(TryAgainError, match="shutting down"):
            model.generate("abc", params())
        assert await model.drain(20)
        assert (await task)[-1].finish_reason == "length"

    asyncio.run(drain())


def test_closing_cancels_what_runs(model: AsyncLLM) -> None:
    slowed(model)

    async def close() -> None:
        task = asyncio.create_task(read(model.generate("abc", params(max_tokens=100))))
        scored = asyncio.create_task(model.score("a" * 100))
        await until(lambda: model.llm.engine.stats.generated > 2)
        again = asyncio.create_task(model.score("b" * 120))
        await asyncio.sleep(0)
        model.close()
        assert (await task)[-1].finish_reason == "cancelled"
        results = await asyncio.gather(scored, again, return_exceptions=True)
        assert all(isinstance(r, TryAgainError) or len(r.logprobs) >= 99 for r in results)
        with pytest.raises(TryAgainError):
            model.generate("abc", params())

    asyncio.run(close())
    assert held(model) == 0
    model.close()


def test_errors_reach_the_reader_and_later_requests_work(model: AsyncLLM) -> None:
    want = model.llm.generate("abc", params())[0].choices[0].token_ids
    run, left = model.llm.engine.executor.run, [3]

    def failing(work: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            raise RuntimeError("the executor is ill")
        return run(work)

    model.llm.engine.executor.run = failing  # type: ignore[method-assign]

    async def fail_then_work() -> list[Chunk]:
        chunks = model.generate("abc", params())
        with pytest.raises(RuntimeError, match="the executor is ill"):
            await read(chunks)
        left[0] = 1
        with pytest.raises(RuntimeError, match="the executor is ill"):
            await model.score("abc")
        return await read(model.generate("abc", params()))

    assert tuple(t for c in asyncio.run(fail_then_work()) for t in c.token_ids) == want


def test_a_defect_of_the_loop_leaves_nobody_waiting(model: AsyncLLM) -> None:
    def broken(stats: Any) -> None:
        model.llm.engine.on_step = None
        raise ValueError("a listener fell over")

    model.llm.engine.on_step = broken

    async def fail() -> None:
        with pytest.raises(ValueError, match="fell over"):
            await read(model.generate("abc", params()))
        assert await read(model.generate("abc", params()))

    asyncio.run(fail())
    assert held(model) == 0
