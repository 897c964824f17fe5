"""Metrics: pure functions named after their definition. Nothing is rounded; what cannot be scored is None, not zero."""

from kvik.evaluation.metrics.diversity import distinct_n, repetition_rate, self_bleu, words
from kvik.evaluation.metrics.sameness import determinism, mean_logprob

__all__ = ["determinism", "distinct_n", "mean_logprob", "repetition_rate", "self_bleu", "words"]
