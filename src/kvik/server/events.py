"""Server-sent events of answers as they come. What the events of one response share is written once, not per token."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from json.encoder import encode_basestring  # one string as JSON, without a JSONEncoder
from typing import Any

from kvik.async_llm import Answer
from kvik.engine.request import Chunk, Usage
from kvik.server.metrics import Metrics
from kvik.server.responding import Reply
from kvik.server.service import finish_of

__all__ = ["Events", "follow", "usage_of"]

Noted = Callable[[Chunk], Any]


class Events:
    """Writes the events of one response.

    Args:
        head: what each begins with.
        chat: as chat.completion.chunk, else as text_completion.
        usage: whether the response ends with its usage; the others then say null.
    """

    def __init__(self, head: Mapping[str, Any], chat: bool, usage: bool) -> None:
        self._head = "data: " + json.dumps(head)[:-1]
        self._first = '"delta":{"role":"assistant","content":' if chat else '"text":'
        self._next = '"delta":{"content":' if chat else '"text":'
        self._close = '},"logprobs":' if chat else ',"logprobs":'
        self._tail = ',"usage":null}\n\n' if usage else "}\n\n"
        self._told: set[int] = set()

    def piece(self, index: int, text: str, logprobs: Any = None, finish: str | None = None) -> str:
        """A piece of choice `index`."""
        content = self._next
        if index not in self._told:
            self._told.add(index)
            content = self._first
        noted = "null" if logprobs is None else json.dumps(logprobs)
        end = "null" if finish is None else f'"{finish}"'
        return (
            f'{self._head},"choices":[{{"index":{index},{content}{encode_basestring(text)}{self._close}{noted}'
            f',"finish_reason":{end}}}]{self._tail}'
        )

    def last(self, more: Mapping[str, Any]) -> str:
        """The event after the choices: usage, receipt."""
        return f'{self._head},"choices":[],{json.dumps(more)[1:]}\n\n'


async def follow(
    answer: Answer, base: int, events: Events, reply: Reply, metrics: Metrics, noted: Noted | None = None
) -> Usage | None:
    """Send an answer's chunks as they come, its samples as choices from `base` on; its usage.

    noted: the logprobs of a chunk, as they are sent.
    """
    usage = None
    while chunks := await answer.ready():
        pieces = []
        for chunk in chunks:
            finish = None
            if chunk.finish_reason is not None:
                finish = finish_of(chunk.finish_reason)
                metrics.answer(finish)
            if chunk.stats is not None:
                metrics.request(chunk.stats)
            usage = chunk.usage or usage
            logprobs = noted(chunk) if noted is not None and chunk.logprobs else None
            if chunk.text or finish or logprobs is not None:
                pieces.append(events.piece(base + chunk.index, chunk.text, logprobs, finish))
        if pieces:
            await reply.events("".join(pieces))
    return usage


def usage_of(usages: Sequence[Usage | None], prompt_tokens: int = 0) -> dict[str, Any]:
    """OpenAI's usage of some requests, and what their keys and values took, all together.

    prompt_tokens: of prompts that were only scored, of whose cache nothing is said.
    """
    known = [usage for usage in usages if usage is not None]
    prompt = prompt_tokens + sum(usage.prompt_tokens for usage in known)
    generated = sum(usage.completion_tokens for usage in known)
    kept = {
        name: sum(getattr(usage, name) for usage in known)
        for name in ("kv_bytes_now", "kv_bytes_peak", "kv_tokens_kept")
    }
    return {
        "prompt_tokens": prompt,
        "completion_tokens": generated,
        "total_tokens": prompt + generated,
        "prompt_tokens_details": {"cached_tokens": sum(usage.cached_tokens for usage in known)},
        **(kept if known else {}),
    }
