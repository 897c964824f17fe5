"""The model as the endpoints see it: its names, the way of texts into it, and requests under way."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import asdict
from typing import Any, TypeVar

from kvik import __version__
from kvik.async_llm import Answer, AsyncLLM
from kvik.engine.request import Choice, Completion, Request, ScoreRequest, ScoreResult
from kvik.errors import TryAgainError
from kvik.params import AnyParams, CacheParams, SamplingParams, StreamingLLM
from kvik.server.errors import ApiError, shutting_down
from kvik.server.metrics import Metrics
from kvik.weights.catalogue import CATALOGUE, find

__all__ = ["Service", "finish_of", "score_of", "together"]

INLINE_CHARACTERS = 2000
"""Texts up to this length are turned into tokens on the event loop (about 2 ms); others in a thread."""

FINISH = {"stop": "stop", "length": "length", "no_token": "stop"}
"""OpenAI's finish_reason by ours; the others end in an error. "no_token": min_tokens and filters left none to draw."""

Result = TypeVar("Result")


class Service:
    """One model behind HTTP.

    Attributes:
        name: what the model is called. names: what requests may call it: that, its path, aliases, the name in its file.
        draining: no new requests are taken; those that were go on.
    """

    def __init__(self, llm: AsyncLLM, ref: str | None = None) -> None:
        """ref: what the user called the model; None takes the name in its file."""
        self.engine, self.llm = llm, llm.llm
        self.info = self.llm.info
        known = None if ref is None else find(ref)
        self.name = known or ref or self.info.name
        aliases = CATALOGUE[known].aliases if known else ()
        self.names = frozenset((self.name, ref, self.info.name, self.info.path, *aliases))
        self.metrics = Metrics(self.name, self.llm.engine)
        self.fingerprint = f"kvik-{__version__}-{self.info.digest[:12]}"
        self.started = int(time.time())
        self.draining = False
        self._answering = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def check_model(self, name: Any) -> None:
        """ApiError 404 unless the model is this one."""
        if not isinstance(name, str):
            raise ApiError(400, "model must be a string", param="model", code="invalid_type")
        if name not in self.names:
            message = f"no model {name!r} here; this server has {self.name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")

    def head(self, prefix: str, kind: str) -> dict[str, Any]:
        """What every piece of one response begins with."""
        return {
            "id": prefix + secrets.token_hex(12), "object": kind, "created": int(time.time()), "model": self.name,
            "system_fingerprint": self.fingerprint,
        }  # fmt: skip

    async def off_loop(self, size: int, work: Callable[[], Result]) -> Result:
        """Do what takes time with the number of characters; in a thread where that is long."""
        return work() if size <= INLINE_CHARACTERS else await asyncio.to_thread(work)

    async def request(self, ids: Sequence[int], params: AnyParams, salt: str, cache: CacheParams) -> Request:
        """A checked request; in a thread where its words are long or its grammar is new."""
        return await self.off_loop(self.characters(params), lambda: self.llm.request(ids, params, salt, cache))

    def characters(self, params: AnyParams) -> int:
        """How many a request's check turns into tokens; more than are inline where a new grammar is compiled."""
        grammar = params.grammar
        if grammar is not None and not self.llm.engine.admission.grammars.known(grammar):
            return INLINE_CHARACTERS + 1
        if not isinstance(params, SamplingParams):
            return 0
        size = 3 * sum(map(len, params.bad_words))  # each is encoded three times
        if params.dry_multiplier and params.dry_breakers:  # looked for in the whole vocabulary, however short
            size += INLINE_CHARACTERS + sum(map(len, params.dry_breakers))
        return size

    async def ids(self, prompt: str | Sequence[int], param: str, more: int, cache: CacheParams) -> tuple[int, ...]:
        """A prompt as token ids; `check_length` holds."""
        encode = self.llm.tokenizer.encode
        ids = await self.off_loop(len(prompt), lambda: encode(prompt)) if isinstance(prompt, str) else prompt
        self.check_length(len(ids), more, param, cache)
        return tuple(ids)

    def check_length(self, count: int, more: int, param: str, cache: CacheParams) -> None:
        """ApiError 400 unless the context holds so many tokens and `more` generated ones."""
        streams = isinstance(cache.policy, StreamingLLM)
        limit = self.llm.engine.admission.context(cache) if streams else self.info.context_length
        if count + more > limit:
            wanted = ", and at least one is to be generated" if more else ""
            raise ApiError(
                400, f"{param} has {count} tokens{wanted}; the model's context holds {limit}", param=param,
                code="context_length_exceeded",
            )  # fmt: skip

    @asynccontextmanager
    async def started_all(self, requests: Sequence[Request]) -> AsyncIterator[list[Answer]]:
        """The requests under way; all are cancelled at the end, done or not. TryAgainError where some find no room."""
        answers: list[Answer] = []
        try:
            for request in requests:
                answers.append(self.engine.start(request))
                self.metrics.prompt_tokens += len(request.prompt)
            yield answers
        finally:
            for answer in answers:
                answer.cancel()

    async def completion(self, answer: Answer) -> Completion:
        """The whole answer of a request under way, counted."""
        while chunks := await answer.ready():
            for chunk in chunks:
                if chunk.finish_reason is not None:
                    self.metrics.answer(finish_of(chunk.finish_reason))
                if chunk.stats is not None:
                    self.metrics.request(chunk.stats)
        return answer.completion()

    async def completions(self, answers: Sequence[Answer]) -> list[Completion]:
        """As `completion`, of all; raises what the first one that fails ended with."""
        return await together([self.completion(answer) for answer in answers])

    async def score_all(self, requests: Sequence[ScoreRequest]) -> list[ScoreResult]:
        """The results of texts that are scored together."""
        results = await together([self.engine.scored(request) for request in requests])
        self.metrics.prompt_tokens += sum(len(request.token_ids) for request in requests)
        return results

    def check_count(self, count: int, param: str) -> None:
        """ApiError 400 where one call asks for more than can ever run and wait."""
        params = self.llm.engine.params
        most = params.max_sequences + params.max_waiting
        if count > most:
            message = f"{param} has {count} entries; this server takes at most {most} in one call"
            raise ApiError(400, message, param=param, code="invalid_value")

    def check_taking(self) -> None:
        """ApiError 503 while the server ends."""
        if self.draining:
            raise shutting_down()

    def receipt(self, completion: Completion) -> dict[str, Any]:
        """The completion's receipt, with the model's name for its path."""
        assert completion.receipt is not None
        found = asdict(completion.receipt)
        found["model"] = {**found["model"], "path": self.name}
        return found

    @contextmanager
    def answering(self) -> Iterator[None]:
        """A request that was taken, up to the end of its answer. ApiError 503 where the server's end cuts it."""
        self._answering += 1
        self._idle.clear()
        try:
            yield
        except TryAgainError:
            self.check_taking()
            raise
        finally:
            self._answering -= 1
            if not self._answering:
                self._idle.set()

    async def drain(self, seconds: float) -> bool:
        """Take no new requests and wait for the answers of the others. False where the time ran out."""
        self.draining = True
        end = time.monotonic() + seconds
        with suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), seconds)
        # Only now the engine: a request may still be on its way to it, from a thread or between two uses of it.
        return await self.engine.drain(max(0.0, end - time.monotonic()))

    def warm_up(self) -> None:
        """Do what a first request would wait for: the chat template is compiled."""
        if self.llm.chat_template is not None:
            with suppress(Exception):  # whoever asks for a chat is told
                self.llm.chat_ids([{"role": "user", "content": "Hello"}])


def finish_of(reason: str) -> str:
    """OpenAI's finish_reason. ApiError for an answer that did not end by itself."""
    if reason not in FINISH:
        raise shutting_down() if reason == "cancelled" else ApiError(500, "the answer failed", code="engine_error")
    return FINISH[reason]


def score_of(choice: Choice) -> dict[str, float]:
    """What an answer of a beam search has beside OpenAI's fields: its `score`."""
    return {} if choice.score is None else {"score": choice.score}


async def together(works: Sequence[Coroutine[Any, Any, Result]]) -> list[Result]:
    """The results of all; the first failure cancels the others and is raised."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(work) for work in works]
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]
