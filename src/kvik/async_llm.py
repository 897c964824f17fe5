"""`AsyncLLM`: the engine on a thread of its own, for asyncio: what the server and every concurrent client stand on."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any, Self, TypeVar

from kvik.engine.request import Chunk, Completion, Request, ScoreRequest, ScoreResult
from kvik.engine.sequence import Group
from kvik.errors import TryAgainError
from kvik.llm import LLM, Prompt, score_result
from kvik.params import SamplingParams
from kvik.text.chat_template import Tools
from kvik.text.conversation import Message

__all__ = ["AsyncLLM"]

MAX_BUFFERED = 64
"""Chunks that wait for a slow reader at most; further ones join the last of their sample."""

Result = TypeVar("Result")


class AsyncLLM:
    """A model that answers many at once, from any number of event loops.

    Args:
        llm: the model to drive, as `LLM` makes it; or what to make it of, with the same keywords.

    Requests are checked when they are made: `generate` and `chat` raise ParameterError at the call, TryAgainError where
    too many wait. Use as a context manager, or call `close`.
    """

    def __init__(self, llm: LLM | str = "smollm2-135m", **settings: Any) -> None:
        self.llm = llm if isinstance(llm, LLM) else LLM(llm, **settings)
        self._driver = _Driver(self.llm)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def generate(
        self, prompt: Prompt, params: SamplingParams | None = None, *, salt: str = ""
    ) -> AsyncGenerator[Chunk, None]:
        """The answer's chunks as they come, those of its samples in turn. `aclose` (or cancelling the task) cancels.

        A reader that is slower than the model gets several chunks in one; the engine never waits for it.
        """
        return self.run(self.llm.request(prompt, params or SamplingParams(), salt))

    def chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        tools: Tools | None = None,
        *,
        salt: str = "",
    ) -> AsyncGenerator[Chunk, None]:
        """`generate` for a conversation, through the model's chat template."""
        return self.generate(self.llm.chat_ids(messages, tools), params, salt=salt)

    def run(self, request: Request) -> AsyncGenerator[Chunk, None]:
        """The chunks of a checked request (`LLM.request`)."""
        stream = _Stream(asyncio.get_running_loop())
        return _Chunks(self._driver, stream, self._driver.add(stream, lambda: self._add(request, stream)))

    async def complete(self, request: Request) -> Completion:
        """The whole answer of a checked request."""
        stream = _Stream(asyncio.get_running_loop())
        ticket = self._driver.add(stream, lambda: self._add(request, stream))
        async for _ in _Chunks(self._driver, stream, ticket):
            pass
        assert ticket.group is not None
        return self.llm.completion(request, ticket.group)

    async def score(self, text: Prompt, top: int = 0) -> ScoreResult:
        """Log-probabilities of a given text; see `LLM.score`."""
        request: ScoreRequest = self.llm.score_request(text, top=top)
        stream = _Stream(asyncio.get_running_loop())
        ticket = self._driver.add(stream, lambda: self.llm.engine.add_score(request))
        try:
            await stream.ended
        finally:
            self._driver.cancel(ticket)
        if ticket.error is not None:
            raise ticket.error
        assert ticket.group is not None
        return score_result(ticket.group)

    def _add(self, request: Request, stream: _Stream) -> Group:
        return self.llm.engine.add(request, stream.put)

    @property
    def num_requests(self) -> int:
        """Requests that have not ended."""
        return self._driver.num_requests

    async def drain(self, timeout: float | None = None) -> bool:
        """Wait until no request is under way; new ones are refused from now on. False where the time ran out."""
        self._driver.draining = True
        return await asyncio.to_thread(self._driver.wait_idle, timeout)

    def close(self) -> None:
        """Cancel what is under way and end the engine's thread."""
        self._driver.close()


class _Stream:
    """Chunks on their way to one reader. `put` is called from the engine's thread, inside a step."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.ended: asyncio.Future[None] = loop.create_future()
        self.ready: deque[Chunk] = deque()
        self.fresh: list[Chunk] = []  # of the step under way; the engine's thread's
        self._reader: asyncio.Future[None] | None = None

    def put(self, chunk: Chunk) -> None:
        self.fresh.append(chunk)

    def deliver(self, chunks: list[Chunk], done: bool) -> None:
        """On the reader's loop."""
        for chunk in chunks:
            if len(self.ready) < MAX_BUFFERED or chunk.finish_reason == "error" or not self._join(chunk):
                self.ready.append(chunk)
        if done and not self.ended.done():
            self.ended.set_result(None)
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    def _join(self, chunk: Chunk) -> bool:
        """Add the chunk to the last one of its sample that waits; False where none does."""
        for place in range(len(self.ready) - 1, -1, -1):
            last = self.ready[place]
            if last.index == chunk.index:
                self.ready[place] = joined(last, chunk)
                return True
        return False

    async def next(self) -> Chunk | None:
        """The next chunk; None after the last."""
        while not self.ready:
            if self.ended.done():
                return None
            self._reader = self.loop.create_future()
            await self._reader
        return self.ready.popleft()


def joined(first: Chunk, second: Chunk) -> Chunk:
    """Two pieces of a sample that follow each other as one."""
    noted = first.logprobs if second.logprobs is None else (first.logprobs or ()) + second.logprobs
    return second._replace(text=first.text + second.text, token_ids=first.token_ids + second.token_ids, logprobs=noted)


class _Ticket:
    """A request's place with the driver. group is None until the engine has it."""

    def __init__(self, stream: _Stream, add: Callable[[], Group]) -> None:
        self.stream, self.add = stream, add
        self.group: Group | None = None
        self.error: Exception | None = None
        self.cancelled = False


class _Chunks(AsyncGenerator[Chunk, None]):
    """A request's chunks for its reader. Unlike a generator's, its `aclose` cancels before the first chunk was asked for."""

    def __init__(self, driver: _Driver, stream: _Stream, ticket: _Ticket) -> None:
        self._driver, self._stream, self._ticket = driver, stream, ticket
        self._over = False

    async def asend(self, value: None) -> Chunk:
        if self._over:
            raise StopAsyncIteration
        try:
            chunk = await self._stream.next()
        except BaseException:
            self._end()
            raise
        if chunk is not None and chunk.finish_reason != "error":
            return chunk
        self._end()
        ticket = self._ticket
        error = ticket.error or (ticket.group.error if ticket.group is not None else None)
        if error is not None:
            raise error
        raise StopAsyncIteration

    async def athrow(self, kind: Any, value: Any = None, traceback: Any = None) -> Chunk:
        self._end()
        raise kind if value is None else value

    async def aclose(self) -> None:
        self._end()

    def __del__(self) -> None:
        self._end()

    def _end(self) -> None:
        if not self._over:
            self._over = True
            self._driver.cancel(self._ticket)


class _Driver:
    """The engine's thread: takes requests and cancellations between steps and hands each step's chunks out at once."""

    def __init__(self, llm: LLM) -> None:
        self._engine = llm.engine
        self._wake = threading.Condition()
        self._new: deque[_Ticket] = deque()
        self._cancelled: deque[_Ticket] = deque()
        self._running: list[_Ticket] = []
        self._closed = False
        self.draining = False
        self._thread = threading.Thread(target=self._run, name="kvik-engine", daemon=True)
        self._thread.start()

    @property
    def num_requests(self) -> int:
        return len(self._new) + len(self._running)

    def add(self, stream: _Stream, add: Callable[[], Group]) -> _Ticket:
        """Hand a request to the engine. TryAgainError where it takes no more."""
        ticket = _Ticket(stream, add)
        with self._wake:
            if self._closed or self.draining:
                raise TryAgainError("the engine is shutting down and takes no more requests")
            if not self._engine.has_room_for(len(self._new)):
                raise TryAgainError(
                    f"{self.num_requests} requests are under way and max_waiting is {self._engine.params.max_waiting}; "
                    "try again later"
                )
            self._new.append(ticket)
            self._wake.notify_all()
        return ticket

    def cancel(self, ticket: _Ticket) -> None:
        """End a request between two steps; nothing where it has ended."""
        ticket.cancelled = True
        if ticket.stream.ended.done():
            return
        with self._wake:
            self._cancelled.append(ticket)
            self._wake.notify_all()

    def wait_idle(self, timeout: float | None) -> bool:
        with self._wake:
            return self._wake.wait_for(lambda: not self.num_requests, timeout)

    def close(self) -> None:
        with self._wake:
            self._closed = True
            self._wake.notify_all()
        if self._thread is not threading.current_thread():
            self._thread.join()

    def _run(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._closed or self._new or self._cancelled or self._running)
                new, self._new = self._new, deque()
                cancelled, self._cancelled = self._cancelled, deque()
                closed = self._closed
                self._running += new
            if closed:
                cancelled.extend(self._running)
            for ticket in new:
                self._begin(ticket)
            for ticket in cancelled:
                if ticket.group is not None:
                    self._engine.cancel(ticket.group)
            if not closed and self._engine.has_work:
                self._step()
            self._hand_out()
            if closed:
                return

    def _step(self) -> None:
        try:
            self._engine.step()
        except Exception as error:  # a defect: nobody may wait for ever, and later requests may work
            for ticket in self._running:
                if ticket.group is not None and not ticket.group.done:
                    ticket.error = error
                    self._engine.cancel(ticket.group)

    def _begin(self, ticket: _Ticket) -> None:
        if ticket.cancelled:
            return
        try:
            ticket.group = ticket.add()
        except Exception as error:  # the reader is told
            ticket.error = error

    def _hand_out(self) -> None:
        """The step's chunks to their readers: one wake-up for each event loop."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[_Stream, list[Chunk], bool]]] = {}
        left = []
        for ticket in self._running:
            stream, done = ticket.stream, ticket.group is None or ticket.group.done
            if stream.fresh or done:
                by_loop.setdefault(stream.loop, []).append((stream, stream.fresh, done))
                stream.fresh = []
            if not done:
                left.append(ticket)
        for loop, deliveries in by_loop.items():
            try:
                loop.call_soon_threadsafe(_deliver, deliveries)
            except RuntimeError:  # the loop was closed: nobody reads any more
                for ticket in left:
                    if ticket.stream.loop is loop and ticket.group is not None:
                        self._engine.cancel(ticket.group)
        if len(left) != len(self._running):
            with self._wake:
                self._running = left
                self._wake.notify_all()


def _deliver(deliveries: list[tuple[_Stream, list[Chunk], bool]]) -> None:
    for stream, chunks, done in deliveries:
        stream.deliver(chunks, done)
