"""What is asked for an answer, and what comes: OpenAI's completions and chats as `kvik` knows them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple

from kvik.errors import DataError, ParameterError
from kvik.params import AnyParams, BeamParams, Grammar, SamplingParams

__all__ = ["EndpointAnswer", "EndpointChoice", "NamedToken", "answer_of", "choices_of", "fields_of"]


class _Known(NamedTuple):
    """What a server honours beside OpenAI's fields: always said, as its defaults are its own; said where it is not neutral."""

    always: tuple[str, ...] = ()
    more: tuple[str, ...] = ()


_OPENAI = ("temperature", "top_p", "presence_penalty", "frequency_penalty")
_OPENAI_MORE = ("n", "seed", "stop", "logit_bias", "logprobs", "max_tokens")
_EVERY = tuple(field.name for field in fields(SamplingParams) if field.name != "trace")
_SERVERS: Mapping[str, _Known] = {
    "kvik": _Known((), _EVERY),
    "vllm": _Known(
        ("top_k", "min_p", "repetition_penalty"), ("min_tokens", "bad_words", "stop_token_ids", "ignore_eos")
    ),
    "llamacpp": _Known(("top_k", "min_p", "typical_p"), ("ignore_eos",)),
}
"""By what a server calls itself in /v1/models (`owned_by`)."""
_TELLING = ("kvik", "vllm")
"""Those that tell the log-probabilities of an answer at no cost, and its token ids if asked."""


class NamedToken(NamedTuple):
    """A token of an answer: its text as the server has it, and the best ones at its place by theirs."""

    token: str
    logprob: float
    top: Mapping[str, float]


@dataclass(frozen=True)
class EndpointChoice:
    """One sample. finish_reason: OpenAI's word. logprobs: None unless asked for."""

    index: int
    text: str
    finish_reason: str | None
    logprobs: tuple[NamedToken, ...] | None
    given_ids: tuple[int, ...] | None
    given_logprob: float | None

    @property
    def token_ids(self) -> tuple[int, ...]:
        """ParameterError where the server does not tell them."""
        if self.given_ids is None:
            raise ParameterError("token_ids: this server does not tell an answer's token ids")
        return self.given_ids

    @property
    def cumulative_logprob(self) -> float:
        """Sum of its tokens' log-probabilities. ParameterError where the server does not tell them."""
        if self.given_logprob is None:
            raise ParameterError("cumulative_logprob: this server tells it only with logprobs")
        return self.given_logprob


@dataclass(frozen=True)
class EndpointAnswer:
    """A request's answer. text: the first choice's. usage: tokens, as the server counts them."""

    text: str
    choices: tuple[EndpointChoice, ...]
    usage: Mapping[str, Any]


def fields_of(params: AnyParams, server: str | None, chat: bool, where: str) -> dict[str, Any]:
    """The fields of a request's body. ParameterError names what this server is not known to honour.

    server: what it calls itself; None: it does not say.
    """
    if params.trace:
        raise ParameterError("trace: an endpoint does not tell what its tokens were drawn from")
    known = _SERVERS.get(server or "", _Known())
    given = _beam_fields(params, server, where) if isinstance(params, BeamParams) else _sampling(params, known, where)
    given = {name: _as_json(value) for name, value in given.items() if value is not None}
    top = given.pop("logprobs", 0 if server in _TELLING else None)
    if top is not None:
        given |= {"logprobs": True, "top_logprobs": top} if chat else {"logprobs": top}
    if server == "kvik":
        given["receipt"] = True
    elif server == "vllm":
        given["return_token_ids"] = True
    return given


def _sampling(params: SamplingParams, known: _Known, where: str) -> dict[str, Any]:
    given = {name: getattr(params, name) for name in (*_OPENAI, *known.always)}
    for field in fields(params):
        value = getattr(params, field.name)
        if field.name in given or value == field.default:
            continue
        if field.name not in (*_OPENAI_MORE, *known.more):
            raise ParameterError(f"{field.name}: {where} is not known to honour it")
        given[field.name] = value
    if "logit_bias" in given:
        given["logit_bias"] = {str(token): bias for token, bias in params.logit_bias}
    return given


def _beam_fields(params: BeamParams, server: str | None, where: str) -> dict[str, Any]:
    if server != "kvik":
        raise ParameterError(f"num_beams: {where} is not known to honour it")
    given = {field.name: getattr(params, field.name) for field in fields(params)}
    changed = {field.name for field in fields(params) if given[field.name] != field.default}
    found = {name: given[name] for name in changed - {"num_return_sequences", "trace"}}
    return found | {"num_beams": params.num_beams, "n": params.num_return_sequences}


def _as_json(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    return asdict(value) if isinstance(value, Grammar) else value


def choices_of(where: str, value: Any, count: int) -> list[Mapping[str, Any]]:
    """An answer's choices in order. DataError where they are not `count`."""
    listed = value.get("choices") if isinstance(value, Mapping) else None
    if not isinstance(listed, list):
        raise DataError(f"{where}: the answer has no list 'choices'")
    if len(listed) != count:
        raise DataError(f"{where}: the answer has {len(listed)} choices, {count} were asked for")
    for index, choice in enumerate(listed):
        if not isinstance(choice, Mapping):
            raise DataError(f"{where}: choices[{index}] is no object")
    if count > 1:
        if sorted(str(choice.get("index")) for choice in listed) != sorted(map(str, range(count))):
            raise DataError(f"{where}: the choices' index does not run from 0 to {count - 1}")
        listed.sort(key=lambda choice: int(choice["index"]))
    return listed


def answer_of(where: str, value: Any, params: AnyParams, chat: bool) -> EndpointAnswer:
    """What a server answered. DataError names what is missing."""
    listed = choices_of(where, value, params.num_answers)
    receipt = value.get("receipt")
    outputs = receipt.get("outputs") if isinstance(receipt, Mapping) else None
    choices = []
    for index, choice in enumerate(listed):
        ids = outputs[index] if isinstance(outputs, list) and len(outputs) == len(listed) else choice.get("token_ids")
        noted = _noted(where, choice, chat)
        choices.append(
            EndpointChoice(
                index, _text(where, index, choice, chat), choice.get("finish_reason"),
                noted if params.logprobs is not None else None, _ids(ids),
                None if noted is None else sum(one.logprob for one in noted),
            )  # fmt: skip
        )
    usage = value.get("usage")
    return EndpointAnswer(choices[0].text, tuple(choices), usage if isinstance(usage, Mapping) else {})


def _text(where: str, index: int, choice: Mapping[str, Any], chat: bool) -> str:
    name, text = "text", choice.get("text")
    if chat:
        message = choice.get("message")
        name, text = "message.content", message.get("content", "") if isinstance(message, Mapping) else None
        if isinstance(message, Mapping) and text is None:
            text = ""  # a call of a tool
    if not isinstance(text, str):
        raise DataError(f"{where}: the answer has no choices[{index}].{name}")
    return text


def _ids(ids: Any) -> tuple[int, ...] | None:
    good = isinstance(ids, list) and all(isinstance(token, int) and not isinstance(token, bool) for token in ids)
    return tuple(ids) if good else None


def _noted(where: str, choice: Mapping[str, Any], chat: bool) -> tuple[NamedToken, ...] | None:
    """A choice's tokens; None where it does not tell of them."""
    table = choice.get("logprobs")
    if table is None:
        return None
    try:
        if chat:
            return tuple(
                NamedToken(
                    str(one["token"]), float(one["logprob"]),
                    {str(o["token"]): float(o["logprob"]) for o in one.get("top_logprobs") or ()},
                )
                for one in table["content"]
            )  # fmt: skip
        tops = table.get("top_logprobs") or [None] * len(table["tokens"])
        return tuple(
            NamedToken(str(token), float(logprob), dict(top or {}))
            for token, logprob, top in zip(table["tokens"], table["token_logprobs"], tops, strict=True)
        )
    except (KeyError, TypeError, ValueError, AttributeError):
        raise DataError(f"{where}: choices[{choice.get('index', 0)!r:.20}].logprobs is malformed") from None
