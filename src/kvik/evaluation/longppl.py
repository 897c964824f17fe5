"""LongPPL: perplexity over the tokens that need a long context.

Fang, Wang, Liu, Zhang, Jegelka, Gao, Ding and Wang 2024, "What is wrong with perplexity for long-context language
modeling?" (arXiv:2410.23771). An *evaluator* finds the key tokens: those with

    log P(x | long context) - log P(x | short context) > alpha    and    log P(x | long context) > beta.

LongPPL of the *evaluated* model is exp of its mean negative log-likelihood over the key tokens only, each weighing the
same; all others count for nothing.

As in the authors' implementation: the long context is the text up to the token. The short one comes from windows that
begin at tokens 0, stride, 2 * stride, … of the evaluator's: each is `window` tokens of context and then the next `stride`
tokens (at the end of the text fewer), which are judged there; so a token's short context is `window` to window + stride - 1
tokens, and the first `window` tokens of a text are never key. Windows are cut out as they are: nothing is put in front of
them. Both comparisons are strict. The evaluator's key tokens that touch make one span of characters, and a token of the
evaluated model is key where all of its characters lie in one span, whatever its tokenizer.

Otherwise than there: both models read the text as their texts begin (with the token for that in front, where the model
has one; there the evaluated model goes without), and a text's first token, which nothing predicts, is never key.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvik.errors import DataError, ParameterError
from kvik.evaluation.model import TextModel
from kvik.evaluation.perplexity import Text, as_texts, exp
from kvik.evaluation.segments import SEGMENT_BYTES, SegmentSums
from kvik.evaluation.statistics import Interval, block_bootstrap
from kvik.evaluation.token_spans import TokenizedText, inside, joined, shortened, tokenized

__all__ = ["KeyRule", "KeyToken", "LongPPL", "longppl"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

ALPHA, BETA, WINDOW, STRIDE = 2.0, -2.0, 4096, 1024
_CHARACTERS = 16  # more than a token has on average


@dataclass(frozen=True)
class KeyRule:
    """What makes a token key.

    Attributes:
        alpha: nats that the long context must gain above, finite.
        beta: log-probability in the long context that must be passed, finite; 0 or more lets no token pass.
        window: tokens of short context, at least 1.
        stride: tokens judged in each window, at least 1.
    """

    alpha: float = ALPHA
    beta: float = BETA
    window: int = WINDOW
    stride: int = STRIDE

    def __post_init__(self) -> None:
        for name in ("alpha", "beta"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise ParameterError(f"{name} must be a finite number, got {value!r}")
        for name in ("window", "stride"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ParameterError(f"{name} must be an integer of at least 1, got {value!r}")


class KeyToken(NamedTuple):
    """A key token of the evaluated model. text: which, from 0; offset: bytes before it, of the text as the tokenizer
    normalizes it; token: as text; nll: of the evaluated model, nats."""

    text: int
    offset: int
    token: str
    nll: float


@dataclass(frozen=True)
class LongPPL:
    """What the evaluated model makes of the tokens that need a long context.

    Attributes:
        value: exp of the mean nll of the key tokens; None where there are none.
        nll: that mean, nats; None likewise.
        standard_error: of nll, by bootstrap over the segments of 2,048 bytes of the texts that have key tokens. interval: of
            value, at 95 %. None where there are fewer than two such segments.
        key_tokens: of the evaluated model. tokens: that it predicted. share: of these that are key.
        perplexity: of all that it predicted, from the same pass.
        evaluator_key_tokens: of the evaluator. judged: tokens that it could have found, those after a text's first window.
        texts: read. texts_short: of them, those with nothing to judge. texts_cut: those cut to the shorter context.
        rule: what makes a token key.
        keys: all key tokens, in order.
    """

    value: float | None
    nll: float | None
    standard_error: float | None
    interval: Interval | None
    key_tokens: int
    tokens: int
    share: float
    perplexity: float
    evaluator_key_tokens: int
    judged: int
    texts: int
    texts_short: int
    texts_cut: int
    rule: KeyRule
    keys: tuple[KeyToken, ...]


def _unwatched(done: int) -> None:
    """Progress that nobody watches."""


def longppl(
    model: TextModel,
    evaluator: TextModel,
    texts: str | Iterable[Text],
    *,
    alpha: float = ALPHA,
    beta: float = BETA,
    window: int = WINDOW,
    stride: int = STRIDE,
    cut: bool = False,
    progress: Callable[[int], None] = _unwatched,
) -> LongPPL:
    """LongPPL of the model on the texts, with the evaluator's key tokens.

    Args:
        model: is evaluated. evaluator: finds the key tokens; it may be the same.
        texts: each a string or the pieces of one; a string is one text.
        alpha, beta, window, stride: see `KeyRule`.
        cut: a text longer than the shorter of both contexts is cut to it; False refuses it.
        progress: called with bytes of text that are done.

    Raises ParameterError for settings out of range and a window that leaves the evaluator no token to judge, DataError for
    a text longer than a context, by name, and for one that the tokenizers turn into different characters.
    """
    rule = KeyRule(alpha, beta, window, stride)
    room = evaluator.info.context_length
    if window >= room:
        raise ParameterError(
            f"window must be below {room}, the context of {evaluator.info.name}, which judges the tokens after it, "
            f"got {window}"
        )
    found = _Found(rule)
    for index, pieces in enumerate(as_texts(texts)):
        whole, ended = _beginning(pieces, (model, evaluator))
        text = _fitting(index, whole, model, evaluator, ended=ended, cut=cut)
        found.cut += len(text) < len(whole) or not ended
        _add(found, index, text, model, evaluator)
        progress(found.bytes)
    if not found.tokens:
        raise DataError("the texts have no token to predict; give longer ones")
    return found.result()


def _beginning(pieces: Iterable[str], models: tuple[TextModel, ...]) -> tuple[str, bool]:
    """A text, or as much of one as is surely beyond a context: it may be larger than memory. And whether that is all."""
    most = max(one.info.context_length for one in models)
    text, wanted = "", _CHARACTERS * most
    parts: list[str] = []
    for piece in pieces:
        parts.append(piece)
        if (wanted := wanted - len(piece)) > 0:
            continue
        text = "".join([text, *parts])
        parts, wanted = [], len(text)
        # what follows changes the last few tokens only
        if any(len(tokenized(one.tokenizer, text).ids) > one.info.context_length + _CHARACTERS for one in models):
            return text, False
    return "".join([text, *parts]), True


def _fitting(index: int, text: str, model: TextModel, evaluator: TextModel, *, ended: bool, cut: bool) -> str:
    """The text, as much of it as is to be read."""
    for role, one in (("the evaluator", evaluator), ("the model", model)):
        most, count = one.info.context_length, len(tokenized(one.tokenizer, text).ids)
        if count <= most:
            continue
        if not cut:
            raise DataError(
                f"text {index} has {count:,} tokens{'' if ended else ' or more'} for {role} {one.info.name}, whose context is "
                f"{most:,}; LongPPL takes texts within one context: cut it, or let it be cut (cut=True, --cut)"
            )
        text = shortened(one.tokenizer, text, most)
    return text


def _add(found: _Found, index: int, text: str, model: TextModel, evaluator: TextModel) -> None:
    judge, own = tokenized(evaluator.tokenizer, text), tokenized(model.tokenizer, text)
    if judge.data != own.data:
        raise DataError(
            f"text {index}: the tokenizers of {evaluator.info.name} and {model.info.name} normalize it differently, so "
            "their tokens cannot be matched"
        )
    same = evaluator is model
    keys, long = _evaluator_keys(evaluator, judge, found.rule, everything=same)
    nll = -(long if same else _logprobs(model, [own.ids], [1])[0])
    found.add(index, model, own, nll, judge, keys)


def _evaluator_keys(
    evaluator: TextModel, text: TokenizedText, rule: KeyRule, *, everything: bool
) -> tuple[Ints, Floats]:
    """Indices in `ids` of the evaluator's key tokens, and the log-probabilities in the long context: from the first judged
    token on, or of everything.

    The first window's context is the long one, so it is not computed again: nothing is gained there.
    """
    ids, window = text.ids, rule.window
    starts = list(range(0, len(ids) - window, rule.stride))
    first = 1 if everything else window
    if not starts and not everything:
        return np.empty(0, np.int64), np.empty(0)
    parts = [ids, *(ids[start : start + window + rule.stride] for start in starts[1:])]
    long, *short = _logprobs(evaluator, parts, [first] + [window] * (len(parts) - 1))
    if not starts:
        return np.empty(0, np.int64), long
    judged = long[window - first :]
    alone = judged[: rule.stride]
    gain = judged - np.concatenate([alone, *short])
    return window + np.flatnonzero((gain > rule.alpha) & (judged > rule.beta)), long


def _logprobs(model: TextModel, inputs: list[list[int]], first: list[int]) -> list[Floats]:
    """Of each input the log-probabilities from its first token on; those of a single token have none."""
    wanted = [at for at, ids in enumerate(inputs) if len(ids) > first[at]]
    scored = model.score([inputs[at] for at in wanted], first=[first[at] for at in wanted]) if wanted else []
    found = [np.empty(0)] * len(inputs)
    for at, result in zip(wanted, scored, strict=True):
        found[at] = np.asarray(result.logprobs, np.float64)
        if len(found[at]) != len(inputs[at]) - first[at] or not np.isfinite(found[at]).all():
            raise DataError(f"{model.info.name} does not give every token a finite log-probability")
    return found


class _Found:
    """What adds up over the texts."""

    def __init__(self, rule: KeyRule) -> None:
        self.rule = rule
        self.texts = self.short = self.cut = self.bytes = 0
        self.tokens = self.judged = self.evaluator_keys = 0
        self.nll = 0.0
        self.keys: list[KeyToken] = []
        self._segments = SegmentSums()

    def add(
        self, index: int, model: TextModel, own: TokenizedText, nll: Floats, judge: TokenizedText, judge_keys: Ints
    ) -> None:
        """nll: of own.ids[1:]. judge_keys: indices in judge.ids."""
        self.texts += 1
        judged = max(0, len(judge.ids) - self.rule.window)
        self.judged += judged
        self.short += not judged
        self.evaluator_keys += len(judge_keys)
        self.tokens += len(nll)
        self.nll += float(nll.sum())
        unpredicted = 0 if own.front else 1
        spans = own.spans[unpredicted:]
        places = np.flatnonzero(inside(spans, joined(judge.spans[judge_keys - judge.front])))
        starts = spans[places, 0]
        segments, inverse, counts = np.unique(
            (self.bytes + starts) // SEGMENT_BYTES, return_inverse=True, return_counts=True
        )
        self._segments.add(
            segments, np.bincount(inverse, nll[places]).astype(np.float64), counts, np.zeros_like(segments)
        )
        for place, offset in zip(places.tolist(), starts.tolist(), strict=True):
            token, before = own.ids[place + 1], own.ids[place]
            text = model.tokenizer.piece(token, before).decode(errors="replace")
            self.keys.append(KeyToken(index, offset, text, float(nll[place])))
        self.bytes += len(own.data)

    def result(self) -> LongPPL:
        count = len(self.keys)
        nll = math.fsum(key.nll for key in self.keys) / count if count else None
        error = interval = None
        segments = [(sums, keys) for sums, keys in zip(*self._segments.result(0)[1:3], strict=True) if keys]
        if nll is not None and len(segments) > 1:
            spread = block_bootstrap(*zip(*segments, strict=True))
            error = spread.standard_error
            interval = Interval(exp(nll), exp(spread.interval.low), exp(spread.interval.high))
        return LongPPL(
            value=None if nll is None else exp(nll), nll=nll, standard_error=error, interval=interval,
            key_tokens=count, tokens=self.tokens, share=count / self.tokens,
            perplexity=exp(self.nll / self.tokens),
            evaluator_key_tokens=self.evaluator_keys, judged=self.judged, texts=self.texts, texts_short=self.short,
            texts_cut=self.cut, rule=self.rule, keys=tuple(self.keys),
        )  # fmt: skip
