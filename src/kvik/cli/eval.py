"""`kvik eval`: what a model thinks of given text."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvik.cli.input import read_text
from kvik.cli.options import Json, ModelOptions, add_group, add_verb
from kvik.cli.output import print_json, print_table, quoted, write

if TYPE_CHECKING:
    from kvik.llm import LLM

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the verbs."""
    group = add_group(app, "eval", _group)
    add_verb(group, "logprobs", logprobs)


def _group() -> None:
    """Measure what a model thinks of given text."""


def logprobs(
    file: Annotated[
        str, typer.Argument(metavar="FILE", show_default=False, help="A text file in UTF-8, or - for standard input.")
    ],
    model: ModelOptions,
    json: Json = False,
) -> None:
    """Print each token of a text with its log-probability, and the totals.

    The first token has none: nothing comes before it. Perplexity is exp of minus the mean of the others.

    \b
    Examples:
      kvik eval logprobs letter.txt
      echo "The capital of France is Paris." | kvik eval logprobs - --json
    """
    text = read_text(file)
    llm = model.load()
    ids = llm.tokenizer.encode(text)
    found: list[float] = llm.score([ids])[0].logprobs.tolist() if len(ids) > 1 else []
    report = _report(llm, ids, found)
    if json:
        print_json(report)
        return
    if ids:
        shown: list[float | None] = [None, *found]
        rows = [
            [str(token), "-" if value is None else f"{value:.4f}", quoted(llm.tokenizer.decode_bytes([token]))]
            for token, value in zip(ids, shown, strict=True)
        ]
        print_table([["id", "logprob", "token"], *rows], ">><")
    write(_totals(report) + "\n")


def _report(llm: LLM, ids: list[int], logprobs: list[float]) -> dict[str, Any]:
    total = math.fsum(logprobs)
    mean = total / len(logprobs) if logprobs else None
    return {
        "token_ids": ids,
        "tokens": [llm.tokenizer.decode([token]) for token in ids],
        "logprobs": logprobs,
        "num_tokens": len(ids),
        "num_scored": len(logprobs),
        "total_logprob": total if logprobs else None,
        "mean_logprob": mean,
        "perplexity": None if mean is None else _exp(-mean),
        "model": llm.info,
    }


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


def _totals(report: dict[str, Any]) -> str:
    if report["num_tokens"] == 0:
        return "0 tokens: the text is empty, there is nothing to score"
    if report["num_scored"] == 0:
        return "1 token: nothing comes before it, so it has no log-probability"
    mean, perplexity = report["mean_logprob"], report["perplexity"]
    return f"{report['num_tokens']} tokens, mean log-probability {mean:.4f}, perplexity {perplexity:.4f}"
