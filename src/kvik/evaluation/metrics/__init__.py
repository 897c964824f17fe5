"""Metrics: pure functions named after their definition. Nothing is rounded; what cannot be scored is None, not zero.

METRICS has those that judge predictions. A package that one of them needs is imported when it is used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import UnionType
from typing import Literal

from kvik.evaluation.metrics.answers import exact_match, token_f1
from kvik.evaluation.metrics.bertscore import bertscore
from kvik.evaluation.metrics.code_bleu import code_bleu
from kvik.evaluation.metrics.diversity import distinct_n, repetition, self_bleu
from kvik.evaluation.metrics.execution import execution_accuracy, pass_at_k, pass_rates
from kvik.evaluation.metrics.meteor import meteor
from kvik.evaluation.metrics.result import MetricResult, Sums, Unscored, check_pairs
from kvik.evaluation.metrics.rouge import rouge, rouge1, rouge2, rougeL, rougeLsum
from kvik.evaluation.metrics.sameness import determinism, mean_logprob
from kvik.evaluation.metrics.translation import bleu, chrf, ter
from kvik.evaluation.metrics.words import words

__all__ = [
    "GROUPS",
    "METRICS",
    "Metric",
    "MetricResult",
    "Sums",
    "Unscored",
    "bertscore",
    "bleu",
    "check_pairs",
    "chrf",
    "code_bleu",
    "determinism",
    "distinct_n",
    "exact_match",
    "execution_accuracy",
    "mean_logprob",
    "meteor",
    "pass_at_k",
    "pass_rates",
    "repetition",
    "rouge",
    "rouge1",
    "rouge2",
    "rougeL",
    "rougeLsum",
    "self_bleu",
    "ter",
    "token_f1",
    "words",
]

Pooled = Literal["mean", "sums", "set"]
"""How a metric's value comes of its samples: the mean of their scores; of what is added up over them (MetricResult.sums);
of all of them together, so that drawing some twice would change what is measured."""


@dataclass(frozen=True)
class Metric:
    """One entry of METRICS.

    Attributes:
        function: (predictions, references, *, settings…); without references for the metrics that need none.
        about: what it says, in a few words.
        low, high: the range of its values; None is unbounded.
        higher_is_better: None where that depends.
        needs_references: whether it compares with references at all.
        extra: the extra of Kvik that it needs: pip install "kvik[…]"; None for none.
        pooled: how its value comes of the samples.
        by_sample: settings that a file of predictions may have one of for each sample, and of which type; then they are
            given as a list.
    """

    function: Callable[..., MetricResult]
    about: str
    low: float = 0.0
    high: float | None = 1.0
    higher_is_better: bool | None = True
    needs_references: bool = True
    extra: str | None = None
    pooled: Pooled = "mean"
    by_sample: Mapping[str, type | UnionType] = field(default_factory=dict)


METRICS: dict[str, Metric] = {
    "exact_match": Metric(exact_match, "the answer is a reference, after SQuAD's normalization"),
    "token_f1": Metric(token_f1, "words in common with a reference, after SQuAD's normalization"),
    "bleu": Metric(bleu, "n-grams in common, percent", high=100, extra="eval", pooled="sums"),
    "chrf": Metric(chrf, "characters' n-grams in common, percent", high=100, extra="eval", pooled="sums"),
    "ter": Metric(ter, "edits to a reference, percent of its words", high=None, higher_is_better=False, extra="eval", pooled="sums"),
    "rouge1": Metric(rouge1, "words in common, F1"),
    "rouge2": Metric(rouge2, "pairs of words in common, F1"),
    "rougeL": Metric(rougeL, "longest common subsequence of words, F1"),
    "rougeLsum": Metric(rougeLsum, "longest common subsequences by sentence, F1"),
    "meteor": Metric(meteor, "words, stems and synonyms in common, in order", extra="eval"),
    "bertscore": Metric(bertscore, "tokens alike by their embeddings, F1", low=-1, extra="bertscore"),
    "pass_at_k": Metric(pass_rates, "one of k programs passes its tests", needs_references=False, by_sample={"n": int, "c": int}),
    "execution_accuracy": Metric(execution_accuracy, "the program's result is the reference's", by_sample={"database": str}),
    "code_bleu": Metric(code_bleu, "n-grams, syntax and data flow in common", extra="eval", pooled="sums"),
    "distinct_n": Metric(distinct_n, "different n-grams among all", needs_references=False, pooled="set"),
    "self_bleu": Metric(self_bleu, "how alike the predictions are", higher_is_better=None, needs_references=False, pooled="set", by_sample={"group": str | int}),
    "repetition": Metric(repetition, "n-grams a prediction had before", higher_is_better=False, needs_references=False),
}  # fmt: skip

GROUPS: dict[str, tuple[str, ...]] = {"rouge": ("rouge1", "rouge2", "rougeL", "rougeLsum")}
"""Names for several metrics at once."""
