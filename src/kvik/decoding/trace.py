"""What a token was chosen from: its row of logits looked at through every stage of `pipeline.stages`.

`SamplingParams(trace=True)` keeps a TokenTrace for each token, computed by the definition, some ten milliseconds for a
vocabulary of 50,000; without it nothing is computed or kept.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvik.decoding.elementary import Float64
from kvik.decoding.filters import is_greedy
from kvik.decoding.pipeline import DrawRequest, Stage, stages

__all__ = ["BEST", "NUCLEUS", "TEMPERATURES", "CandidateTrace", "StageTrace", "SweepTrace", "TokenTrace", "trace_token"]

BEST = 12
"""Tokens whose way through the stages is kept, most probable first; the drawn one is added where it is none of them."""
NUCLEUS = 0.9
"""The p of `nucleus` where top_p asks for none."""
TEMPERATURES = (0.1, 0.2, 0.3, 0.5, 0.7, 0.85, 1.0, 1.2, 1.5, 2.0)
"""Those of `sweep`, beside the request's own where it lies between them."""


class StageTrace(NamedTuple):
    """What a stage did. name: of its parameter, or "logits" for the row as it came, "greedy" for temperature 0.

    kept: tokens that are left. removed: tokens it took away, and `mass` the probability that these had before it.
    """

    name: str
    kept: int
    removed: int
    mass: float


class CandidateTrace(NamedTuple):
    """A token's probability after each stage, [stages]; 0 once it is removed. removed_by: the stage's name, or None."""

    token_id: int
    shares: tuple[float, ...]
    removed_by: str | None


class SweepTrace(NamedTuple):
    """The logits as they came, at another temperature. entropy in nats; nucleus: tokens that have nucleus_p together.

    shares: probabilities of the candidates, in their order.
    """

    temperature: float
    entropy: float
    nucleus: int
    shares: tuple[float, ...]


class TokenTrace(NamedTuple):
    """Of one drawn token.

    position: of the token in its sequence. probability, rank (1 is the best, equals by rising id), entropy (nats), nucleus
    (fewest tokens that have nucleus_p together; nucleus_p is top_p, or 0.9 where that is off) are those of the logits as
    they came. drawn_probability: its probability among the tokens that remained after all stages.
    """

    token_id: int
    position: int
    probability: float
    rank: int
    entropy: float
    nucleus: int
    nucleus_p: float
    drawn_probability: float
    stages: tuple[StageTrace, ...]
    candidates: tuple[CandidateTrace, ...]
    sweep: tuple[SweepTrace, ...]


def trace_token(logits: npt.NDArray[np.float32], request: DrawRequest, token_id: int) -> TokenTrace:
    """Of the token drawn from logits [V] by a request; call it while the request's edits hold."""
    row = np.asarray(logits, np.float64)
    order = np.argsort(-row, kind="stable")
    rank = int(np.flatnonzero(order == token_id)[0]) + 1
    ids = order[: min(BEST, np.count_nonzero(row > -np.inf))].tolist()
    if token_id not in ids:
        ids.append(token_id)
    told, shares, gone = _through(stages(logits, request), ids, is_greedy(request.params.temperature))
    p = request.params.top_p if request.params.top_p < 1.0 else NUCLEUS
    at_one = _sweep(row[order], 1.0, p)
    return TokenTrace(
        token_id, request.position, shares[0][ids.index(token_id)], rank, at_one.entropy, at_one.nucleus, p,
        shares[-1][ids.index(token_id)], tuple(told),
        tuple(
            CandidateTrace(token, tuple(each[place] for each in shares), gone.get(token)) for place, token in enumerate(ids)
        ),
        tuple(_with_shares(_sweep(row[order], t, p), row, ids) for t in _temperatures(request.params.temperature)),
    )  # fmt: skip


def _through(
    found: Iterable[Stage], ids: list[int], greedy: bool
) -> tuple[list[StageTrace], list[list[float]], dict[int, str]]:
    """Each stage's account, after each the probabilities of ids, and which stage removed those of them that are."""
    told: list[StageTrace] = []
    shares: list[list[float]] = []
    removed: dict[int, str] = {}
    before: Float64 | None = None  # probabilities, -1 for what is not there any more
    for stage in found:
        share = _probabilities(np.asarray(stage.scores, np.float64))
        alive = stage.scores > -np.inf
        gone = ~alive if before is None else ~alive & (before >= 0.0)
        mass = 0.0 if before is None else float(before[gone].sum())
        name = "greedy" if greedy and stage.name == "temperature" else stage.name
        told.append(StageTrace(name, int(alive.sum()), int(gone.sum()), mass))
        shares.append(share[ids].tolist())
        removed |= {token: name for token in ids if gone[token]}
        before = np.where(alive, share, -1.0)
    return told, shares, removed


def _probabilities(scores: Float64) -> Float64:
    """Of scores [V]; all 0 where nothing remains."""
    best = scores.max()
    if best == -np.inf:
        return np.zeros_like(scores)
    weights = np.exp(scores - best)
    share: Float64 = weights / weights.sum()
    return share


def _temperatures(own: float) -> list[float]:
    inside = TEMPERATURES[0] <= own <= TEMPERATURES[-1]
    return sorted({*TEMPERATURES, own} if inside else TEMPERATURES)


def _sweep(falling: Float64, temperature: float, p: float) -> SweepTrace:
    """Of logits in falling order at a temperature."""
    share = _probabilities(falling / temperature)
    there = share[share > 0.0]
    entropy = float(-(there * np.log(there)).sum())
    nucleus = int(np.searchsorted(np.cumsum(share), p * (1.0 - 1e-12))) + 1
    return SweepTrace(temperature, max(0.0, entropy), min(nucleus, len(falling)), ())


def _with_shares(found: SweepTrace, row: Float64, ids: list[int]) -> SweepTrace:
    scaled = row / found.temperature
    best = scaled.max()
    total = float(np.exp(scaled - best).sum())
    return found._replace(shares=tuple((np.exp(scaled[ids] - best) / total).tolist()))
