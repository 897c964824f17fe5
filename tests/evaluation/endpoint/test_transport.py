"""Requests to servers that are down, slow, busy or broken."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable
from email.utils import formatdate

import pytest
from evaluation.endpoint.fake_server import Call, Reply, serving, well

from kvik.errors import DataError, KvikError, ParameterError, TryAgainError
from kvik.evaluation.endpoint import transport as module
from kvik.evaluation.endpoint.transport import Refused, Transport


class Waits(list[float]):
    """In place of waiting."""

    def __call__(self, seconds: float) -> None:
        self.append(seconds)


def fails(kind: type[KvikError], message: str, act: Callable[[], object]) -> KvikError:
    with pytest.raises(kind, match=message) as caught:
        act()
    assert "\n" not in str(caught.value)
    return caught.value


def in_turn(*replies: Reply) -> Callable[[Call], Reply]:
    """The replies one after another, the last one again and again."""
    return lambda call: replies[min(call.number, len(replies) - 1)]


BUSY = Reply(503, {"error": {"message": "the model is loading"}})
DONE = Reply(body={"ok": True})


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504, 529])
def test_what_may_pass_is_tried_again(status: int) -> None:
    waits = Waits()
    with serving(in_turn(Reply(status, b"oops"), Reply(status, b"oops"), DONE)) as server:
        transport = Transport(server.url, sleep=waits)
        assert transport.get("/x") == {"ok": True}
        transport.close()
    assert len(server.calls) == 3 and len(waits) == 2


def test_waits_grow_with_jitter_up_to_a_bound_and_are_repeatable() -> None:
    def waits_of(seed: int) -> Waits:
        waits = Waits()
        with serving(in_turn(BUSY)) as server:
            transport = Transport(server.url, retries=9, sleep=waits, seed=seed)
            error = fails(
                TryAgainError, "status 503: the model is loading, after 10 attempts", lambda: transport.get("/x")
            )
            assert str(error).startswith(f"{server.url}/x: ") and error.exit_code == 75
            transport.close()
        return waits

    first = waits_of(1)
    assert len(first) == 9
    for number, wait in enumerate(first):
        most = min(30.0, 0.5 * 2**number)
        assert most / 2 <= wait <= most
    assert waits_of(1) == first and waits_of(2) != first


def test_retry_after_in_seconds_and_as_a_date() -> None:
    waits = Waits()
    late = formatdate(time.time() + 60, usegmt=True)
    replies = [Reply(429, b"", {"Retry-After": "17"}), Reply(429, b"", {"Retry-After": late})]
    replies += [Reply(429, b"", {"Retry-After": "soon"}), DONE]
    with serving(in_turn(*replies)) as server:
        transport = Transport(server.url, sleep=waits)
        assert transport.post("/x", {}) == {"ok": True}
        transport.close()
    assert waits[0] == 17.0 and 55 < waits[1] <= 60 and waits[2] <= 2.0


def test_retry_after_beyond_the_bound_stops_the_work() -> None:
    waits = Waits()
    with serving(in_turn(Reply(429, {"error": "quota"}, {"Retry-After": "3600"}))) as server:
        transport = Transport(server.url, sleep=waits)
        fails(
            TryAgainError,
            "status 429: quota; the server asks to come back in 3600 seconds",
            lambda: transport.get("/x"),
        )
        transport.close()
    assert not waits and len(server.calls) == 1


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        (400, {"error": {"message": "max_tokens is too large\nby far"}}, r"max_tokens is too large\\nby far"),
        (401, {"error": {"message": "wrong key sk-secret123"}}, "wrong key …"),
        (404, {"detail": "Not Found"}, "Not Found"),
        (422, {"detail": [{"loc": ["body"], "msg": "field required"}]}, "field required"),
        (413, b"<html>\n", "<html>"),
        (403, b"", "no reason is given"),
        (301, b"\xff\xfe moved", "moved"),
        (400, {"error": "x" * 5000}, "x{300}…$"),
        (400, b"[" * 100_000, r"\[{300}…"),
    ],
)
def test_a_refusal_fails_at_once_in_the_servers_words(status: int, body: object, said: str) -> None:
    waits = Waits()
    with serving(in_turn(Reply(status, body))) as server:
        transport = Transport(server.url + "/v1/", api_key="sk-secret123", sleep=waits)
        error = fails(Refused, f"/v1/x: status {status}: .*{said}", lambda: transport.get("/v1/x"))
        transport.close()
    assert "secret" not in str(error) and len(server.calls) == 1 and not waits
    assert isinstance(error, ParameterError) and error.status == status
    assert server.calls[0].path == "/v1/x" and server.calls[0].headers["Authorization"] == "Bearer sk-secret123"


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        (Reply(body=b""), "is no JSON"),
        (Reply(body=b'{"a": NaN}'), "is no JSON"),
        (Reply(body=b"[" * 100_000), "is no JSON"),
        (Reply(body=b'{"a": ' + b"1" * 5000 + b"}"), "is no JSON"),
        (Reply(body=b"\xff\xfe"), "is no JSON"),
        (Reply(raw=b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{"), "breaks off: 1 of 100 bytes"),
        (Reply(raw=b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n{"), "breaks off"),
        (Reply(raw=b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n{"), "breaks off"),
        (Reply(raw=b"SSH-2.0-OpenSSH_9.2\r\n"), "does not speak HTTP"),
        (Reply(raw=b"HTTP/1.1 200 OK\r\n" + b"X: " + b"x" * 70_000), "does not speak HTTP"),
    ],
)
def test_a_broken_answer_is_a_data_error(reply: Reply, said: str) -> None:
    waits = Waits()
    with serving(in_turn(reply)) as server:
        transport = Transport(server.url, sleep=waits)
        error = fails(DataError, said, lambda: transport.get("/x"))
        assert str(error).startswith(f"{server.url}/x: ") and not waits
        transport.close()


def test_an_answer_without_end_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_ANSWER_BYTES", 100_000)
    with serving(in_turn(Reply(body=b" " * 1_000_000))) as server:
        transport = Transport(server.url)
        fails(DataError, "more than 100000 bytes", lambda: transport.get("/x"))
        transport.close()


def test_a_server_that_is_down() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    waits = Waits()
    transport = Transport(f"http://127.0.0.1:{port}", retries=3, sleep=waits)
    fails(
        TryAgainError, "no answer: Connection refused, after 4 attempts; try again later", lambda: transport.get("/x")
    )
    assert len(waits) == 3
    only_once = Transport(f"http://127.0.0.1:{port}", retries=0)
    fails(TryAgainError, "after 1 attempt;", lambda: only_once.get("/x"))
    fails(ParameterError, "no host of this name", lambda: Transport("http://no-such-host.invalid", retries=0).get("/x"))


def test_a_server_that_closes_without_a_word() -> None:
    with serving(in_turn(Reply(raw=b""))) as server:
        transport = Transport(server.url, retries=1, sleep=Waits())
        fails(TryAgainError, "no answer: the connection was lost, after 2 attempts", lambda: transport.get("/x"))
        transport.close()


def test_a_slow_answer_ends_at_the_deadline_however_its_bytes_drip() -> None:
    listening = socket.create_server(("127.0.0.1", 0))
    stop = threading.Event()

    def drip() -> None:
        connection, _ = listening.accept()
        with connection:
            connection.recv(4096)
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
            while not stop.wait(0.05):
                try:
                    connection.sendall(b" ")
                except OSError:
                    return

    thread = threading.Thread(target=drip, daemon=True)
    thread.start()
    transport = Transport(f"http://127.0.0.1:{listening.getsockname()[1]}", timeout=0.3, retries=0)
    begun = time.monotonic()
    fails(TryAgainError, "no answer within 0.3 seconds, after 1 attempt", lambda: transport.get("/x"))
    assert 0.25 < time.monotonic() - begun < 2
    stop.set()
    thread.join()
    listening.close()
    transport.close()


def test_a_silent_server_is_tried_again() -> None:
    def answer(call: Call) -> Reply:
        if call.number == 0:
            time.sleep(0.5)
        return DONE

    waits = Waits()
    with serving(answer) as server:
        transport = Transport(server.url, timeout=0.2, sleep=waits)
        assert transport.get("/x") == {"ok": True}
        transport.close()
    assert len(waits) == 1


def test_connections_are_kept_and_a_closed_one_is_replaced_without_an_attempt() -> None:
    with serving(well) as server:
        transport = Transport(server.url, retries=0)
        for _ in range(5):
            transport.get("/v1/models")
        assert server.connections == 1
        for connection in transport._idle:  # as a server does after a while
            connection.http.sock.shutdown(socket.SHUT_RDWR)
        assert transport.get("/v1/models")["data"]
        assert server.connections == 2
        transport.close()


def test_several_requests_are_in_flight_and_their_answers_in_order() -> None:
    barrier = threading.Barrier(4, timeout=5)

    def answer(call: Call) -> Reply:
        if call.number < 4:
            barrier.wait()
        return Reply(body=call.body["n"] * 2)

    with serving(answer) as server:
        transport = Transport(server.url, parallel=4)
        found = transport.post_each("/x", [{"n": n} for n in range(40)], lambda i, value: (i, value))
        assert found == [(n, 2 * n) for n in range(40)]
        assert server.busiest == 4 and server.connections == 4
        assert transport.post_each("/x", [], lambda i, value: value) == []
        transport.close()


def test_the_first_failure_cuts_off_the_others() -> None:
    released = threading.Event()

    def answer(call: Call) -> Reply:
        if call.body["n"] == 2:
            return Reply(400, {"error": {"message": "not this one"}})
        released.wait(5)
        return DONE

    with serving(answer) as server:
        transport = Transport(server.url, parallel=4)
        begun = time.monotonic()
        fails(Refused, "not this one", lambda: transport.post_each("/x", [{"n": n} for n in range(99)], lambda i, v: v))
        assert time.monotonic() - begun < 3
        released.set()
        transport.close()
    assert len(server.calls) < 10


@pytest.mark.parametrize(
    ("url", "said"),
    [
        (None, "url must be a string"), ("localhost:8000", "must be as http://"), ("ftp://a", "must be as http://"),
        ("http://", "must be as http://"), ("http://a b", "must be as http://"), ("http://[::1", "url is none"),
        ("http://a:99999", "url is none"), ("http://ä", "must be as http://"), ("http://a/v1?key=1", "no query"),
        ("http://a\r\nX: y", "url is none"), ("http://a/\r\nX", "must be as http://"),
    ],
)  # fmt: skip
def test_bad_urls(url: str, said: str) -> None:
    fails(ParameterError, said, lambda: Transport(url))


def test_urls() -> None:
    for url in ("http://a", "http://a/", "http://a/v1", "http://a/v1/"):
        assert Transport(url).url == "http://a"
    assert Transport("https://a:8/api/v1").url == "https://a:8/api"
    error = fails(ParameterError, "no user and no password", lambda: Transport("http://me:hush@a"))
    assert "hush" not in str(error)


@pytest.mark.parametrize("key", ["", "a b", "sk-secret\r\nX: y", "sk-secreté", 5])
def test_a_bad_key_is_not_shown(key: str) -> None:
    error = fails(
        ParameterError, "api_key must be printable ASCII without spaces", lambda: Transport("http://a", api_key=key)
    )
    assert "secret" not in str(error)


def test_settings() -> None:
    fails(ParameterError, "timeout must be above 0", lambda: Transport("http://a", timeout=0))
    fails(ParameterError, "retries must be in", lambda: Transport("http://a", retries=-1))
    fails(ParameterError, "parallel must be in", lambda: Transport("http://a", parallel=65))


def test_bodies_are_json() -> None:
    with serving(lambda call: Reply(body=call.body)) as server:
        transport = Transport(server.url)
        body = {"prompt": "é \ud83d\ude00", "n": 1}
        assert transport.post("/x", body) == json.loads(json.dumps(body))
        transport.close()
