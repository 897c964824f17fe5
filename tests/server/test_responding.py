"""`Reply`: the order of a response's messages."""

from __future__ import annotations

import asyncio

import pytest

from kvik.server.errors import ApiError
from kvik.server.responding import Reply


def test_events_of_several_tasks_follow_one_start():
    sent = []

    async def send(message):
        await asyncio.sleep(0.01 if message["type"] == "http.response.start" else 0)  # as where the client is slow
        sent.append(message["type"])

    async def run():
        reply = Reply(send)
        await asyncio.gather(*(reply.events(f"data: {i}\n\n") for i in range(3)))

    asyncio.run(run())
    assert sent == ["http.response.start"] + ["http.response.body"] * 3


def test_a_start_that_was_not_sent_leaves_the_error_its_status():
    sent = []

    async def send(message):
        if not sent:
            sent.append(None)
            raise RuntimeError("not sent")
        sent.append(message)

    async def run():
        reply = Reply(send)
        with pytest.raises(RuntimeError):
            await reply.events("data: 1\n\n")
        await reply.error(ApiError(500, "broken"))

    asyncio.run(run())
    assert sent[1]["status"] == 500 and b"broken" in sent[2]["body"]
