"""Rotary frequencies after context extension.

Su et al. 2021 (arXiv:2104.09864); linear: Chen et al. 2023 (arXiv:2306.15595); yarn: Peng et al. 2023
(arXiv:2309.00071); llama3: the band scaling released with Llama 3.1 (Meta 2024).
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from kvik.errors import ParameterError
from kvik.models.config import RopeConfig
from kvik.ops import RopeTable

__all__ = ["rope_table", "yarn_attention_factor"]

Frequencies = NDArray[np.float64]


def rope_table(rope: RopeConfig, head_size: int, context_length: int) -> RopeTable:
    """Frequencies [head_size / 2] and the factor on cosine and sine.

    context_length stands in for `rope.original_context` where that is None.
    Raises ParameterError for an odd head size, a kind without its formula, or divisors that do not fit.
    """
    if head_size < 2 or head_size % 2:
        raise ParameterError(f"head_size must be even and at least 2, got {head_size}")
    base = rope.theta ** (-np.arange(0, head_size, 2, dtype=np.float64) / head_size)
    if rope.divisors is not None:
        divisors = np.asarray(rope.divisors, dtype=np.float64)
        if divisors.shape != base.shape or not (np.isfinite(divisors) & (divisors > 0)).all():
            raise ParameterError(f"rope divisors must be {base.size} finite positive numbers, got {divisors.shape}")
        return RopeTable(base / divisors)
    original = rope.original_context or context_length
    if rope.kind == "default":
        return RopeTable(base)
    if rope.kind == "linear":
        return RopeTable(base / rope.factor)
    if rope.kind == "llama3":
        return RopeTable(_llama3(base, rope, original))
    if rope.kind == "yarn":
        factor = rope.attention_factor
        return RopeTable(
            _yarn(base, rope, head_size, original), yarn_attention_factor(rope.factor) if factor is None else factor
        )
    raise ParameterError(f"rope kind must be default, linear, llama3 or yarn, got {rope.kind!r}")


def yarn_attention_factor(factor: float, scale: float = 1.0) -> float:
    """0.1 scale ln(factor) + 1, which keeps attention's entropy over a context `factor` times longer (eq. 22)."""
    return 1.0 if factor <= 1.0 else 0.1 * scale * math.log(factor) + 1.0


def _llama3(base: Frequencies, rope: RopeConfig, original: int) -> Frequencies:
    """Long waves are slowed by the factor, short ones kept, those between blended by rotations per context."""
    rotations = original * base / (2 * math.pi)
    kept = (rotations - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    return _blend(base, rope.factor, kept)


def _yarn(base: Frequencies, rope: RopeConfig, head_size: int, original: int) -> Frequencies:
    """A linear ramp over dimensions between those that turn beta_fast and beta_slow times in the original context."""

    def dimension(rotations: float) -> float:
        return head_size * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low = max(math.floor(dimension(rope.beta_fast)), 0)
    high = min(math.ceil(dimension(rope.beta_slow)), head_size - 1)
    # Both edges on one dimension would divide by zero: a step, written as a very steep ramp.
    width = float(high - low) or 0.001
    return _blend(base, rope.factor, 1.0 - (np.arange(base.size, dtype=np.float64) - low) / width)


def _blend(base: Frequencies, factor: float, kept: Frequencies) -> Frequencies:
    """`kept` 1 leaves a frequency, 0 divides it by the factor."""
    share = np.clip(kept, 0.0, 1.0)
    return base * share + base / factor * (1.0 - share)
