"""From logits to tokens. pipeline.py and noise.py are the definition, the native sampler is its fast twin."""

from kvik.decoding.best import Best, best_rows
from kvik.decoding.pipeline import DrawRequest
from kvik.decoding.sampler import Drawn, Sampler, TokenLogprob, sample_rows, sample_rows_by_definition
from kvik.decoding.state import DecodingState, Edits, Matcher, Words

__all__ = [
    "Best",
    "DecodingState",
    "DrawRequest",
    "Drawn",
    "Edits",
    "Matcher",
    "Sampler",
    "TokenLogprob",
    "Words",
    "best_rows",
    "sample_rows",
    "sample_rows_by_definition",
]
