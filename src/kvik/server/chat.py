"""/v1/chat/completions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvik.async_llm import Answer
from kvik.engine.request import Choice, Chunk, Request
from kvik.errors import ParameterError
from kvik.server.body import Fields, JsonObject
from kvik.server.errors import ApiError, api_error
from kvik.server.events import Events, follow, usage_of
from kvik.server.fields import GENERATION, Common, cache_of, chat_fields, check_policy, check_top, generation_params
from kvik.server.formats import names
from kvik.server.logprobs import chat_logprobs
from kvik.server.responding import Reply
from kvik.server.service import Service, finish_of, score_of

__all__ = ["FIELDS", "RENAMED", "answer_chat", "conversation", "conversation_ids"]

FIELDS = frozenset((*GENERATION, "messages", "tools", "max_tokens", "top_logprobs", "cache_salt"))
RENAMED = {"logprobs": "top_logprobs", "prompt": "messages"}

_OPTIONAL = ("name", "refusal", "annotations", "audio", "function_call", "tool_calls", "tool_call_id")


async def answer_chat(service: Service, body: JsonObject, reply: Reply) -> None:
    """Check, start, and answer whole or in events."""
    fields, common = chat_fields(body)
    service.check_model(fields.require("model"))
    try:
        params = generation_params(fields, common.max_tokens, _top_logprobs(fields))
        ids = await conversation_ids(service, fields)
        cache = cache_of(fields, service.llm.engine.admission)
        service.check_length(len(ids), 1, "messages", cache)
        check_policy(cache, len(ids))
        request = await service.request(ids, params, common.salt, cache)
    except ParameterError as error:
        raise api_error(error, FIELDS, RENAMED | names(fields)) from None
    async with service.started_all([request]) as (answer,):
        if common.stream:
            await _stream(service, answer, common, reply)
        else:
            await reply.json(await _whole(service, answer, common))


def _top_logprobs(fields: Fields) -> int | None:
    wanted, top = fields.take("logprobs", bool, False), check_top(fields.take("top_logprobs", int), "top_logprobs")
    if top is not None and not wanted:
        raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs", code="invalid_value")
    return (top or 0) if wanted else None


async def conversation_ids(service: Service, fields: Fields) -> tuple[int, ...]:
    """A body's messages and tools as token ids, however many."""
    llm = service.llm
    if llm.chat_template is None:
        raise ApiError(
            400, f"{service.name} has no chat template; use /v1/completions", param="messages", code="no_template"
        )
    messages, tools = conversation(fields.require("messages")), fields.take("tools", list)
    choice = fields.given.get("tool_choice", "auto")
    if choice not in ("auto", "none"):
        message = "tool_choice must be auto or none: what the model writes is not constrained"
        raise ApiError(400, message, param="tool_choice", code="unsupported_parameter")
    if not tools or choice == "none":  # a model that is to call none is not told of any
        tools = None
    size = sum(len(message.get("content") or "") for message in messages) if tools is None else 1 << 20
    ids = await service.off_loop(size, lambda: llm.chat_ids(messages, tools))
    return tuple(ids)


def conversation(messages: Any) -> list[Any]:
    """Messages with content in parts joined and keys that say null left out; the chat template checks the rest."""
    if not isinstance(messages, list):
        raise ApiError(400, "messages must be a list", param="messages", code="invalid_type")
    return [_message(message, f"messages[{index}]") for index, message in enumerate(messages)]


def _message(message: Any, name: str) -> Any:
    if not isinstance(message, Mapping):
        raise ApiError(400, f"{name} must be an object", param=name, code="invalid_type")
    plain = {key: value for key, value in message.items() if value is not None or key not in _OPTIONAL}
    content = plain.get("content")
    if isinstance(content, list):
        plain["content"] = "".join(_part(part, f"{name}.content[{index}]") for index, part in enumerate(content))
    elif content is not None and not isinstance(content, str):
        raise ApiError(
            400, f"{name}.content must be a string or a list of parts", param=f"{name}.content", code="invalid_type"
        )
    return plain


def _part(part: Any, name: str) -> str:
    if not isinstance(part, Mapping) or part.get("type") != "text":
        kind = part.get("type") if isinstance(part, Mapping) else part
        raise ApiError(400, f"{name} must be of type text, got {kind!r:.100}", param=name, code="unsupported_parameter")
    text = part.get("text")
    if not isinstance(text, str) or set(part) > {"type", "text"}:
        raise ApiError(
            400, f"{name} must have type and text, a string, and nothing else", param=name, code="invalid_value"
        )
    return text


async def _stream(service: Service, answer: Answer, common: Common, reply: Reply) -> None:
    events = Events(service.head("chatcmpl-", "chat.completion.chunk"), True, common.include_usage)

    def noted(chunk: Chunk) -> dict[str, Any]:
        return chat_logprobs(service.llm.tokenizer, chunk.logprobs or ())

    usage = await follow(answer, 0, events, reply, service.metrics, noted)
    more: dict[str, Any] = {"usage": usage_of([usage])} if common.include_usage else {}
    if common.receipt:
        more["receipt"] = service.receipt(answer.completion())
    if more:
        await reply.events(events.last(more))
    await reply.done()


async def _whole(service: Service, answer: Answer, common: Common) -> dict[str, Any]:
    completion = await service.completion(answer)
    found = {
        **service.head("chatcmpl-", "chat.completion"),
        "choices": [_choice(service, answer.request, choice) for choice in completion.choices],
        "usage": usage_of([completion.usage]),
    }
    if common.receipt:
        found["receipt"] = service.receipt(completion)
    return found


def _choice(service: Service, request: Request, choice: Choice) -> dict[str, Any]:
    noted = None if choice.logprobs is None else chat_logprobs(service.llm.tokenizer, choice.logprobs)
    return {
        "index": choice.index,
        "message": {"role": "assistant", "content": choice.text},
        "logprobs": noted,
        "finish_reason": finish_of(choice.finish_reason),
        **score_of(choice),
    }
