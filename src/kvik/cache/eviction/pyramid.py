"""Budgets that fall from the first layer to the last (PyramidKV: Cai et al. 2024, arXiv:2406.02069)."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from math import floor

__all__ = ["budgets"]

STEEPNESS = 20
"""The last layer's part of an even share, the protected slots apart, is one in so many: the paper's beta."""


def budgets(kept: int, protected: int, most: Sequence[int]) -> list[int]:
    """Slots of each layer: `protected` and a share of the rest that falls linearly. Their sum is len(most) * kept.

    kept: slots that a layer keeps on average, at least 1. most: slots that there are, by layer; where that is less than the
    share, the line is less steep, so that the first layer keeps all. Fractions go to the largest remainders, to
    earlier layers where these are equal; no layer gets less than one slot.
    """
    layers = len(most)
    if layers == 1:
        return [min(kept, most[0])]
    rest = Fraction(kept - min(protected, kept))
    high = min(rest * (2 - Fraction(1, STEEPNESS)), Fraction(max(max(most), kept) - kept) + rest)
    low = 2 * rest - high
    fall = (high - low) / (layers - 1)
    line = [kept - rest + high - fall * layer for layer in range(layers)]
    least = [min(max(1, min(protected, kept)), each) for each in most]
    return _whole(_within(line, least, most, min(layers * kept, sum(most))))


def _within(line: list[Fraction], least: Sequence[int], most: Sequence[int], total: int) -> list[Fraction]:
    """The line moved up or down and cut to the bounds, so that its sum is the total, which these allow."""
    found, free = list(line), set(range(len(line)))
    while free:
        move = (total - sum(found, Fraction(0))) / len(free)
        over = {layer: most[layer] for layer in free if found[layer] + move > most[layer]}
        under = {layer: least[layer] for layer in free if found[layer] + move < least[layer]}
        excess = sum(found[layer] + move - bound for layer, bound in (over | under).items())
        cut = over if excess >= 0 else under
        if not cut:
            return [share + move if layer in free else share for layer, share in enumerate(found)]
        for layer, bound in cut.items():
            found[layer] = Fraction(bound)
        free -= cut.keys()
    return found


def _whole(shares: list[Fraction]) -> list[int]:
    """Integers of the same sum, by largest remainder."""
    whole = [floor(share) for share in shares]
    order = sorted(range(len(shares)), key=lambda layer: (whole[layer] - shares[layer], layer))
    for layer in order[: int(sum(shares)) - sum(whole)]:
        whole[layer] += 1
    return whole
