"""What a request asks for against what the model and the cache have: who may come in, and what each sequence begins with."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from kvik.cache.eviction import Evictor
from kvik.cache.layout import CacheShape, KVLayout, kv_layout
from kvik.cache.storage import PoolSize, check_slab
from kvik.decoding.grammar import Grammars
from kvik.decoding.history import Breakers
from kvik.decoding.state import DecodingState, Words
from kvik.engine.request import Request, ScoreRequest
from kvik.engine.room import Room
from kvik.errors import ParameterError
from kvik.ops import RopeTable
from kvik.params import MAX_LOGPROBS, AnyParams, BeamParams, CacheParams, EngineParams, SamplingParams
from kvik.text.tokenizer import Tokenizer
from kvik.text.words import Pieces, bad_word_ids, breaker_ids

__all__ = ["Admission", "Model", "scored_prompt"]

MOST_LISTS = 16  # of bad_words, and of dry_breakers, that an engine remembers
MOST_CACHES = 1024  # of requests whose layouts an engine remembers
MOST_LAYOUTS = 4096  # that an executor ever knows
MOST_STREAMED = 2**30  # tokens of a sequence that has no context to fit

Sequences = tuple[tuple[int, ...], ...]
Found = TypeVar("Found")


@dataclass(frozen=True)
class Model:
    """What the engine knows of a model beside its executor.

    shape: its configuration. identity: what decides the bytes of a cached block, beside the layout. rope: of the layers that
    see all; None where positions are learned. scale: of attention's products; None: 1 / sqrt(head size).
    """

    tokenizer: Tokenizer
    shape: CacheShape
    path: Path | None = None
    identity: str = ""
    rope: RopeTable | None = None
    scale: float | None = None

    @property
    def vocab_size(self) -> int:
        return self.shape.vocab_size

    @property
    def context_length(self) -> int:
        return self.shape.context_length


class Admission:
    """Checks requests, once, before they are queued.

    Args:
        model: whose vocabulary and context they must fit.
        cache: of requests that do not say.
        pool: where it lies.
        params: the machine's share.
    """

    def __init__(self, model: Model, cache: CacheParams, pool: PoolSize, params: EngineParams) -> None:
        self.model, self.cache, self.pool, self.params = model, cache, pool, params
        self._remembering = threading.Lock()  # requests are checked in any thread
        self._layouts: dict[CacheParams, KVLayout] = {}
        self._distinct: dict[KVLayout, KVLayout] = {}  # one object of each
        self.layout(cache)
        self._bad: dict[tuple[str, ...], Sequences] = {}
        self._breakers: dict[tuple[str, ...], Breakers] = {}
        self._pieces: Pieces | None = None
        self.grammars = Grammars(model.tokenizer, model.vocab_size)

    def layout(self, cache: CacheParams) -> KVLayout:
        """Of a request's cache. ParameterError where the model cannot have it."""
        with self._remembering:
            layout = self._layouts.get(cache)
        if layout is None:
            layout = kv_layout(self.model.shape, cache)
            check_slab(layout, self.pool.slab_bytes)
        with self._remembering:
            layout = self._distinct.get(layout, layout)  # caches that differ in a scorer's fields have the same
            if layout not in self._distinct and len(self._distinct) >= MOST_LAYOUTS:
                raise ParameterError(
                    f"cache: requests have asked for {MOST_LAYOUTS} different layouts already; use one of them"
                )
            self._distinct[layout] = layout
            self._layouts[cache] = layout
            if len(self._layouts) > MOST_CACHES:
                del self._layouts[next(iter(self._layouts))]
        return layout

    def _cache(self, cache: CacheParams | None, prompt_tokens: int | None) -> CacheParams:
        """The request's, which suits the model and the prompt."""
        if cache is None:
            cache = self.cache
        elif not isinstance(cache, CacheParams):
            raise ParameterError(f"cache must be CacheParams, got {cache!r}")
        self.layout(cache)
        cache.check(prompt_tokens)
        return cache

    def context(self, cache: CacheParams) -> int:
        """Tokens that a sequence may have, by the model."""
        return MOST_STREAMED if self.layout(cache).executor.window else self.model.context_length

    def evictor(self, cache: CacheParams, prompt_tokens: int | None) -> Evictor | None:
        """What gives up tokens of a sequence that begins with so many."""
        return Evictor.of(cache, self.model.shape, prompt_tokens, self.model.rope, self.model.scale)

    def request(
        self, prompt: tuple[int, ...], params: AnyParams, salt: str = "", cache: CacheParams | None = None
    ) -> Request:
        """Check a prompt against the model and the cache. ParameterError says what does not fit, with both numbers."""
        self._check_ids(prompt, "the prompt")
        cache = self._cache(cache, len(prompt))
        context = self.context(cache)
        room = context - len(prompt)
        if room < 1:
            raise ParameterError(
                f"the prompt has {len(prompt)} tokens; the context holds {context}, one of them generated"
            )
        if params.min_tokens > room:
            raise ParameterError(f"min_tokens is {params.min_tokens}; after the prompt the context holds {room}")
        name, count = ("num_beams" if isinstance(params, BeamParams) else "n"), params.num_sequences
        if count > self.params.max_sequences:
            raise ParameterError(f"{name} is {count}; max_sequences allows {self.params.max_sequences} at once")
        # Without max_tokens an answer ends where the context or the pool does.
        answer = 1 if params.max_tokens is None else min(room, params.max_tokens)
        self._check_fits(self.slabs(len(prompt), answer, params.num_sequences, cache), len(prompt) + answer, params)
        outside = [token for token in params.stop_token_ids if token >= self.model.vocab_size]
        if outside:
            raise ParameterError(f"stop_token_ids must be in [0, {self.model.vocab_size - 1}], got {outside[0]}")
        if params.grammar is not None:
            self.grammars.compile(params.grammar)
        if isinstance(params, BeamParams):
            return Request(prompt, params, 0, salt, cache=cache)
        self._check_biases(params)
        words = self._words(params)
        seed = params.seed if params.seed is not None else secrets.randbits(64)
        return Request(prompt, params, seed, salt, words, cache)

    def _check_biases(self, params: SamplingParams) -> None:
        """Refuse what names tokens that the model does not have."""
        last = self.model.vocab_size - 1
        outside = [token for token, _ in params.logit_bias if token > last]  # type: ignore[misc] # pairs by now
        if outside:
            raise ParameterError(f"logit_bias has token ids outside [0, {last}]: {', '.join(map(str, outside))}")

    def _words(self, params: SamplingParams) -> Words:
        """bad_words and dry_breakers as tokens; refuse what the model cannot write."""
        words = Words()
        if params.bad_words:
            words = words._replace(bad=self._remembered(self._bad, params.bad_words, self._bad_word_ids))
        if params.dry_multiplier and params.dry_breakers:
            words = words._replace(breakers=self._remembered(self._breakers, params.dry_breakers, self._breaker_ids))
        return words

    def _remembered(
        self, known: dict[tuple[str, ...], Found], texts: tuple[str, ...], find: Callable[[tuple[str, ...]], Found]
    ) -> Found:
        """What `find` makes of texts, kept for the last few of them: the prompts of one call ask for the same.

        Nobody waits for another's `find`: where two look for the same at once, both do.
        """
        with self._remembering:
            found = known.get(texts)
        if found is None:
            found = find(texts)
        with self._remembering:
            known.pop(texts, None)
            known[texts] = found
            if len(known) > MOST_LISTS:
                del known[next(iter(known))]
        return found

    def _bad_word_ids(self, words: tuple[str, ...]) -> Sequences:
        last = self.model.vocab_size - 1
        found: list[tuple[int, ...]] = []
        for word in words:
            ids = bad_word_ids(self.model.tokenizer, word)
            if not ids or any(token > last for sequence in ids for token in sequence):
                raise ParameterError(f"bad_words has {word!r}, which the model's vocabulary cannot write")
            found += ids
        return tuple(found)

    def _breaker_ids(self, breakers: tuple[str, ...]) -> Breakers:
        if self._pieces is None:
            self._pieces = Pieces(self.model.tokenizer)
        return Breakers(breaker_ids(self._pieces, breakers))

    def decoding_state(self, request: Request) -> DecodingState:
        """What a sequence of the request begins with."""
        prompt, params = request.prompt, request.params
        ends, matcher = self.model.tokenizer.eos_ids, None
        if params.grammar is not None:
            matcher = self.grammars.compile(params.grammar).matcher(prompt[-1], ends.union(params.stop_token_ids))
        return DecodingState(params, prompt, self.model.vocab_size, end_ids=ends, words=request.words, matcher=matcher)

    def score_request(
        self, token_ids: tuple[int, ...], *, reduce: bool = True, top: int = 0, first: int = 1, salt: str = "",
        cache: CacheParams | None = None,
    ) -> ScoreRequest:  # fmt: skip
        """Check a text to be scored from token index `first` on, as `request` does a prompt."""
        self._check_ids(token_ids, "the text to score")
        if isinstance(top, bool) or not isinstance(top, int) or not 0 <= top <= MAX_LOGPROBS:
            raise ParameterError(f"top must be an integer in [0, {MAX_LOGPROBS}], got {top!r}")
        if isinstance(first, bool) or not isinstance(first, int) or not 1 <= first <= len(token_ids):
            raise ParameterError(f"first must be an integer in [1, {len(token_ids)}], got {first!r}")
        cache = self._cache(cache, scored_prompt(first))
        if len(token_ids) > self.context(cache):
            raise ParameterError(
                f"the text to score has {len(token_ids)} tokens; the context holds {self.context(cache)}"
            )
        slabs = self.room(cache, scored_prompt(first)).slabs(0, len(token_ids), 1)
        self._check_fits(slabs, len(token_ids), None)
        return ScoreRequest(token_ids, reduce, top, first, salt, cache)

    def _check_ids(self, ids: tuple[int, ...], what: str) -> None:
        if not ids:
            raise ParameterError(f"{what} is empty: it needs at least one token")
        for place, token in enumerate(ids):
            if not 0 <= token < self.model.vocab_size:
                last = self.model.vocab_size - 1
                raise ParameterError(f"{what} has token id {token} at index {place}, outside [0, {last}]")

    def room(self, cache: CacheParams, prompt: int | None) -> Room:
        """What a request with this cache takes; prompt: its tokens as a policy sees them."""
        return Room(self.layout(cache), cache, prompt, self.params.max_batch_tokens, self.pool.slab_bytes)

    def slabs(self, prompt: int, answer: int, n: int, cache: CacheParams | None = None) -> int:
        """Most slabs that n samples or beams of a prompt hold at once: what they share, and the rest n times."""
        return self.room(cache or self.cache, prompt).slabs(prompt, prompt + answer, n)

    def _check_fits(self, slabs: int, tokens: int, params: AnyParams | None) -> None:
        n, (have, each) = 1 if params is None else params.num_sequences, self.pool
        if slabs > have:
            samples = f" of {n} {'beams' if isinstance(params, BeamParams) else 'samples'}" if n > 1 else ""
            raise ParameterError(
                f"{tokens} tokens{samples} need {slabs * each} bytes of KV cache and kv_bytes "
                f"allows {have * each}; lower max_tokens or raise kv_bytes"
            )

    def most_tokens(self, cache: CacheParams, prompt: int, n: int) -> int:
        """Tokens a sample can have, by the context and the pool."""
        low, high = prompt + 1, self.context(cache)
        if self.slabs(prompt, high - prompt, n, cache) <= self.pool.num_slabs:
            return high
        while low < high:  # the largest that fits; `request` has made sure of the first
            middle = (low + high + 1) // 2
            fits = self.slabs(prompt, middle - prompt, n, cache) <= self.pool.num_slabs
            low, high = (middle, high) if fits else (low, middle - 1)
        return low


def scored_prompt(first: int) -> int | None:
    """Tokens of a scored text that are to a policy what a prompt is: those before the first that is scored, if not the very
    first.
    """
    return first if first > 1 else None
