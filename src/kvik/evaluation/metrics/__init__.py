"""Metrics: pure functions named after their definition. Nothing is rounded; what cannot be scored is None, not zero.

METRICS has those that judge predictions. A metric's module, and what that needs, is imported when it is used.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

from kvik.evaluation.metrics.diversity import distinct_n, repetition_rate, self_bleu, words
from kvik.evaluation.metrics.result import MetricResult, Sums, Unscored, check_pairs
from kvik.evaluation.metrics.sameness import determinism, mean_logprob

__all__ = [
    "GROUPS",
    "METRICS",
    "Metric",
    "MetricResult",
    "Sums",
    "Unscored",
    "check_pairs",
    "determinism",
    "distinct_n",
    "mean_logprob",
    "repetition_rate",
    "self_bleu",
    "words",
]

Pooled = Literal["mean", "sums", "set"]
"""How a metric's value comes of its samples: the mean of their scores; of what is added up over them (MetricResult.sums);
of all of them together, so that drawing some twice would change what is measured."""


@dataclass(frozen=True)
class Metric:
    """One entry of METRICS.

    Attributes:
        place: "module:function", the module below this package.
        about: what it says, in a few words.
        low, high: the range of its values; None is unbounded.
        higher_is_better: None where that depends.
        needs_references: whether it compares with references at all.
        extra: the package it needs, as pip names it.
        pooled: how its value comes of the samples.
    """

    place: str
    about: str
    low: float = 0.0
    high: float | None = 1.0
    higher_is_better: bool | None = True
    needs_references: bool = True
    extra: str | None = None
    pooled: Pooled = "mean"

    @property
    def function(self) -> Callable[..., MetricResult]:
        """(predictions, references, *, settings…); without references for the metrics that need none."""
        module, _, name = self.place.partition(":")
        found: Any = getattr(import_module(f"{__name__}.{module}"), name)
        function: Callable[..., MetricResult] = found
        return function


METRICS: dict[str, Metric] = {
    "exact_match": Metric("answers:exact_match", "the answer is a reference, after SQuAD's normalization"),
    "token_f1": Metric("answers:token_f1", "words in common with a reference, after SQuAD's normalization"),
    "bleu": Metric("translation:bleu", "n-grams in common, percent", high=100, extra="sacrebleu", pooled="sums"),
    "chrf": Metric("translation:chrf", "characters' n-grams in common, percent", high=100, extra="sacrebleu", pooled="sums"),
    "ter": Metric("translation:ter", "edits to a reference, percent of its words", high=None, higher_is_better=False, extra="sacrebleu", pooled="sums"),
    "rouge1": Metric("rouge:rouge1", "words in common, F1"),
    "rouge2": Metric("rouge:rouge2", "pairs of words in common, F1"),
    "rougeL": Metric("rouge:rougeL", "longest common subsequence of words, F1"),
    "rougeLsum": Metric("rouge:rougeLsum", "longest common subsequences by sentence, F1"),
    "meteor": Metric("meteor:meteor", "words, stems and synonyms in common, in order", extra="nltk"),
    "bertscore": Metric("bertscore:bertscore", "tokens alike by their embeddings, F1", low=-1, extra="torch"),
    "pass_at_k": Metric("execution:pass_at_k", "one of k programs passes its tests"),
    "execution_accuracy": Metric("execution:execution_accuracy", "the program's result is the reference's"),
    "code_bleu": Metric("code_bleu:code_bleu", "n-grams, syntax and data flow in common", extra="tree-sitter", pooled="sums"),
    "distinct_n": Metric("diversity:distinct_n", "different n-grams among all", needs_references=False, pooled="set"),
    "self_bleu": Metric("diversity:self_bleu", "how alike the predictions are", higher_is_better=None, needs_references=False, pooled="set"),
    "repetition": Metric("diversity:repetition", "n-grams a prediction had before", higher_is_better=False, needs_references=False),
}  # fmt: skip

GROUPS: dict[str, tuple[str, ...]] = {"rouge": ("rouge1", "rouge2", "rougeL", "rougeLsum")}
"""Names for several metrics at once."""
