"""Runs the application: its address, its signals, its end."""

from __future__ import annotations

import asyncio
import errno
import logging
import signal
import socket
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager

import uvicorn
from fastapi import FastAPI

from kvik.async_llm import AsyncLLM
from kvik.errors import KvikError, ParameterError, StorageError, TryAgainError
from kvik.server.service import Service

__all__ = ["bind", "serve", "url_of"]

SWITCH_SECONDS = 0.0005
"""How long the event loop may keep the interpreter from the engine's thread, where that waits for it."""
KEEP_ALIVE_SECONDS = 75
BACKLOG = 1024
FLUSH_SECONDS = 5


def bind(host: str, port: int) -> socket.socket:
    """A socket at the address, not listening yet. port 0 takes a free one.

    ParameterError for an unknown host, TryAgainError where the port is taken, StorageError for other reasons.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise ParameterError(f"--host {host!r} is no address of this machine: {error}") from None
    family, kind, protocol, _, address = found[0]
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except OSError as error:
        sock.close()
        raise _cannot_listen(error, host, port) from None
    return sock


def _cannot_listen(error: OSError, host: str, port: int) -> KvikError:
    if error.errno == errno.EADDRINUSE:
        return TryAgainError(f"port {port} of {host} is in use; end what uses it, or choose another with --port")
    return StorageError(f"cannot listen on port {port} of {host}: {error.strerror}")


def url_of(sock: socket.socket) -> str:
    """Where clients reach it."""
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class _Uvicorn(uvicorn.Server):
    """Leaves signals to `serve`: uvicorn would close the port at once, and whoever comes is to get a 503."""

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


def serve(
    app: FastAPI,
    llm: AsyncLLM,
    sock: socket.socket,
    *,
    drain_seconds: float,
    access_log: bool,
    ready: Callable[[], None],
) -> None:
    """Answer until SIGTERM or Ctrl-C, then finish what runs, for drain_seconds at most.

    A second signal ends it at once. Raises KeyboardInterrupt after Ctrl-C, and what ends uvicorn
    before that. ready: called when requests are answered.
    """
    sys.setswitchinterval(SWITCH_SECONDS)
    try:
        sock.listen(BACKLOG)  # of two that were bound while their models loaded, one can
    except OSError as error:
        raise _cannot_listen(error, *sock.getsockname()[:2]) from None
    if access_log:
        _log_to_stderr()
    config = uvicorn.Config(
        app, lifespan="off", log_config=None, access_log=access_log, timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=FLUSH_SECONDS, server_header=False, ws="none",
    )  # fmt: skip
    uvicorn_server = _Uvicorn(config)
    service: Service = app.state.service
    received: list[int] = []

    async def main() -> None:
        loop, stop = asyncio.get_running_loop(), asyncio.Event()

        def on_signal(number: int) -> None:
            received.append(number)
            stop.set()
            if len(received) > 1:
                llm.stop()
                uvicorn_server.should_exit = uvicorn_server.force_exit = True

        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, on_signal, number)
        serving = asyncio.create_task(uvicorn_server.serve(sockets=[sock]))
        stopping = asyncio.create_task(stop.wait())
        while not (uvicorn_server.started or serving.done()):
            await asyncio.sleep(0.005)
        if not serving.done():
            ready()
        await asyncio.wait((serving, stopping), return_when=asyncio.FIRST_COMPLETED)
        if not stopping.done():
            stopping.cancel()
            await serving  # raises what ended it
            raise KvikError("the HTTP server ended by itself")
        if not await service.drain(drain_seconds):
            llm.stop()  # what still runs is told so
        uvicorn_server.should_exit = True
        await serving

    uvicorn_loop = config.get_loop_factory()
    with asyncio.Runner(loop_factory=uvicorn_loop) as runner:
        runner.run(main())
    if signal.SIGINT in received:
        raise KeyboardInterrupt


def _log_to_stderr() -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("uvicorn.access")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
