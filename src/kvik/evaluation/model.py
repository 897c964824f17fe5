"""What evaluation asks of a model. `kvik.LLM` gives all of it; an HTTP endpoint gives what its server can.

What a model cannot give (a logit, a log-probability of a given token) it refuses with a ParameterError that names it.
"""

from __future__ import annotations

from collections.abc import Generator as Yielding
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

__all__ = ["Generator", "Info", "RowScorer", "Rows", "Scored", "Scorer", "TextModel", "TextTokens"]

Ids = Sequence[int]


class Generator(Protocol):
    """Answers prompts. An answer has `choices` with text, token_ids and cumulative_logprob."""

    def generate(self, prompts: Any, params: Any) -> Sequence[Any]: ...


class Scored(Protocol):
    """Log-probabilities of a text's tokens, in nats: `logprobs[i]` is of token `first + i`, given all before it."""

    @property
    def first(self) -> int: ...

    @property
    def logprobs(self) -> NDArray[np.float64]: ...


class Scorer(Protocol):
    """Gives the log-probabilities of given tokens.

    inputs: token ids, one or several texts. reduce: keep no logits. top: best tokens at each place besides. first: index
    of the first token whose log-probability is wanted, at least 1, one for all or one an input; what comes before is
    context. One result an input, in order, with N - first log-probabilities of its N tokens.
    """

    def score(
        self, inputs: Sequence[Ids], *, reduce: bool = True, top: int = 0, first: int | Sequence[int] = 1
    ) -> Sequence[Scored]: ...


class Rows(Protocol):
    """Logits [C, V] float32, valid until the next item: row i comes before token `first + i`."""

    @property
    def first(self) -> int: ...

    @property
    def logits(self) -> NDArray[np.float32]: ...


class RowScorer(Protocol):
    """Gives the logits before each of a text's tokens `first` to its last, a few rows at a time; closing it ends that."""

    def score_rows(self, ids: Ids, *, first: int = 1) -> Yielding[Rows]: ...


class TextTokens(Protocol):
    """A tokenizer: `kvik.text.tokenizer.Tokenizer` is one.

    add_bos: the model's texts begin with the token bos_id. encode: a text's ids; first: it begins its document. piece:
    the bytes of a token that follows `after`; None: it begins the text.
    """

    @property
    def bos_id(self) -> int | None: ...

    @property
    def add_bos(self) -> bool: ...

    def encode(self, text: str, *, add_special: bool = True, first: bool = True) -> list[int]: ...

    def piece(self, token: int, after: int | None = None) -> bytes: ...


class Info(Protocol):
    """name: for people. digest: of all that decides what it answers. context_length: tokens, at least 2."""

    @property
    def name(self) -> str: ...

    @property
    def digest(self) -> str: ...

    @property
    def context_length(self) -> int: ...


class TextModel(Scorer, Protocol):
    """A scorer that knows its tokens: what perplexity is measured on."""

    @property
    def tokenizer(self) -> TextTokens: ...

    @property
    def info(self) -> Info: ...
