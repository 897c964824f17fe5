"""`LLM`: a model with its engine, driven synchronously."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from time import perf_counter
from typing import Any, TypeGuard, TypeVar

from kvik import __version__
from kvik.cache.layout import kv_layout
from kvik.cache.storage import pool_size, usual_layouts
from kvik.engine.admission import Model
from kvik.engine.beams import BeamAnswer, BeamGroup
from kvik.engine.engine import Engine
from kvik.engine.executors import EXECUTORS, build_executor, check_device
from kvik.engine.request import (
    Chunk,
    Completion,
    LogitRows,
    Receipt,
    Request,
    ScoreRequest,
    ScoreResult,
    params_kind,
)
from kvik.engine.scoring import Reading, Scored, Scoring
from kvik.engine.sequence import Generating, Group
from kvik.errors import ParameterError, TryAgainError
from kvik.models.loading import load_model
from kvik.models.rope import rope_table
from kvik.params import AnyParams, BeamParams, CacheParams, EngineParams, SamplingParams, cache_params, choose
from kvik.text.chat_template import ChatTemplate, Tools
from kvik.text.conversation import Message
from kvik.text.tokenizer import Tokenizer
from kvik.weights.fetch import Progress
from kvik.weights.layouts import parse_weights

__all__ = ["LLM", "ModelInfo", "Stream", "as_prompts", "score_result"]

Prompt = str | Sequence[int]
Key = TypeVar("Key", bound=Hashable)
Params = AnyParams | Sequence[AnyParams] | None
Caches = CacheParams | Sequence[CacheParams] | None

_FALLBACK = {"temperature": 0.7, "top_k": 50, "top_p": 0.9}
"""Sampling of `default_params` for a model that brings none of its own, or only penalties."""
_PENALTIES = {"repetition_penalty", "no_repeat_ngram_size"}


@dataclass(frozen=True)
class ModelInfo:
    """What is loaded. Bytes are measured: the packed tensors' and the cache's own; matrix_bytes are those a step reads.

    kv: formats of the engine's cache, kv_bytes_per_token in these; cache: all of it.
    """

    name: str
    path: str
    digest: str
    family: str
    parameters: int
    license: str | None
    context_length: int
    vocab_size: int
    layouts: Mapping[str, int]
    weights: str
    weights_bytes: int
    matrix_bytes: int
    kv: str
    cache: CacheParams
    kv_bytes_per_token: int
    kv_pool_bytes: int
    executor: str
    isa: str | None
    threads: int
    load_seconds: float


def _ignore(stage: str, done: int, total: int) -> None:
    """Progress that nobody watches."""


def _never() -> bool:
    """Nothing ends it early."""
    return False


class LLM:
    """A model that answers.

    Args:
        model: catalogue name (`smollm2-135m`), path of a .gguf file or of a folder with one or with safetensors, or hub id.
        weights: "auto" keeps what the file has; "f32", "bf16", "int8", "int4" convert on load.
        kv: formats of the KV cache: "f16" (None), "bf16", "f32", "int8", "int4", or of keys and values, "k8v4"; short for
            cache=CacheParams(k=…, v=…).
        cache: how the KV cache is kept, for requests that do not say.
        executor: "native", or "torch" (extra `torch`).
        device: "cpu"; with the torch executor also "cuda".
        engine: threads, cache bytes, tokens a step.
        progress: called with (stage, done, total) while downloading, packing and loading.

    Raises ParameterError, DataError or StorageError, one line each.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] = "smollm2-135m",
        *,
        weights: str = "auto",
        kv: str | None = None,
        cache: CacheParams | None = None,
        executor: str = "native",
        device: str = "cpu",
        engine: EngineParams | None = None,
        progress: Progress | None = None,
    ) -> None:
        begun = perf_counter()
        engine = EngineParams() if engine is None else engine
        if not isinstance(engine, EngineParams):
            raise ParameterError(f"engine must be EngineParams, got {engine!r}")
        if not isinstance(model, str | os.PathLike):
            raise ParameterError(f"model must be a name or a path, got {model!r}")
        own, report = _engine_cache(kv, cache), progress or _ignore
        made_by, kept = choose("executor", executor, EXECUTORS), parse_weights(weights)
        check_device(made_by, device)
        loaded = load_model(model, kept, report)
        config = loaded.config
        layout = kv_layout(config, own)
        size = pool_size(layout, usual_layouts(config), config.context_length, engine.max_sequences, engine.kv_bytes)
        threads = engine.threads or len(os.sched_getaffinity(0))
        max_rows = min(engine.max_batch_tokens, config.context_length * engine.max_sequences)
        built = build_executor(made_by, loaded, size, threads=threads, max_rows=max_rows, device=device)
        self.tokenizer: Tokenizer = loaded.tokenizer
        self.chat_template: ChatTemplate | None = ChatTemplate.of(loaded.tokenizer, loaded.path)
        self.identity = {
            "name": loaded.name, "path": str(loaded.path), "digest": loaded.digest, "weights": kept, "kv": own.kv,
            "executor": executor, "device": device, "isa": built.isa,
        }  # fmt: skip
        rope = None if config.rope is None else rope_table(config.rope, config.head_size, config.context_length)
        self.engine = Engine(built, Model(loaded.tokenizer, config, loaded.path, loaded.digest, rope), own, size, engine)
        self._defaults = dict(loaded.defaults)
        self.info = ModelInfo(
            name=loaded.name, path=str(loaded.path), digest=loaded.digest, family=config.family,
            parameters=loaded.parameters,
            license=loaded.license, context_length=config.context_length, vocab_size=config.vocab_size,
            layouts=loaded.weights.bytes_by_layout(), weights=kept, weights_bytes=loaded.weights.nbytes,
            matrix_bytes=loaded.matrix_bytes, kv=own.kv, cache=own,
            kv_bytes_per_token=layout.token_bytes, kv_pool_bytes=size.nbytes,
            executor=executor, isa=built.isa, threads=threads,
            load_seconds=perf_counter() - begun,
        )  # fmt: skip

    def default_params(self) -> SamplingParams:
        """The model's own generation defaults; where it has none, or only penalties, temperature 0.7, top_k 50, top_p 0.9."""
        own = self._defaults
        return SamplingParams(**(own if own.keys() - _PENALTIES else {**_FALLBACK, **own}))

    def generate(
        self, prompts: Prompt | Sequence[Prompt], params: Params = None, *, cache: Caches = None
    ) -> list[Completion]:
        """One Completion a prompt, in order; all run together as far as the engine has room.

        prompts: a string, a list of token ids, or a list of those. params: SamplingParams or BeamParams, one for all or
        one a prompt; None is SamplingParams(). cache: CacheParams likewise; None is the engine's. Everything is checked
        before anything is computed.
        """
        many = as_prompts(prompts)
        each = zip(many, _as_params(params, len(many)), _as_caches(cache, len(many)), strict=True)
        requests = [self.request(prompt, wanted, cache=kept) for prompt, wanted, kept in each]
        found: list[Completion | None] = [None] * len(requests)
        for index, result in self.complete_each(enumerate(requests)):
            if isinstance(result, Exception):
                raise result
            found[index] = result
        return [one for one in found if one is not None]

    def complete_each(
        self, requests: Iterable[tuple[Key, Request] | None], until: Callable[[], bool] = _never
    ) -> Iterator[tuple[Key, Completion | Exception]]:
        """Answers as they finish, each with its request's key; an Exception for a request that failed by itself.

        requests: from `request`; before each step as many are taken as may run beside those under way, so that there
        may be any number of them. None: nothing yet; the step goes ahead without. Waiting for a request is up to the
        iterable, once nothing runs.
        until: asked before each step; once it says True what runs is cancelled and the iterator ends, as it does when
        it is closed.
        """
        source, more = iter(requests), True
        following: tuple[Key, Request] | None = None
        running: dict[Key, tuple[Request, Group]] = {}
        try:
            while more or following is not None or running:
                while len(running) < self.engine.params.max_sequences and self.engine.has_room:
                    if following is None and more:
                        try:
                            following = next(source)
                        except StopIteration:
                            more = False
                    if following is None:
                        break
                    key, request = following
                    try:
                        running[key] = (request, self.engine.add(request, _unheard))
                    except TryAgainError:  # another thread was faster
                        break
                    following = None
                if until():
                    return
                self.engine.step()
                for key in [key for key, (_, group) in running.items() if group.done]:
                    request, group = running.pop(key)
                    yield key, group.error or self.completion(request, group)
        finally:
            for _, group in running.values():
                self.engine.cancel(group)

    def stream(
        self, prompt: Prompt, params: AnyParams | None = None, *, cache: CacheParams | None = None
    ) -> Stream:
        """The answer's chunks as they come, those of its samples in turn. Closing the iterator cancels.

        What a beam search answers is known at its end: there is one chunk for each answer, the best first.
        cache: None is the engine's.
        """
        return Stream(self, self.request(prompt, params or SamplingParams(), cache=cache))

    def chat(
        self, messages: Sequence[Message], params: AnyParams | None = None, tools: Tools | None = None, *,
        cache: CacheParams | None = None,
    ) -> Completion:  # fmt: skip
        """The assistant's answer to a conversation, through the model's chat template.

        messages and tools as `ChatTemplate.encode` takes them. The answer is text: a call of a tool stands in it as the
        model writes it. cache: None is the engine's.
        """
        return self.generate([self.chat_ids(messages, tools)], params, cache=cache)[0]

    def stream_chat(
        self, messages: Sequence[Message], params: AnyParams | None = None, tools: Tools | None = None, *,
        cache: CacheParams | None = None,
    ) -> Stream:  # fmt: skip
        """`chat`, streamed."""
        return self.stream(self.chat_ids(messages, tools), params, cache=cache)

    def score(
        self,
        inputs: Prompt | Sequence[Prompt],
        *,
        reduce: bool = True,
        top: int = 0,
        first: int | Sequence[int] = 1,
        cache: CacheParams | None = None,
    ) -> list[ScoreResult]:
        """Log-probabilities of given texts or token ids, without generating. See ScoreResult for shapes.

        reduce: logits are reduced as they are made, [N, V] of them never exist; False keeps them.
        top: how many of the best tokens to report at each place, 0 to 1,024.
        first: token index from which on, one for all or one an input, each from 1 to the number of its tokens; what comes
        before costs no logits, and the cache may have it. To an eviction policy it is the prompt.
        cache: how keys and values are kept; None is the engine's.
        """
        many = as_prompts(inputs)
        if not isinstance(first, int | Sequence) or isinstance(first, str):
            raise ParameterError(f"first must be an integer or a list of integers, got {first!r}")
        firsts = [first] * len(many) if isinstance(first, int) else list(first)
        if len(firsts) != len(many):
            raise ParameterError(f"first has {len(firsts)} entries for {len(many)} inputs; give one, or one an input")
        requests = [
            self.score_request(text, reduce=reduce, top=top, first=each, cache=cache)
            for text, each in zip(many, firsts, strict=True)
        ]
        waiting, running = deque(requests), deque[Group]()
        results = []
        try:
            while waiting or running:
                while waiting and self.engine.has_room:
                    try:
                        running.append(self.engine.add_score(waiting[0]))
                    except TryAgainError:  # another thread was faster
                        break
                    waiting.popleft()
                self.engine.step()
                while running and running[0].done:
                    results.append(score_result(running.popleft()))
        finally:
            for group in running:
                self.engine.cancel(group)
        return results

    def score_rows(
        self, ids: Prompt, *, first: int = 1, cache: CacheParams | None = None
    ) -> Generator[LogitRows]:
        """The rows of logits from which the tokens from index `first` on were predicted, at most 64 at a time, in order.

        An item's array is valid until the next one is asked for; nothing more of the text is computed until then. Rows are
        not checked: damaged weights may make some that are not finite. Closing the iterator cancels. first, cache: as in
        `score`.
        """
        request = self.score_request(ids, first=first, cache=cache)
        return self._rows(request)

    def _rows(self, request: ScoreRequest) -> Generator[LogitRows]:
        group = self.engine.add_reading(request)
        sequence: Reading = group.samples[0]
        try:
            while True:
                rows = sequence.take()
                if rows is not None:
                    yield rows
                    sequence.go_on()
                elif group.error is not None:
                    raise group.error
                elif group.done:
                    _check_whole(sequence)
                    return
                else:
                    self.engine.step()
        finally:
            self.engine.cancel(group)

    def request(
        self, prompt: Prompt, params: AnyParams, salt: str = "", cache: CacheParams | None = None
    ) -> Request:
        """A checked request for `complete_each`. salt: only requests with the same one share cached prefixes.

        cache: None is the engine's.
        """
        return self.engine.request(self._ids(prompt, "prompt"), params, salt, cache)

    def score_request(
        self, text: Prompt, *, reduce: bool = True, top: int = 0, first: int = 1, salt: str = "",
        cache: CacheParams | None = None,
    ) -> ScoreRequest:  # fmt: skip
        """A checked request to score a text. salt and cache as in `request`."""
        ids = self._ids(text, "input")
        return self.engine.score_request(ids, reduce=reduce, top=top, first=first, salt=salt, cache=cache)

    def completion(self, request: Request, group: Group) -> Completion:
        """The answer of a request that is done."""
        samples: tuple[Generating | BeamAnswer, ...] = group.samples
        choices = tuple(s.choice() for s in samples)
        usage, stats = next((s.usage, s.stats) for s in samples if s.usage is not None)
        assert usage is not None
        receipt = Receipt(
            __version__, self.identity, params_kind(request.params), _params_as_used(request, samples),
            request.cache.as_dict(), request.prompt, tuple(c.token_ids for c in choices), tuple(c.finish_reason for c in choices),
        )  # fmt: skip
        beams = tuple(group.search.steps) if isinstance(group, BeamGroup) and group.params.trace else None
        return Completion(choices[0].text, choices, request.prompt, usage, stats, receipt, beams)

    def chat_ids(self, messages: Sequence[Message], tools: Tools | None = None) -> list[int]:
        """A conversation as token ids, by the model's chat template, with the beginning of an answer."""
        if self.chat_template is None:
            raise ParameterError(f"{self.info.name} has no chat template; use generate, or kvik run --raw")
        return self.chat_template.encode(self.tokenizer, messages, tools=tools)

    def _ids(self, prompt: Prompt, what: str) -> tuple[int, ...]:
        if isinstance(prompt, str):
            return tuple(self.tokenizer.encode(prompt))
        ids = tuple(prompt)
        for token in ids:
            if isinstance(token, bool) or not isinstance(token, int):
                raise ParameterError(f"{what} must be a string or a list of token ids, got an item {token!r}")
        return ids


class Stream(Iterator[Chunk]):
    """A request's chunks as they come; the request is queued with the first one. Closing or dropping it cancels."""

    def __init__(self, llm: LLM, request: Request) -> None:
        self.request = request
        self._llm = llm
        self._group: Group | None = None
        self._chunks = self._run()

    def __next__(self) -> Chunk:
        return next(self._chunks)

    def close(self) -> None:
        self._chunks.close()

    @property
    def completion(self) -> Completion | None:
        """The whole answer once it has ended, or what there is of it after `close`; None before."""
        if self._group is None or not self._group.done or self._group.error is not None:
            return None
        return self._llm.completion(self.request, self._group)

    def _run(self) -> Generator[Chunk]:
        ready: deque[Chunk] = deque()
        engine = self._llm.engine
        self._group = group = engine.add(self.request, ready.append)
        try:
            while ready or not group.done:
                if not ready:
                    engine.step()
                while ready:
                    chunk = ready.popleft()
                    if group.error is not None and chunk.finish_reason == "error":
                        raise group.error
                    yield chunk
        finally:
            engine.cancel(group)


def score_result(group: Group) -> ScoreResult:
    """The result of a scoring request that is done; raises what it failed with."""
    if group.error is not None:
        raise group.error
    sequence: Scoring = group.samples[0]
    _check_whole(sequence)
    return sequence.result()


def _check_whole(sequence: Scored) -> None:
    if sequence.unscored:
        raise TryAgainError("the text was not scored to its end: the request was cancelled")


def _params_as_used(request: Request, samples: Sequence[Generating | BeamAnswer]) -> dict[str, Any]:
    """The request's parameters by name, with the seed that was used and, where it ended a sample, the pool's limit.

    A beam search may end with it though no answer does.
    """
    used = asdict(request.params)
    searched = isinstance(request.params, BeamParams)
    if not searched:
        used["seed"] = request.seed
    if used["max_tokens"] is None and (searched or any(sample.finish_reason == "length" for sample in samples)):
        used["max_tokens"] = samples[0].most_tokens_held - len(request.prompt)
    return used


def _unheard(chunk: Chunk) -> None:
    """Chunks of an answer that is read when it is whole."""


def as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    if isinstance(prompts, bytes | Mapping) or not isinstance(prompts, Sequence):
        raise ParameterError(f"prompts must be a string, token ids or a list of these, got {type(prompts).__name__}")
    ids = [p for p in prompts if isinstance(p, int)]
    if ids and len(ids) == len(prompts):
        return [ids]
    return [p for p in prompts if _is_prompt(p)]


def _is_prompt(prompt: object) -> TypeGuard[Prompt]:
    if isinstance(prompt, str | Sequence) and not isinstance(prompt, bytes):
        return True
    raise ParameterError(f"a prompt must be a string or a list of token ids, got {prompt!r}")


def _engine_cache(kv: str | None, cache: CacheParams | None) -> CacheParams:
    if cache is None:
        return cache_params(kv, None, CacheParams())
    if kv is not None:
        raise ParameterError("kv and cache both say how the KV cache is kept; give one of them")
    if not isinstance(cache, CacheParams):
        raise ParameterError(f"cache must be CacheParams, got {cache!r}")
    return cache


def _as_caches(cache: Caches, count: int) -> list[CacheParams | None]:
    if cache is None or isinstance(cache, CacheParams):
        return [cache] * count
    if not isinstance(cache, list | tuple) or not all(isinstance(one, CacheParams) for one in cache):
        raise ParameterError(f"cache must be CacheParams or a list of these, got {cache!r}")
    if len(cache) != count:
        raise ParameterError(f"cache has {len(cache)} entries for {count} prompts; give one, or one a prompt")
    return list(cache)


def _as_params(params: Params, count: int) -> list[AnyParams]:
    if params is None or isinstance(params, AnyParams):
        return [params or SamplingParams()] * count
    if not isinstance(params, list | tuple) or not all(isinstance(p, AnyParams) for p in params):
        raise ParameterError(f"params must be SamplingParams, BeamParams or a list of these, got {params!r}")
    listed = list(params)
    if len(listed) != count:
        raise ParameterError(f"params has {len(listed)} entries for {count} prompts; give one, or one a prompt")
    return listed
