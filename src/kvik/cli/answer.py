"""An answer as it comes: shown on the way, kept when interrupted, timed, and as a Completion in the end."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, cast

from kvik.cli.output import Interrupt, amount, print_table, quoted, write
from kvik.errors import ParameterError

if TYPE_CHECKING:
    from kvik.cache.layout import KVLayout
    from kvik.engine.request import Chunk, Completion, FinishReason, TokenLogprobs, Usage
    from kvik.llm import LLM
    from kvik.params import SamplingParams

__all__ = [
    "Answer",
    "InOrder",
    "Timings",
    "encode",
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
    decode_tok_s: tokens per second after the first one; None below two tokens.
    """

    load_ms: float
    first_token_ms: float | None
    process_first_token_ms: float | None
    decode_tok_s: float | None


@dataclass
class _Sample:
    text: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None


@dataclass
class Answer:
    """What has come so far."""

    prompt: tuple[int, ...]
    kv: KVLayout
    load_seconds: float
    samples: dict[int, _Sample] = field(default_factory=dict)
    usage: Usage | None = None
    interrupted: bool = False
    asked: float = field(default_factory=time.perf_counter)
    first: float | None = None
    last: float | None = None
    process_first: float | None = None

    def take(self, chunk: Chunk) -> None:
        """Add a piece."""
        self.last = time.perf_counter()
        if self.first is None:
            self.first, self.process_first = self.last, seconds_since_start()
        sample = self.samples.setdefault(chunk.index, _Sample())
        sample.text.append(chunk.text)
        sample.token_ids.extend(chunk.token_ids)
        sample.logprobs.extend(chunk.logprobs or ())
        sample.finish_reason = chunk.finish_reason or sample.finish_reason
        self.usage = chunk.usage or self.usage

    @property
    def text(self) -> str:
        """Of the first sample."""
        return "".join(self.samples[0].text) if 0 in self.samples else ""

    @property
    def generated(self) -> int:
        """Tokens of all samples."""
        return sum(len(sample.token_ids) for sample in self.samples.values())

    @property
    def timings(self) -> Timings:
        if self.first is None or self.last is None or self.process_first is None:
            return Timings(1e3 * self.load_seconds, None, None, None)
        decoding = self.last - self.first
        rate = (self.generated - 1) / decoding if self.generated > 1 and decoding > 0 else None
        return Timings(1e3 * self.load_seconds, 1e3 * (self.first - self.asked), 1e3 * self.process_first, rate)

    def completion(self, logprobs_wanted: bool) -> Completion:
        """The answer in the API's words. Needs log-probabilities in the chunks (SamplingParams.logprobs)."""
        from kvik.engine.request import Choice, Completion

        choices = []
        for index, sample in sorted(self.samples.items()):
            logprobs = tuple(sample.logprobs) if logprobs_wanted else None
            total = sum(token.logprob for token in sample.logprobs)
            reason: FinishReason = sample.finish_reason or "cancelled"
            choices.append(Choice(index, "".join(sample.text), tuple(sample.token_ids), reason, total, logprobs))
        return Completion(choices[0].text if choices else "", tuple(choices), self.prompt, self.usage_so_far)

    @property
    def usage_so_far(self) -> Usage:
        """The request's own, or what it has taken when it was interrupted: its last token was drawn, not computed."""
        from kvik.cache.layout import BLOCK_TOKENS
        from kvik.engine.request import Usage

        if self.usage is not None:
            return self.usage
        samples = [len(self.prompt) + len(sample.token_ids) - 1 for _, sample in sorted(self.samples.items())]
        shared = len(self.prompt) // BLOCK_TOKENS if len(samples) > 1 else 0
        blocks = [self.kv.sequence_blocks(tokens, 1) for tokens in samples]
        held = sum(self.kv.held_bytes(each) for each in blocks) - (len(blocks) - 1) * shared * sum(self.kv.block_bytes)
        return Usage(len(self.prompt), self.generated, 0, max(0, held), max(0, held), samples[-1] if samples else 0)

    def summary(self, llm: LLM, *, since_start: bool = False) -> str:
        """The one line: tokens, time to the first one (and to it from the process's start), speed, bytes."""
        timings, info = self.timings, llm.info
        parts = [f"{len(self.prompt)} prompt + {self.generated} generated tokens"]
        if timings.first_token_ms is not None and timings.process_first_token_ms is not None:
            after = f" ({timings.process_first_token_ms / 1e3:.2f} s after the start)" if since_start else ""
            parts.append(f"first token in {timings.first_token_ms / 1e3:.2f} s{after}")
        if timings.decode_tok_s is not None:
            parts.append(f"{timings.decode_tok_s:.0f} tokens/s")
        parts.append(f"weights {amount(info.weights_bytes)}")
        parts.append(f"KV {amount(self.usage_so_far.kv_bytes_peak)}")
        cut = [sample for sample in self.samples.values() if sample.finish_reason == "length"]
        if self.interrupted:
            parts.append("interrupted")
        elif any(len(self.prompt) + len(sample.token_ids) >= info.context_length for sample in cut):
            parts.append("cut at the end of the context")
        elif cut:
            parts.append("cut at max_tokens")
        elif any(sample.finish_reason == "no_token" for sample in self.samples.values()):
            parts.append("ended because the filters left no token")
        return ", ".join(parts)


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


def with_seed(params: SamplingParams) -> SamplingParams:
    """The parameters with a seed that can be told, drawn here when none was given."""
    return params if params.seed is not None else replace(params, seed=int.from_bytes(os.urandom(4)))


def take_answer(chunks: Iterator[Chunk], answer: Answer, show: Callable[[Chunk], None]) -> None:
    """Show each chunk and keep it, to the end or to Ctrl-C; before the first chunk that is a KeyboardInterrupt."""
    with Interrupt() as interrupt, closing(cast("Generator[Chunk]", chunks)) as stream:
        for chunk in stream:
            interrupt.gentle = True
            answer.take(chunk)
            show(chunk)
            if interrupt.pressed:
                answer.interrupted = True
                return


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


def print_logprobs(llm: LLM, answer: Answer) -> None:
    """A line for each generated token: its log-probability and the best tokens at its place."""
    rows: list[list[Any]] = []
    for index, sample in sorted(answer.samples.items()):
        for token in sample.logprobs:
            best = "  ".join(f"{quoted(llm.tokenizer.decode_bytes([t.token_id]))} {t.logprob:.3f}" for t in token.top)
            text = quoted(llm.tokenizer.decode_bytes([token.token_id]))
            rows.append([str(index), text, f"{token.logprob:.3f}", best])
    if rows:
        print_table([["sample", "token", "logprob", "best"], *rows], "><><")
