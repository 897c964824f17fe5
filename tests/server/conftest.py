"""The application in this process, and `kvik serve` as a process of its own, both with the default model."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from kvik import AsyncLLM, EngineParams
from kvik.server.app import create_app

MODEL = "smollm2-135m"
NAMED = {"model": MODEL}


@pytest.fixture(scope="session")
def llm(default_model_gguf: Path) -> Iterator[AsyncLLM]:
    engine = EngineParams(kv_bytes=400_000_000, max_sequences=140)
    with AsyncLLM(str(default_model_gguf), engine=engine) as made:
        yield made


class Client:
    """Requests to an application, each on an event loop of its own, or several together."""

    def __init__(self, llm: AsyncLLM, **settings: Any) -> None:
        self.app = create_app(llm, ref=MODEL, **settings)

    def together(self, *calls: tuple[str, Any]) -> list[httpx.Response]:
        """POST bodies at the same time."""

        async def run() -> list[httpx.Response]:
            transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://kvik", timeout=60) as client:
                return await asyncio.gather(*(client.post(path, **_content(body)) for path, body in calls))

        return asyncio.run(run())

    def post(self, path: str, body: Any) -> httpx.Response:
        return self.together((path, body))[0]

    def get(self, path: str, **headers: str) -> httpx.Response:
        async def run() -> httpx.Response:
            async with httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url="http://kvik") as client:
                return await client.get(path, headers=headers)

        return asyncio.run(run())

    def complete(self, prompt: Any, **fields: Any) -> dict[str, Any]:
        return _value(self.post("/v1/completions", {**NAMED, "prompt": prompt, **fields}))

    def chat(self, text: str, **fields: Any) -> dict[str, Any]:
        body = {**NAMED, "messages": [{"role": "user", "content": text}], **fields}
        return _value(self.post("/v1/chat/completions", body))

    def refused(self, path: str, body: Any, status: int = 400) -> dict[str, Any]:
        """The error object of a request that is refused; its message is one line."""
        response = self.post(path, body)
        assert response.status_code == status, response.text
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"} and error["message"] and "\n" not in error["message"]
        return error


def _content(body: Any) -> dict[str, Any]:
    return {"content": body if isinstance(body, bytes) else json.dumps(body)}


def _value(response: httpx.Response) -> dict[str, Any]:
    assert response.status_code == 200, response.text
    return events(response.text) if "event-stream" in response.headers["content-type"] else response.json()


def events(text: str) -> list[dict[str, Any]]:
    """The events of a stream, which ends as it should."""
    pieces = text.split("\n\n")
    assert pieces[-2:] == ["data: [DONE]", ""]
    return [json.loads(piece.removeprefix("data: ")) for piece in pieces[:-2]]


@pytest.fixture
def client(llm: AsyncLLM) -> Client:
    return Client(llm)


@dataclass
class Served:
    process: subprocess.Popen[str]
    url: str
    line: str

    def metric(self, name: str) -> float:
        text = httpx.get(f"{self.url}/metrics").text
        return float(next(line for line in text.splitlines() if line.startswith(name)).rpartition(" ")[2])


@pytest.fixture(scope="session")
def start(default_model_gguf: Path) -> Iterator[Callable[..., Served]]:
    """start("--api-key", …) runs `kvik serve` on a free port; all are ended with the tests."""
    running = []

    def run(*arguments: str) -> Served:
        command = [sys.executable, "-m", "kvik.cli", "serve", str(default_model_gguf), "--port", "0", *arguments]
        command += ["--kv-bytes", "200000000"]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | {"KVIK_API_KEY": ""})
        running.append(process)
        line = process.stderr.readline()
        assert " at http://" in line, line + process.stderr.read()
        return Served(process, line.partition(" at ")[2].partition(",")[0], line)

    yield run
    for process in running:
        process.kill()
        process.wait()
        process.stderr.close()


@pytest.fixture(scope="session")
def served(start: Callable[..., Served]) -> Served:
    return start()
