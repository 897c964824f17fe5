"""`kvik compare`: settings side by side on the model in hand."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvik.cli.answer import encode_prompt
from kvik.cli.cache_options import check_prompt
from kvik.cli.compare_kv import compare_kv
from kvik.cli.compare_runs import runs
from kvik.cli.input import argument_text
from kvik.cli.machine import cores, processor
from kvik.cli.options import EngineOptions, Json, ModelOptions, Plain, System, add_group, add_verb
from kvik.cli.output import note, print_json, print_table, write
from kvik.cli.pictures import check_picture
from kvik.errors import ParameterError
from kvik.params import MAX_SEED, AnyParams

if TYPE_CHECKING:
    from kvik.evaluation.compare import Measured, Run

__all__ = ["register"]

_DEFAULT = "greedy,beam,temperature,top-k,top-p,balanced"
_MOST_REPEATS, _MOST_TOKENS = 100, 4096


def register(app: typer.Typer) -> None:
    """Add the verb."""
    group = add_group(app, "compare", compare)
    add_verb(group, "decoding", decoding)
    add_verb(group, "kv", compare_kv)
    add_verb(group, "runs", runs)


def compare() -> None:
    """Side by side: settings on the model in hand, or two runs that were scored."""


@dataclass(frozen=True, kw_only=True)
class CompareOptions:
    """What is compared, and how often."""

    strategies: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES", show_default=_DEFAULT,
            help="Strategies, separated by commas: greedy, beam, temperature, top-k, top-p, min-p, typical, epsilon, eta, "
            "top-n-sigma, xtc, factual, balanced, creative.",
        ),
    ] = None  # fmt: skip
    sweep: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FIELD=FIRST:LAST:STEPS", show_default=False,
            help="Values of one field beside or instead of strategies: temperature, k, p, min_p, typical_p, "
            "repetition_penalty, beams. May be repeated.",
        ),
    ] = None  # fmt: skip
    repeat: Annotated[
        int, typer.Option(metavar="N", help="Runs that count, each with another seed, 1 to 100; one more goes ahead.")
    ] = 5
    max_tokens: Annotated[int, typer.Option(metavar="N", help="Most tokens of an answer, 1 to 4096.")] = 64
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Answers of equal length: go on past the model's own end of text.")
    ] = False
    seed: Annotated[int, typer.Option(metavar="N", help="Of the first run; the others count on from it.")] = 0
    plot: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", show_default=False, help="Draw it into a .png, .svg or .pdf (extra kvik\\[plots])."
        ),
    ] = None

    def check(self) -> None:
        """Raise ParameterError naming the option and its range."""
        for name, high in (("repeat", _MOST_REPEATS), ("max_tokens", _MOST_TOKENS)):
            value = getattr(self, name)
            if not 1 <= value <= high:
                raise ParameterError(f"--{name.replace('_', '-')} must be in [1, {high}], got {value}")
        if not 0 <= self.seed <= MAX_SEED - self.repeat:
            raise ParameterError(f"--seed must be in [0, {MAX_SEED - self.repeat}], got {self.seed}")
        if self.plot is not None:
            check_picture("--plot", self.plot)

    def chosen(self) -> dict[str, AnyParams]:
        """By name, the strategies asked for and the points of the sweeps."""
        from kvik.params import choose
        from kvik.planning import STRATEGIES, sweep

        found: dict[str, AnyParams] = {}
        names = ("" if self.sweep else _DEFAULT) if self.strategies is None else self.strategies
        chosen = [name for name in map(str.strip, names.split(",")) if name]
        if self.strategies is not None and not chosen:
            raise ParameterError("--strategies names none")
        for given in chosen:
            found[given] = STRATEGIES[choose("--strategies", given, tuple(STRATEGIES))].params
        for text in self.sweep or ():
            found |= sweep(text)
        fixed: dict[str, Any] = {"max_tokens": self.max_tokens, "ignore_eos": self.ignore_eos}
        return {name: replace(params, **fixed) for name, params in found.items()}


def decoding(
    model: ModelOptions,
    engine: EngineOptions,
    options: CompareOptions,
    prompt: Annotated[
        str, typer.Argument(metavar="PROMPT", show_default=False, help="The text, or - to read it from standard input.")
    ],
    raw: Plain = False,
    system: System = None,
    json: Json = False,
) -> None:
    """Measure decoding strategies on one prompt: one answer a run, strategies in turn, medians over the runs.

    \b
    tok/s      tokens of the answer per second of the whole request, median of the runs
    tokens     mean length of an answer
    distinct   different words, and pairs of words, among all of the runs' answers: 1 is all different
    self-BLEU  how alike the runs' answers are: 1 is all the same
    logprob    mean log-probability of a token by the model itself; nearer 0 is more probable
    repeated   share of an answer's 4-grams of words that it had before
    same       share of pairs of runs with the same answer, though their seeds differ; 1 is deterministic

    \b
    Examples:
      kvik compare decoding "Once upon a time" --raw
      kvik compare decoding "Name a colour." --strategies greedy,beam,creative,min-p --repeat 9 --json
      kvik compare decoding "Tell me about rivers." --sweep temperature=0.1:1.5:8 --sweep p=0.5:1:6 --plot sweep.png
    """
    options.check()
    strategies = options.chosen()
    text = argument_text(prompt)
    llm = model.load(engine.params())
    ids = encode_prompt(llm, text, system, raw)
    check_prompt(llm.info.cache, len(ids))
    from kvik.evaluation.compare import compare_strategies

    found = compare_strategies(
        llm, ids, strategies, repeat=options.repeat, seed=options.seed, heard=_heard(options.repeat)
    )
    report = {
        "strategies": found,
        "model": llm.info,
        "machine": {"processor": processor(), "cores": cores().allowed},
        "settings": {
            "prompt": text, "prompt_tokens": len(ids), "raw": raw, "repeat": options.repeat, "max_tokens": options.max_tokens,
            "ignore_eos": options.ignore_eos, "seed": options.seed,
        },
    }  # fmt: skip
    if options.plot is not None:
        from kvik.cli.compare_plot import draw_plot

        draw_plot(found, report, options.plot)
    if json:
        print_json(report)
    else:
        _show(found, report)


def _heard(rounds: int) -> Any:
    """A line on a terminal for each run."""

    def heard(number: int, name: str, run: Run) -> None:
        if sys.stderr.isatty():
            which = f"round {number} of {rounds}" if number else "warming up"
            note(f"{which}: {name}, {len(run.token_ids)} tokens in {run.seconds:.2f} s", dim=True)

    return heard


def _figure(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _show(found: list[Measured], report: Mapping[str, Any]) -> None:
    info, settings = report["model"], report["settings"]
    write(f"{info.name}: weights {info.weights}, kv {info.cache.text}, {info.executor}, {info.threads} threads\n")
    write(f"{report['machine']['processor']}; {settings['repeat']} runs of at most {settings['max_tokens']} tokens\n\n")
    rows = [["strategy", "tok/s", "tokens", "distinct-1", "distinct-2", "self-BLEU", "logprob", "repeated", "same"]]
    for one in found:
        rows.append([
            one.name, f"{one.tokens_per_second:.0f}", f"{one.tokens:.0f}", _figure(one.distinct_1), _figure(one.distinct_2),
            _figure(one.self_bleu), _figure(one.mean_logprob), _figure(one.repetition), _figure(one.determinism),
        ])  # fmt: skip
    print_table(rows, "<>>>>>>>>")
    broken = [one.name for one in found if not one.repeatable]
    write(
        f"\nnot the same tokens with the same seed: {', '.join(broken)}\n" if broken
        else "\nEvery strategy gave the same tokens again with the same seed.\n"
    )  # fmt: skip
