"""`kvik eval`: what a model thinks of given text."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvik.cli.cache_options import check_prompt
from kvik.cli.eval_correlate import correlate
from kvik.cli.eval_divergence import divergence
from kvik.cli.eval_longppl import longppl
from kvik.cli.eval_perplexity import perplexity
from kvik.cli.eval_rate import rate
from kvik.cli.eval_score import score
from kvik.cli.input import read_text
from kvik.cli.options import EngineOptions, Json, ModelOptions, add_group, add_verb
from kvik.cli.output import print_json, print_table, quoted, write
from kvik.errors import ParameterError
from kvik.params import MAX_LOGPROBS

if TYPE_CHECKING:
    from kvik.engine.request import ScoreResult
    from kvik.llm import LLM

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the verbs."""
    group = add_group(app, "eval", _group)
    add_verb(group, "logprobs", logprobs)
    add_verb(group, "score", score)
    add_verb(group, "rate", rate)
    add_verb(group, "perplexity", perplexity)
    add_verb(group, "divergence", divergence)
    add_verb(group, "longppl", longppl)
    add_verb(group, "correlate", correlate)


def _group() -> None:
    """Measure: what a model thinks of given text, how good predictions are, what people prefer."""


def logprobs(
    file: Annotated[
        str, typer.Argument(metavar="FILE", show_default=False, help="A text file in UTF-8, or - for standard input.")
    ],
    model: ModelOptions,
    engine: EngineOptions,
    top: Annotated[
        int, typer.Option("--top", metavar="K", help="Also the K best tokens at each place, 0 to 1024.")
    ] = 0,
    json: Json = False,
) -> None:
    """Print each token of a text with its log-probability, and the totals.

    The first token has none: nothing comes before it. Perplexity is exp of minus the mean of the others.

    \b
    Examples:
      kvik eval logprobs letter.txt --top 3
      echo "The capital of France is Paris." | kvik eval logprobs - --json
    """
    if not 0 <= top <= MAX_LOGPROBS:
        raise ParameterError(f"--top must be in [0, {MAX_LOGPROBS}], got {top}")
    check_prompt(model.cache(), None)
    machine, text = engine.params(), read_text(file)
    llm = model.load(machine)
    ids = llm.tokenizer.encode(text)
    scored = llm.score([ids], top=top)[0] if len(ids) > 1 else None
    found: list[float] = scored.logprobs.tolist() if scored is not None else []
    report = _report(llm, ids, found)
    if top:
        report["top"] = scored.top if scored is not None else []
    if json:
        print_json(report)
        return
    if ids:
        shown: list[float | None] = [None, *found]
        rows = [
            [str(token), "-" if value is None else f"{value:.4f}", quoted(llm.tokenizer.decode_bytes([token]))]
            for token, value in zip(ids, shown, strict=True)
        ]
        head, align = ["id", "logprob", "token"], ">><"
        if top:
            rows = [[*row, best] for row, best in zip(rows, _best(llm, scored), strict=True)]
            head, align = [*head, "best"], align + "<"
        print_table([head, *rows], align)
    write(_totals(report) + "\n")


def _best(llm: LLM, scored: ScoreResult | None) -> list[str]:
    """The best tokens at each place with their log-probabilities; none at the first."""
    places = scored.top if scored is not None else ()
    return [
        "  ".join(f"{quoted(llm.tokenizer.decode_bytes([one.token_id]))} {one.logprob:.3f}" for one in place)
        for place in ((), *places)
    ]


def _report(llm: LLM, ids: list[int], logprobs: list[float]) -> dict[str, Any]:
    from kvik.evaluation.metrics import mean_logprob
    from kvik.evaluation.perplexity import exp

    total = math.fsum(logprobs)
    mean = mean_logprob(logprobs)
    return {
        "token_ids": ids,
        "tokens": [llm.tokenizer.decode([token]) for token in ids],
        "logprobs": logprobs,
        "num_tokens": len(ids),
        "num_scored": len(logprobs),
        "total_logprob": total if logprobs else None,
        "mean_logprob": mean,
        "perplexity": None if mean is None else exp(-mean),
        "model": llm.info,
    }


def _totals(report: dict[str, Any]) -> str:
    if report["num_tokens"] == 0:
        return "0 tokens: the text is empty, there is nothing to score"
    if report["num_scored"] == 0:
        return "1 token: nothing comes before it, so it has no log-probability"
    mean, perplexity = report["mean_logprob"], report["perplexity"]
    return f"{report['num_tokens']} tokens, mean log-probability {mean:.4f}, perplexity {perplexity:.4f}"
