"""One sample of a request on its way: its tokens, its place in the cache, its text so far."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from kvik.cache.blocks import BlockTable
from kvik.decoding.sampler import Drawn, DrawRequest, Sampler
from kvik.engine.request import Choice, Chunk, FinishReason, Request, ScoreRequest, TokenLogprobs, Usage
from kvik.text.detokenize import Detokenizer
from kvik.text.stop import StopChecker

__all__ = ["Generating", "Scoring", "Sequence"]


@dataclass(eq=False)
class Sequence:
    """A sequence has `tokens` it should have computed and `num_computed` it has; a step lets them catch up."""

    tokens: list[int]
    table: BlockTable
    num_computed: int = 0

    @property
    def pending(self) -> int:
        """Tokens still to be computed."""
        return len(self.tokens) - self.num_computed

    @property
    def most_tokens(self) -> int:
        """Tokens a step may compute of this sequence."""
        return self.pending

    def logit_rows(self, count: int) -> range:
        """Which of the next `count` rows need logits."""
        return range(count - 1, count) if count == self.pending else range(0)


@dataclass(eq=False)
class Generating(Sequence):
    """A sequence that goes on with tokens drawn from its logits."""

    request: Request = field(kw_only=True)
    index: int = field(kw_only=True)
    sampler: Sampler = field(kw_only=True)
    detokenizer: Detokenizer = field(kw_only=True)
    stop: StopChecker = field(kw_only=True)
    end_ids: frozenset[int] = field(kw_only=True)
    most_tokens_held: int = field(kw_only=True)  # of context and pool, the smaller
    emit: Callable[[Chunk], None] = field(kw_only=True)
    text: str = ""
    cumulative_logprob: float = 0.0
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    usage: Usage | None = None

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - len(self.request.prompt)

    def draw_request(self) -> DrawRequest:
        return self.sampler.request(len(self.tokens), self.num_generated)

    def take(self, drawn: Drawn) -> None:
        """Append the drawn token, or end where there is none; emits what became readable."""
        params = self.request.params
        if drawn.token_id is None:
            self.finish("no_token")
            return
        token = drawn.token_id
        self.tokens.append(token)
        self.cumulative_logprob += drawn.logprob
        noted = None
        if params.logprobs is not None:
            noted = (TokenLogprobs(token, drawn.logprob, drawn.top),)
            self.logprobs.extend(noted)
        if (token in self.end_ids and not params.ignore_eos) or token in params.stop_token_ids:
            self.finish("stop", (token,), noted)
            return
        emitted, matched = self.stop.add(self.detokenizer.add((token,)))
        if matched is not None:
            self._emit(emitted, (token,), noted, "stop")
            return
        full = len(self.tokens) >= self.most_tokens_held
        if full or (params.max_tokens is not None and self.num_generated >= params.max_tokens):
            self.finish("length", (token,), noted, emitted)
        else:
            self._emit(emitted, (token,), noted, None)

    def finish(
        self,
        reason: FinishReason,
        tokens: tuple[int, ...] = (),
        noted: tuple[TokenLogprobs, ...] | None = None,
        text: str = "",
    ) -> None:
        """End the sample; what was held back as a possible stop string or character comes out."""
        emitted, matched = self.stop.add(self.detokenizer.finish())
        rest = "" if matched is not None else self.stop.finish()
        self._emit(text + emitted + rest, tokens, noted, "stop" if matched is not None else reason)

    def _emit(
        self,
        text: str,
        tokens: tuple[int, ...],
        noted: tuple[TokenLogprobs, ...] | None,
        reason: FinishReason | None,
    ) -> None:
        self.text += text
        self.finish_reason = reason
        self.emit(Chunk(self.index, text, tokens, noted, reason))

    def choice(self) -> Choice:
        """The finished sample."""
        assert self.finish_reason is not None
        logprobs = tuple(self.logprobs) if self.request.params.logprobs is not None else None
        token_ids = tuple(self.tokens[len(self.request.prompt) :])
        return Choice(self.index, self.text, token_ids, self.finish_reason, self.cumulative_logprob, logprobs)


@dataclass(eq=False)
class Scoring(Sequence):
    """A sequence all of whose rows need logits: nothing is drawn, each token's log-probability is noted."""

    request: ScoreRequest = field(kw_only=True)
    most_rows: int = field(kw_only=True)

    @property
    def most_tokens(self) -> int:
        return min(self.pending, self.most_rows)

    def logit_rows(self, count: int) -> range:
        return range(count)
