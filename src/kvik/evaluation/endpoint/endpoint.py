"""`Endpoint`: a server that speaks OpenAI's protocol, as a model."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn, Self

from kvik.errors import DataError, ParameterError
from kvik.evaluation.endpoint.answers import EndpointAnswer, answer_of, fields_of
from kvik.evaluation.endpoint.scoring import (
    PATH,
    EndpointScore,
    Form,
    echo_body,
    find_form,
    named_tokens,
    refuse,
    score_of,
)
from kvik.evaluation.endpoint.tokens import ServerTokenizer
from kvik.evaluation.endpoint.transport import Refused, Sleep, Transport
from kvik.evaluation.model import TextTokens
from kvik.llm import as_prompts
from kvik.params import AnyParams, SamplingParams
from kvik.params.checks import integer
from kvik.text.conversation import Message
from kvik.text.tokenizer import check_text

__all__ = ["Endpoint", "EndpointInfo"]

_MODELS, _CHATS = "/v1/models", "/v1/chat/completions"


class _Card(NamedTuple):
    """A model as /v1/models has it. server: what owns it; context: tokens; None where that is not told."""

    name: str
    server: str | None
    context: int | None


@dataclass(frozen=True)
class EndpointInfo:
    """What is asked for answers. digest: of the address and the name: what stands behind them may change."""

    name: str
    digest: str
    context: Callable[[], int]

    @property
    def context_length(self) -> int:
        """Tokens that can be scored at once. ParameterError where the server does not say."""
        return self.context()


class Endpoint:
    """A model behind an OpenAI-compatible server: Kvik's, vLLM's, SGLang's, llama-server's and others.

    It generates; it scores given tokens where the server echoes prompts with their log-probabilities. Whole
    distributions, logits and best tokens by id are refused by name. Nothing is asked before it is needed. Safe to share
    between threads; use as a context manager, or call `close`.

    Args:
        url: http:// or https://, with or without /v1.
        model: its name there; None takes the server's only one.
        api_key: sent as a bearer token and never shown.
        tokenizer: the model's own (`kvik.text.tokenizer.Tokenizer`); None asks the server's /tokenize.
        timeout: seconds one answer may take. retries, parallel, seed, sleep: see `Transport`.
        context_length: tokens, where the server does not say.

    Raises ParameterError for what is refused (400, 401, 404 in the server's own words), DataError for answers that are
    broken or of other tokens, TryAgainError where the server is down, slow or too busy, after `retries` attempts more.
    """

    def __init__(
        self,
        url: str,
        model: str | None = None,
        *,
        api_key: str | None = None,
        tokenizer: TextTokens | None = None,
        timeout: float = 60.0,
        retries: int = 5,
        parallel: int = 8,
        context_length: int | None = None,
        seed: int = 0,
        sleep: Sleep | None = None,
    ) -> None:
        if model is not None and (not isinstance(model, str) or not model):
            raise ParameterError(f"model must be a name, got {model!r:.80}")
        if context_length is not None:
            integer("context_length", context_length, 2)
        self._transport = Transport(
            url, api_key=api_key, timeout=timeout, retries=retries, parallel=parallel, seed=seed, sleep=sleep
        )
        self.url = self._transport.url
        self._model, self._context = model, context_length
        self._lock = threading.RLock()
        self._card: _Card | None = None
        self._form: Form | None = None
        self._tokenizer = tokenizer
        self._server_tokenizer: ServerTokenizer | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Endpoint({self.url!r}, {self._model!r})"

    def close(self) -> None:
        """Let the connections go."""
        self._transport.close()

    @property
    def info(self) -> EndpointInfo:
        name = self._known_card().name
        digest = hashlib.sha256(f"{self.url}\0{name}".encode()).hexdigest()
        return EndpointInfo(f"{name} at {self.url}", digest, self._scored_at_once)

    @property
    def tokenizer(self) -> TextTokens:
        if self._tokenizer is not None:
            return self._tokenizer
        with self._lock:
            if self._server_tokenizer is None:
                self._server_tokenizer = ServerTokenizer(self._transport, self._known_card().name, self._token_name)
            return self._server_tokenizer

    def generate(
        self, prompts: str | Sequence[Any], params: AnyParams | Sequence[AnyParams] | None = None
    ) -> list[EndpointAnswer]:
        """One answer a prompt, in order, from /v1/completions.

        prompts: a string, a list of token ids, or a list of those. params: one for all or one a prompt; None is
        SamplingParams(). A field that the server is not known to honour is refused with ParameterError.
        """
        many = as_prompts(prompts)
        each = _params_of(params, len(many))
        bodies = [self._completion_body(prompt, one) for prompt, one in zip(many, each, strict=True)]
        where = self.url + PATH
        return self._transport.post_each(PATH, bodies, lambda i, value: answer_of(where, value, each[i], False))

    def chat(self, messages: Sequence[Message], params: AnyParams | None = None) -> EndpointAnswer:
        """The answer to a conversation, from /v1/chat/completions: a list of {"role": …, "content": …}."""
        (params,) = _params_of(params, 1)
        card = self._known_card()
        body = {"model": card.name, "messages": list(messages)}
        body |= fields_of(params, card.server, True, self.url)
        return answer_of(self.url + _CHATS, self._transport.post(_CHATS, body), params, True)

    def score(
        self, inputs: str | Sequence[Any], *, reduce: bool = True, top: int = 0, first: int | Sequence[int] = 1
    ) -> list[EndpointScore]:
        """Log-probabilities of the tokens `first` to the last of each text, or list of token ids; see EndpointScore.

        first: at least 1, at most the number of tokens; one for all, or one an input. reduce=False and top > 0 are
        refused: they ask for more than a server tells.
        """
        if not reduce:
            refuse("reduce=False")
        if top:
            refuse("top", "a server tells its best tokens by text, not by id; load the model itself")
        many = [self._ids(given) for given in as_prompts(inputs)]
        firsts = _firsts(first, [len(ids) for ids in many])
        where, known = self.url + PATH, self._known_bytes()
        asked = [i for i, ids in enumerate(many) if firsts[i] < len(ids)]
        if not asked:
            return [_nothing(ids, at) for ids, at in zip(many, firsts, strict=True)]
        name, form = self._known_card().name, self._known_form()
        scores = self._transport.post_each(
            PATH, [echo_body(name, many[i], form) for i in asked],
            lambda k, value: score_of(where, value, many[asked[k]], firsts[asked[k]], form, known),
        )  # fmt: skip
        found = dict(zip(asked, scores, strict=True))
        return [found[i] if i in found else _nothing(ids, firsts[i]) for i, ids in enumerate(many)]

    def score_rows(self, ids: Sequence[int], *, first: int = 1) -> Generator[NoReturn]:
        """Refused: no server tells whole distributions."""
        refuse("score_rows")

    def _completion_body(self, prompt: str | Sequence[int], params: AnyParams) -> dict[str, Any]:
        if isinstance(prompt, str):
            check_text(prompt, "prompt")
        card = self._known_card()
        given: str | list[int] = prompt if isinstance(prompt, str) else self._ids(prompt)
        body: dict[str, Any] = {"model": card.name, **fields_of(params, card.server, False, self.url)}
        if params.max_tokens is None:  # servers then take 16
            given = self._ids(prompt)
            room = self._context_length() - len(given)
            if room < 1:
                raise ParameterError(f"prompt has {len(given)} tokens: nothing of the context is left for an answer")
            body["max_tokens"] = room
        return body | {"prompt": given}

    def _ids(self, given: str | Sequence[int]) -> list[int]:
        ids = self.tokenizer.encode(given) if isinstance(given, str) else list(given)
        if not ids:
            raise ParameterError("an input has no tokens")
        for token in ids:
            if isinstance(token, bool) or not isinstance(token, int) or token < 0:
                raise ParameterError(f"an input must be a string or a list of token ids, got an item {token!r:.80}")
        return ids

    def _known_bytes(self) -> Callable[[int], bytes | None]:
        """A token's bytes, as far as they are known without asking the server."""
        if self._tokenizer is not None:
            piece = self._tokenizer.piece
            return lambda token: piece(token, token)
        with self._lock:
            own = self._server_tokenizer
        return (lambda token: None) if own is None else own.known

    def _known_card(self) -> _Card:
        with self._lock:
            if self._card is None:
                self._card = self._find_card()
            return self._card

    def _find_card(self) -> _Card:
        try:
            value = self._transport.get(_MODELS)
        except Refused as error:
            if self._model is None or error.status not in (404, 405):
                raise
            return _Card(self._model, None, None)
        listed = value.get("data") if isinstance(value, Mapping) else None
        if not isinstance(listed, list) or not all(isinstance(one, Mapping) for one in listed):
            raise DataError(f"{self.url}{_MODELS}: the answer has no list 'data' of objects")
        cards = {str(one.get("id")): one for one in listed}
        if self._model is None and len(cards) != 1:
            names = ", ".join(sorted(cards)[:20]) or "none"
            raise ParameterError(f"{self.url} has {len(cards)} models, give model=, one of: {names}")
        name = next(iter(cards)) if self._model is None else self._model
        alone = next(iter(cards.values())) if len(cards) == 1 else {}  # whose alias it may be; the server knows
        card = cards.get(name, alone)
        context, server = card.get("max_model_len"), card.get("owned_by")
        good = isinstance(context, int) and not isinstance(context, bool) and context > 1
        return _Card(name, server if isinstance(server, str) else None, context if good else None)

    def _known_form(self) -> Form:
        with self._lock:
            if self._form is None:
                self._form = find_form(self._transport, self._known_card().name)
            return self._form

    def _context_length(self) -> int:
        context = self._context or self._known_card().context
        if context is None:
            raise ParameterError(f"context_length: {self.url} does not say how many tokens its model takes; give it")
        return context

    def _scored_at_once(self) -> int:
        """Tokens of the context that a text to score may have: one that must be generated needs its place."""
        return self._context_length() - self._known_form().max_tokens

    def _token_name(self, token: int) -> str:
        """What the server calls a token where it echoes it."""
        form = self._known_form()
        value = self._transport.post(PATH, echo_body(self._known_card().name, (token,), form))
        tokens, _ = named_tokens(self.url + PATH, value)
        return tokens[0] if tokens else ""


def _nothing(ids: Sequence[int], first: int) -> EndpointScore:
    """Of an input none of whose tokens are asked for."""
    import numpy as np

    return EndpointScore(tuple(ids), first, np.empty(0))


def _firsts(first: int | Sequence[int], lengths: Sequence[int]) -> list[int]:
    found = [first] * len(lengths) if isinstance(first, int) else list(first)
    if len(found) != len(lengths):
        raise ParameterError(f"first has {len(found)} entries for {len(lengths)} inputs")
    for at, length in zip(found, lengths, strict=True):
        integer("first", at, 1, length)
    return found


def _params_of(params: AnyParams | Sequence[AnyParams] | None, count: int) -> list[AnyParams]:
    listed = [params or SamplingParams()] * count if params is None or isinstance(params, AnyParams) else list(params)
    if not all(isinstance(one, AnyParams) for one in listed):
        raise ParameterError(f"params must be SamplingParams, BeamParams or a list of these, got {params!r:.200}")
    if len(listed) != count:
        raise ParameterError(f"params has {len(listed)} entries for {count} prompts; give one, or one a prompt")
    return listed
