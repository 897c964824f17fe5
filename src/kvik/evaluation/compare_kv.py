"""KV caches side by side on one prompt: bytes, speed, how far predictions move, and the texts that come of it.

Every cache answers the prompt by itself. Divergence is teacher-forced: each cache predicts the full cache's answer, token by
token, and its distributions are compared with the full cache's: KL(full || cache), and whether the best token is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from statistics import median
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from kvik.evaluation.lockstep import Distributions, VocabularyInfo, VocabularyTokens, compared_rows
from kvik.evaluation.rows import Compare, NativeCompare
from kvik.evaluation.windows import Window
from kvik.params import CacheParams, SamplingParams

__all__ = ["CacheMeasured", "CachedModel", "Moved", "compare_caches"]


class CachedModel(Protocol):
    """A model that keeps keys and values as it is told to: `kvik.LLM` is one."""

    @property
    def tokenizer(self) -> VocabularyTokens: ...

    @property
    def info(self) -> VocabularyInfo: ...

    def generate(self, prompts: Any, params: Any, *, cache: Any = None) -> Sequence[Any]: ...

    def score_rows(self, ids: Any, *, first: int = 1, cache: CacheParams | None = None) -> Any: ...


class Moved(NamedTuple):
    """How far predictions are from the full cache's, over the tokens of its answer.

    kl_mean, kl_max: nats. same_top: share of predictions whose best token stays. first_flip: index of the first whose does
    not; None: none.
    """

    tokens: int
    kl_mean: float
    kl_max: float
    same_top: float
    first_flip: int | None


class CacheMeasured(NamedTuple):
    """A cache's figures.

    kv_bytes_now, kv_bytes_peak, kv_tokens_kept: of its own answer, as `Usage` has them. tokens_per_second: of the answer after
    its first token; median over the runs, least and most beside it; None where there is one token only. moved: None for the
    full cache. common: tokens with which its answer begins as the full cache's does.
    """

    name: str
    cache: CacheParams
    kv_bytes_now: int
    kv_bytes_peak: int
    kv_tokens_kept: float
    tokens_per_second: float | None
    slowest: float | None
    fastest: float | None
    moved: Moved | None
    common: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str


@dataclass(frozen=True)
class _Kept:
    """The model with one of the caches, as `compared_rows` takes it."""

    model: CachedModel
    cache: CacheParams

    @property
    def tokenizer(self) -> VocabularyTokens:
        return self.model.tokenizer

    @property
    def info(self) -> VocabularyInfo:
        return self.model.info

    def score_rows(self, ids: Sequence[int], *, first: int = 1) -> Any:
        return self.model.score_rows(ids, first=first, cache=self.cache)


def compare_caches(
    model: CachedModel,
    prompt: Sequence[int],
    full: CacheParams,
    caches: Mapping[str, CacheParams],
    params: SamplingParams,
    *,
    repeat: int,
    compare: Compare | None = None,
    heard: Callable[[int, str, Any], None] = lambda number, name, answer: None,
) -> list[CacheMeasured]:
    """The full cache's figures and those of each other, in order; the first is named "full".

    params: with a seed or without chance, so that runs are alike. repeat: runs that count, at least 1; one goes ahead. heard:
    called after each run with its round (0 does not count), the cache's name and its completion.
    """
    compare = NativeCompare() if compare is None else compare
    every = {"full": full, **caches}
    rates: dict[str, list[float]] = {name: [] for name in every}
    answers: dict[str, Any] = {}
    for number in range(repeat + 1):
        names = list(every)
        turn = number % len(names)  # no cache always follows the same one
        for name in names[turn:] + names[:turn]:
            (answers[name],) = model.generate([list(prompt)], params, cache=every[name])
            if number and (rate := _rate(answers[name])) is not None:
                rates[name].append(rate)
            heard(number, name, answers[name])
    whole = tuple(answers["full"].choices[0].token_ids)
    found = []
    for name, cache in every.items():
        moved = None if name == "full" else moved_by(_Kept(model, full), _Kept(model, cache), prompt, whole, compare)
        found.append(_measured(name, cache, answers[name], rates[name], moved, whole))
    return found


def _rate(answer: Any) -> float | None:
    """Tokens a second after the first."""
    later, seconds = len(answer.choices[0].token_ids) - 1, answer.stats.decode
    return later / seconds if later > 0 and seconds > 0 else None


def _measured(
    name: str, cache: CacheParams, answer: Any, rates: Sequence[float], moved: Moved | None, whole: tuple[int, ...]
) -> CacheMeasured:
    choice, usage = answer.choices[0], answer.usage
    ids = tuple(choice.token_ids)
    common = next((i for i, (a, b) in enumerate(zip(ids, whole, strict=False)) if a != b), min(len(ids), len(whole)))
    middle, slowest, fastest = (median(rates), min(rates), max(rates)) if rates else (None, None, None)
    return CacheMeasured(
        name, cache, usage.kv_bytes_now, usage.kv_bytes_peak, usage.kv_tokens_kept, middle, slowest,
        fastest, moved, common, choice.text, ids,
        choice.finish_reason,
    )  # fmt: skip


def moved_by(
    full: Distributions, other: Distributions, prompt: Sequence[int], answer: Sequence[int], compare: Compare
) -> Moved | None:
    """The other's predictions of the answer against the full cache's; None where there is no token to predict."""
    if not answer:
        return None
    kl: list[NDArray[np.float64]] = []
    same: list[NDArray[np.bool_]] = []
    window = Window([*prompt, *answer], len(prompt), 0, np.zeros(len(answer), np.int64))
    with closing(compared_rows(other, full, window, compare)) as rows:
        for part in rows:
            kl.append(part.figures.kl)
            same.append(part.figures.base_best == part.figures.other_best)
    moves, stays = np.concatenate(kl), np.concatenate(same)
    flips = np.flatnonzero(~stays)
    first = int(flips[0]) if len(flips) else None
    return Moved(len(moves), float(moves.mean()), float(moves.max()), float(stays.mean()), first)
