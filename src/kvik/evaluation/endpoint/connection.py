"""One connection to a server, on which an answer has a deadline as a whole, however slowly its bytes come."""

from __future__ import annotations

import io
import socket
import time
from contextlib import suppress
from http.client import HTTPConnection, HTTPResponse, HTTPSConnection
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from kvik import __version__
from kvik.errors import ParameterError

__all__ = ["Connection", "Place", "exchange", "place_of"]


class Place(NamedTuple):
    """Where a server is. url: as shown, without /v1; path: of it, in front of those that are asked."""

    url: str
    secure: bool
    host: str
    port: int
    path: str


def place_of(url: object) -> Place:
    """A server's address. ParameterError for one that is none, or that has a password, a query or a fragment."""
    if not isinstance(url, str):
        raise ParameterError(f"url must be a string, got {url!r:.80}")
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise ParameterError(f"url is none: {error}") from None
    if "@" in parts.netloc:
        raise ParameterError("url must have no user and no password; give api_key")
    if parts.scheme not in ("http", "https") or not host or not url.isprintable() or " " in url or not url.isascii():
        raise ParameterError(f"url must be as http://HOST:PORT or https://HOST, got {url!r:.200}")
    if parts.query or parts.fragment:
        raise ParameterError(f"url must have no query and no fragment, got {url!r:.200}")
    secure = parts.scheme == "https"
    path = parts.path.rstrip("/").removesuffix("/v1").rstrip("/")
    return Place(f"{parts.scheme}://{parts.netloc}{path}", secure, host, port or (443 if secure else 80), path)


class Connection:
    """A connection, made with its first request."""

    def __init__(self, place: Place) -> None:
        kind = HTTPSConnection if place.secure else HTTPConnection
        self.http = kind(place.host, place.port)

    def close(self) -> None:
        self.http.close()

    def cut(self) -> None:
        """End it from another thread: what reads from it fails."""
        sock = self.http.sock
        if sock is not None:
            with suppress(OSError):  # it has just been closed
                sock.shutdown(socket.SHUT_RDWR)


def exchange(
    connection: Connection, place: Place, method: str, path: str, data: bytes | None, key: str, timeout: float
) -> HTTPResponse:
    """Send a request and read the head of its answer. What is read of it later has the same deadline."""
    http, deadline = connection.http, time.monotonic() + timeout
    headers = {"Accept": "application/json", "Accept-Encoding": "identity", "User-Agent": f"kvik/{__version__}"}
    if data is not None:
        headers["Content-Type"] = "application/json"
    if key:
        headers["Authorization"] = f"Bearer {key}"
    if http.sock is None:
        http.timeout = timeout
        http.connect()
    http.sock.settimeout(_left(deadline))

    def response(sock: socket.socket, **settings: Any) -> HTTPResponse:
        timed: Any = _Socket(sock, deadline)
        return HTTPResponse(timed, **settings)

    http.response_class = response  # type: ignore[assignment]  # it is only called
    http.request(method, place.path + path, data, headers)
    return http.getresponse()


def _left(deadline: float) -> float:
    """Seconds until then. TimeoutError where there are none."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


class _Socket:
    """What HTTPResponse reads from."""

    def __init__(self, sock: socket.socket, deadline: float) -> None:
        self._sock, self._deadline = sock, deadline

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(_Timed(self._sock, self._deadline))


class _Timed(io.RawIOBase):
    """A socket's bytes, each read with the time that is left."""

    def __init__(self, sock: socket.socket, deadline: float) -> None:
        self._sock, self._deadline = sock, deadline
        self._file = sock.makefile("rb", buffering=0)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        self._sock.settimeout(_left(self._deadline))
        return self._file.readinto(buffer)

    def close(self) -> None:
        self._file.close()
        super().close()
