"""A model that needs no weights: the real engine, whose executor answers every prompt with the same words."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvik.cache.layout import kv_layout
from kvik.cache.storage import pool_size
from kvik.decoding.sampler import TokenLogprob
from kvik.engine.admission import Model
from kvik.engine.engine import Engine
from kvik.engine.request import LogitRows, Request, ScoreResult
from kvik.llm import LLM, ModelInfo
from kvik.ops import CacheView, Pass, Reduced, RopeTable, StepTimes
from kvik.ops.pages import ADDRESS_BYTES, CacheLayout
from kvik.ops.reduction import empty_reduced
from kvik.params import CacheParams, EngineParams, SamplingParams

ANSWER = ["The", " sky", " is", " blue", ".\n", "Really", " blue!"]
CONTEXT, VOCABULARY = 2048, 64
END = 0


ROPE = RopeTable(10000.0 ** (-np.arange(0, 32, 2) / 32))


@dataclass(frozen=True)
class FakeShape:
    """Blocks of f16 take 4,096 bytes."""

    num_layers: int = 2
    num_heads: int = 1
    num_kv_heads: int = 1
    head_size: int = 32
    windows: tuple[int | None, ...] = (None, None)
    context_length: int = CONTEXT
    vocab_size: int = VOCABULARY
    rope: RopeTable | None = ROPE


class FakeTokenizer:
    """Words with the blank before them, digits one by one; ids in order of first sight, after those of the answer."""

    special_ids = eos_ids = frozenset({END})
    add_bos, bos_id = True, END
    vocab_size = VOCABULARY

    def __init__(self) -> None:
        self.words: list[bytes] = [b"<|end|>", *(word.encode() for word in ANSWER)]

    def encode(self, text: str, add_special: bool = True, first: bool = True) -> list[int]:
        pieces = [piece.encode() for piece in re.findall(r"\s?[^\s\d]+|\s?\d|\s", text)]
        return [self.id_of(piece) for piece in pieces]

    def id_of(self, piece: bytes) -> int:
        if piece not in self.words:
            self.words.append(piece)
            assert len(self.words) <= VOCABULARY, "the test uses too many words"
        return self.words.index(piece)

    def piece(self, token: int, after: int | None = None) -> bytes:
        return self.words[token] if token < len(self.words) else b" ?"

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        return b"".join(map(self.piece, ids))

    def decode(self, ids: Sequence[int]) -> str:
        return self.decode_bytes(ids).decode(errors="replace")


class FakeTemplate:
    def encode(
        self, tokenizer: FakeTokenizer, messages: Sequence[Mapping[str, str]], tools: object = None
    ) -> list[int]:
        return tokenizer.encode("".join(f" <{m['role']}> {m['content']}" for m in messages) + " <assistant>")


class FakeExecutor:
    """After a word of the answer comes the next one, after any other token the first. A step takes 3 microseconds."""

    isa = "portable"
    pool = None

    def __init__(self, llm: FakeLLM) -> None:
        self.llm = llm
        self._layouts: dict[CacheLayout, int] = {}

    def run(self, work: Pass) -> NDArray[np.float32]:
        time.sleep(self.llm.delay)
        last = work.tokens[work.logit_rows]
        follow = np.where((last >= 1) & (last < len(ANSWER)), last + 1, 1)
        follow[last == len(ANSWER)] = END
        after = self.llm.interrupt_after
        if after is not None and len(follow) and follow[0] == after + 1:
            os.kill(os.getpid(), signal.SIGINT)
        logits = np.zeros((len(follow), VOCABULARY), np.float32)
        logits[np.arange(len(follow)), self.llm.says(follow)] = 40.0
        return logits

    def register(self, layout: CacheLayout) -> int:
        return self._layouts.setdefault(layout, len(self._layouts))

    def read(self, view: CacheView, layer: int, head: int, what: str) -> NDArray[np.float32]:
        """Keys and values of some length and direction, the same every time."""
        held = view.num_tokens - int(view.shifts.max())
        return np.random.default_rng(layer).normal(size=(held, FakeShape.head_size)).astype(np.float32)

    def evict(self, *_: object) -> None:
        """Nothing lies anywhere."""

    def save(self, blocks: NDArray[np.int32], steps: int) -> NDArray[np.uint8]:
        return np.zeros((len(blocks), steps * ADDRESS_BYTES), np.uint8)

    def restore(self, blocks: NDArray[np.int32], data: NDArray[np.uint8]) -> None:
        """Nothing lies anywhere."""

    def reduced(self) -> Reduced:
        return empty_reduced(0, 0)  # `FakeLLM.score` asks no model

    def times(self) -> StepTimes:
        return StepTimes(1e-6, 1e-6, 1e-6)


class FakeLLM(LLM):
    """interrupt_after: tokens after which it presses Ctrl-C itself; delay: seconds a step takes."""

    delay = 0.0

    def __init__(self, model: str, **settings: Any) -> None:
        self.model, self.settings = model, settings
        self.tokenizer: Any = FakeTokenizer()
        self.chat_template: Any = FakeTemplate()
        params = settings.get("engine") or EngineParams()
        cache = settings.get("cache") or CacheParams()
        shape: Any = FakeShape()
        layout = kv_layout(shape, cache)
        size = pool_size(layout, (), CONTEXT, params.max_sequences, params.kv_bytes)
        executor: Any = FakeExecutor(self)
        self.engine = Engine(executor, Model(self.tokenizer, shape, None, "fake", shape.rope), cache, size, params)
        self.info = ModelInfo(
            name="fake", path="/fake.gguf", digest="d1", family="llama", parameters=10, license=None,
            context_length=CONTEXT, vocab_size=VOCABULARY, layouts={"int4": 96_000_000}, weights="auto",
            weights_bytes=96_400_000, matrix_bytes=1000, kv=cache.kv, cache=cache,
            kv_bytes_per_token=layout.token_bytes, kv_pool_bytes=size.nbytes, executor="native", isa="portable", threads=2,
            load_seconds=0.01,
        )  # fmt: skip
        kept = ("name", "path", "digest", "weights", "kv", "executor", "isa")
        self.identity = {**{name: getattr(self.info, name) for name in kept}, "device": "cpu"}
        self._defaults = {"temperature": 0.7, "top_k": 50, "top_p": 0.9}
        self.asked: list[tuple[list[int], SamplingParams]] = []
        self.caches: list[CacheParams] = []  # of the requests
        self.interrupt_after: int | None = None

    def says(self, follow: NDArray[np.int32]) -> NDArray[np.int32]:
        """The tokens that come next; tests put others here."""
        return follow

    def request(self, prompt: Any, params: SamplingParams, salt: str = "", cache: CacheParams | None = None) -> Request:
        request = super().request(prompt, params, salt, cache)
        self.asked.append((list(request.prompt), params))
        self.caches.append(request.cache)
        return request

    def score(
        self, inputs: Any, *, reduce: bool = True, top: int = 0, first: Any = 1, cache: CacheParams | None = None
    ) -> list[ScoreResult]:
        """Every log-probability is -2."""
        logits = None if reduce else self.logits(len(inputs[0]))
        best = tuple(TokenLogprob(token, -1.0 - token) for token in range(top))
        firsts = [first] * len(inputs) if isinstance(first, int) else first
        return [
            ScoreResult(
                tuple(ids), at, np.full(len(ids) - at, -2.0), np.zeros(len(ids) - at),
                (best,) * (len(ids) - at) if top else (), logits,
            )
            for ids, at in zip(inputs, firsts, strict=True)
        ]  # fmt: skip

    def logits(self, rows: int) -> NDArray[np.float32]:
        """The better half of the vocabulary has all there is, or, in other weights than f32, three quarters of it."""
        share = 1.0 if self.settings.get("weights") == "f32" else 0.75
        logits = np.full((rows, VOCABULARY), np.log(max(1e-30, 1 - share)), np.float32)
        logits[:, : VOCABULARY // 2] = np.log(share)
        return logits

    def score_rows(  # type: ignore[override]
        self, ids: Any, *, first: int = 1, cache: CacheParams | None = None
    ) -> Iterator[LogitRows]:
        for start in range(first, len(ids), 64):
            yield LogitRows(start, self.logits(min(64, len(ids) - start)))
