"""The load generator: streamed /v1/completions on loopback, in one asyncio loop, with the times of every token.

All requests fix their number of tokens and decode greedily, so that every server does the same work. One request that
fails fails the whole measurement.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, NamedTuple

from bench import BenchError
from bench.trace import Work

HOST = "127.0.0.1"
MOST_REQUESTS = 2000
MOST_AT_ONCE = 256


@dataclass
class Answer:
    """When a request was due, and when each chunk with text came; seconds on one clock."""

    work: Work
    due: float
    begun: float
    chunks: list[float] = field(default_factory=list)
    ended: float = 0.0

    @property
    def first_token(self) -> float:
        """Seconds from when the request was due, so that a late generator flatters nobody."""
        return self.chunks[0] - self.due

    @property
    def gaps(self) -> list[float]:
        return [after - before for before, after in zip(self.chunks, self.chunks[1:], strict=False)]


class Load(NamedTuple):
    """Answers in the order of the trace; begun and ended: of the whole; drained: when the last request was taken."""

    answers: list[Answer]
    begun: float
    ended: float
    drained: float


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` (0 to 1) of all values do not exceed (nearest rank)."""
    if not values or not 0 <= share <= 1:
        raise BenchError(f"no percentile {share} of {len(values)} values")
    ordered = sorted(values)
    return ordered[max(0, -int(-share * len(ordered) // 1) - 1)]


# --- one request


async def complete(port: int, model: str, work: Work, due: float, timeout: float) -> Answer:
    """Stream one completion to its end. BenchError for any other end than all its tokens."""
    answer = Answer(work, due, perf_counter())
    try:
        async with asyncio.timeout(timeout):
            await _stream(port, model, answer)
    except (OSError, EOFError, ValueError, TimeoutError) as error:
        raise BenchError(f"a request of {len(work.prompt)} tokens failed: {error!r}") from error
    return answer


async def _stream(port: int, model: str, answer: Answer) -> None:
    body = json.dumps({
        "model": model, "prompt": answer.work.prompt, "max_tokens": answer.work.new_tokens, "temperature": 0,
        "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True},
    }).encode()  # fmt: skip
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {HOST}:{port}\r\nContent-Type: application/json\r\n"
    reader, writer = await asyncio.open_connection(HOST, port, limit=1 << 22)
    try:
        writer.write(f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body)
        await writer.drain()
        status, chunked = await _head(reader)
        if status != 200:
            said = b" ".join([line async for line in _lines(reader, chunked)]).decode(errors="replace").strip()
            raise BenchError(f"the server answered {status}: {said[:300]}")
        await _events(_lines(reader, chunked), answer)
    finally:
        writer.close()
    answer.ended = perf_counter()


async def _head(reader: asyncio.StreamReader) -> tuple[int, bool]:
    """The status, and whether the body comes in chunks of HTTP/1.1."""
    lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
    return int(lines[0].split(" ", 2)[1]), headers.get("transfer-encoding", "").lower() == "chunked"


async def _lines(reader: asyncio.StreamReader, chunked: bool) -> AsyncIterator[bytes]:
    """Lines of the body. Without chunks the body ends with the connection."""
    rest = b""
    while True:
        if chunked:
            size = int((await reader.readuntil(b"\r\n")).split(b";")[0], 16)
            part = (await reader.readexactly(size + 2))[:-2]
        else:
            part = await reader.read(1 << 16)
        if not part:
            if rest:
                yield rest
            return
        *whole, rest = (rest + part).split(b"\n")
        for line in whole:
            yield line.rstrip(b"\r")


async def _events(lines: AsyncIterator[bytes], answer: Answer) -> None:
    """Take the times of the chunks that bring tokens; check that the answer is whole."""
    reason, count, done = None, None, False
    async for line in lines:
        if not line.startswith(b"data:"):
            continue
        data = line[5:].strip()
        if data == b"[DONE]":
            done = True
            break
        event: dict[str, Any] = json.loads(data)
        if "error" in event:
            raise BenchError(f"the server reported: {event['error']}")
        for choice in event.get("choices", []):
            ending = choice.get("finish_reason")
            reason = ending or reason
            if choice.get("text") or ending is None:  # some servers end with a chunk that brings no token
                answer.chunks.append(perf_counter())
        count = (event.get("usage") or {}).get("completion_tokens", count)
    wanted = answer.work.new_tokens
    if not done or reason != "length" or count not in (None, wanted) or not answer.chunks:
        raise BenchError(f"an answer of {count} tokens ended as {reason!r}, wanted {wanted} and 'length'")


# --- many requests


async def _all(tasks: Iterable[Awaitable[Any]]) -> list[Any]:
    """Every result, or the first failure: then the others are cancelled."""
    running = [asyncio.ensure_future(task) for task in tasks]
    try:
        return list(await asyncio.gather(*running))
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


async def _open_loop(port: int, model: str, works: Sequence[Work], rate: float, timeout: float) -> Load:
    begun = perf_counter()

    async def one(work: Work) -> Answer:
        due = begun + work.arrival / rate
        await asyncio.sleep(due - perf_counter())
        return await complete(port, model, work, due, timeout)

    answers = await _all(one(work) for work in works)
    return Load(answers, begun, perf_counter(), begun + works[-1].arrival / rate)


async def _closed_loop(port: int, model: str, works: Sequence[Work], at_once: int, timeout: float) -> Load:
    begun = drained = perf_counter()
    waiting, answers = iter(enumerate(works)), {}

    async def one() -> None:
        nonlocal drained
        for number, work in waiting:
            drained = perf_counter()
            answers[number] = await complete(port, model, work, drained, timeout)

    await _all(one() for _ in range(at_once))
    return Load([answers[number] for number in range(len(works))], begun, perf_counter(), drained)


def _run(works: Sequence[Work], timeout: float, load: Callable[[], Awaitable[Load]]) -> Load:
    if not 1 <= len(works) <= MOST_REQUESTS:
        raise BenchError(f"a trace holds 1 to {MOST_REQUESTS} requests, not {len(works)}")

    async def bounded() -> Load:
        async with asyncio.timeout(timeout):
            return await load()

    try:
        return asyncio.run(bounded())
    except TimeoutError as error:
        raise BenchError(f"{len(works)} requests did not end within {timeout:g} s") from error


def arrive(port: int, model: str, works: Sequence[Work], rate: float, timeout: float = 600) -> Load:
    """Send each request when it is due, whatever became of the others. rate: requests per second."""
    if not rate > 0:
        raise BenchError(f"the rate must be above 0, got {rate}")
    return _run(works, timeout, lambda: _open_loop(port, model, works, rate, timeout))


def saturate(port: int, model: str, works: Sequence[Work], at_once: int, timeout: float = 600) -> Load:
    """Keep `at_once` requests under way until the trace is used up."""
    if not 1 <= at_once <= MOST_AT_ONCE:
        raise BenchError(f"1 to {MOST_AT_ONCE} requests at once, not {at_once}")
    return _run(works, timeout, lambda: _closed_loop(port, model, works, at_once, timeout))


# --- figures


def latencies(load: Load) -> dict[str, float]:
    """Seconds: time to first token and between chunks; how late the generator was; chunks per token (1: none merged)."""
    firsts = [answer.first_token for answer in load.answers]
    gaps = [gap for answer in load.answers for gap in answer.gaps]
    chunks = sum(len(answer.chunks) for answer in load.answers)
    return {
        "first_s": percentile(firsts, 0.5), "first_p99_s": percentile(firsts, 0.99),
        "gap_s": percentile(gaps, 0.5), "gap_p99_s": percentile(gaps, 0.99),
        "gap_p99_over_median": percentile(gaps, 0.99) / percentile(gaps, 0.5),
        "late_s": max(answer.begun - answer.due for answer in load.answers),
        "chunks_per_token": chunks / sum(answer.work.new_tokens for answer in load.answers),
        "tok_s": total_rate(load),
    }  # fmt: skip


def total_rate(load: Load) -> float:
    """Tokens generated per second, from the first request to the last answer."""
    return sum(answer.work.new_tokens for answer in load.answers) / (load.ended - load.begun)


def capacity(load: Load) -> float:
    """Requests per second of a saturated server: work done until the last request was taken, so that the emptying end
    does not count. An answer under way counts by the share of its chunks that had come."""
    done = sum(sum(at <= load.drained for at in answer.chunks) / len(answer.chunks) for answer in load.answers)
    seconds = load.drained - load.begun
    if not done > 0 or not seconds > 0:
        raise BenchError("too few requests to measure a capacity: give more than are under way at once")
    return done / seconds
