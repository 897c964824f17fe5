"""/tokenize and /detokenize."""

from __future__ import annotations

from typing import Any

from kvik.server.body import Fields, JsonObject
from kvik.server.chat import conversation_ids
from kvik.server.errors import ApiError
from kvik.server.responding import Reply
from kvik.server.service import Service

__all__ = ["FIELDS", "detokenize", "tokenize"]

FIELDS = frozenset(("prompt", "messages", "tools", "tokens"))


async def tokenize(service: Service, body: JsonObject, reply: Reply) -> None:
    """The token ids of a text, or of a conversation as the model would be given it."""
    used = ("model", "prompt", "messages", "tools", "tool_choice", "add_special_tokens", "return_token_strs")
    fields = Fields(body, used, {})
    _check_model(service, fields)
    if ("prompt" in fields.given) == ("messages" in fields.given):
        raise ApiError(400, "give prompt or messages, one of them", param="prompt", code="invalid_value")
    tokenizer = service.llm.tokenizer
    add_special = fields.take("add_special_tokens", bool)
    if "messages" in fields.given:
        if add_special is not None:
            message = "add_special_tokens goes with prompt; the chat template decides for messages"
            raise ApiError(400, message, param="add_special_tokens", code="invalid_value")
        ids = list(await conversation_ids(service, fields))
    else:
        for name in ("tools", "tool_choice"):
            if name in fields.given:
                raise ApiError(400, f"{name} goes with messages", param=name, code="invalid_value")
        text = fields.take("prompt", str)
        ids = await service.off_loop(
            len(text), lambda: tokenizer.encode(text, add_special=True if add_special is None else add_special)
        )
    found: dict[str, Any] = {"count": len(ids), "max_model_len": service.info.context_length, "tokens": ids}
    if fields.take("return_token_strs", bool, False):
        found["token_strs"] = [tokenizer.token_text(token) for token in ids]
    await reply.json(found)


async def detokenize(service: Service, body: JsonObject, reply: Reply) -> None:
    """The text of token ids, special tokens included."""
    fields = Fields(body, ("model", "tokens"), {})
    _check_model(service, fields)
    fields.require("tokens")
    tokens = fields.take("tokens", list)
    for index, token in enumerate(tokens):
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < service.info.vocab_size:
            message = f"tokens[{index}] must be in [0, {service.info.vocab_size - 1}], got {token!r:.100}"
            raise ApiError(400, message, param=f"tokens[{index}]", code="invalid_value")
    text = await service.off_loop(len(tokens), lambda: service.llm.tokenizer.decode(tokens))
    await reply.json({"prompt": text})


def _check_model(service: Service, fields: Fields) -> None:
    if "model" in fields.given:
        service.check_model(fields.given["model"])
