"""`kvik eval divergence`: what one setting of a model costs against another."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from kvik.cli.model_spec import SPEC_HELP, ModelSpec, check_scored, load_models, parse_spec
from kvik.cli.naming import naming_options
from kvik.cli.options import EngineOptions, Json
from kvik.cli.output import Progress, print_json
from kvik.cli.pictures import check_picture
from kvik.cli.text_input import TEXTS_HELP, opened_texts
from kvik.cli.window_options import Stride, check_windows, window_option
from kvik.errors import ParameterError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kvik.evaluation.divergence import Divergence

__all__ = ["DivergenceOptions", "Measured", "divergence"]

OFFLINE_TOKENS = 8192


class Measured(NamedTuple):
    """Two models as they were asked for, what was predicted, and the figures."""

    model: str
    reference: str
    text: str
    divergence: Divergence


@dataclass(frozen=True, kw_only=True)
class DivergenceOptions:
    """Which two, on how much of the text, in which windows."""

    model: Annotated[
        str,
        typer.Option(
            "--model", "-m", metavar="REF[,key=value…]", show_default=False, help=f"What is judged: {SPEC_HELP}."
        ),
    ]
    against: Annotated[
        str,
        typer.Option(
            "--against", metavar="REF[,key=value…]", show_default=False, help="The reference, named likewise."
        ),
    ]
    window: Annotated[int | None, window_option(512)] = None
    stride: Stride = None
    tokens: Annotated[
        int | None,
        typer.Option(
            "--tokens", metavar="N", show_default=f"all of TEXT; {OFFLINE_TOKENS} without TEXT",
            help="Predictions to compare, at least 1.",
        ),
    ] = None  # fmt: skip
    plot: Annotated[
        str | None,
        typer.Option(
            "--plot",
            metavar="FILE",
            show_default=False,
            help="Draw it into a .png, .svg or .pdf (extra kvik\\[plots]).",
        ),
    ] = None

    def check(self) -> tuple[ModelSpec, ModelSpec]:
        """The model and the reference. Raises ParameterError naming the option and its range."""
        check_windows(self.window, self.stride)
        if self.tokens is not None and self.tokens < 1:
            raise ParameterError(f"--tokens must be at least 1, got {self.tokens}")
        if self.plot is not None:
            check_picture("--plot", self.plot)
        return _spec("--model", self.model), _spec("--against", self.against)


def _spec(option: str, text: str) -> ModelSpec:
    spec = parse_spec(option, text)
    check_scored(option, [spec])
    if spec.ref.startswith(("http://", "https://")):
        raise ParameterError(
            f"{option}: an endpoint does not give whole distributions, which divergence needs, got {spec.ref}"
        )
    return spec


def divergence(
    options: DivergenceOptions,
    engine: EngineOptions,
    texts: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[TEXT…]", show_default="the language reference inside Python",
            help=TEXTS_HELP,
        ),
    ] = None,
    json: Json = False,
) -> None:  # fmt: skip
    """Measure what a setting costs: how far a model's predictions are from a reference's, over the same texts.

    The yardstick for equal quality. Each prediction is a whole distribution over the vocabulary; its figure is
    KL(reference || model) in nats. Any two forms of one model can be compared, or two models with the same vocabulary.
    Intervals are at 95 %, by drawing windows anew.

    \b
    KL          nats that are lost by who expects --model where --against is true; 0 is the same distribution
    same best   share of predictions whose most probable token stays; greedy answers change where it does not
    perplexity  of --model over that of --against; 1 is the same

    \b
    Examples:
      kvik eval divergence --model smollm2-135m,weights=int4 --against smollm2-135m,weights=f32
      kvik eval divergence book.txt --model smollm2-135m,kv=f16 --against smollm2-135m,kv=f32 --plot kv.png
      kvik eval divergence book.txt --model smollm2-135m --against smollm2-135m,executor=torch --tokens 2000 --json
    """
    specs = options.check()
    machine = engine.params()
    with _words(texts) as words:
        tokens = OFFLINE_TOKENS if options.tokens is None and not texts else options.tokens
        from kvik.evaluation.divergence import DEFAULT_WINDOW
        from kvik.evaluation.divergence import divergence as measure
        from kvik.evaluation.rows import NativeCompare

        model, reference = load_models(specs, machine, tokens=options.window or DEFAULT_WINDOW)
        with _progress(tokens, words.bytes) as progress, naming_options(DivergenceOptions):
            found = measure(
                model, reference, words.pieces, window=options.window, stride=options.stride, tokens=tokens,
                compare=NativeCompare(machine.threads), progress=progress,
            )  # fmt: skip
    _report(Measured(str(specs[0]), str(specs[1]), words.name, found), options.plot, json=json)


@contextmanager
def _progress(tokens: int | None, size: int) -> Iterator[Callable[[int, int], None]]:
    """A bar over the predictions that are asked for; over the bytes of the texts where it is all of them."""
    with Progress(unit="bytes" if tokens is None else "tokens") as bar:
        if tokens is None:
            yield lambda done, read: bar("compare", read, size)
        else:
            yield lambda done, read: bar("compare", done, tokens)


class _Words(NamedTuple):
    """name: what the texts are, for people; pieces: of each of them; bytes: of all."""

    name: str
    pieces: Iterable[Any]
    bytes: int


@contextmanager
def _words(names: list[str] | None) -> Iterator[_Words]:
    """What is predicted: the files, read once already, or the text every Python has."""
    if not names:
        from kvik.evaluation.offline import TEXT_NAME, offline_text

        text = offline_text()
        yield _Words(TEXT_NAME, [text], len(text.encode()))
        return
    with opened_texts(names) as opened:
        opened.read()
        yield _Words(", ".join(names), opened.texts(), opened.bytes)


def _report(found: Measured, plot: str | None, *, json: bool) -> None:
    if json:
        print_json(found)
    else:
        from kvik.cli.divergence_report import print_report

        print_report(found)
    if plot is not None:
        from kvik.cli.divergence_plot import draw_plot

        draw_plot(found, plot)
