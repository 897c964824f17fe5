"""A model of a few lines for engine tests: it says the tokens it was told to, whatever the prompt."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kvik.cache.layout import KVLayout
from kvik.engine.engine import Engine
from kvik.ops import Pass, StepTimes
from kvik.text.tokenizer import Tokenizer

LAYOUT = KVLayout("f16", layers=1, kv_heads=1, head_size=16)


class Script:
    """After token i of the vocabulary comes i + 1; notes every pass."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.passes: list[Pass] = []
        self.isa: str | None = None

    def run(self, work: Pass) -> NDArray[np.float32]:
        self.passes.append(work)
        logits = np.zeros((len(work.logit_rows), self.vocab_size), np.float32)
        follow = (work.tokens[work.logit_rows] + 1) % self.vocab_size
        logits[np.arange(len(follow)), follow] = 9.0
        return logits

    def times(self) -> StepTimes:
        return StepTimes(0.0, 0.0, 0.0)


def engine(tokenizer: Tokenizer, *, num_blocks: int = 8, context: int = 100, batch: int = 32) -> tuple[Engine, Script]:
    script = Script(tokenizer.vocab_size)
    made = Engine(
        script,
        tokenizer,
        LAYOUT,
        num_blocks,
        vocab_size=tokenizer.vocab_size,
        context_length=context,
        max_batch_tokens=batch,
    )
    return made, script
