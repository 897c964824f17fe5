"""`LLM`: a model with its engine, driven synchronously."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import TypeGuard

from kvik.cache.layout import kv_layout, parse_kv
from kvik.cache.storage import num_blocks_for
from kvik.engine.engine import Engine
from kvik.engine.executors import EXECUTORS, build_executor, check_device
from kvik.engine.request import Chunk, Completion, Request, ScoreResult, Usage
from kvik.engine.sequence import Generating
from kvik.errors import ParameterError
from kvik.models.loading import load_model
from kvik.params import EngineParams, SamplingParams, choose
from kvik.text.chat_template import ChatTemplate, Tools
from kvik.text.conversation import Message
from kvik.text.tokenizer import Tokenizer
from kvik.weights.fetch import Progress
from kvik.weights.layouts import parse_weights

__all__ = ["LLM", "ModelInfo"]

Prompt = str | Sequence[int]
Params = SamplingParams | Sequence[SamplingParams] | None

_FALLBACK = {"temperature": 0.7, "top_k": 50, "top_p": 0.9}
"""Sampling of `default_params` for a model that brings none of its own."""


@dataclass(frozen=True)
class ModelInfo:
    """What is loaded. Bytes are measured: the packed tensors' and the cache's own; matrix_bytes are those a step reads."""

    name: str
    path: str
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
    kv_bytes_per_token: int
    kv_pool_bytes: int
    executor: str
    isa: str | None
    threads: int
    load_seconds: float


def _ignore(stage: str, done: int, total: int) -> None:
    """Progress that nobody watches."""


class LLM:
    """A model that answers.

    Args:
        model: catalogue name (`smollm2-135m`), path of a .gguf file or of a folder with one or with safetensors, or hub id.
        weights: "auto" keeps what the file has; "f32", "bf16", "int8", "int4" convert on load.
        kv: format of the KV cache, "f16" or "f32".
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
        kv: str = "f16",
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
        kv_format, report = parse_kv(kv), progress or _ignore
        made_by, kept = choose("executor", executor, EXECUTORS), parse_weights(weights)
        check_device(made_by, device)
        loaded = load_model(model, kept, report)
        config = loaded.config
        layout = kv_layout(config, kv_format)
        num_blocks = num_blocks_for(layout, config.context_length, engine.kv_bytes)
        threads = engine.threads or len(os.sched_getaffinity(0))
        max_rows = min(engine.max_batch_tokens, config.context_length)
        built = build_executor(made_by, loaded, layout, num_blocks, threads=threads, max_rows=max_rows, device=device)
        self.tokenizer: Tokenizer = loaded.tokenizer
        self.chat_template: ChatTemplate | None = ChatTemplate.of(loaded.tokenizer, loaded.path)
        self.engine = Engine(
            built, loaded.tokenizer, layout, num_blocks,
            vocab_size=config.vocab_size, context_length=config.context_length,
            max_batch_tokens=engine.max_batch_tokens, path=loaded.path,
        )  # fmt: skip
        self._defaults = dict(loaded.defaults)
        self.info = ModelInfo(
            name=loaded.name, path=str(loaded.path), family=config.family, parameters=loaded.parameters,
            license=loaded.license, context_length=config.context_length, vocab_size=config.vocab_size,
            layouts=loaded.weights.bytes_by_layout(), weights=kept, weights_bytes=loaded.weights.nbytes,
            matrix_bytes=loaded.matrix_bytes, kv=kv_format,
            kv_bytes_per_token=layout.token_bytes, kv_pool_bytes=num_blocks * layout.block_bytes,
            executor=executor, isa=built.isa, threads=threads,
            load_seconds=perf_counter() - begun,
        )  # fmt: skip

    def default_params(self) -> SamplingParams:
        """The model's own generation defaults; where it has none, temperature 0.7, top_k 50, top_p 0.9."""
        return SamplingParams(**(self._defaults or _FALLBACK))

    def generate(self, prompts: Prompt | Sequence[Prompt], params: Params = None) -> list[Completion]:
        """One Completion a prompt, in order.

        prompts: a string, a list of token ids, or a list of those. params: one for all or one a prompt; None is
        SamplingParams(). Everything is checked before anything is computed.
        """
        many = _as_prompts(prompts)
        requests = [self._request(p, q) for p, q in zip(many, _as_params(params, len(many)), strict=True)]
        return [self._complete(request) for request in requests]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[Chunk]:
        """The answer's chunks as they come, sample after sample. Closing the iterator cancels."""
        return self._stream(self._request(prompt, params or SamplingParams()))

    def chat(
        self, messages: Sequence[Message], params: SamplingParams | None = None, tools: Tools | None = None
    ) -> Completion:
        """The assistant's answer to a conversation, through the model's chat template.

        messages and tools as `ChatTemplate.encode` takes them. The answer is text: a call of a tool stands in it as the
        model writes it.
        """
        return self._complete(self._request(self._chat_ids(messages, tools), params or SamplingParams()))

    def stream_chat(
        self, messages: Sequence[Message], params: SamplingParams | None = None, tools: Tools | None = None
    ) -> Iterator[Chunk]:
        """`chat`, streamed."""
        return self.stream(self._chat_ids(messages, tools), params)

    def score(self, inputs: Prompt | Sequence[Prompt], return_logits: bool = False) -> list[ScoreResult]:
        """Log-probabilities of given texts or token ids, without generating. See ScoreResult for shapes."""
        requests = [self.engine.score_request(self._ids(p, "input"), return_logits) for p in _as_prompts(inputs)]
        results = []
        for request in requests:
            sequence = self.engine.add_score(request)
            try:
                while sequence.pending:
                    self.engine.step()
            except BaseException:
                self.engine.cancel(sequence)
                raise
            results.append(self.engine.score_result(sequence))
        return results

    def _chat_ids(self, messages: Sequence[Message], tools: Tools | None) -> list[int]:
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

    def _request(self, prompt: Prompt, params: SamplingParams) -> Request:
        return self.engine.request(self._ids(prompt, "prompt"), params)

    def _complete(self, request: Request) -> Completion:
        sequences = self._add(request, lambda chunk: None)
        self._finish(sequences)
        choices = tuple(s.choice() for s in sequences)
        return Completion(choices[0].text, choices, request.prompt, _total(sequences))

    def _add(self, request: Request, emit: Callable[[Chunk], None]) -> list[Generating]:
        return [self.engine.add(request, index, emit) for index in range(request.params.n)]

    def _finish(self, sequences: list[Generating]) -> None:
        try:
            while any(s.finish_reason is None for s in sequences):
                self.engine.step()
        except BaseException:
            self._cancel(sequences)
            raise

    def _cancel(self, sequences: list[Generating]) -> None:
        for sequence in sequences:
            if sequence.finish_reason is None:
                self.engine.cancel(sequence)

    def _stream(self, request: Request) -> Iterator[Chunk]:
        ready: deque[Chunk] = deque()
        sequences = self._add(request, ready.append)
        try:
            left = len(sequences)
            while left:
                self.engine.step()
                while ready:
                    chunk = ready.popleft()
                    left -= chunk.finish_reason is not None
                    usage = _total(sequences) if not left and not ready else None
                    yield replace(chunk, usage=usage)
        finally:
            self._cancel(sequences)


def _as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
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


def _as_params(params: Params, count: int) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if not isinstance(params, list | tuple) or not all(isinstance(p, SamplingParams) for p in params):
        raise ParameterError(f"params must be SamplingParams or a list of them, got {params!r}")
    listed = list(params)
    if len(listed) != count:
        raise ParameterError(f"params has {len(listed)} entries for {count} prompts; give one, or one a prompt")
    return listed


def _total(sequences: list[Generating]) -> Usage:
    """The request's usage: samples run one after another, so their bytes do not add up."""
    each = [s.usage for s in sequences if s.usage is not None]
    return Usage(
        len(sequences[0].request.prompt),
        sum(s.num_generated for s in sequences),
        0,
        each[-1].kv_bytes_now if each else 0,
        max((u.kv_bytes_peak for u in each), default=0),
        each[-1].kv_tokens_kept if each else 0,
    )
