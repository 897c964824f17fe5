"""Executors without a model: one says the tokens it was told to, one what follows from all that its block tables show."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kvik.cache.layout import BLOCK_TOKENS, KVLayout, LayerGroup
from kvik.engine.admission import Model
from kvik.engine.engine import Engine
from kvik.ops import Executor, Pass, Reduced, StepTimes
from kvik.ops.reduction import empty_reduced, reduce_logits
from kvik.params import EngineParams
from kvik.text.tokenizer import Tokenizer

LAYOUT = KVLayout("f16", 1, 16, (LayerGroup((0,), 0),))
WINDOWS = KVLayout("f16", 1, 16, (LayerGroup((0, 2, 4), 0), LayerGroup((1, 3), 20)))
ONE_WINDOW = KVLayout("f16", 1, 16, (LayerGroup((0, 1), 20),))
ONLY_WINDOWS = KVLayout("f16", 1, 16, (LayerGroup((0, 1), 20), LayerGroup((2,), 40)))


class Reducing:
    """Reduces the rows that `make` gives beside those that are asked for."""

    def __init__(self) -> None:
        self._reduced = empty_reduced(0, 0)

    def make(self, work: Pass, rows: NDArray[np.int32]) -> NDArray[np.float32]:
        raise NotImplementedError

    def run(self, work: Pass) -> NDArray[np.float32]:
        logits, kept = self.make(work, np.concatenate([work.logit_rows, work.reduce_rows])), len(work.logit_rows)
        self._reduced = reduce_logits(logits[kept:], work.targets, work.top)
        return logits[:kept]

    def reduced(self) -> Reduced:
        return self._reduced


class Script(Reducing):
    """After token i of the vocabulary comes i + 1; notes every pass."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.passes: list[Pass] = []
        self.isa: str | None = None
        self.pool = None

    def make(self, work: Pass, rows: NDArray[np.int32]) -> NDArray[np.float32]:
        self.passes.append(work)
        logits = np.zeros((len(rows), self.vocab_size), np.float32)
        follow = (work.tokens[rows] + 1) % self.vocab_size
        logits[np.arange(len(follow)), follow] = 9.0
        return logits

    def times(self) -> StepTimes:
        return StepTimes(0.0, 0.0, 0.0)


class Seeing(Reducing):
    """Logits are a hash of everything a row sees through its block tables, and so is what it leaves in the cache.

    Memory is that of the layout, a number for each layer and slot; groups share it as they do in the executors. So a wrong
    block, slot, window or copy, or one that somebody else wrote to, changes what comes out.
    """

    isa: str | None = None
    pool: None = None
    BUCKETS = 509

    def __init__(self, layout: KVLayout, num_slabs: int, vocab_size: int) -> None:
        super().__init__()
        self.layout = layout
        layers = num_slabs * layout.slab_bytes // layout.layer_bytes
        self.memory = np.zeros((layers, BLOCK_TOKENS), np.uint64)
        self.groups = [
            self.memory[: layers // n * n].reshape(-1, n, BLOCK_TOKENS)
            for n in (len(group.layers) for group in layout.groups)
        ]
        rng = np.random.default_rng(7)
        self.table = rng.normal(0, 2, (2, self.BUCKETS, vocab_size)).astype(np.float32)
        self.factors = rng.integers(0, 2**63, (8, 4096), dtype=np.uint64) * 2 + 1
        self.rows = self.splits = 0

    def make(self, work: Pass, rows: NDArray[np.int32]) -> NDArray[np.float32]:
        for group, source, target in work.copies.tolist():
            self.groups[group][target] = self.groups[group][source]
        wanted = set(rows.tolist())
        out = {}
        sequences = len(work.spans) - 1
        for s in range(sequences):
            tables = [work.blocks[slice(*work.block_spans[g * sequences + s :][:2])] for g in range(len(self.groups))]
            first, end = work.spans[s : s + 2].tolist()
            self.splits += end - 1 not in wanted
            for row in range(first, end):
                seen = self._row(int(work.tokens[row]), int(work.slots[row]), tables)
                if row in wanted:
                    out[row] = self.table[0, seen % self.BUCKETS] + self.table[1, (seen >> 20) % self.BUCKETS]
        self.rows += len(work.tokens)
        return np.array([out[row] for row in rows.tolist()], np.float32).reshape(len(out), self.table.shape[2])

    def _row(self, token: int, slot: int, tables: list[NDArray[np.int32]]) -> int:
        seen = np.uint64((token + 1) * 0x9E3779B97F4A7C15 % 2**64) ^ np.uint64(slot)
        with np.errstate(over="ignore"):
            for group, table, shape in zip(self.groups, tables, self.layout.groups, strict=True):
                low = max(0, slot + 1 - shape.window) if shape.window else 0
                places = table[low // BLOCK_TOKENS : slot // BLOCK_TOKENS + 1]
                assert (places >= 0).all(), "a block that is seen was freed"
                values = group[places].transpose(1, 0, 2).reshape(len(shape.layers), -1)
                begin = low - low % BLOCK_TOKENS
                values = values[:, low - begin : slot - begin]
                seen += (values * self.factors[: len(values), low:slot]).sum()
            seen ^= seen >> np.uint64(29)
            seen *= np.uint64(0xBF58476D1CE4E5B9)
            seen ^= seen >> np.uint64(32)
        for group, table in zip(self.groups, tables, strict=True):
            group[table[slot // BLOCK_TOKENS], :, slot % BLOCK_TOKENS] = seen
        return int(seen)

    def times(self) -> StepTimes:
        return StepTimes(0.0, 0.0, 0.0)


def make_engine(
    executor: Executor, tokenizer: Tokenizer, layout: KVLayout, num_slabs: int, context: int = 400, **params: object
) -> Engine:
    model = Model(tokenizer, tokenizer.vocab_size, context)
    return Engine(executor, model, layout, num_slabs, EngineParams(**params))  # type: ignore[arg-type]


def engine(
    tokenizer: Tokenizer, *, num_blocks: int = 8, context: int = 100, batch: int = 32, **params: object
) -> tuple[Engine, Script]:
    script = Script(tokenizer.vocab_size)
    params = {"max_batch_tokens": batch, "prefix_sharing": False} | params
    return make_engine(script, tokenizer, LAYOUT, num_blocks, context, **params), script


def seeing(tokenizer: Tokenizer, layout: KVLayout = LAYOUT, num_slabs: int = 400, **params: object) -> Engine:
    return make_engine(Seeing(layout, num_slabs, tokenizer.vocab_size), tokenizer, layout, num_slabs, **params)


def run_out(made: Engine) -> None:
    """Step to the end, checking the books after every step; nobody holds a block afterwards."""
    while made.step():
        made.scheduler.check_integrity()
    assert made.scheduler.pool.num_held == 0
    assert made.scheduler.pool.num_free_slabs == made.scheduler.pool.num_slabs
