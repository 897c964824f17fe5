"""`kvik eval perplexity`: how well models predict texts, and how sure the difference is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from kvik.cli.endpoint_options import EndpointOptions, refuse_engine
from kvik.cli.model_spec import SPEC_HELP, ModelSpec, check_scored, find_models, load_models, parse_specs
from kvik.cli.naming import naming_options
from kvik.cli.options import EngineOptions, Json
from kvik.cli.output import Progress, note, print_json
from kvik.cli.pictures import check_picture
from kvik.cli.text_input import TEXTS_HELP, Texts, opened_texts
from kvik.cli.window_options import Stride, check_windows, window_option
from kvik.errors import TryAgainError
from kvik.params import EngineParams
from kvik.weights.catalogue import DEFAULT_MODEL

if TYPE_CHECKING:
    from kvik.cli.perplexity_log import PerplexityLog
    from kvik.evaluation.model import TextModel
    from kvik.evaluation.perplexity import Perplexity

__all__ = ["Measured", "PerplexityOptions", "perplexity"]


class Measured(NamedTuple):
    """A model's figures. model: as it was asked for; name: as its file calls it; band: the guide's."""

    model: str
    name: str
    digest: str
    perplexity: Perplexity
    band: str


@dataclass(frozen=True, kw_only=True)
class PerplexityOptions:
    """Of which models, in which windows, and where it goes."""

    models: Annotated[
        str | None,
        typer.Option(
            "--models", "--model", "-m", metavar="REF[,REF…]", show_default=DEFAULT_MODEL,
            help=f"Models, separated by commas: {SPEC_HELP}.",
        ),
    ] = None  # fmt: skip
    window: Annotated[int | None, window_option(2048)] = None
    stride: Stride = None
    out: Annotated[
        str | None,
        typer.Option(
            "--out", metavar="FILE", show_default=False,
            help="Keep the figures of each group of windows: the same command goes on where it ends.",
        ),
    ] = None  # fmt: skip
    plot: Annotated[
        str | None,
        typer.Option(
            "--plot", metavar="FILE", show_default=False,
            help="Draw the loss by position in the window into a .png, .svg or .pdf (extra kvik\\[plots]).",
        ),
    ] = None  # fmt: skip

    def check(self) -> None:
        """Raise ParameterError naming the option and its range."""
        check_windows(self.window, self.stride)
        if self.plot is not None:
            check_picture("--plot", self.plot)

    def specs(self, endpoint: EndpointOptions) -> list[ModelSpec]:
        """The models to load; none where only an endpoint is asked for."""
        if self.models is not None:
            found = parse_specs("--models", self.models)
            check_scored("--models", found)
            return found
        return [] if endpoint.endpoint is not None else parse_specs("--models", DEFAULT_MODEL)


def perplexity(
    texts: Annotated[
        list[str],
        typer.Argument(
            metavar="TEXT…", show_default=False,
            help=TEXTS_HELP,
        ),
    ],
    options: PerplexityOptions,
    endpoint: EndpointOptions,
    engine: EngineOptions,
    json: Json = False,
) -> None:  # fmt: skip
    """Measure how well models predict texts: perplexity by token, byte and word, bits per byte.

    A text may be of any length: it is read and scored in windows, in which every token is predicted once. Perplexity by
    token cannot be compared between models with other tokens; bits per byte can. Intervals are at 95 %, by drawing
    segments of the texts anew; differences are of the same segments.

    \b
    Examples:
      kvik eval perplexity book.txt
      kvik eval perplexity book.txt news.jsonl --models smollm2-135m,weights=f32,smollm2-135m --plot loss.png
      kvik eval perplexity big.txt --window 1024 --stride 512 --out big.jsonl
      kvik eval perplexity book.txt --endpoint http://127.0.0.1:8000/v1 --tokenizer smollm2-135m
    """
    options.check()
    endpoint.check()
    specs, machine = options.specs(endpoint), engine.params()
    if not specs:
        refuse_engine(machine)
    with opened_texts(texts) as opened:
        opened.read()
        find_models(specs)
        with _log(options, endpoint, specs, opened) as log, _going_on(options.out):
            found = list(_measured(options, endpoint, specs, machine, opened, log))
    _report(found, options, opened, json=json)


def _log(
    options: PerplexityOptions, endpoint: EndpointOptions, specs: Sequence[ModelSpec], texts: Texts
) -> AbstractContextManager[PerplexityLog | None]:
    if options.out is None:
        return nullcontext()
    from kvik.cli.perplexity_log import PerplexityLog

    settings: dict[str, Any] = {
        "TEXT": [f"{fact.bytes} bytes in {fact.texts}, digest {fact.digest}" for fact in texts.facts],
        "--models": [str(spec) for spec in specs],
        "--endpoint": endpoint.endpoint, "--endpoint-model": endpoint.endpoint_model, "--tokenizer": endpoint.tokenizer,
        "--window": options.window, "--stride": options.stride,
    }  # fmt: skip
    texts.refuse(options.out)
    return PerplexityLog(options.out, settings)


@contextmanager
def _going_on(out: str | None) -> Iterator[None]:
    """Say of what stops it halfway that the same command goes on."""
    hint = f"the same command goes on where {out} ends" if out is not None else "with --out it could go on"
    try:
        yield
    except KeyboardInterrupt:
        note(f"Stopped; {hint}.")
        raise
    except TryAgainError as error:
        raise TryAgainError(f"{error}; {hint}") from error


def _measured(
    options: PerplexityOptions, endpoint: EndpointOptions, specs: Sequence[ModelSpec], machine: EngineParams,
    texts: Texts, log: PerplexityLog | None,
) -> Iterator[Measured]:  # fmt: skip
    """The models one after another: no two are held at once. The endpoint comes last."""
    for index, spec in enumerate(specs):
        yield _measure(str(spec), index, load_models([spec], machine)[0], options, texts, log)
    if endpoint.endpoint is not None:
        with endpoint.open() as model:
            yield _measure(endpoint.endpoint, len(specs), model, options, texts, log)


def _measure(
    asked: str, index: int, model: TextModel, options: PerplexityOptions, texts: Texts, log: PerplexityLog | None
) -> Measured:
    from kvik.evaluation.bands import band
    from kvik.evaluation.perplexity import perplexity
    from kvik.evaluation.windows import window_size

    info = model.info
    with naming_options(PerplexityOptions):
        size = window_size(options.window, options.stride, info.context_length)
    more: Mapping[str, Any] = {}
    if log is not None:
        identity = {"name": info.name, "digest": info.digest, "window": size.window, "stride": size.stride}
        more = {"known": log.begin(index, identity), "heard": _keeper(log, index)}
    with Progress() as progress:
        found = perplexity(
            model, texts.texts(), window=size.window, stride=size.stride,
            progress=lambda done: progress("score", done, texts.bytes), **more,
        )  # fmt: skip
    texts.check(found.text_digest)
    if log is not None:
        log.sync()
    return Measured(asked, info.name, info.digest, found, band(found.token_perplexity))


def _keeper(log: PerplexityLog, index: int) -> Callable[[Any], None]:
    return lambda scores: log.add(index, scores)


def _report(found: list[Measured], options: PerplexityOptions, texts: Texts, *, json: bool) -> None:
    from kvik.cli.perplexity_report import print_report
    from kvik.evaluation.bands import BANDS_OF
    from kvik.evaluation.perplexity import difference

    first, *others = found
    differences = [difference(first.perplexity, other.perplexity) for other in others]
    if json:
        print_json({"texts": texts.facts, "models": found, "differences": differences, "band_of": BANDS_OF})
    else:
        print_report(found, differences)
    if options.plot is not None:
        from kvik.cli.perplexity_plot import draw_plot

        draw_plot(found, options.plot)
