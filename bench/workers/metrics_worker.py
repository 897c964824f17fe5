"""Runs in the environment of the tools: times rouge-score or sacrebleu; one JSON object on stdout.

metrics_worker.py '{"mode": "rouge", "pairs": IN.json, "repeat": 3}'     four kinds with F1
metrics_worker.py '{"mode": "bleu", "pairs": IN.json, "repeat": 3}'      BLEU of all together and of each
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from time import perf_counter

KINDS = ("rouge1", "rouge2", "rougeL", "rougeLsum")

Texts = list[str]
Figures = dict[str, float]


def rouge() -> Callable[[Texts, Texts], Figures]:
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(KINDS)

    def work(predictions: Texts, references: Texts) -> Figures:
        scores = [scorer.score(wanted, given) for wanted, given in zip(references, predictions, strict=True)]
        return {kind: fmean(score[kind].fmeasure for score in scores) for kind in KINDS}

    return work


def bleu() -> Callable[[Texts, Texts], Figures]:
    from sacrebleu.metrics import BLEU

    whole, sentence = BLEU(), BLEU(effective_order=True)

    def work(predictions: Texts, references: Texts) -> Figures:
        corpus = whole.corpus_score(predictions, [references]).score
        each = [
            sentence.sentence_score(given, [wanted]).score
            for given, wanted in zip(predictions, references, strict=True)
        ]
        return {"corpus": corpus, "mean": fmean(each)}

    return work


def main() -> None:
    request = json.loads(sys.argv[1])
    pairs = json.loads(Path(request["pairs"]).read_text())
    work, seconds, figures = {"rouge": rouge, "bleu": bleu}[request["mode"]](), [], {}
    for _ in range(request["repeat"] + 1):
        begun = perf_counter()
        figures = work(**pairs)
        seconds.append(perf_counter() - begun)
    print(json.dumps({"seconds": seconds[1:], "figures": figures}))


if __name__ == "__main__":
    main()
