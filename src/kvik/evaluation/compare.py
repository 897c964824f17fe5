"""Decoding strategies side by side on one prompt: the guide's summary table (section 2.9), measured.

Every strategy runs once for nothing and then `repeat` times, each time with another seed; round by round, so that a slow
minute of the machine meets all of them. The repeats of a strategy are the samples its texts are judged by.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from statistics import fmean, median
from time import perf_counter
from typing import NamedTuple

from kvik.evaluation.metrics import determinism, distinct_n, repetition_rate, self_bleu, words
from kvik.evaluation.model import Generator
from kvik.params import AnyParams, SamplingParams

__all__ = ["Measured", "Run", "compare_strategies"]

REPETITION_ORDER = 4


class Run(NamedTuple):
    """One answer. seconds: from the request to its end; logprob: the sum over its tokens, as the model gives them."""

    text: str
    token_ids: tuple[int, ...]
    logprob: float
    seconds: float


class Measured(NamedTuple):
    """A strategy's figures; None where they cannot be told.

    tokens_per_second: of the answer, prompt included in the time; median over the repeats, least and most beside it.
    tokens: mean length of an answer. distinct_1, distinct_2, self_bleu: over the texts of all repeats, on `words`.
    repetition: mean over the texts of the share of 4-grams of words that came before in it.
    mean_logprob: over all tokens, by the model itself (temperature 1, no filter).
    determinism: share of pairs of repeats with the same tokens, though their seeds differ.
    repeatable: whether the same seed gave the same tokens again.
    """

    name: str
    params: AnyParams
    tokens_per_second: float
    slowest: float
    fastest: float
    tokens: float
    distinct_1: float | None
    distinct_2: float | None
    self_bleu: float | None
    repetition: float | None
    mean_logprob: float | None
    determinism: float | None
    repeatable: bool
    texts: tuple[str, ...]


def compare_strategies(
    model: Generator,
    prompt: Sequence[int],
    strategies: Mapping[str, AnyParams],
    *,
    repeat: int,
    seed: int,
    heard: Callable[[int, str, Run], None] = lambda number, name, run: None,
) -> list[Measured]:
    """The figures of each strategy, in order.

    repeat: runs that count, at least 1; run r has the seed `seed` + r. heard: called after each run with its round (0 does
    not count), the strategy's name and what came.
    """
    runs: dict[str, list[Run]] = {name: [] for name in strategies}
    warm: dict[str, Run] = {}
    for number in range(repeat + 1):
        names = list(strategies)
        turn = number % len(names)  # no strategy always follows the same one
        for name in names[turn:] + names[:turn]:
            run = _run(model, prompt, strategies[name], seed + max(0, number - 1))
            if number:
                runs[name].append(run)
            else:
                warm[name] = run
            heard(number, name, run)
    return [measure(name, strategies[name], warm[name], runs[name]) for name in strategies]


def _run(model: Generator, prompt: Sequence[int], params: AnyParams, seed: int) -> Run:
    if isinstance(params, SamplingParams):
        params = replace(params, seed=seed)
    begun = perf_counter()
    (answer,) = model.generate([list(prompt)], params)
    seconds = perf_counter() - begun
    choice = answer.choices[0]
    return Run(choice.text, tuple(choice.token_ids), choice.cumulative_logprob, seconds)


def measure(name: str, params: AnyParams, warm: Run, runs: Sequence[Run]) -> Measured:
    """Figures of a strategy's runs. warm: one with the seed of the first of them."""
    rates = [len(run.token_ids) / run.seconds for run in runs]
    texts = [words(run.text) for run in runs]
    tokens = sum(len(run.token_ids) for run in runs)
    repeated = [rate for text in texts if (rate := repetition_rate(text, REPETITION_ORDER)) is not None]
    return Measured(
        name, params, median(rates), min(rates), max(rates), fmean(len(run.token_ids) for run in runs),
        distinct_n(texts, 1), distinct_n(texts, 2), self_bleu(texts),
        fmean(repeated) if repeated else None,
        sum(run.logprob for run in runs) / tokens if tokens else None,
        determinism([run.token_ids for run in runs]), warm.token_ids == runs[0].token_ids,
        tuple(run.text for run in runs),
    )  # fmt: skip
