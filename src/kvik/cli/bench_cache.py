"""`kvik bench --no-kv-cache`: what keeping keys and values is worth, by the length of the sequence."""

from __future__ import annotations

import random
import sys
from dataclasses import dataclass, replace
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from kvik.cli.machine import cores, processor
from kvik.cli.output import note, print_json, print_table, write
from kvik.cli.pictures import check_picture
from kvik.errors import ParameterError

if TYPE_CHECKING:
    from kvik.llm import LLM
    from kvik.params import SamplingParams

__all__ = ["CacheOptions", "Length", "compare_cache", "crossover", "lengths"]

SHORTEST = 16
_GUIDE = 10.0  # "10x faster" is what introductions to the KV cache promise
_PANEL = "With and without keys and values in memory"
_STEPS = 8  # new tokens that are timed at each length with the cache


@dataclass(frozen=True, kw_only=True)
class CacheOptions:
    """What is compared."""

    no_kv_cache: Annotated[
        bool,
        typer.Option(
            "--no-kv-cache", rich_help_panel=_PANEL, help="Compare with computing the whole sequence each time."
        ),
    ] = False
    max_length: Annotated[
        int | None,
        typer.Option(
            "--max-length",
            metavar="N",
            rich_help_panel=_PANEL,
            show_default="1024",
            help="Longest sequence, at least 16; from 16 on each length is twice the one before.",
        ),
    ] = None
    plot: Annotated[
        str | None,
        typer.Option(
            "--plot", metavar="FILE", rich_help_panel=_PANEL, show_default=False,
            help="Draw it into a .png, .svg or .pdf (extra kvik\\[plots]).",
        ),
    ] = None  # fmt: skip

    def check(self) -> None:
        """Raise ParameterError for what is out of range or goes with nothing."""
        for name, value in (("--max-length", self.max_length), ("--plot", self.plot)):
            if value is not None and not self.no_kv_cache:
                raise ParameterError(f"{name} needs --no-kv-cache")
        if self.max_length is not None and self.max_length < SHORTEST:
            raise ParameterError(f"--max-length must be at least {SHORTEST}, got {self.max_length}")
        if self.plot is not None:
            check_picture("--plot", self.plot)

    @property
    def longest(self) -> int:
        return 1024 if self.max_length is None else self.max_length


class Length(NamedTuple):
    """Milliseconds of one new token after `length` tokens, and of all tokens of an answer from the first to there.

    cached: with keys and values kept; recomputed: with the whole sequence computed for each token. speedup: of one token;
    answer_speedup: of the whole answer.
    """

    length: int
    cached_ms: float
    recomputed_ms: float
    speedup: float
    answer_cached_ms: float
    answer_recomputed_ms: float
    answer_speedup: float


def lengths(longest: int) -> list[int]:
    """16, 32, 64, … and the longest."""
    found = []
    length = SHORTEST
    while length < longest:
        found.append(length)
        length *= 2
    return [*found, longest]


def compare_cache(llm: LLM, options: CacheOptions, repeat: int, seed: int, *, json: bool) -> None:
    """Measure, print, and draw if asked. The engine shares no prefixes, so that a prompt is really computed again."""
    context = llm.info.context_length
    if options.longest + _STEPS >= context:
        raise ParameterError(
            f"--max-length must be below {context - _STEPS}, got {options.longest}: the context holds {context} tokens"
        )
    params = replace(llm.default_params(), seed=seed, ignore_eos=True)
    draw = random.Random(seed)
    ordinary = [token for token in range(llm.info.vocab_size) if token not in llm.tokenizer.special_ids]
    text = draw.choices(ordinary, k=options.longest)
    _times(llm, params, text[:SHORTEST])  # the first touch of the weights does not count
    measured = []
    for length in lengths(options.longest):
        rounds = [_times(llm, params, text[:length]) for _ in range(repeat)]
        measured.append((length, median(one[0] for one in rounds), median(one[1] for one in rounds)))
        if sys.stderr.isatty():
            note(f"{length} tokens: {measured[-1][1]:.2f} and {measured[-1][2]:.2f} ms", dim=True)
    found = _with_answers(measured)
    report = {
        "lengths": found, "crossover": crossover(found), "guide_speedup": _GUIDE,
        "guide_length": _where(found, "speedup", _GUIDE), "guide_answer_length": _where(found, "answer_speedup", _GUIDE),
        "model": llm.info, "machine": {"processor": processor(), "cores": cores().allowed},
        "settings": {"max_length": options.longest, "repeat": repeat, "seed": seed},
    }  # fmt: skip
    if options.plot is not None:
        from kvik.cli.bench_plot import draw_plot

        draw_plot(found, report, options.plot)
    if json:
        print_json(report)
    else:
        _show(found, report)


def _times(llm: LLM, params: SamplingParams, text: list[int]) -> tuple[float, float]:
    """Milliseconds of one token after the text: with its keys and values there, and with all of it computed."""
    stream = llm.stream(text, replace(params, max_tokens=_STEPS + 1))
    begun = perf_counter()
    next(stream)
    recomputed = perf_counter() - begun
    begun = perf_counter()
    for _ in stream:
        pass
    return 1e3 * (perf_counter() - begun) / _STEPS, 1e3 * recomputed


def _with_answers(measured: list[tuple[int, float, float]]) -> list[Length]:
    """An answer's time is the sum over its tokens, those between two measured lengths on the line between them."""
    found = []
    cached = recomputed = 0.0
    before = (0, measured[0][1], measured[0][1])  # a first token costs the same both ways
    for length, one, other in measured:
        steps = length - before[0]
        cached += steps * (before[1] + one) / 2
        recomputed += steps * (before[2] + other) / 2
        found.append(Length(length, one, other, other / one, cached, recomputed, recomputed / cached))
        before = (length, one, other)
    return found


def crossover(found: list[Length]) -> int | None:
    """The shortest measured length from which on the cache is the faster one at every length; None if at none."""
    since = None
    for one in reversed(found):
        if one.speedup <= 1:
            break
        since = one.length
    return since


def _where(found: list[Length], what: str, factor: float) -> int | None:
    """The length at which a speed-up reaches the factor, on the line between measured lengths; None if at none."""
    before: tuple[int, float] | None = None
    for one in found:
        value: float = getattr(one, what)
        if value >= factor:
            if before is None:
                return one.length
            length, low = before
            return round(length + (one.length - length) * (factor - low) / (value - low))
        before = (one.length, value)
    return None


def _show(found: list[Length], report: dict[str, Any]) -> None:
    info = report["model"]
    write(f"{info.name}: weights {info.weights}, kv {info.cache.text}, {info.executor}, {info.threads} threads\n")
    write(f"{report['machine']['processor']}\n\n")
    rows = [["tokens before", "cached", "recomputed", "speed-up", "answer so far, cached", "recomputed", "speed-up"]]
    for one in found:
        rows.append([
            str(one.length), f"{one.cached_ms:.2f} ms", f"{one.recomputed_ms:.2f} ms", f"{one.speedup:.1f}x",
            f"{one.answer_cached_ms / 1e3:.2f} s", f"{one.answer_recomputed_ms / 1e3:.2f} s", f"{one.answer_speedup:.1f}x",
        ])  # fmt: skip
    print_table(rows, ">>>>>>>")
    write("\n" + said(report) + "\n")


def said(report: dict[str, Any]) -> str:
    """What the figures say in a sentence or two."""
    since, token, answer = report["crossover"], report["guide_length"], report["guide_answer_length"]
    first = (
        "The cache is not faster at these lengths." if since is None else f"The cache is faster from {since} tokens on."
    )
    if token is None:
        return f"{first} A token is 10 times as fast at none of them."
    whole = "at none of them" if answer is None else f"from about {answer} on"
    return f"{first} A token is 10 times as fast from about {token} tokens on, a whole answer {whole}."
