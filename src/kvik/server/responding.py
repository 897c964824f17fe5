"""Responses that end when the client leaves, and what happens when something fails before or within one."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Container, Mapping
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from kvik.server.errors import ApiError, api_error, report_defect

__all__ = ["Reply", "Respond"]

_JSON, _EVENTS = "application/json", "text/event-stream; charset=utf-8"


class Reply:
    """The way back to one client: a whole JSON value, or events one after another, from one task or several.

    Attributes:
        begun: the response's start was sent.
    """

    def __init__(self, send: Send) -> None:
        self._send = send
        self.begun = False
        self._beginning = asyncio.Lock()

    async def json(self, value: Any, status: int = 200) -> None:
        """The whole response."""
        await self.whole(json.dumps(value, ensure_ascii=False, allow_nan=False).encode(), status)

    async def whole(self, body: bytes, status: int, headers: Mapping[str, str] | None = None) -> None:
        """The whole response."""
        await self._begin(status, _JSON, {"content-length": str(len(body)), **(headers or {})})
        await self._send({"type": "http.response.body", "body": body})

    async def events(self, text: str) -> None:
        """Some more events, in one piece; the first begins the response."""
        if not self.begun:
            async with self._beginning:
                if not self.begun:  # another task's events may have come first
                    # Proxies are asked to hand on each piece at once.
                    await self._begin(200, _EVENTS, {"cache-control": "no-cache", "x-accel-buffering": "no"})
        await self._send({"type": "http.response.body", "body": text.encode(), "more_body": True})

    async def done(self) -> None:
        """The end of the events."""
        await self._send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})

    async def error(self, error: ApiError) -> None:
        """The error object: as the response, or as its last event."""
        if not self.begun:
            await self.whole(error.body(), error.status, error.headers)
        else:
            await self.events(f"data: {error.body().decode()}\n\n")
            await self.done()

    async def _begin(self, status: int, content: str, headers: Mapping[str, str]) -> None:
        fields = {"content-type": content, **headers}
        pairs = [(name.lower().encode(), value.encode()) for name, value in fields.items()]
        await self._send({"type": "http.response.start", "status": status, "headers": pairs})
        self.begun = True


class Respond(Response):
    """Runs `work` until it is done or the client has left, which cancels it.

    fields, renamed: as in `api_error`, for what `work` raises.
    """

    def __init__(
        self,
        work: Callable[[Reply], Awaitable[None]],
        fields: Container[str] = (),
        renamed: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__()
        self._work, self._fields, self._renamed = work, fields, renamed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        working = asyncio.ensure_future(self._run(Reply(send)))
        leaving = asyncio.ensure_future(_gone(receive))
        try:
            await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (working, leaving):
                task.cancel()
            await asyncio.gather(working, leaving, return_exceptions=True)

    async def _run(self, reply: Reply) -> None:
        try:
            await self._work(reply)
        except Exception as error:
            told = api_error(error, self._fields, self._renamed)
            if told.status >= 500 and not isinstance(error, ApiError):
                report_defect(error)
            await reply.error(told)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
