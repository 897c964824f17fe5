"""An answer as it comes: shown on the way, kept when interrupted, timed."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, overload

from kvik.cli.output import Interrupt, amount, print_table, quoted, write
from kvik.errors import ParameterError
from kvik.params import AnyParams, SamplingParams

if TYPE_CHECKING:
    from kvik.engine.request import Chunk, Completion
    from kvik.llm import LLM, Stream

__all__ = [
    "Answer",
    "InOrder",
    "Timings",
    "encode",
    "encode_prompt",
    "print_logprobs",
    "seconds_since_start",
    "take_answer",
    "with_seed",
]

Message = Mapping[str, str]


@dataclass(frozen=True)
class Timings:
    """Of one answer, in milliseconds; None where nothing was generated.

    first_token_ms: from the request to its first token. process_first_token_ms: from the start of the process to it.
    decode_tok_s: tokens per second after the first one; None below two tokens. Of a beam search, whose answers come when
    it ends, first_token_ms is to them, and decode_tok_s counts its longest.
    """

    load_ms: float
    first_token_ms: float | None
    process_first_token_ms: float | None
    decode_tok_s: float | None


@dataclass
class Answer:
    """What has come so far; `completion` when that is all."""

    num_prompt: int
    load_seconds: float
    generated: int = 0
    completion: Completion | None = None
    interrupted: bool = False
    asked: float = field(default_factory=time.perf_counter)
    first: float | None = None
    last: float | None = None
    process_first: float | None = None

    def take(self, chunk: Chunk) -> None:
        """Note when a piece came."""
        self.last = time.perf_counter()
        if self.first is None:
            self.first, self.process_first = self.last, seconds_since_start()
        self.generated += len(chunk.token_ids)

    @property
    def whole(self) -> Completion:
        """The completion of an answer that has ended or was interrupted."""
        assert self.completion is not None
        return self.completion

    @property
    def timings(self) -> Timings:
        if self.first is None or self.last is None or self.process_first is None:
            return Timings(1e3 * self.load_seconds, None, None, None)
        decoding, generated = self.last - self.first, self.generated
        if self._searched is not None:
            decoding, generated = self._searched
        rate = (generated - 1) / decoding if generated > 1 and decoding > 0 else None
        return Timings(1e3 * self.load_seconds, 1e3 * (self.first - self.asked), 1e3 * self.process_first, rate)

    @property
    def _searched(self) -> tuple[float, int] | None:
        """Of a beam search: seconds after its first step, and tokens of its longest answer."""
        found = self.completion
        if found is None or found.stats is None or found.receipt is None or found.receipt.kind != "beam":
            return None
        return found.stats.decode, max(len(choice.token_ids) for choice in found.choices)

    def summary(self, llm: LLM, *, since_start: bool = False) -> str:
        """The one line: tokens, time to the first one (and to it from the process's start), speed, bytes."""
        timings, info, usage = self.timings, llm.info, self.whole.usage
        cached = f" ({usage.cached_tokens} cached)" if usage.cached_tokens else ""
        parts = [f"{self.num_prompt} prompt{cached} + {self.generated} generated tokens"]
        if timings.first_token_ms is not None and timings.process_first_token_ms is not None:
            after = f" ({timings.process_first_token_ms / 1e3:.2f} s after the start)" if since_start else ""
            what = "first token" if self._searched is None else "answer"
            parts.append(f"{what} in {timings.first_token_ms / 1e3:.2f} s{after}")
        if timings.decode_tok_s is not None:
            parts.append(f"{timings.decode_tok_s:.0f} tokens/s")
        parts.append(f"weights {amount(info.weights_bytes)}")
        shared = usage.kv_bytes_unshared > usage.kv_bytes_peak
        unshared = f" ({amount(usage.kv_bytes_unshared)} without sharing)" if shared else ""
        parts.append(f"KV {amount(usage.kv_bytes_peak)}{unshared}")
        if found := self._kept:
            parts.append(found)
        parts += self._ending(info.context_length)
        return ", ".join(parts)

    @property
    def _kept(self) -> str:
        """What an eviction policy left of the last answer's tokens; empty where all are there."""
        usage, last = self.whole.usage, self.whole.choices[-1]
        held = self.num_prompt + max(0, len(last.token_ids) - 1)  # the last token is drawn, not computed
        if usage.kv_tokens_kept >= held - 1 or not usage.kv_tokens_kept:
            return ""
        return f"{usage.kv_tokens_kept:.0f} of {held} tokens kept ({amount(usage.kv_bytes_now)} at the end)"

    def _ending(self, context: int) -> list[str]:
        """What ended it, where that was not the model."""
        choices = self.whole.choices
        cut = [choice for choice in choices if choice.finish_reason == "length"]
        if self.interrupted:
            return ["interrupted"]
        if any(self.num_prompt + len(choice.token_ids) >= context for choice in cut):
            return ["cut at the end of the context"]
        if cut:
            return ["cut at max_tokens"]
        if any(choice.finish_reason == "no_token" for choice in choices):
            return ["ended because the filters left no token"]
        return []


def seconds_since_start() -> float:
    """Since the operating system started this process (to about 10 ms), imports included."""
    with open("/proc/self/stat", "rb") as file:
        ticks = int(file.read().rpartition(b")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def encode(llm: LLM, messages: Sequence[Message], raw: bool) -> list[int]:
    """The token ids of a conversation: by the model's chat template, else (or if raw) of the texts one after another.

    Raises ParameterError for a system message that would go nowhere.
    """
    if llm.chat_template is not None and not raw:
        ids: list[int] = llm.chat_template.encode(llm.tokenizer, messages)
        return ids
    if any(message["role"] == "system" for message in messages):
        why = "--raw leaves it out" if llm.chat_template is not None else "this model has none"
        raise ParameterError(f"--system needs a chat template, and {why}")
    ids = llm.tokenizer.encode("".join(message["content"] for message in messages))
    return ids


def encode_prompt(llm: LLM, text: str, system: str | None, raw: bool) -> list[int]:
    """`encode` of one prompt, behind what the model is told before all else."""
    told = [] if system is None else [{"role": "system", "content": system}]
    return encode(llm, [*told, {"role": "user", "content": text}], raw)


@overload
def with_seed(params: SamplingParams) -> SamplingParams: ...
@overload
def with_seed(params: AnyParams) -> AnyParams: ...
def with_seed(params: AnyParams) -> AnyParams:
    """The parameters with a seed that can be told, drawn here when none was given and one is needed."""
    if isinstance(params, SamplingParams) and params.seed is None:
        return replace(params, seed=int.from_bytes(os.urandom(4)))
    return params


def take_answer(stream: Stream, answer: Answer, show: Callable[[Chunk], None]) -> None:
    """Show each chunk and keep the answer, to the end or to Ctrl-C; before the first chunk that is a KeyboardInterrupt."""
    with Interrupt() as interrupt, closing(stream):
        for chunk in stream:
            interrupt.gentle = True
            answer.take(chunk)
            show(chunk)
            if interrupt.pressed:
                answer.interrupted = True
                break
    answer.completion = stream.completion


class InOrder:
    """Shows samples one after another, whatever the order their chunks come in; several of them under headings."""

    def __init__(self, count: int) -> None:
        self._count, self._current, self._begun = count, 0, False
        self._waiting: dict[int, list[Chunk]] = {}

    def __call__(self, chunk: Chunk) -> None:
        self._waiting.setdefault(chunk.index, []).append(chunk)
        while pieces := self._waiting.pop(self._current, None):
            if not self._begun and self._count > 1:
                write(f"--- answer {self._current + 1} of {self._count} ---\n")
            self._begun = True
            write("".join(piece.text for piece in pieces))
            if pieces[-1].finish_reason is None:
                return
            write("\n")
            self._current, self._begun = self._current + 1, False

    def close(self) -> None:
        """End the line of an answer that was interrupted."""
        if self._begun:
            write("\n")


def print_logprobs(llm: LLM, completion: Completion) -> None:
    """A line for each generated token: its log-probability and the best tokens at its place."""
    rows: list[list[Any]] = []
    for choice in completion.choices:
        for token in choice.logprobs or ():
            best = "  ".join(f"{quoted(llm.tokenizer.decode_bytes([t.token_id]))} {t.logprob:.3f}" for t in token.top)
            text = quoted(llm.tokenizer.decode_bytes([token.token_id]))
            rows.append([str(choice.index), text, f"{token.logprob:.3f}", best])
    if rows:
        print_table([["sample", "token", "logprob", "best"], *rows], "><><")
