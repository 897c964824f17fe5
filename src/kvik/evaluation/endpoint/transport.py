"""Requests to an HTTP server, several in flight, over connections that are kept; and what follows when no answer comes.

Standard library only. Proxies of the environment are not asked. What may pass (no connection, no answer in time, 408, 429,
500, 502, 503, 504, 529) is tried again after a growing wait, drawn at random so that clients do not come back together
(Brooker 2015, "Exponential backoff and jitter"), or after what Retry-After says. The rest fails at once.
"""

from __future__ import annotations

import json
import random
import socket
import ssl
import threading
from collections.abc import Callable, Mapping, Sequence
from http.client import HTTPException, HTTPResponse, IncompleteRead
from queue import SimpleQueue
from typing import Any, NoReturn, TypeVar

from kvik.errors import DataError, ParameterError, TryAgainError
from kvik.evaluation.endpoint.connection import Connection, Place, exchange, place_of
from kvik.evaluation.endpoint.refusal import reason_of, seconds_of
from kvik.params.checks import integer, real

__all__ = ["Refused", "Transport"]

Result = TypeVar("Result")
Sleep = Callable[[float], object]

MAX_ANSWER_BYTES = 1 << 27
MAX_RETRIES = 100
MAX_PARALLEL = 64
FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0  # seconds
MAX_RETRY_AFTER = 120.0
"""Seconds that a server may ask to be waited for; after a longer one the work stops, to be resumed."""
MAX_TIMEOUT = 86_400.0

_PASSING = frozenset((408, 429, 500, 502, 503, 504, 529))
_LOST = "the connection was lost"


class Refused(ParameterError):
    """A request that the server will not answer, in its own words. Another one may do. status: 400, 404, …"""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class _Later(Exception):
    """It may go well another time. wait: seconds that the server asks for."""

    def __init__(self, reason: str, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.reason, self.wait = reason, wait


class _Flight:
    """Requests that end together: when one fails the others are cut off."""

    def __init__(self) -> None:
        self.stopped = threading.Event()
        self._lock = threading.Lock()
        self._connections: set[Connection] = set()

    def add(self, connection: Connection) -> None:
        with self._lock:
            self._connections.add(connection)

    def remove(self, connection: Connection) -> None:
        with self._lock:
            self._connections.discard(connection)

    def stop(self) -> None:
        self.stopped.set()
        with self._lock:
            for connection in self._connections:
                connection.cut()


class Transport:
    """One server.

    Args:
        url: http:// or https://, with or without /v1 at the end.
        api_key: sent as a bearer token, never shown; None for none.
        timeout: seconds that one answer may take, from its request to its last byte.
        retries: how often a request is sent again, 0 to 100.
        parallel: requests in flight at once, 1 to 64.
        seed: of the waits' jitter.
        sleep: called with seconds in place of waiting.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        timeout: float = 60.0,
        retries: int = 5,
        parallel: int = 8,
        seed: int = 0,
        sleep: Sleep | None = None,
    ) -> None:
        self._place: Place = place_of(url)
        self.url = self._place.url
        real("timeout", timeout, 0.0, MAX_TIMEOUT)
        if timeout == 0.0:
            raise ParameterError("timeout must be above 0 seconds")
        integer("retries", retries, 0, MAX_RETRIES)
        integer("parallel", parallel, 1, MAX_PARALLEL)
        self._key = _checked_key(api_key)
        self._timeout, self._retries, self._parallel = float(timeout), retries, parallel
        self._random = random.Random(seed)
        self._sleep = sleep
        self._lock = threading.Lock()
        self._idle: list[Connection] = []

    def get(self, path: str) -> Any:
        """The JSON value at a path."""
        return self._ask("GET", path, None, _Flight())

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """The JSON value that answers a body."""
        return self._ask("POST", path, body, _Flight())

    def post_each(
        self, path: str, bodies: Sequence[Mapping[str, Any]], read: Callable[[int, Any], Result]
    ) -> list[Result]:
        """What `read` makes of each body's number and answer, in order; several in flight. The first failure ends all."""
        flight = _Flight()
        if len(bodies) <= 1:
            return [read(index, self._ask("POST", path, body, flight)) for index, body in enumerate(bodies)]
        done: SimpleQueue[tuple[int, Any, BaseException | None]] = SimpleQueue()
        numbers = iter(range(len(bodies)))

        def work() -> None:
            while not flight.stopped.is_set():
                with self._lock:
                    number = next(numbers, None)
                if number is None:
                    return
                try:
                    done.put((number, read(number, self._ask("POST", path, bodies[number], flight)), None))
                except BaseException as error:  # raised again by whoever waits
                    done.put((number, None, error))
                    return

        # daemons: Ctrl-C does not wait for a server that is silent
        threads = [threading.Thread(target=work, daemon=True) for _ in range(min(self._parallel, len(bodies)))]
        found: dict[int, Result] = {}
        try:
            for thread in threads:
                thread.start()
            for _ in bodies:
                number, value, error = done.get()
                if error is not None:
                    raise error
                found[number] = value
        finally:
            flight.stop()
        return [found[number] for number in range(len(bodies))]

    def close(self) -> None:
        """Let the connections go; the next request makes new ones."""
        with self._lock:
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    def _ask(self, method: str, path: str, body: Mapping[str, Any] | None, flight: _Flight) -> Any:
        data = None if body is None else json.dumps(body).encode()
        attempt = 0
        while True:
            attempt += 1
            try:
                return self._once(method, path, data, flight)
            except _Later as later:
                self._check_again(path, later, attempt)
                wait = max(later.wait, min(LONGEST_WAIT, FIRST_WAIT * 2.0 ** (attempt - 1)) * self._random.uniform(0.5, 1.0))
                (self._sleep or flight.stopped.wait)(wait)
                if flight.stopped.is_set():
                    raise TryAgainError(f"{self.url}{path}: another request failed") from None

    def _check_again(self, path: str, later: _Later, attempt: int) -> None:
        """TryAgainError where it is not tried again."""
        where = f"{self.url}{path}: {later.reason}"
        if later.wait > MAX_RETRY_AFTER:
            raise TryAgainError(f"{where}; the server asks to come back in {later.wait:.0f} seconds") from None
        if attempt > self._retries:
            times = "1 attempt" if attempt == 1 else f"{attempt} attempts"
            raise TryAgainError(f"{where}, after {times}; try again later") from None

    def _once(self, method: str, path: str, data: bytes | None, flight: _Flight) -> Any:
        """One attempt. A kept connection that the server has closed meanwhile counts for nothing."""
        while True:
            connection, kept = self._take()
            flight.add(connection)
            begun = False
            try:
                if flight.stopped.is_set():
                    raise _Later("another request failed")
                response = exchange(connection, self._place, method, path, data, self._key, self._timeout)
                begun = True
                answer = self._read(path, response)
            except (ConnectionError, IncompleteRead) as error:
                connection.close()
                if kept and not begun:
                    continue
                self._broken(path, error, begun)
            except BaseException as error:
                connection.close()
                self._fail(path, error)
            finally:
                flight.remove(connection)
            if response.will_close:
                connection.close()
            else:
                with self._lock:
                    self._idle.append(connection)
            return self._value(path, response, answer)

    def _take(self) -> tuple[Connection, bool]:
        """A connection, and whether it was in use before."""
        with self._lock:
            if self._idle:
                return self._idle.pop(), True
        return Connection(self._place), False

    def _read(self, path: str, response: HTTPResponse) -> bytes:
        """The whole answer, not more than MAX_ANSWER_BYTES."""
        wanted, parts, size = response.length, [], 0
        while part := response.read(1 << 16):
            parts.append(part)
            size += len(part)
            if size > MAX_ANSWER_BYTES:
                raise DataError(f"{self.url}{path}: the answer has more than {MAX_ANSWER_BYTES} bytes")
        if wanted is not None and size < wanted:
            raise DataError(f"{self.url}{path}: the answer breaks off: {size} of {wanted} bytes came")
        return b"".join(parts)

    def _broken(self, path: str, error: Exception, begun: bool) -> NoReturn:
        """A connection that ended too early: in the middle of an answer, or before it."""
        if begun:
            raise DataError(f"{self.url}{path}: the answer breaks off") from None
        reason = error.strerror if isinstance(error, OSError) and error.strerror else _LOST
        raise _Later(f"no answer: {reason}") from None

    def _fail(self, path: str, error: BaseException) -> NoReturn:
        where = f"{self.url}{path}"
        if isinstance(error, TimeoutError):
            raise _Later(f"no answer within {self._timeout:g} seconds") from None
        if isinstance(error, ssl.SSLEOFError | ssl.SSLZeroReturnError):
            raise _Later(f"no answer: {_LOST}") from None
        if isinstance(error, ssl.SSLError):
            raise ParameterError(f"{where}: no secure connection: {error.reason or error.strerror}") from None
        if isinstance(error, socket.gaierror):
            if error.errno == socket.EAI_NONAME:
                raise ParameterError(f"{where}: no host of this name is known") from None
            raise _Later(f"the host's name cannot be looked up: {error.strerror}") from None
        if isinstance(error, OSError):
            raise _Later(f"no answer: {error.strerror or _LOST}") from None
        if isinstance(error, HTTPException):
            raise DataError(f"{where}: what answers does not speak HTTP ({type(error).__name__})") from None
        raise error

    def _value(self, path: str, response: HTTPResponse, answer: bytes) -> Any:
        """The JSON value of an answer. What it fails with is the server's own message."""
        where, status = f"{self.url}{path}", response.status
        if 200 <= status < 300:
            try:
                return json.loads(answer, parse_constant=_no_number)
            except (ValueError, RecursionError):
                raise DataError(f"{where}: the answer is no JSON, it begins with {answer[:60]!r}") from None
        said = reason_of(answer)
        if self._key:
            said = said.replace(self._key, "…")
        if status in _PASSING:
            raise _Later(f"status {status}: {said}", seconds_of(response.getheader("Retry-After")))
        raise Refused(f"{where}: status {status}: {said}", status)


def _checked_key(key: str | None) -> str:
    """The key, which no message shows."""
    if key is None:
        return ""
    if not isinstance(key, str) or not key or not all("!" <= char <= "~" for char in key):
        raise ParameterError("api_key must be printable ASCII without spaces")
    return key


def _no_number(name: str) -> NoReturn:
    raise ValueError(name)
