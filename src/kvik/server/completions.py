"""/v1/completions: several prompts at once, echo, and log-probabilities of what is given and what is generated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from kvik.async_llm import Answer
from kvik.engine.request import Chunk, Completion, Request, ScoreRequest, ScoreResult, Usage
from kvik.errors import ParameterError
from kvik.params import AnyParams, CacheParams
from kvik.server.body import Fields, JsonObject
from kvik.server.errors import ApiError, api_error
from kvik.server.events import Events, follow, usage_of
from kvik.server.fields import (
    GENERATION,
    Common,
    cache_of,
    check_policy,
    check_top,
    completion_fields,
    generation_params,
)
from kvik.server.formats import names
from kvik.server.logprobs import TokenTable
from kvik.server.responding import Reply
from kvik.server.service import Service, finish_of, score_of, together

__all__ = ["FIELDS", "answer_completion", "prompts_of"]

FIELDS = frozenset((*GENERATION, "prompt", "max_tokens", "logprobs", "cache_salt"))

Prompt = str | list[int]


@dataclass(frozen=True)
class Job:
    """One prompt of the call, checked. text: what echo gives; the others are None where they are not needed."""

    ids: tuple[int, ...]
    text: str
    request: Request | None
    score: ScoreRequest | None


async def answer_completion(service: Service, body: JsonObject, reply: Reply) -> None:
    """Check all prompts, start them together, and answer whole or in events."""
    fields, common = completion_fields(body)
    service.check_model(fields.require("model"))
    echo, top = fields.take("echo", bool, False), check_top(fields.take("logprobs", int), "logprobs")
    only_score = echo and common.max_tokens == 0
    if only_score and common.receipt:
        raise ApiError(
            400, "receipt needs generated tokens, and max_tokens is 0", param="receipt", code="invalid_value"
        )
    params = generation_params(fields, 1 if only_score else common.max_tokens, top)
    cache = cache_of(fields, service.llm.engine.admission)
    jobs = await _jobs(service, fields, _Asked(params, cache, common.salt, echo, only_score))
    scored = await _scores(service, jobs)
    answering = _Answering(service, jobs, scored, params, common, echo)
    if only_score:
        await answering.score_only(reply)
        return
    async with service.started_all([job.request for job in jobs if job.request is not None]) as answers:
        await (answering.stream if common.stream else answering.whole)(answers, reply)


def prompts_of(value: Any) -> list[Prompt]:
    """A string, a list of strings, a list of token ids or a list of those, as a list of prompts."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if all(_is_id(one) for one in value):
            return [value]
        for index, one in enumerate(value):
            if not (isinstance(one, str) or (isinstance(one, list) and all(_is_id(token) for token in one))):
                raise ApiError(
                    400, f"prompt[{index}] must be a string or a list of token ids", param=f"prompt[{index}]",
                    code="invalid_type",
                )  # fmt: skip
        return value
    what = "is empty" if value == [] else "must be a string, a list of strings, token ids or a list of lists of these"
    raise ApiError(400, f"prompt {what}", param="prompt", code="invalid_type")


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass(frozen=True)
class _Asked:
    """What is asked of every prompt of the call."""

    params: AnyParams
    cache: CacheParams
    salt: str
    echo: bool
    only_score: bool

    @property
    def scored_cache(self) -> CacheParams:
        """Of an echoed prompt's scores: a policy that first evicts behind the prompt changes none of them."""
        scorer = self.cache.scorer
        if self.only_score or scorer is None or scorer.at is not None:
            return self.cache
        return replace(self.cache, policy=None, layers="uniform", heads="uniform")


async def _jobs(service: Service, fields: Fields, asked: _Asked) -> list[Job]:
    prompts = prompts_of(fields.require("prompt"))
    service.check_count(len(prompts), "prompt")
    whole = isinstance(fields.given["prompt"], str) or len(prompts) == 1
    jobs = []
    for index, prompt in enumerate(prompts):
        name = "prompt" if whole else f"prompt[{index}]"
        try:
            jobs.append(await _job(service, prompt, name, asked))
        except ParameterError as error:
            raise api_error(error, FIELDS | {name}, {"prompt": name, "text": name, **names(fields)}) from None
    return jobs


async def _job(service: Service, prompt: Prompt, name: str, asked: _Asked) -> Job:
    llm, params, cache = service.llm, asked.params, asked.cache
    ids = await service.ids(prompt, name, 0 if asked.only_score else 1, cache)
    check_policy(cache, None if asked.only_score else len(ids))
    request = None if asked.only_score else await service.request(ids, params, asked.salt, cache)
    score = None
    if asked.echo and (asked.only_score or params.logprobs is not None):
        score = llm.score_request(ids, top=params.logprobs or 0, salt=asked.salt, cache=asked.scored_cache)
    text = ""
    if asked.echo:
        text = prompt if isinstance(prompt, str) else llm.tokenizer.decode(ids, skip_special=True)
    return Job(ids, text, request, score if params.logprobs is not None else None)


async def _scores(service: Service, jobs: Sequence[Job]) -> list[ScoreResult | None]:
    results = iter(await service.score_all([job.score for job in jobs if job.score is not None]))
    return [None if job.score is None else next(results) for job in jobs]


class _Answering:
    """One call on its way out. Choice p * n + i is sample i of prompt p."""

    def __init__(
        self,
        service: Service,
        jobs: Sequence[Job],
        scored: Sequence[ScoreResult | None],
        params: AnyParams,
        common: Common,
        echo: bool,
    ) -> None:
        self.service, self.jobs, self.scored = service, jobs, scored
        self.params, self.common, self.echo = params, common, echo
        self.head = service.head("cmpl-", "text_completion")

    def _table(self, prompt: int) -> TokenTable | None:
        """Where the log-probabilities of one sample go, those of an echoed prompt first."""
        if self.params.logprobs is None:
            return None
        table = TokenTable(self.service.llm.tokenizer, self.params.logprobs)
        scored = self.scored[prompt]
        if scored is not None:
            table.prompt(scored)
        else:
            table.skip(self.jobs[prompt].ids)
        return table

    async def score_only(self, reply: Reply) -> None:
        """The prompts with their log-probabilities; nothing is generated."""
        choices = []
        for prompt, job in enumerate(self.jobs):
            table = self._table(prompt)
            noted = None if table is None else table.take()
            choices += [(prompt * self.params.num_answers + i, job.text, noted) for i in range(self.params.num_answers)]
        self.service.metrics.answer("length", len(choices))
        usage = usage_of([], sum(len(job.ids) for job in self.jobs))
        if not self.common.stream:
            listed = [
                {"index": index, "text": text, "logprobs": noted, "finish_reason": "length"}
                for index, text, noted in choices
            ]
            await reply.json({**self.head, "choices": listed, "usage": usage})
            return
        events = Events(self.head, False, self.common.include_usage)
        await reply.events("".join(events.piece(*choice, "length") for choice in choices))
        if self.common.include_usage:
            await reply.events(events.last({"usage": usage}))
        await reply.done()

    async def whole(self, answers: Sequence[Answer], reply: Reply) -> None:
        completions = await self.service.completions(answers)
        choices = []
        for prompt, completion in enumerate(completions):
            for choice in completion.choices:
                table = self._table(prompt)
                if table is not None:
                    table.generated(choice.logprobs or ())
                choices.append({
                    "index": prompt * self.params.num_answers + choice.index,
                    "text": self.jobs[prompt].text + choice.text,
                    "logprobs": None if table is None else table.take(),
                    "finish_reason": finish_of(choice.finish_reason),
                    **score_of(choice),
                })  # fmt: skip
        found = {**self.head, "choices": choices, "usage": usage_of([one.usage for one in completions])}
        if self.common.receipt:
            found["receipt"] = _receipts(self.service, completions)
        await reply.json(found)

    async def stream(self, answers: Sequence[Answer], reply: Reply) -> None:
        events = Events(self.head, False, self.common.include_usage)
        usages = await together([self._follow(p, answer, events, reply) for p, answer in enumerate(answers)])
        more: dict[str, Any] = {"usage": usage_of(usages)} if self.common.include_usage else {}
        if self.common.receipt:
            more["receipt"] = _receipts(self.service, [answer.completion() for answer in answers])
        if more:
            await reply.events(events.last(more))
        await reply.done()

    async def _follow(self, prompt: int, answer: Answer, events: Events, reply: Reply) -> Usage | None:
        n, base = self.params.num_answers, prompt * self.params.num_answers
        tables = [self._table(prompt) for _ in range(n)] if self.params.logprobs is not None else []
        if self.echo:
            first = [table.take() if table is not None else None for table in tables] or [None] * n
            text = self.jobs[prompt].text
            await reply.events("".join(events.piece(base + i, text, first[i]) for i in range(n)))

        def noted(chunk: Chunk) -> Any:
            table = tables[chunk.index]
            assert table is not None
            table.generated(chunk.logprobs or ())
            return table.take()

        return await follow(answer, base, events, reply, self.service.metrics, noted)


def _receipts(service: Service, completions: Sequence[Completion]) -> Any:
    """The receipt; of several prompts, theirs in order."""
    receipts = [service.receipt(one) for one in completions]
    return receipts[0] if len(receipts) == 1 else receipts
