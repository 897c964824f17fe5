"""`AsyncLLM`: the engine on a thread of its own, for asyncio: what the server and every concurrent client stand on."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any, Self

from kvik.engine.request import Chunk, Completion, Request, ScoreRequest, ScoreResult
from kvik.engine.sequence import Group
from kvik.errors import KvikError, TryAgainError
from kvik.llm import LLM, Prompt, score_result
from kvik.params import AnyParams, CacheParams, SamplingParams
from kvik.text.chat_template import Tools
from kvik.text.conversation import Message

__all__ = ["Answer", "AsyncLLM"]

MAX_BUFFERED = 64
"""Chunks that wait for a slow reader at most; further ones join the last of their sample."""


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
        self, prompt: Prompt, params: AnyParams | None = None, *, salt: str = "", cache: CacheParams | None = None
    ) -> AsyncGenerator[Chunk, None]:
        """The answer's chunks as they come, those of its samples in turn. `aclose` (or cancelling the task) cancels.

        A reader that is slower than the model gets several chunks in one; the engine never waits for it.
        cache: None is the engine's.
        """
        return self.run(self.llm.request(prompt, params or SamplingParams(), salt, cache))

    def chat(
        self,
        messages: Sequence[Message],
        params: AnyParams | None = None,
        tools: Tools | None = None,
        *,
        salt: str = "",
        cache: CacheParams | None = None,
    ) -> AsyncGenerator[Chunk, None]:
        """`generate` for a conversation, through the model's chat template."""
        return self.generate(self.llm.chat_ids(messages, tools), params, salt=salt, cache=cache)

    def start(self, request: Request) -> Answer:
        """Begin a checked request (`LLM.request`) and read it as it suits: `Answer`."""
        stream = _Stream(asyncio.get_running_loop())
        ticket = self._driver.add(stream, lambda: self.llm.engine.add(request, stream.put))
        return Answer(self.llm, request, self._driver, ticket)

    def run(self, request: Request) -> AsyncGenerator[Chunk, None]:
        """The chunks of a checked request."""
        return _OneByOne(self.start(request))

    async def complete(self, request: Request) -> Completion:
        """The whole answer of a checked request."""
        answer = self.start(request)
        try:
            while await answer.ready():
                pass
        finally:
            answer.cancel()
        return answer.completion()

    async def score(
        self, text: Prompt, *, top: int = 0, first: int = 1, cache: CacheParams | None = None
    ) -> ScoreResult:
        """Log-probabilities of a given text; see `LLM.score`."""
        return await self.scored(self.llm.score_request(text, top=top, first=first, cache=cache))

    async def scored(self, request: ScoreRequest) -> ScoreResult:
        """The result of a checked request to score (`LLM.score_request`)."""
        stream = _Stream(asyncio.get_running_loop())
        ticket = self._driver.add(stream, lambda: self.llm.engine.add_score(request))
        try:
            await asyncio.shield(stream.ended)  # its cancellation would look like the end
        finally:
            self._driver.cancel(ticket)
        if ticket.error is not None:
            raise ticket.error
        assert ticket.group is not None
        return score_result(ticket.group)

    @property
    def num_requests(self) -> int:
        """Requests that have not ended."""
        return self._driver.num_requests

    async def drain(self, timeout: float | None = None) -> bool:
        """Wait until no request is under way; new ones are refused from now on. False where the time ran out."""
        self._driver.draining = True
        return await asyncio.to_thread(self._driver.wait_idle, timeout)

    def stop(self) -> None:
        """Cancel what is under way and take no more; does not wait for it."""
        self._driver.stop()

    def close(self) -> None:
        """`stop`, and wait for the engine's thread to end."""
        self._driver.close()


class Answer:
    """A request under way, read on the loop that started it. Whoever starts one cancels it at the end, done or not."""

    def __init__(self, llm: LLM, request: Request, driver: _Driver, ticket: _Ticket) -> None:
        self._llm, self.request, self._driver, self._ticket = llm, request, driver, ticket

    async def ready(self) -> list[Chunk]:
        """The chunks that are there, at least one; waits for it. Empty after the last; raises what ended the request."""
        while chunks := await self._ticket.stream.take():
            if chunks[-1].finish_reason == "error":
                chunks = [chunk for chunk in chunks if chunk.finish_reason != "error"]
            if chunks:
                return chunks
        group, error = self._ticket.group, self._ticket.error
        if error is None and group is not None:
            error = group.error
        if error is not None:
            raise error
        return []

    def completion(self) -> Completion:
        """The whole answer, once `ready` was empty."""
        assert self._ticket.group is not None
        return self._llm.completion(self.request, self._ticket.group)

    def cancel(self) -> None:
        """End the request between two steps; nothing where it has ended."""
        self._driver.cancel(self._ticket)


class _OneByOne(AsyncGenerator[Chunk, None]):
    """An answer's chunks. Unlike a generator's, its `aclose` cancels before the first chunk was asked for."""

    def __init__(self, answer: Answer) -> None:
        self._answer: Answer | None = answer
        self._ready: deque[Chunk] = deque()

    async def asend(self, value: None) -> Chunk:
        if not self._ready:
            if self._answer is None:
                raise StopAsyncIteration
            try:
                self._ready.extend(await self._answer.ready())
            except BaseException:
                self._end()
                raise
        if not self._ready:
            self._end()
            raise StopAsyncIteration
        return self._ready.popleft()

    async def athrow(self, kind: Any, value: Any = None, traceback: Any = None) -> Chunk:
        self._end()
        raise kind if value is None else value

    async def aclose(self) -> None:
        self._end()

    def __del__(self) -> None:
        self._end()

    def _end(self) -> None:
        self._ready.clear()
        if self._answer is not None:
            self._answer.cancel()
            self._answer = None


class _Stream:
    """Chunks on their way to one reader. `put` is called from the engine's thread, inside a step."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.ended: asyncio.Future[None] = loop.create_future()
        self.ready: list[Chunk] = []
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

    async def take(self) -> list[Chunk]:
        """The chunks that wait, at least one; empty after the last."""
        while not self.ready:
            if self.ended.done():
                return []
            self._reader = self.loop.create_future()
            await self._reader
        chunks, self.ready = self.ready, []
        return chunks


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


class _Driver:
    """The engine's thread: takes requests and cancellations between steps and hands each step's chunks out at once."""

    def __init__(self, llm: LLM) -> None:
        self._engine = llm.engine
        self._wake = threading.Condition()
        self._new: deque[_Ticket] = deque()
        self._cancelled: deque[_Ticket] = deque()
        self._running: list[_Ticket] = []
        self._closed = False
        self._failure: str | None = None
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
            if self._failure is not None:
                raise KvikError(self._failure)
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

    def stop(self) -> None:
        with self._wake:
            self._closed = True
            self._wake.notify_all()

    def close(self) -> None:
        self.stop()
        if self._thread is not threading.current_thread():
            self._thread.join()

    def _run(self) -> None:
        try:
            self._work()
        except BaseException as error:  # a defect: every reader is told, and nobody is taken any more
            with self._wake:
                self._failure = f"the engine's thread ended: {error!r}"
                self._running += self._new
                self._new.clear()
            for ticket in self._running:
                ticket.error = ticket.error or KvikError(self._failure)
            self._hand_out()

    def _work(self) -> None:
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
                self._cancel(ticket)
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
                    self._cancel(ticket)

    def _cancel(self, ticket: _Ticket) -> None:
        try:
            if ticket.group is not None:
                self._engine.cancel(ticket.group)
        except Exception as error:  # its blocks are free all the same
            ticket.error = ticket.error or error

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
            stream, done = ticket.stream, ticket.group is None or ticket.group.done or ticket.error is not None
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
                    if ticket.stream.loop is loop:
                        self._cancel(ticket)
        if len(left) != len(self._running):
            with self._wake:
                self._running = left
                self._wake.notify_all()


def _deliver(deliveries: list[tuple[_Stream, list[Chunk], bool]]) -> None:
    for stream, chunks, done in deliveries:
        stream.deliver(chunks, done)
