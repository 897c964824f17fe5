"""Log-probabilities of given tokens from /v1/completions: a prompt that is echoed, with `logprobs`.

OpenAI's own servers gave them so; Kvik, vLLM and SGLang still do. Some want at least one generated token, or `logprobs`
above 0; what a server takes is found out once, with two tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

import numpy as np
from numpy.typing import NDArray

from kvik.errors import DataError, ParameterError
from kvik.evaluation.endpoint.answers import choices_of
from kvik.evaluation.endpoint.tokens import token_bytes
from kvik.evaluation.endpoint.transport import Refused, Transport

__all__ = ["FORMS", "PATH", "EndpointScore", "Form", "echo_body", "find_form", "named_tokens", "refuse", "score_of"]

PATH = "/v1/completions"
ABOVE_ZERO = 1e-3
"""A logarithm of a probability is rounded; above this it is none."""

_TOKEN_ID = "token_id:"

Bytes = Callable[[int], bytes | None]


class Form(NamedTuple):
    """How a server is asked: tokens generated besides, and best tokens told besides."""

    max_tokens: int
    logprobs: int


FORMS = (Form(0, 0), Form(0, 1), Form(1, 1))


def refuse(what: str, why: str = "a server tells single log-probabilities only; load the model itself") -> NoReturn:
    """ParameterError for what no endpoint gives."""
    raise ParameterError(f"{what}: {why}")


@dataclass(frozen=True)
class EndpointScore:
    """Log-probabilities of given tokens, in nats.

    logprobs [N - first] float64: entry i is of token first + i, given all before it. A server says -9999 for what is less.
    """

    token_ids: tuple[int, ...]
    first: int
    logprobs: NDArray[np.float64]

    @property
    def logsumexp(self) -> NDArray[np.float64]:
        refuse("logsumexp")

    @property
    def logits(self) -> NDArray[np.float32]:
        refuse("logits")

    @property
    def top(self) -> tuple[Any, ...]:
        refuse("top")


def echo_body(model: str, ids: Sequence[int], form: Form) -> dict[str, Any]:
    return {
        "model": model, "prompt": list(ids), "echo": True, "max_tokens": form.max_tokens, "logprobs": form.logprobs,
        "temperature": 0,
    }  # fmt: skip


def find_form(transport: Transport, model: str) -> Form:
    """The first form that the server answers. ParameterError where there is none."""
    why = "its answer has no log-probabilities of the prompt"
    for form in FORMS:
        try:
            value = transport.post(PATH, echo_body(model, (0, 1), form))
        except Refused as error:
            if error.status not in (400, 422):
                raise
            why = str(error).removeprefix(f"{transport.url}{PATH}: ")
            continue
        (choice,) = choices_of(transport.url + PATH, value, 1)
        table = choice.get("logprobs")
        found = table.get("token_logprobs") if isinstance(table, Mapping) else None
        if isinstance(found, list) and len(found) >= 2:
            return form
    raise ParameterError(f"{transport.url}{PATH}: the server scores no given tokens (echo with logprobs): {why}")


def named_tokens(where: str, value: Any) -> tuple[list[str], list[float | None]]:
    """The names of an echo's tokens and their log-probabilities, checked one by one."""
    (choice,) = choices_of(where, value, 1)
    table = choice.get("logprobs")
    if not isinstance(table, Mapping):
        raise DataError(f"{where}: the answer has no choices[0].logprobs")
    for name in ("tokens", "token_logprobs"):
        if not isinstance(table.get(name), list):
            raise DataError(f"{where}: the answer has no choices[0].logprobs.{name}")
    tokens, logprobs = table["tokens"], table["token_logprobs"]
    if len(tokens) != len(logprobs):
        raise DataError(f"{where}: the answer has {len(tokens)} tokens and {len(logprobs)} token_logprobs")
    for index, token in enumerate(tokens):
        if not isinstance(token, str):
            raise DataError(f"{where}: choices[0].logprobs.tokens[{index}] is no string")
    for index, logprob in enumerate(logprobs):
        number = isinstance(logprob, int | float) and not isinstance(logprob, bool)
        if not (number and logprob <= ABOVE_ZERO or index == 0 and logprob is None):
            raise DataError(f"{where}: token_logprobs[{index}] must be a logarithm of a probability, got {logprob!r:.80}")
    return tokens, logprobs


def score_of(where: str, value: Any, ids: Sequence[int], first: int, form: Form, known: Bytes) -> EndpointScore:
    """What an echo says of the tokens. DataError where it is of others, as far as their bytes are known."""
    tokens, logprobs = named_tokens(where, value)
    _check_count(where, value, len(tokens), len(ids), form)
    if logprobs[0] is not None:
        raise DataError(f"{where}: the first token has a log-probability, {logprobs[0]}: something stands before it")
    for index, (name, token) in enumerate(zip(tokens, ids, strict=False)):
        if not _is_named(name, token, known(token), index == 0):
            raise DataError(f"{where}: token {index} of the answer is {name!r:.80}, not the one of id {token}")
    return EndpointScore(tuple(ids), first, np.array(logprobs[first : len(ids)], np.float64))


def _check_count(where: str, value: Mapping[str, Any], told: int, wanted: int, form: Form) -> None:
    """The answer must be of the prompt's tokens, and of none but those and what was generated."""
    usage = value.get("usage")
    counts = usage if isinstance(usage, Mapping) else {}
    prompt, generated = counts.get("prompt_tokens", wanted), counts.get("completion_tokens", form.max_tokens)
    if prompt != wanted:
        raise DataError(f"{where}: the server scored {prompt!r:.40} tokens, {wanted} were asked for")
    if told not in (wanted, wanted + form.max_tokens) and told - wanted != generated:
        raise DataError(f"{where}: the answer tells of {told} tokens, {wanted} were asked for")


def _is_named(name: str, token: int, piece: bytes | None, begins: bool) -> bool:
    """Whether an echo's name may be a token's. Spaces around it do not count: servers differ in them."""
    if name.startswith(_TOKEN_ID):
        return name == f"{_TOKEN_ID}{token}"
    said = token_bytes(name)
    if piece is None or said is None or (begins and not said):  # not known; no whole UTF-8; a special token's text
        return True
    try:
        text = piece.decode()
    except UnicodeDecodeError:
        return not said or said == piece
    return said.decode("utf-8", "replace").strip() == text.strip()
