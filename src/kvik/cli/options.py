"""The options that verbs share, as dataclasses: a verb names the group it takes, the command line gets its fields.

`SamplingOptions` has the fields of `SamplingParams` but trace, which `kvik xray` shows, `EngineOptions` those of `EngineParams`,
`CacheOptions` those of `CacheParams`; a test keeps them alike.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass, replace
from inspect import Parameter, Signature, cleandoc, signature
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from kvik.cli.cache_options import CacheOptions, naming_cache
from kvik.cli.naming import naming_options
from kvik.cli.output import Progress
from kvik.cli.strategy_options import SAMPLING_PANEL, StrategyOptions, biases, choices, option
from kvik.errors import ParameterError
from kvik.params import CacheParams, EngineParams, SamplingParams, preset_fields
from kvik.weights.catalogue import CATALOGUE, DEFAULT_MODEL

if TYPE_CHECKING:
    from kvik.llm import LLM

__all__ = [
    "DEFAULT_MAX_TOKENS",
    "BatchOptions",
    "EngineOptions",
    "Json",
    "LoadOptions",
    "ModelOptions",
    "Plain",
    "Ref",
    "SamplingOptions",
    "System",
    "WeightsOption",
    "add_group",
    "add_verb",
    "complete_models",
    "with_options",
]

DEFAULT_MAX_TOKENS = 512
MODEL_PANEL, ENGINE_PANEL, BATCH_PANEL = "Model", "Engine", "Batch"

Json = Annotated[bool, typer.Option("--json", help="Print JSON, with the field names of the Python API.")]
Plain = Annotated[bool, typer.Option("--raw", help="Continue the text as it is, without the model's chat template.")]
System = Annotated[
    str | None,
    typer.Option("--system", metavar="TEXT", show_default=False, help="What the model is told before all else."),
]


def make_llm(model: str, **settings: Any) -> LLM:
    """The one place that makes a model for the command line; tests put another here."""
    from kvik.llm import LLM

    return LLM(model, **settings)


def add_verb(app: typer.Typer, name: str, function: Callable[..., None]) -> None:
    """Make a function a verb. Its docstring is the help, its parameters the options (see `with_options`)."""
    app.command(name, help=_flowing(function.__doc__ or ""))(with_options(function))


def add_group(app: typer.Typer, name: str, function: Callable[[], None]) -> typer.Typer:
    """A verb with verbs of its own; the function's docstring is its help."""
    group = typer.Typer(help=_flowing(function.__doc__ or ""))
    group.callback()(function)
    app.add_typer(group, name=name)
    return group


def _flowing(text: str) -> str:
    """The text with its paragraphs in one line each, for a terminal of any width; those after a \\b stay."""
    paragraphs = cleandoc(text).split("\n\n")
    return "\n\n".join(p if p.startswith("\b") else " ".join(p.split()) for p in paragraphs)


def with_options(function: Callable[..., None]) -> Callable[..., None]:
    """Give each field of every options dataclass among the function's parameters an option of its own.

    A field that the function has a parameter for itself (`serve MODEL`) gets what that is given; one without a default has
    to be given.
    """
    hints = get_type_hints(function, include_extras=True)
    own = {name for name in signature(function).parameters if not is_dataclass(hints[name])}
    groups: dict[str, type] = {}
    parameters = []
    for name, parameter in signature(function).parameters.items():
        kind = hints[name]
        if is_dataclass(kind) and isinstance(kind, type):
            groups[name] = kind
            kinds = get_type_hints(kind, include_extras=True)
            parameters += [
                Parameter(f.name, Parameter.KEYWORD_ONLY, default=_default(f), annotation=kinds[f.name])
                for f in fields(kind)
                if f.name not in own
            ]  # fmt: skip
        else:
            parameters.append(parameter.replace(annotation=kind, kind=Parameter.KEYWORD_ONLY))

    def call(**values: Any) -> None:
        options = {name: kind(**{f.name: values[f.name] for f in fields(kind)}) for name, kind in groups.items()}
        function(**{name: value for name, value in values.items() if name in own}, **options)

    call.__name__, call.__doc__ = function.__name__, function.__doc__
    call.__annotations__ = {p.name: p.annotation for p in parameters}
    call.__signature__ = Signature(parameters)  # type: ignore[attr-defined] # typer reads it
    return call


def _default(field: Field[Any]) -> Any:
    """Of a field; one without is an option that must be given."""
    return Parameter.empty if field.default is MISSING else field.default


def complete_models(incomplete: str) -> list[str]:
    return [name for name in CATALOGUE if name.startswith(incomplete)]


Ref = Annotated[
    str,
    typer.Argument(
        metavar="REF",
        show_default=False,
        help="Catalogue name, .gguf file, folder or hub id.",
        autocompletion=complete_models,
    ),
]


WeightsOption = Annotated[
    str,
    option(
        "--weights", "Format of the weights: auto keeps what the file has, else f32, bf16, int8 or int4.",
        MODEL_PANEL, metavar="FORMAT", autocompletion=choices("auto", "f32", "bf16", "int8", "int4"),
    ),
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """Which model, in which form, on which part of the machine. Values are checked by `kvik.LLM`."""

    model: Annotated[
        str,
        typer.Option(
            "--model", "-m", metavar="REF", rich_help_panel=MODEL_PANEL, autocompletion=complete_models,
            help="Name of the catalogue (`kvik models list`), .gguf file, folder, or hub id.",
        ),
    ] = DEFAULT_MODEL  # fmt: skip
    weights: WeightsOption = "auto"
    executor: Annotated[
        str,
        option(
            "--executor", "native, or torch (extra kvik\\[torch]).",
            MODEL_PANEL, metavar="NAME", autocompletion=choices("native", "torch"),
        ),
    ] = "native"  # fmt: skip
    device: Annotated[
        str, option("--device", "cpu; the torch executor takes others, like cuda.", MODEL_PANEL, metavar="NAME")
    ] = "cpu"

    def load_with(self, engine: EngineParams, cache: CacheParams) -> LLM:
        """The model, fetched and packed if need be, with bars on a terminal."""
        with Progress() as progress, naming_cache(), naming_options(LoadOptions), naming_options(EngineParams):
            return make_llm(
                self.model, weights=self.weights, cache=cache, executor=self.executor, device=self.device,
                engine=engine, progress=progress,
            )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ModelOptions(CacheOptions, LoadOptions):
    """A model, and how its keys and values are kept."""

    def load(self, engine: EngineParams) -> LLM:
        """`load_with` this cache; what is wrong with it is said first."""
        return self.load_with(engine, self.cache())


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """The fields of EngineParams."""

    threads: Annotated[
        int | None,
        option("--threads", "Threads, 1 to 256.", ENGINE_PANEL, "every core this process may run on", metavar="N"),
    ] = EngineParams.threads
    kv_bytes: Annotated[
        str | None,
        option("--kv-bytes", "Memory of the KV cache, up to 1 PiB: bytes, or with kB MB GB TB (powers of 1000) or KiB MiB "
                "GiB TiB (of 1024).", ENGINE_PANEL, "a quarter of the machine's, or less where that is enough",
                metavar="SIZE"),
    ] = None  # fmt: skip
    max_batch_tokens: Annotated[
        int, option("--max-batch-tokens", "Most tokens computed in a step, 1 to 65536.", ENGINE_PANEL, metavar="N")
    ] = EngineParams.max_batch_tokens
    max_sequences: Annotated[
        int, option("--max-sequences", "Most sequences that run at once, 1 to 4096.", ENGINE_PANEL, metavar="N")
    ] = EngineParams.max_sequences
    max_waiting: Annotated[
        int, option("--max-waiting", "Most requests that wait, 0 to 1000000.", ENGINE_PANEL, metavar="N")
    ] = EngineParams.max_waiting
    prefix_sharing: Annotated[
        bool,
        option("--prefix-sharing/--no-prefix-sharing", "Prompts that begin alike share the cache of what they have in common.",
                ENGINE_PANEL),
    ] = EngineParams.prefix_sharing  # fmt: skip

    def params(self) -> EngineParams:
        """Raises ParameterError naming the option and its range."""
        given: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        with naming_options(EngineParams):
            return EngineParams(**{**given, "kv_bytes": _bytes(self.kv_bytes)})


def _bytes(text: str | None) -> int | None:
    """Bytes of "512MB", "1.5GiB" or "4096"."""
    if text is None:
        return None
    found = re.fullmatch(r"(\d{1,18}(?:\.\d{1,9})?) ?(?:(?:([kmgt])(i?))?b)?", text.strip(), re.ASCII | re.IGNORECASE)
    if found is None or ("." in found[1] and not found[2]):
        raise ParameterError(
            f"--kv-bytes takes bytes, or a number with kB, MB, GB, TB, KiB, MiB, GiB or TiB, got {text!r}"
        )
    power = " kmgt".index(found[2].lower()) if found[2] else 0
    from decimal import Decimal

    return int(Decimal(found[1]) * (1024 if found[3] else 1000) ** power)


@dataclass(frozen=True, kw_only=True)
class SamplingOptions(StrategyOptions):
    """The fields of SamplingParams; None is what was not given."""

    temperature: Annotated[
        float | None,
        option("--temperature", "Divides the logits, at least 0; 0 always takes the best token.", SAMPLING_PANEL,
                "the model's own, else 0.7", metavar="X"),
    ] = None  # fmt: skip
    top_k: Annotated[
        int | None,
        option("--top-k", "Keep the K most probable tokens; 0 is off.", SAMPLING_PANEL,
                "the model's own, else 50", metavar="K"),
    ] = None  # fmt: skip
    top_p: Annotated[
        float | None,
        option("--top-p", "Keep the fewest tokens that have probability P together, 0 to 1; 1 is off.", SAMPLING_PANEL,
                "the model's own, else 0.9", metavar="P"),
    ] = None  # fmt: skip
    min_p: Annotated[
        float | None,
        option("--min-p", "Keep tokens with at least P times the best one's probability, 0 to 1; 0 is off.",
                SAMPLING_PANEL, "the model's own, else 0", metavar="P"),
    ] = None  # fmt: skip
    seed: Annotated[
        int | None,
        option("--seed", "Number that makes the answer repeatable, 0 to 2**64 - 1.", SAMPLING_PANEL,
                "another each time", metavar="N"),
    ] = None  # fmt: skip
    n: Annotated[
        int, option("--n", "Answers to the prompt, 1 to 128.", SAMPLING_PANEL, metavar="N")
    ] = SamplingParams.n  # fmt: skip
    max_tokens: Annotated[
        int, option("--max-tokens", "Most tokens of an answer, at least 1.", SAMPLING_PANEL, metavar="N")
    ] = DEFAULT_MAX_TOKENS
    min_tokens: Annotated[
        int,
        option("--min-tokens", "Fewest tokens of an answer: until then nothing ends it.", SAMPLING_PANEL,
                metavar="N"),
    ] = SamplingParams.min_tokens  # fmt: skip
    stop: Annotated[
        list[str] | None,
        option("--stop", "Text that ends the answer and is left out. Repeat it for up to 16.", SAMPLING_PANEL,
                "", metavar="TEXT"),
    ] = None  # fmt: skip
    stop_token_ids: Annotated[
        list[str] | None,
        option("--stop-token-ids", "Token ids that end the answer, separated by commas. May be repeated.",
                SAMPLING_PANEL, "", metavar="IDS"),
    ] = None  # fmt: skip
    ignore_eos: Annotated[bool, option("--ignore-eos", "Go on past the model's own end of text.", SAMPLING_PANEL)] = (
        False
    )
    logprobs: Annotated[
        int | None,
        option("--logprobs", "Also print each token's log-probability and those of the N best, 0 to 1024.",
                SAMPLING_PANEL, "", metavar="N"),
    ] = None  # fmt: skip
    logprobs_mode: Annotated[
        str,
        option("--logprobs-mode", "raw: before every filter; processed: after them.", SAMPLING_PANEL,
                metavar="MODE", autocompletion=choices("raw", "processed")),
    ] = SamplingParams.logprobs_mode  # fmt: skip

    def given(self) -> dict[str, Any]:
        """What was given, by the names of SamplingParams; and "preset" where one was."""
        given: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        given = {name: value for name, value in given.items() if value not in (None, []) and value is not False}
        if "stop_token_ids" in given:
            given["stop_token_ids"] = _ids(given["stop_token_ids"])
        if "logit_bias" in given:
            given["logit_bias"] = biases(given["logit_bias"])
        return given

    def params(self, base: SamplingParams) -> SamplingParams:
        """`base` with what was given. Raises ParameterError naming the option and its range."""
        given = self.given()
        with naming_options(SamplingOptions):
            if "preset" in given:
                given = {**preset_fields(given.pop("preset")), **given}
            return replace(base, **given)

    def check(self, json: bool) -> None:
        """Raise what `params` would raise, and what would have no effect, before a model is loaded for it."""
        params = self.params(SamplingParams())
        if params.logprobs_mode != SamplingParams.logprobs_mode and params.logprobs is None and not json:
            raise ParameterError("--logprobs-mode needs --logprobs, which says that log-probabilities are printed")


@dataclass(frozen=True, kw_only=True)
class BatchOptions:
    """A file of requests instead of one prompt."""

    batch: Annotated[
        str | None,
        option("--batch", "Requests, a JSON object a line; - is standard input.", BATCH_PANEL, "", metavar="FILE"),
    ] = None
    out: Annotated[
        str | None, option("--out", "Where their results go, a line each.", BATCH_PANEL, "", metavar="FILE")
    ] = None
    resume: Annotated[
        bool, option("--resume", "Go on where --out ends: keep its results, run the other requests.", BATCH_PANEL)
    ] = False

    def check(self, prompt: str | None, receipt: str | None) -> None:
        """Raise ParameterError for options that do not go together."""
        if self.batch is None:
            for name, given in (("--out", self.out is not None), ("--resume", self.resume)):
                if given:
                    raise ParameterError(f"{name} needs --batch, which names the requests")
            return
        if prompt is not None:
            raise ParameterError("--batch and a PROMPT exclude each other")
        if receipt is not None:
            raise ParameterError("--receipt cannot be with --batch: each result has its receipt")
        if self.out is None:
            raise ParameterError("--batch needs --out, the file for the results")


def _ids(texts: list[str]) -> tuple[int, ...]:
    try:
        return tuple(int(piece) for text in texts for piece in text.split(","))
    except ValueError:
        given = ",".join(texts)
        raise ParameterError(f"--stop-token-ids takes whole numbers separated by commas, got {given!r}") from None
