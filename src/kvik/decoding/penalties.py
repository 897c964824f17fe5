"""What changes single logits before temperature: pure functions on one row, float32 [V]; -inf marks a removed token.

Every operation is one float32 operation an entry, as transformers computes it on float32 logits, so that both agree in
every bit; native/sampler_edits.cpp is the fast twin. No function writes into its input. A finite logit stays finite,
whatever is added, subtracted or multiplied: it is bounded by the largest float32. A removed token stays removed.
What each looks at, prompt, answer or both, is decided where the ids are gathered (state.py) and written here.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from kvik.errors import ParameterError

__all__ = [
    "ban",
    "dry_cap",
    "dry_penalty",
    "frequency",
    "mask",
    "no_repeat_ngram",
    "presence",
    "repetition",
    "subtract",
    "with_bias",
]

Row = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int32]

LARGEST = np.finfo(np.float32).max
# llama.cpp raises its base to whole powers only as far as a float32 holds them
FLOAT_LOG_MAX = 88.7228391
LEAST_DRY_BASE = 1.000001


def _checked(row: Row, ids: Ids) -> npt.NDArray[np.intp]:
    """ids as indices; ParameterError unless all are in [0, V)."""
    at = np.asarray(ids, np.intp)
    if at.size and not (at.min() >= 0 and at.max() < row.size):
        outside = at[(at < 0) | (at >= row.size)]
        raise ParameterError(f"token ids must be in [0, {row.size - 1}], got {', '.join(map(str, outside.tolist()))}")
    return at


def _changed(row: Row, at: npt.NDArray[np.intp], values: Row) -> Row:
    """The row with row[at] = values, those bounded where a token is not removed."""
    result = row.copy()
    result[at] = np.where(row[at] == -np.inf, row[at], np.clip(values, -LARGEST, LARGEST))
    return result


def with_bias(row: Row, ids: Ids, biases: npt.NDArray[np.float32]) -> Row:
    """Adds biases [N] to the logits of ids [N]: OpenAI's logit_bias. Looks at no text."""
    at = _checked(row, ids)
    return _changed(row, at, row[at] + biases)


def ban(row: Row, ids: Ids) -> Row:
    """Removes ids: the ends of text until min_tokens are out, and what would complete one of bad_words.

    bad_words look at prompt and answer (transformers' NoBadWordsLogitsProcessor), min_tokens at the answer's length.
    """
    result = row.copy()
    result[_checked(row, ids)] = -np.inf
    return result


def mask(row: Row, allowed: npt.NDArray[np.uint32]) -> Row:
    """Removes the tokens whose bit is 0: token t is bit t % 32 of allowed[t // 32], allowed [ceil(V / 32)].

    A grammar's next tokens. It looks at the answer.
    """
    if allowed.shape != ((row.size + 31) // 32,):
        raise ParameterError(f"a mask of {row.size} tokens has {(row.size + 31) // 32} words, got {allowed.shape}")
    bits = np.unpackbits(allowed.astype("<u4").view(np.uint8), bitorder="little", count=row.size)
    return np.where(bits, row, np.float32(-np.inf))


def repetition(row: Row, seen: Ids, penalty: float) -> Row:
    """Logits of seen tokens are divided by penalty where positive and multiplied where negative; penalty > 0, 1 is off.

    Keskar et al. 2019, "CTRL", arXiv:1909.05858, section 4.1, with the sign as transformers' RepetitionPenaltyLogitsProcessor.
    Looks at prompt and answer.
    """
    if not 0.0 < penalty < math.inf:
        raise ParameterError(f"repetition_penalty must be above 0, got {penalty}")
    at = _checked(row, seen)
    factor = np.float32(penalty)
    old = row[at]
    with np.errstate(over="ignore"):
        return _changed(row, at, np.where(old < 0, old * factor, old / factor))


def presence(row: Row, ids: Ids, penalty: float) -> Row:
    """Subtracts penalty from tokens that the answer has: OpenAI's presence_penalty. Looks at the answer only."""
    return subtract(row, ids, np.full(len(ids), penalty, np.float32))


def frequency(row: Row, ids: Ids, counts: npt.NDArray[np.int32], penalty: float) -> Row:
    """Subtracts penalty times how often the answer has a token: OpenAI's frequency_penalty. Looks at the answer only."""
    return subtract(row, ids, counts.astype(np.float32) * np.float32(penalty))


def subtract(row: Row, ids: Ids, penalties: npt.NDArray[np.float32]) -> Row:
    """Subtracts penalties [N] from the logits of ids [N]; DRY's come from `dry_penalty`.

    DRY ("Don't Repeat Yourself", p-e-w 2024, as llama.cpp's llama_sampler_init_dry computes it): a token that would
    lengthen a repetition of what came before. Looks at prompt and answer, as far as dry_range and the breakers let it.
    """
    at = _checked(row, ids)
    with np.errstate(over="ignore"):
        return _changed(row, at, row[at] - penalties)


def no_repeat_ngram(row: Row, ids: Ids) -> Row:
    """Removes the tokens that would complete an n-gram that is there already: `ban`, by another reason.

    Paulus, Xiong and Socher 2017, arXiv:1705.04304, section 2.5, as transformers' NoRepeatNGramLogitsProcessor. Looks at
    prompt and answer.
    """
    return ban(row, ids)


def dry_cap(base: float) -> int | None:
    """The largest exponent of base, as llama.cpp bounds it; None where no power of it overflows."""
    return int(FLOAT_LOG_MAX / math.log(base)) if base > LEAST_DRY_BASE else None


def dry_penalty(
    lengths: npt.NDArray[np.int64], multiplier: float, base: float, allowed: int
) -> npt.NDArray[np.float32]:
    """multiplier * base ** (length - allowed) for lengths >= allowed of repetitions, bounded by the largest float32."""
    cap = dry_cap(base)
    powers = lengths - allowed if cap is None else np.minimum(lengths - allowed, cap)
    penalties = multiplier * np.power(np.float64(base), powers.astype(np.float64))
    return np.minimum(penalties, float(LARGEST)).astype(np.float32)
