"""`kvik run`: one prompt, one answer, as it is written."""

from __future__ import annotations

from dataclasses import replace
from time import perf_counter
from typing import Annotated, Any

import typer

from kvik.cli.answer import Answer, InOrder, encode, print_logprobs, take_answer, with_seed
from kvik.cli.input import argument_text
from kvik.cli.options import Json, ModelOptions, Plain, SamplingOptions, System, add_verb, naming_options
from kvik.cli.output import note, plain, print_json, write
from kvik.errors import ParameterError
from kvik.params import SamplingParams

__all__ = ["register"]

_INTERRUPTED = 130


def register(app: typer.Typer) -> None:
    """Add the verb."""
    add_verb(app, "run", run)


def run(
    prompt: Annotated[
        str, typer.Argument(metavar="PROMPT", show_default=False, help="The text, or - to read it from standard input.")
    ],
    model: ModelOptions,
    sampling: SamplingOptions,
    raw: Plain = False,
    system: System = None,
    json: Json = False,
) -> None:
    """Answer a prompt.

    The answer goes to standard output as it is written. Then one line on standard error says: prompt and generated
    tokens, time to the first token, tokens per second, bytes of the weights and of keys and values. Ctrl-C ends the
    answer and keeps what there is of it.

    \b
    Examples:
      kvik run "Why is the sky blue?"
      kvik run "Name a colour." --temperature 0 --max-tokens 8
      kvik run "Write a haiku." --n 3 --seed 7
      git diff | kvik run - --system "Write a commit message."
      kvik run --raw "The future of AI is" --logprobs 3 --json
    """
    sampling.check(json)
    text = argument_text(prompt)
    if not text:
        raise ParameterError("the prompt is empty")
    begun = perf_counter()
    llm = model.load()
    loaded = perf_counter() - begun
    messages = [{"role": "user", "content": text}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    ids = encode(llm, messages, raw)
    params = with_seed(sampling.params(llm.default_params()))
    # A Completion tells the sum of the log-probabilities, so with --json the chunks must have them.
    asked = replace(params, logprobs=params.logprobs or 0) if json else params
    answer = Answer(tuple(ids), llm.engine.layout, loaded)
    shown = InOrder(params.n)
    with naming_options(SamplingParams):
        take_answer(llm.stream(ids, asked), answer, (lambda chunk: None) if json else shown)
    if json:
        whole: dict[str, Any] = plain(answer.completion(params.logprobs is not None))
        print_json({**whole, "params": params, "timings": answer.timings, "model": llm.info})
    else:
        shown.close()
        if params.logprobs is not None:
            write("\n")
            print_logprobs(llm, answer)
        note(answer.summary(llm, since_start=True))
    if answer.interrupted:
        raise typer.Exit(_INTERRUPTED)
