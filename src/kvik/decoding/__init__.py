"""From logits to tokens. filters.py and noise.py are the definition, the native sampler is its fast twin."""

from kvik.decoding.sampler import Drawn, DrawRequest, Sampler, TokenLogprob, sample_rows, sample_rows_by_definition

__all__ = ["DrawRequest", "Drawn", "Sampler", "TokenLogprob", "sample_rows", "sample_rows_by_definition"]
