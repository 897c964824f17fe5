"""The trace and the load generator, the latter against a small server on loopback that streams what a test tells it."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench import BenchError
from bench.trace import Work, equal_requests, mean_length, poisson_trace, preallocation_waste
from bench.traffic import Answer, Load, arrive, capacity, latencies, percentile, saturate, total_rate

Events = Callable[[dict[str, Any]], Iterator[Any]]
FIRST, GAP = 0.12, 0.03


def token(text: str = "x", reason: str | None = None) -> dict[str, Any]:
    return {"choices": [{"text": text, "finish_reason": reason}]}


def whole(request: dict[str, Any]) -> Iterator[Any]:
    """An answer as Kvik and vLLM stream it: a chunk a token, then the usage."""
    time.sleep(FIRST)
    for number in range(request["max_tokens"]):
        yield token(reason="length" if number + 1 == request["max_tokens"] else None)
        time.sleep(GAP)
    yield {"choices": [], "usage": {"completion_tokens": request["max_tokens"]}}
    yield "[DONE]"


@contextmanager
def fake_server(events: Events, status: int = 200, chunked: bool = True) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """The server's port and the requests it has had."""
    had: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            had.append({"path": self.path, **request})
            self.send_response(status)
            if chunked:
                self.send_header("Transfer-Encoding", "chunked")
            self.send_header("Connection", "close")
            self.end_headers()
            try:
                for event in events(request):
                    data = event if isinstance(event, str) else json.dumps(event)
                    self.put(f"data: {data}\r\n\r\n".encode())
                self.put(b"")
            except OSError:
                pass  # the client left
            self.close_connection = True

        def put(self, data: bytes) -> None:
            self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n" if chunked else data)
            self.wfile.flush()

        def log_message(self, *said: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server.server_port, had
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class TestTrace:
    def test_the_same_seed_gives_the_same_trace(self) -> None:
        assert poisson_trace("0/1", 50) == poisson_trace("0/1", 50) != poisson_trace("0/2", 50)

    def test_lengths_are_in_range_and_gaps_have_mean_one(self) -> None:
        works = poisson_trace("0", 2000)
        prompts, answers = [len(work.prompt) for work in works], [work.new_tokens for work in works]
        assert 32 <= min(prompts) < 35 and 950 < max(prompts) <= 1024
        assert 16 <= min(answers) < 18 and 240 < max(answers) <= 256
        assert works[0].arrival == 0 and works[-1].arrival / 1999 == pytest.approx(1, abs=0.1)
        assert mean_length(works) > 200 and sorted(prompts)[1000] == pytest.approx(181, rel=0.1)  # √(32 · 1024)

    def test_equal_requests_share_no_prompt(self) -> None:
        works = equal_requests("0", 16, 128, 64)
        assert len({tuple(work.prompt) for work in works}) == 16
        assert {(len(work.prompt), work.new_tokens) for work in works} == {(128, 64)}

    def test_preallocation_counts_what_every_step_leaves_unused(self) -> None:
        assert preallocation_waste([Work([1] * 10, 3)], 100) == pytest.approx(1 - (11 + 12 + 13) / 300)


class TestFigures:
    def test_percentiles_are_nearest_ranks(self) -> None:
        values = [5.0, 1.0, 4.0, 2.0, 3.0]
        assert [percentile(values, share) for share in (0, 0.2, 0.5, 0.8, 0.99, 1)] == [1, 1, 3, 4, 5, 5]
        assert percentile(list(range(1, 101)), 0.99) == 99
        for bad in ([], values):
            with pytest.raises(BenchError, match="no percentile"):
                percentile(bad, 1.5)

    def test_first_tokens_count_from_when_they_were_due(self) -> None:
        work = Work([1], 4)
        late = Answer(work, due=10.0, begun=10.5, chunks=[11.0, 11.1, 11.2, 11.5])
        found = latencies(Load([late, Answer(work, 0.0, 0.0, [2.0, 2.2])], 0.0, 16.0, 10.0))
        assert (found["first_s"], found["first_p99_s"], found["late_s"]) == (1.0, 2.0, 0.5)
        assert found["gap_s"] == pytest.approx(0.1) and found["gap_p99_s"] == pytest.approx(0.3)
        assert found["chunks_per_token"] == 6 / 8 and found["tok_s"] == 0.5

    def test_capacity_leaves_out_the_emptying_end(self) -> None:
        whole, half = Answer(Work([1], 2), 0, 0, [1.0, 2.0]), Answer(Work([1], 2), 0, 0, [3.0, 9.0])
        assert capacity(Load([whole, half], 0.0, 9.0, 4.0)) == 1.5 / 4
        with pytest.raises(BenchError, match="too few"):
            capacity(Load([half], 0.0, 9.0, 1.0))


@pytest.mark.parametrize("chunked", [True, False])
def test_a_stream_is_timed_token_by_token(chunked) -> None:
    works = [Work([7, 8], 4, 0.0), Work([9], 3, 1.0)]
    with fake_server(whole, chunked=chunked) as (port, had):
        load = arrive(port, "m", works, rate=5.0, timeout=10)
    assert [len(answer.chunks) for answer in load.answers] == [4, 3]
    assert load.answers[1].due - load.answers[0].due == pytest.approx(0.2)
    for answer in load.answers:
        assert FIRST <= answer.first_token < FIRST + 0.5
        assert all(gap > GAP / 2 for gap in answer.gaps)
    assert total_rate(load) < 7 / (FIRST + 3 * GAP)
    first = next(request for request in had if request["prompt"] == [7, 8])
    wanted = {"path": "/v1/completions", "model": "m", "max_tokens": 4, "temperature": 0, "ignore_eos": True}
    assert wanted.items() <= first.items() and first["stream"] is True


def test_saturation_keeps_so_many_under_way() -> None:
    running, most, lock = 0, 0, threading.Lock()

    def counted(request: dict[str, Any]) -> Iterator[Any]:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        yield from whole(request)
        with lock:
            running -= 1

    works = [Work([number], 2) for number in range(9)]
    with fake_server(counted) as (port, _):
        load = saturate(port, "m", works, at_once=3, timeout=10)
    assert most in (3, 4)  # an answer ends for the client just before the server counts it
    assert [answer.work for answer in load.answers] == works and 0 < load.drained - load.begun < load.ended - load.begun
    assert capacity(load) == pytest.approx(3 / (FIRST + 2 * GAP), rel=0.6)


def test_a_last_chunk_without_text_is_no_token() -> None:
    def ending(request: dict[str, Any]) -> Iterator[Any]:
        yield from (token("", None), token(), token("", "length"), "[DONE]")

    with fake_server(ending) as (port, _):
        assert len(saturate(port, "m", [Work([1], 2)], 1, 10).answers[0].chunks) == 2


@pytest.mark.parametrize(
    ("events", "said"),
    [
        ((token(reason="stop"), "[DONE]"), "ended as 'stop'"),
        ((token(reason="length"), {"choices": [], "usage": {"completion_tokens": 1}}, "[DONE]"), "1 tokens"),
        ((token(reason="length"),), "wanted 2"),
        (("[DONE]",), "ended as None"),
        (({"error": {"message": "no room"}},), "no room"),
        (("{no json",), "failed"),
    ],
)
def test_an_answer_that_is_not_whole_fails_the_job(events, said) -> None:
    with fake_server(lambda request: iter(events)) as (port, _), pytest.raises(BenchError, match=said):
        arrive(port, "m", [Work([1], 2), Work([2], 2)], rate=100, timeout=10)


def test_refusals_are_told_and_nothing_waits_for_ever() -> None:
    busy = fake_server(lambda request: iter([{"error": "busy"}]), status=503, chunked=False)
    with busy as (port, _), pytest.raises(BenchError, match=r"answered 503: .*busy"):
        arrive(port, "m", [Work([1], 2)], rate=1, timeout=10)
    with pytest.raises(BenchError, match="a request of 1 tokens failed"):
        arrive(port, "m", [Work([1], 2)], rate=1, timeout=10)
    with fake_server(whole) as (port, _), pytest.raises(BenchError, match=r"failed: TimeoutError|did not end within"):
        saturate(port, "m", [Work([1], 50)], at_once=1, timeout=0.3)
    for call in (
        lambda: arrive(port, "m", [], 1), lambda: arrive(port, "m", [Work([1], 1)], 0),
        lambda: saturate(port, "m", [Work([1], 1)], 1000),
    ):  # fmt: skip
        with pytest.raises(BenchError):
            call()
