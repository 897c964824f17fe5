"""A model that needs no weights: it answers every prompt with the same words, a token a word."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from kvik.cache.layout import KVLayout
from kvik.decoding.sampler import TokenLogprob
from kvik.engine.engine import EngineStats
from kvik.engine.request import Chunk, ScoreResult, TokenLogprobs, Usage
from kvik.errors import ParameterError
from kvik.llm import ModelInfo
from kvik.params import SamplingParams

ANSWER = ["The", " sky", " is", " blue", ".\n", "Really", " blue", "!"]
CONTEXT, VOCABULARY = 2048, 64


class FakeTokenizer:
    """Words with the blank before them; ids in order of first sight."""

    special_ids = frozenset({0})
    add_bos, bos_id = True, 0

    def __init__(self) -> None:
        self.words: list[bytes] = [b"<|end|>"]

    def encode(self, text: str, add_special: bool = True) -> list[int]:
        pieces = [piece.encode() for piece in re.findall(r"\s?\S+|\s", text)]
        return [self.id_of(piece) for piece in pieces]

    def id_of(self, piece: bytes) -> int:
        if piece not in self.words:
            self.words.append(piece)
        return self.words.index(piece)

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        return b"".join(self.words[i] for i in ids)

    def decode(self, ids: Sequence[int]) -> str:
        return self.decode_bytes(ids).decode(errors="replace")


class FakeTemplate:
    def encode(self, tokenizer: FakeTokenizer, messages: Sequence[Mapping[str, str]]) -> list[int]:
        return tokenizer.encode("".join(f" <{m['role']}> {m['content']}" for m in messages) + " <assistant>")


class FakeLLM:
    """interrupt_after: tokens after which it presses Ctrl-C itself; delay: seconds a token takes."""

    delay = 0.0

    def __init__(self, model: str, **settings: Any) -> None:
        self.model, self.settings = model, settings
        self.tokenizer = FakeTokenizer()
        self.chat_template: FakeTemplate | None = FakeTemplate()
        self.engine = SimpleNamespace(layout=KVLayout("f16", 2, 1, 32), stats=EngineStats())
        self.info = ModelInfo(
            name="fake", path="/fake.gguf", family="llama", parameters=10, license=None, context_length=CONTEXT,
            vocab_size=VOCABULARY, layouts={"int4": 96_000_000}, weights="auto", weights_bytes=96_400_000,
            matrix_bytes=1000, kv="f16",
            kv_bytes_per_token=256, kv_pool_bytes=1 << 20, executor="native", isa="portable", threads=2,
            load_seconds=0.01,
        )  # fmt: skip
        self.answer = list(ANSWER)
        self.asked: list[tuple[list[int], SamplingParams]] = []
        self.interrupt_after: int | None = None
        self.closed = 0

    def default_params(self) -> SamplingParams:
        return SamplingParams(temperature=0.7, top_k=50, top_p=0.9)

    def stream(self, prompt: Sequence[int], params: SamplingParams) -> Iterator[Chunk]:
        if not prompt:
            raise ParameterError("the prompt is empty: it needs at least one token")
        if len(prompt) >= CONTEXT:
            raise ParameterError(
                f"the prompt has {len(prompt)} tokens; the context holds {CONTEXT}, one of them generated"
            )
        self.asked.append((list(prompt), params))
        return self._chunks(list(prompt), params)

    def _chunks(self, prompt: list[int], params: SamplingParams) -> Iterator[Chunk]:
        import os
        import signal

        count = len(self.answer) if params.max_tokens is None else min(params.max_tokens, len(self.answer))
        if params.ignore_eos:
            count = params.max_tokens or 1
        stats = self.engine.stats
        try:
            for sample in range(params.n):
                for place in range(count):
                    time.sleep(self.delay)
                    if self.interrupt_after is not None and place == self.interrupt_after:
                        os.kill(os.getpid(), signal.SIGINT)
                    stats.steps, stats.tokens, stats.matrices = stats.steps + 1, stats.tokens + 1, stats.matrices + 1e-6
                    word = self.answer[place % len(self.answer)]
                    token = self.tokenizer.id_of(word.encode())
                    top = (TokenLogprob(token, -0.5),) * min(params.logprobs or 0, 1)
                    noted = (TokenLogprobs(token, -0.5, top),) if params.logprobs is not None else None
                    last = place == count - 1
                    reason = None if not last else ("stop" if count == len(self.answer) else "length")
                    usage = None
                    if last and sample == params.n - 1:
                        usage = Usage(len(prompt), count * params.n, 0, 4096, 8192, len(prompt) + count - 1)
                    yield Chunk(sample, word, (token,), noted, reason, usage)
        finally:
            self.closed += 1

    def score(self, inputs: Sequence[Sequence[int]], return_logits: bool = False) -> list[ScoreResult]:
        """Every log-probability is -2. Logits give the better half of the vocabulary all there is, or, in other weights
        than f32, three quarters of it."""
        logits = None
        if return_logits:
            share = 1.0 if self.settings["weights"] == "f32" else 0.75
            logits = np.full((len(inputs[0]), VOCABULARY), np.log(max(1e-30, 1 - share)), np.float32)
            logits[:, : VOCABULARY // 2] = np.log(share)
        return [ScoreResult(tuple(ids), np.full(len(ids) - 1, -2.0), logits) for ids in inputs]
