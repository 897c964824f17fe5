"""Attention of a small model of random numbers, and what the papers' policies would keep of it, in plain loops.

The reference knows tokens, not slots: of each layer and KV head the tokens that are left, and what it saw of each.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from kvik.cache.eviction import Evictor, Kept
from kvik.ops import RopeTable
from kvik.params import H2O, TOVA, CacheParams, ExpectedAttention, KeyDiff, SnapKV

Tables = list[list[list[int]]]  # [L][H_kv] tokens that are left, ascending


@dataclass(frozen=True)
class Shape:
    num_layers: int = 3
    num_heads: int = 4
    num_kv_heads: int = 2
    head_size: int = 8
    windows: tuple[int | None, ...] = (None, 5, None)
    vocab_size: int = 1

    @property
    def group(self) -> int:
        return self.num_heads // self.num_kv_heads


class Numbers(NamedTuple):
    """Random, with attention that peaks. queries [L, n, H, D] unrotated; keys, values [L, n, H_kv, D], keys rotated."""

    queries: Tensor
    keys: Tensor
    values: Tensor


def numbers(shape: Shape, tokens: int, seed: int, peak: float = 2.0) -> Numbers:
    noise = torch.Generator().manual_seed(seed)
    layers, d = shape.num_layers, shape.head_size
    queries = torch.randn(layers, tokens, shape.num_heads, d, generator=noise) * peak + torch.randn(d, generator=noise)
    keys, values = (torch.randn(layers, tokens, shape.num_kv_heads, d, generator=noise) for _ in range(2))
    return Numbers(queries, keys * peak, values)


def rope_table(shape: Shape) -> RopeTable:
    return RopeTable(100.0 ** -(np.arange(shape.head_size // 2) / (shape.head_size / 2)), 1.25)


def rotation(rope: RopeTable, position: int) -> Tensor:
    """[D, D] float64."""
    half = len(rope.inv_freq)
    turn = torch.zeros(2 * half, 2 * half, dtype=torch.float64)
    for i, frequency in enumerate(rope.inv_freq):
        cosine, sine = (f(position * frequency) * rope.factor for f in (math.cos, math.sin))
        turn[i, i], turn[i, i + half], turn[i + half, i], turn[i + half, i + half] = cosine, -sine, sine, cosine
    return turn


def one_thread() -> Iterator[None]:
    """A fixture: products this small gain nothing from more threads, which wait for each other where cores are busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Simulation:
    """A sequence whose rows are computed one chunk after another, evicted by an `Evictor` and by the reference alike."""

    def __init__(
        self, params: CacheParams, tokens: int, prompt: int | None, *, shape: Shape | None = None, seed: int = 0,
        rope: RopeTable | None = None, scale: float | None = None, numbers_: Numbers | None = None,
    ) -> None:  # fmt: skip
        self.shape, self.params, self.prompt, self.rope = shape or Shape(), params, prompt, rope
        self.numbers = numbers_ or numbers(self.shape, tokens, seed)
        self.scale = self.shape.head_size**-0.5 if scale is None else scale
        made = Evictor.of(params, self.shape, prompt, rope, scale)
        assert made is not None
        self.evictor, self.computed = made, 0
        self.tables: Tables = [[[] for _ in range(self.shape.num_kv_heads)] for _ in range(self.shape.num_layers)]
        # [L, H_kv, row, token] in steps of 2**-24, as attention reports them: less than half a step is nothing
        self.probabilities = torch.zeros(
            self.shape.num_layers, self.shape.num_kv_heads, tokens, tokens, dtype=torch.float64
        )
        self.events: list[tuple[int, Kept]] = []

    def advance(self, count: int) -> None:
        """Compute so many rows, in chunks that end at events."""
        end = self.computed + count
        while self.computed < end:
            if self.evictor.next_event(self.computed) == self.computed:
                self._evict()
            event = self.evictor.next_event(self.computed)
            assert event is None or event > self.computed
            self._rows(self.computed, min(end, event or end))

    def _rows(self, first: int, end: int) -> None:
        observation = self.evictor.observation(first, end - first, 3)
        self.computed = end
        begin, stop = (end, end) if observation is None else (max(first, observation.first), min(end, observation.end))
        if observation is not None and observation.queries is not None:
            part = slice(begin - observation.first, stop - observation.first)
            observation.queries[:, part] = self.numbers.queries[:, begin:stop].flatten(2).numpy()
        for layer in range(self.shape.num_layers):
            for head, table in enumerate(self.tables[layer]):
                table += range(first, end)
                steps = torch.round(self._attention(layer, head, first, end) * 2**24)  # [query heads, rows, slots]
                self.probabilities[layer, head, first:end, table] += steps.sum(0)
                if observation is not None and observation.sums is not None:
                    sums = steps[:, begin - first : stop - first].long().sum((0, 1))
                    observation.sums[layer, head, : len(table)] += sums.numpy()

    def _attention(self, layer: int, head: int, first: int, end: int) -> Tensor:
        """Softmax over the tokens left that come no later than the row."""
        heads, table = slice(head * self.shape.group, (head + 1) * self.shape.group), self.tables[layer][head]
        logits = (
            self.numbers.queries[layer, first:end, heads].double().transpose(0, 1)
            @ self.numbers.keys[layer, table, head].double().T
        )
        later = torch.tensor(table) > torch.arange(first, end)[:, None]
        return torch.softmax((logits * self.scale).masked_fill(later, -math.inf), 2)

    def read(self, layer: int, head: int, what: str) -> Any:
        return getattr(self.numbers, what)[layer, self.tables[layer][head], head].numpy()

    def _evict(self) -> None:
        expected = self.reference()
        kept = self.evictor.choose(self.computed, self.read)
        self.evictor.evicted(kept)
        for layer, heads in enumerate(self.tables):
            for head, table in enumerate(heads):
                count = int(kept.counts[layer, head])
                if self.shape.windows[layer]:
                    assert count == -1
                    continue
                slots = kept.kept[layer, head, :count].tolist()
                assert slots == sorted(set(slots)) and (kept.kept[layer, head, count:] == -1).all()
                heads[head] = [table[slot] for slot in slots]
                assert heads[head] == expected[layer][head], (layer, head, self.computed)
        self.events.append((self.computed, kept))

    def reference(self) -> dict[int, list[list[int]]]:
        """Tokens of each layer that evicts, by head, that the policy keeps now."""
        policy, layers = self.params.scorer, [i for i, window in enumerate(self.shape.windows) if not window]
        assert policy is not None
        budget = policy.kept(self.computed)
        if self.params.layers == "pyramid":
            budgets = pyramid(
                budget,
                sum(policy.protected(budget)),
                [sum(map(len, self.tables[layer])) // self.shape.num_kv_heads for layer in layers],
            )
        else:
            budgets = [budget] * len(layers)
        found = {}
        for layer, each in zip(layers, budgets, strict=True):
            scores = [self._scores(layer, head) for head in range(self.shape.num_kv_heads)]
            if isinstance(policy, TOVA):
                scores = [{t: sum(s[t] for s in scores) / len(scores) for t in scores[0]}] * len(scores)
            found[layer] = keep(scores, each, *policy.protected(budget), ada=self.params.heads == "ada")
        return found

    def _scores(self, layer: int, head: int) -> dict[int, float]:
        """Of each token that is left."""
        policy, table, seen = self.params.scorer, self.tables[layer][head], self.probabilities[layer, head]
        if isinstance(policy, H2O):
            return {t: float(seen[:, t].sum()) for t in table}
        if isinstance(policy, TOVA):
            return {t: float(seen[self.computed - 1, t]) for t in table}
        if isinstance(policy, SnapKV):
            sums = seen[self.computed - policy.window : self.computed, table[: -policy.window]].sum(0)
            pooled = torch.nn.functional.max_pool1d(sums[None, None], policy.kernel, 1, policy.kernel // 2)[0, 0]
            return dict(zip(table, [*pooled.tolist(), *[0.0] * policy.window], strict=True))
        keys = self.numbers.keys[layer, table, head].double()
        if isinstance(policy, KeyDiff):
            mean = torch.nn.functional.normalize(keys, dim=1).mean(0)
            return dict(
                zip(table, (-torch.nn.functional.cosine_similarity(keys, mean[None], dim=1)).tolist(), strict=True)
            )
        assert isinstance(policy, ExpectedAttention)
        others, total = keys[policy.sinks :], torch.zeros(len(table), dtype=torch.float64)
        observed = range(max(0, self.computed - policy.window), self.computed)
        observed = range(max(policy.sinks, observed.start), self.computed) or observed
        for query in range(head * self.shape.group, (head + 1) * self.shape.group):
            rows = self.numbers.queries[layer, observed.start : observed.stop, query].double()
            mean, covariance = rows.mean(0), torch.cov(rows.T, correction=0)
            if self.rope is not None:
                coming = range(self.computed, self.computed + policy.future)
                turn = sum(rotation(self.rope, position) for position in coming) / policy.future
                mean, covariance = turn @ mean, turn @ covariance @ turn.T
            logits = [self.scale * mean @ k + self.scale**2 * (k @ covariance @ k) / 2 for k in others]
            total[policy.sinks :] += torch.softmax(torch.stack(logits), 0)
        values = self.numbers.values[layer, table, head].double().norm(dim=1)
        return dict(zip(table, (total / self.shape.group * values).tolist(), strict=True))


def keep(scores: list[dict[int, float]], budget: int, first: int, last: int, *, ada: bool) -> list[list[int]]:
    """Tokens that each head keeps: first and last ones, then the best; of equal ones the later."""
    kept, rest = [], []
    for head, of in enumerate(scores):
        tokens = sorted(of)
        own = set(tokens[:first] + tokens[len(tokens) - last :])
        ranked = sorted(of.keys() - own, key=lambda t: (of[t], t), reverse=True)
        alone = max(1 - first - last, (budget - first - last) // 5) if ada else budget - first - last
        kept.append(own | set(ranked[:alone]))
        rest += [(of[t], t, -head) for t in ranked[alone:]]
    if ada:
        for _, token, head in sorted(rest, reverse=True)[: budget * len(scores) - sum(map(len, kept))]:
            kept[-head].add(token)
    return [sorted(each) for each in kept]


def pyramid(budget: int, protected: int, most: list[int]) -> list[int]:
    """As PyramidKV has it, for layers that all have room: floating point will do here."""
    rest, layers = budget - protected, len(most)
    if layers == 1:
        return [budget]
    high = min(rest * 1.95, max(most) - protected)
    shares = [protected + high - (2 * high - 2 * rest) * i / (layers - 1) for i in range(layers)]
    whole = [math.floor(share + 1e-9) for share in shares]
    order = sorted(range(layers), key=lambda i: (round(whole[i] - shares[i], 6), i))
    for i in order[: layers * budget - sum(whole)]:
        whole[i] += 1
    return whole if whole[-1] else [whole[0] - 1, *whole[1:-1], 1]
