"""The guide's words for a perplexity (section 3.1): those of GPT-2 on English text. Of other models and texts they say nothing."""

from __future__ import annotations

__all__ = ["BANDS", "BANDS_OF", "band"]

BANDS_OF = "GPT-2 on English text"
BANDS: tuple[tuple[float, str], ...] = ((20.0, "excellent"), (50.0, "good"), (100.0, "fair"))
"""Below each figure; from 100 to 300 it is poor, above very poor."""


def band(perplexity: float) -> str:
    """The guide's word for a token perplexity, at least 1."""
    for bound, word in BANDS:
        if perplexity < bound:
            return word
    return "poor" if perplexity <= 300 else "very poor"
