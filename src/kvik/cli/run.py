"""`kvik run`: one prompt and its answer as it is written, or a file of requests."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated

import typer

from kvik.cli.answer import Answer, InOrder, encode_prompt, print_logprobs, take_answer, with_seed
from kvik.cli.answer_options import BeamOptions, GrammarOptions
from kvik.cli.cache_options import check_prompt
from kvik.cli.input import argument_text
from kvik.cli.naming import naming_options
from kvik.cli.options import (
    BatchOptions,
    EngineOptions,
    Json,
    ModelOptions,
    Plain,
    SamplingOptions,
    System,
    add_verb,
)
from kvik.cli.output import note, plain, print_json, write
from kvik.errors import ParameterError
from kvik.params import BeamParams, EngineParams, Grammar

if TYPE_CHECKING:
    from kvik.engine.request import Receipt

__all__ = ["register"]

_INTERRUPTED = 130


def register(app: typer.Typer) -> None:
    """Add the verb."""
    add_verb(app, "run", run)


def run(
    model: ModelOptions,
    sampling: SamplingOptions,
    beams: BeamOptions,
    grammar: GrammarOptions,
    engine: EngineOptions,
    batch: BatchOptions,
    prompt: Annotated[
        str | None,
        typer.Argument(metavar="PROMPT", show_default=False, help="The text, or - to read it from standard input."),
    ] = None,
    raw: Plain = False,
    system: System = None,
    json: Json = False,
    stats: Annotated[bool, typer.Option("--stats", help="Also say where the time went, on standard error.")] = False,
    receipt: Annotated[
        str | None,
        typer.Option("--receipt", metavar="FILE", show_default=False, help="Write what `kvik replay` repeats it by."),
    ] = None,
) -> None:
    """Answer a prompt, or with --batch a file of them.

    The answer goes to standard output as it is written. Then one line on standard error says: prompt and generated
    tokens, time to the first token, tokens per second, bytes of the weights and of keys and values. Ctrl-C ends the
    answer and keeps what there is of it.

    A line of a --batch file is a JSON object with "prompt" (text, or token ids, which are taken as they are) or
    "messages" (of "role" and "content"); it may have an "id", any sampling option, like "max_tokens", those of a
    beam search, with "num_beams", and its own "kv" and "evict". Results go to --out as they finish, a line each. Ctrl-C keeps the finished ones, and
    --resume goes on with the others.

    With --json-schema, --regex or --lark the answer has that shape, unless --max-tokens cuts it. In a line of a --batch
    file it is "grammar": {"kind": "json_schema", "text": {…}}.

    With --beams the answer comes when the search has ended; Ctrl-C before that ends it without one.

    \b
    Examples:
      kvik run "Why is the sky blue?" --stats
      kvik run "Name a colour." --temperature 0 --max-tokens 8
      kvik run "Write a haiku." --n 3 --seed 7 --receipt haiku.json
      kvik run "Translate to French: good morning" --beams 4 --early-stopping true
      kvik run "A person, as JSON." --json-schema person.json
      kvik run "When did the war end?" --regex "[0-9]{4}"
      git diff | kvik run - --system "Write a commit message."
      kvik run --raw "The future of AI is" --logprobs 3 --json
      kvik run - --kv int8 --evict snapkv:budget=25% < report.txt
      kvik run --batch requests.jsonl --out results.jsonl --max-tokens 64
    """
    batch.check(prompt, receipt)
    searching = beams.params(sampling)
    shape = grammar.grammar(sampling.ignore_eos)
    if searching is None:
        sampling.check(json or batch.batch is not None)
    machine = engine.params()
    if batch.batch is not None:
        from kvik.cli.batch import run_batch

        run_batch(model, machine, searching or sampling, shape, batch, raw=raw, system=system, json=json, stats=stats)
    else:
        asked = searching or sampling
        with grammar.naming():
            _answer(
                model, machine, asked, shape, prompt, raw=raw, system=system, json=json, stats=stats, receipt=receipt
            )


def _answer(
    model: ModelOptions, machine: EngineParams, asked: SamplingOptions | BeamParams, grammar: Grammar | None,
    prompt: str | None,
    *, raw: bool, system: str | None, json: bool, stats: bool, receipt: str | None,
) -> None:  # fmt: skip
    """One prompt."""
    if prompt is None:
        raise ParameterError("give a PROMPT, or --batch FILE")
    text = argument_text(prompt)
    begun = perf_counter()
    llm = model.load(machine)
    loaded = perf_counter() - begun
    ids = encode_prompt(llm, text, system, raw)
    params = asked if isinstance(asked, BeamParams) else asked.params(llm.default_params())
    params = with_seed(params if grammar is None else replace(params, grammar=grammar))
    check_prompt(llm.info.cache, len(ids))
    answer, shown = Answer(len(ids), loaded), InOrder(params.num_answers)
    with naming_options(type(params)):
        take_answer(llm.stream(ids, params), answer, (lambda chunk: None) if json else shown)
    found = answer.whole
    if receipt is not None:
        assert found.receipt is not None
        _write_receipt(found.receipt, receipt)
    if stats:
        from kvik.cli.stats import engine_report, print_engine, print_request
    if json:
        engine = {"engine": engine_report(llm.engine)} if stats else {}
        print_json({**plain(found), "params": params, "timings": answer.timings, "model": llm.info, **engine})
    else:
        shown.close()
        if params.logprobs is not None:
            write("\n")
            print_logprobs(llm, found)
        note(answer.summary(llm, since_start=True))
        if stats:
            assert found.stats is not None
            print_request(found.stats)
            print_engine(llm.engine)
    if answer.interrupted:
        raise typer.Exit(_INTERRUPTED)


def _write_receipt(receipt: Receipt, name: str) -> None:
    from kvik.engine.receipt import receipt_to_json
    from kvik.files import atomic_write

    with atomic_write(Path(name)) as file:
        file.write(receipt_to_json(receipt).encode() + b"\n")
