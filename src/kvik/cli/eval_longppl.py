"""`kvik eval longppl`: perplexity over the tokens that need a long context."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from kvik.cli.endpoint_options import EndpointOptions, refuse_engine
from kvik.cli.model_spec import SPEC_HELP, ModelSpec, load_models, parse_spec
from kvik.cli.naming import naming_options
from kvik.cli.options import EngineOptions, Json
from kvik.cli.output import Progress, plain, print_json, print_table, quoted, write
from kvik.cli.text_input import TEXTS_HELP, opened_texts
from kvik.errors import ParameterError
from kvik.params import EngineParams
from kvik.weights.catalogue import DEFAULT_MODEL

if TYPE_CHECKING:
    from kvik.evaluation.longppl import KeyRule, LongPPL
    from kvik.evaluation.model import TextModel

__all__ = ["LongPPLOptions", "Measured", "longppl"]


class Measured(NamedTuple):
    """The models as they were asked for, and the figures."""

    model: str
    evaluator: str
    longppl: LongPPL


@dataclass(frozen=True, kw_only=True)
class LongPPLOptions:
    """Which model, judged by which, and what a key token is."""

    model: Annotated[
        str | None,
        typer.Option(
            "--model", "-m", metavar="REF[,key=value…]", show_default=DEFAULT_MODEL,
            help=f"What is evaluated: {SPEC_HELP}.",
        ),
    ] = None  # fmt: skip
    evaluator: Annotated[
        str | None,
        typer.Option(
            "--evaluator",
            metavar="REF[,key=value…]",
            show_default="what is evaluated",
            help="What finds the key tokens.",
        ),
    ] = None
    alpha: Annotated[
        float, typer.Option("--alpha", metavar="X", help="Nats that a key token gains above from the long context.")
    ] = 2.0
    beta: Annotated[
        float, typer.Option("--beta", metavar="X", help="Log-probability that it is above in the long context.")
    ] = -2.0
    window: Annotated[
        int,
        typer.Option(
            "--window", metavar="N", help="Tokens of short context, at least 1, below the evaluator's context."
        ),
    ] = 4096
    stride: Annotated[int, typer.Option("--stride", metavar="N", help="Tokens judged in each window, at least 1.")] = (
        1024
    )
    cut: Annotated[
        bool, typer.Option("--cut", help="Cut texts that are longer than a model's context, instead of refusing them.")
    ] = False

    def rule(self) -> KeyRule:
        """Raises ParameterError naming the option and its range."""
        from kvik.evaluation.longppl import KeyRule

        with naming_options(LongPPLOptions):
            return KeyRule(self.alpha, self.beta, self.window, self.stride)

    def specs(self, endpoint: str | None) -> tuple[ModelSpec | None, ModelSpec | None]:
        """The model and the evaluator to load; None for what the endpoint is. ParameterError where both are given."""
        if endpoint is not None and self.model is not None:
            raise ParameterError("--model and --endpoint exclude each other: one model is evaluated")
        model = None if endpoint is not None else parse_spec("--model", self.model or DEFAULT_MODEL)
        return model, model if self.evaluator is None else parse_spec("--evaluator", self.evaluator)


def longppl(
    texts: Annotated[
        list[str],
        typer.Argument(
            metavar="TEXT…", show_default=False,
            help=TEXTS_HELP,
        ),
    ],
    options: LongPPLOptions,
    endpoint: EndpointOptions,
    engine: EngineOptions,
    show_keys: Annotated[bool, typer.Option("--show-keys", help="Also print each key token.")] = False,
    json: Json = False,
) -> None:  # fmt: skip
    """Measure how well a model predicts the tokens that need a long context: LongPPL (Fang et al. 2024).

    Key tokens are those whose log-probability a long context raises by more than --alpha, to above --beta, in the eyes of
    the evaluator. The long context is all of the text before the token; the short one is the last --window to
    --window + --stride - 1 tokens. LongPPL is the perplexity over key tokens only: texts of no more than --window tokens
    have none. The evaluator may have another tokenizer: tokens are matched by their characters.

    \b
    Examples:
      kvik eval longppl report.txt
      kvik eval longppl reports.jsonl --model smollm2-135m,weights=int4 --evaluator smollm2-135m,weights=f32
      kvik eval longppl report.txt --window 512 --stride 128 --show-keys
      kvik eval longppl report.txt --endpoint http://127.0.0.1:8000/v1 --evaluator smollm2-135m
    """
    rule, machine = options.rule(), engine.params()
    endpoint.check()
    specs = options.specs(endpoint.endpoint)
    if specs == (None, None):
        refuse_engine(machine)
    with opened_texts(texts) as opened:
        opened.read()
        with _models(specs, endpoint, machine) as (model, judge):
            from kvik.evaluation.longppl import longppl as measure

            with Progress() as progress, naming_options(LongPPLOptions):
                found = measure(
                    model, judge, opened.texts(), alpha=rule.alpha, beta=rule.beta, window=rule.window,
                    stride=rule.stride, cut=options.cut, progress=lambda done: progress("score", done, opened.bytes),
                )  # fmt: skip
    names = [endpoint.endpoint if spec is None else str(spec) for spec in specs]
    measured = Measured(str(names[0]), str(names[1]), found)
    if json:
        _print_json(measured, show_keys=show_keys)
    else:
        _print(measured)
        if show_keys and found.keys:
            _print_keys(found)


@contextmanager
def _models(
    specs: tuple[ModelSpec | None, ModelSpec | None], endpoint: EndpointOptions, machine: EngineParams
) -> Iterator[tuple[TextModel, TextModel]]:
    """What is evaluated, and the evaluator; the endpoint where there is no spec."""
    loaded: list[TextModel] = [*load_models([spec for spec in specs if spec is not None], machine)]
    if len(loaded) == 2:
        yield loaded[0], loaded[1]
        return
    with endpoint.open() as served:
        yield served, loaded[0] if loaded else served


def _print_json(found: Measured, *, show_keys: bool) -> None:
    report: dict[str, Any] = plain(found)
    if not show_keys:
        del report["longppl"]["keys"]
    print_json(report)


def _print(found: Measured) -> None:
    f = found.longppl
    key = "" if f.interval is None else f"{f.interval.low:.4f} to {f.interval.high:.4f}"
    of = f"{f.key_tokens:,} key tokens, {f.share:.2%}".replace("%", " %") + f" of {f.tokens:,}"
    rows = [
        ["", "", "95 % interval", "of"],
        ["LongPPL", "none" if f.value is None else f"{f.value:.4f}", key or "-", of],
        ["perplexity", f"{f.perplexity:.4f}", "", f"all {f.tokens:,} tokens"],
    ]
    write(f"{found.model}, key tokens by {found.evaluator}\n\n")
    print_table(rows, "<>><")
    r = f.rule
    write(
        f"\n{f.evaluator_key_tokens:,} of {f.judged:,} tokens are key to the evaluator: they gain more than {r.alpha:g} nats "
        f"from the long\ncontext, to above {r.beta:g}; short contexts of {r.window:,} tokens slid by {r.stride:,}.\n"
    )
    if f.texts_short:
        write(
            f"{f.texts_short:,} of {f.texts:,} texts {'has' if f.texts_short == 1 else 'have'} no more than {r.window:,} "
            "tokens, and so no key tokens.\n"
        )
    if f.texts_cut:
        write(f"{f.texts_cut:,} of {f.texts:,} texts {'was' if f.texts_cut == 1 else 'were'} cut to the context.\n")
    if f.value is not None and f.interval is None:
        write("The interval needs key tokens in more than one segment of 2,048 bytes.\n")


def _print_keys(found: LongPPL) -> None:
    rows = [[str(key.text), f"{key.offset:,}", f"{key.nll:.4f}", quoted(key.token.encode())] for key in found.keys]
    write("\n")
    print_table([["text", "byte", "nats", "key token"], *rows], ">>><")
