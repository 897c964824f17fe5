"""A small HTTP server that answers as it is told, well or badly. Its model knows 256 tokens, the bytes."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import MappingProxyType
from typing import Any, NamedTuple


class Reply(NamedTuple):
    """body: bytes as they are, or a value as JSON. raw: bytes sent in place of a whole HTTP answer."""

    status: int = 200
    body: Any = None
    headers: Mapping[str, str] = MappingProxyType({})
    raw: bytes | None = None


Answer = Callable[["Call"], Reply]


class Call(NamedTuple):
    number: int
    method: str
    path: str
    body: Any
    headers: dict[str, str]


class FakeServer:
    """What was asked, and what connections there were."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.calls: list[Call] = []
        self.connections = self.busy = self.busiest = 0
        self.lock = threading.Lock()
        self.url = ""

    def paths(self) -> list[str]:
        return [call.path for call in self.calls]


@contextmanager
def serving(answer: Answer) -> Iterator[FakeServer]:
    fake = FakeServer(answer)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = 10

        def setup(self) -> None:
            super().setup()
            with fake.lock:
                fake.connections += 1

        def log_message(self, *_: Any) -> None:
            """Nothing is logged."""

        def handle_any(self) -> None:
            size = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(size)) if size else None
            with fake.lock:
                call = Call(len(fake.calls), self.command, self.path, body, dict(self.headers))
                fake.calls.append(call)
                fake.busy += 1
                fake.busiest = max(fake.busiest, fake.busy)
            reply = fake.answer(call)
            with fake.lock:
                fake.busy -= 1
            try:
                self.reply(reply)
            except ConnectionError:  # the client has gone
                self.close_connection = True

        do_GET = do_POST = handle_any

        def reply(self, reply: Reply) -> None:
            if reply.raw is not None:
                self.wfile.write(reply.raw)
                self.close_connection = True
                return
            data = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
            self.send_response(reply.status)
            for name, value in {"Content-Length": str(len(data)), **reply.headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: Any) -> None:
            """A client that goes away is no error."""

    server = Server(("127.0.0.1", 0), Handler)
    fake.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield fake
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def logprob(token: int, index: int) -> float:
    """Of the fake model: any number that token and place decide."""
    return -((token * 7 + index * 13) % 101) / 10 - 0.05


def name_of(token: int) -> str:
    return chr(token) if token < 128 else f"bytes:\\x{token:02x}"


def echo(body: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """The answer to a prompt of token ids with echo. changes: in its logprobs table."""
    ids = body["prompt"] + [65] * body["max_tokens"]
    table: dict[str, Any] = {
        "tokens": [name_of(token) for token in ids],
        "token_logprobs": [None if i == 0 else logprob(token, i) for i, token in enumerate(ids)],
    }
    usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": body["max_tokens"]}
    return {"choices": [{"index": 0, "text": "", "logprobs": table | changes}], "usage": usage}


def models(owner: str = "vllm", context: int | None = 512) -> dict[str, Any]:
    return {"data": [{"id": "fake", "owned_by": owner, "max_model_len": context}]}


def well(call: Call) -> Reply:
    """A server with nothing wrong."""
    if call.path == "/v1/models":
        return Reply(body=models())
    if call.path == "/tokenize":
        ids = list(call.body["prompt"].encode())
        names = [chr(token) if token < 128 else "\ufffd" for token in ids]
        return Reply(body={"count": len(ids), "max_model_len": 512, "tokens": ids, "token_strs": names})
    if call.path == "/v1/completions" and call.body.get("echo"):
        return Reply(body=echo(call.body))
    if call.path == "/v1/completions":
        prompt = call.body["prompt"]
        return Reply(body={"choices": [{"index": 0, "text": f"<{prompt}>", "finish_reason": "stop"}], "usage": {}})
    if call.path == "/v1/chat/completions":
        said = call.body["messages"][-1]["content"]
        return Reply(body={"choices": [{"index": 0, "message": {"content": said.upper()}, "finish_reason": "stop"}]})
    return Reply(404, {"error": {"message": "no such path"}})
