"""`kvik xray`: what every token was chosen from."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer

from kvik.cli.answer import encode_prompt, with_seed
from kvik.cli.answer_options import GrammarOptions
from kvik.cli.cache_options import CACHE_PANEL, KV_HELP, check_prompt, complete_kv
from kvik.cli.input import argument_text
from kvik.cli.naming import naming_options
from kvik.cli.options import (
    EngineOptions,
    Json,
    ModelOptions,
    Plain,
    SamplingOptions,
    System,
    add_verb,
)
from kvik.cli.output import note, plain, print_json, write
from kvik.cli.pictures import check_picture
from kvik.cli.strategy_options import option
from kvik.cli.xray_kv import check_evicts
from kvik.errors import ParameterError
from kvik.params import MAX_BEAMS, BeamParams, SamplingParams

if TYPE_CHECKING:
    from kvik.cli.xray_tree import Node
    from kvik.decoding.trace import TokenTrace
    from kvik.llm import LLM

__all__ = ["register"]

_MOST_TOKENS = 2048
_BEAM_TOKENS = 16
_SHARED = ("grammar", "stop", "stop_token_ids", "ignore_eos", "repetition_penalty", "no_repeat_ngram_size")


def register(app: typer.Typer) -> None:
    """Add the verb."""
    add_verb(app, "xray", xray)


@dataclass(frozen=True, kw_only=True)
class XrayOptions:
    """What is looked at, and where it goes."""

    html: Annotated[
        str | None,
        typer.Option(
            "--html", metavar="FILE", show_default=False, help="Write it as one page that needs nothing else."
        ),
    ] = None
    at: Annotated[
        int | None,
        typer.Option(
            "--at", metavar="N", show_default="the most open choice", help="The token shown in detail, from 1."
        ),
    ] = None
    plot: Annotated[
        str | None,
        typer.Option("--plot", metavar="FILE", show_default=False, help="Draw that token's probabilities at several "
                     "temperatures into a .png, .svg or .pdf (extra kvik\\[plots])."),
    ] = None  # fmt: skip
    beams: Annotated[
        int,
        typer.Option(
            "--beams",
            metavar="N",
            help="Also follow so many beams from the prompt, 1 to 64, with what of the options beside it does not draw; 0 is none.",
        ),
    ] = 0
    beam_tokens: Annotated[
        int | None,
        typer.Option("--beam-tokens", metavar="N", show_default=str(_BEAM_TOKENS), help="Most tokens of a beam."),
    ] = None

    cache: Annotated[
        bool,
        typer.Option("--kv", help="Show which tokens the KV cache keeps under --evict, and why, instead of choices."),
    ] = False

    def check(self) -> None:
        """Raise ParameterError naming the option and its range."""
        if self.cache:
            for name in ("at", "plot", "beams", "beam_tokens"):
                if getattr(self, name):
                    raise ParameterError(f"--{name.replace('_', '-')} has no effect with --kv; leave it out")
        if not 0 <= self.beams <= MAX_BEAMS:
            raise ParameterError(f"--beams must be in [0, {MAX_BEAMS}], got {self.beams}")
        if self.beam_tokens is not None and not self.beams:
            raise ParameterError("--beam-tokens needs --beams")
        if self.beam_tokens is not None and not 1 <= self.beam_tokens <= _MOST_TOKENS:
            raise ParameterError(f"--beam-tokens must be in [1, {_MOST_TOKENS}], got {self.beam_tokens}")
        if self.at is not None and self.at < 1:
            raise ParameterError(f"--at must be at least 1, got {self.at}")
        if self.plot is not None:
            check_picture("--plot", self.plot)


@dataclass(frozen=True, kw_only=True)
class XrayModelOptions(ModelOptions):
    """As for every verb, but --kv is what is looked at."""

    kv_flag: ClassVar[str] = "--kv-format"
    kv: Annotated[
        str, option("--kv-format", KV_HELP, CACHE_PANEL, metavar="FORMAT", autocompletion=complete_kv)
    ] = ModelOptions.kv  # fmt: skip


def xray(
    model: XrayModelOptions,
    sampling: SamplingOptions,
    grammar: GrammarOptions,
    engine: EngineOptions,
    options: XrayOptions,
    prompt: Annotated[
        str, typer.Argument(metavar="PROMPT", show_default=False, help="The text, or - to read it from standard input.")
    ],
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", metavar="N", help=f"Most tokens of the answer, 1 to {_MOST_TOKENS}.")
    ] = 64,
    raw: Plain = False,
    system: System = None,
    json: Json = False,
) -> None:
    """Answer a prompt and show what every token was chosen from.

    Of each token: its probability and rank by the model, the entropy there, how many tokens make the nucleus of top_p (0.9
    where that is off), how many every filter removed, and the probability it was drawn with. One token is shown in
    detail: the best candidates, which stage removed each, and the same logits at other temperatures.

    With --kv it shows instead what --evict gives up: which tokens each layer and head of the KV cache keeps at each
    event, and why, for its score or as one of the first or last. Its formats are those of --kv-format.

    \b
    Examples:
      kvik xray "The capital of France is" --raw --max-tokens 12
      kvik xray "Once upon a time" --raw --temperature 1.2 --top-k 50 --html story.html --beams 4
      kvik xray "Name a colour." --at 1 --plot temperature.png
      kvik xray --kv - --evict snapkv:budget=25% --html kept.html < report.txt
    """
    options.check()
    if not 1 <= max_tokens <= _MOST_TOKENS:
        raise ParameterError(f"--max-tokens must be in [1, {_MOST_TOKENS}], got {max_tokens}")
    if sampling.n != 1:
        raise ParameterError("--n has no effect on an x-ray, which is of one answer; leave it out")
    if sampling.logprobs is not None:
        raise ParameterError("--logprobs has no effect on an x-ray, which has them; leave it out")
    if sampling.logprobs_mode != SamplingParams.logprobs_mode:
        raise ParameterError("--logprobs-mode has no effect on an x-ray, which has both; leave it out")
    sampling.check(json=True)
    shape, machine = grammar.grammar(sampling.ignore_eos), engine.params()
    if options.cache:
        check_evicts(model.cache())
    text = argument_text(prompt)
    llm = model.load(machine)
    ids = encode_prompt(llm, text, system, raw)
    check_prompt(llm.info.cache, len(ids))
    own = replace(sampling.params(llm.default_params()), max_tokens=max_tokens, grammar=shape, trace=not options.cache)
    params = with_seed(own)
    if options.cache:
        with naming_options(SamplingParams), grammar.naming():
            _look(llm, ids, params, options.html, json=json)
        return
    with naming_options(SamplingParams), grammar.naming():
        (answer,) = llm.generate([ids], params)
        tree = _follow(llm, ids, params, options)
    traces = answer.choices[0].trace or ()
    at = _detail(traces, options.at)
    if options.html is not None:
        told = {"strategy": strategy_line(params), "temperature": params.temperature}
        _write_page(llm, options, traces, tree, {"prompt": text, "raw": raw, **told})
    if options.plot is not None and at is not None:
        from kvik.cli.xray_plot import draw_sweep

        draw_sweep(traces[at], llm.tokenizer.piece, llm.info.name, options.plot)
    if json:
        print_json({
            "text": answer.text, "tokens": [_named(llm, one) for one in traces], "beams": [_node(llm, n) for n in tree],
            "params": params, "model": llm.info,
        })  # fmt: skip
    else:
        _show(llm, traces, tree, at, options)
    if options.html is not None:
        note(f"{options.html}: open it in a browser")


def _look(llm: LLM, ids: list[int], params: SamplingParams, html: str | None, *, json: bool) -> None:
    """At the KV cache."""
    from kvik.cli.xray_kv import look, report, write_page

    found = look(llm, ids, params)
    report(llm, found, json=json)
    if html is not None:
        write_page(llm, found, html)


def _follow(llm: LLM, ids: list[int], asked: SamplingParams, options: XrayOptions) -> list[Node]:
    """The tree of a beam search from the prompt, where one is asked for, with what of `asked` is not about drawing."""
    if not options.beams:
        return []
    from kvik.cli.xray_tree import beam_tree

    tokens = options.beam_tokens or _BEAM_TOKENS
    params = BeamParams(
        num_beams=options.beams,
        num_return_sequences=options.beams,
        max_tokens=tokens,
        min_tokens=min(asked.min_tokens, tokens),
        trace=True,
        **{name: getattr(asked, name) for name in _SHARED},
    )
    (found,) = llm.generate([ids], params)
    assert found.beams is not None
    return beam_tree(found.beams, [choice.token_ids for choice in found.choices])


def _detail(traces: tuple[TokenTrace, ...], at: int | None) -> int | None:
    """Index of the token shown in detail: the one asked for, else that with the highest entropy."""
    if at is not None and at > len(traces):
        raise ParameterError(f"--at is {at}; the answer has {len(traces)} tokens")
    if at is not None:
        return at - 1
    return max(range(len(traces)), key=lambda i: traces[i].entropy, default=None)


def strategy_line(params: SamplingParams) -> str:
    """What is not the default, in a line."""
    given = {f.name: getattr(params, f.name) for f in fields(params) if getattr(params, f.name) != f.default}
    told = {"temperature": params.temperature, **given}
    return ", ".join(f"{name} {value}" for name, value in told.items() if name != "trace")


def _write_page(
    llm: LLM, options: XrayOptions, traces: tuple[TokenTrace, ...], tree: list[Node], facts: dict[str, Any]
) -> None:
    from kvik.cli.xray_html import page
    from kvik.files import atomic_write

    assert options.html is not None
    text = page(traces, tree, llm.tokenizer.piece, {**facts, "model": llm.info.name, "beams": options.beams})
    with atomic_write(Path(options.html)) as file:
        file.write(text.encode(errors="replace"))


def _named(llm: LLM, one: TokenTrace) -> dict[str, Any]:
    """A trace with the texts of its tokens."""
    found: dict[str, Any] = plain(one)
    found["text"] = llm.tokenizer.decode([one.token_id])
    for candidate in found["candidates"]:
        candidate["text"] = llm.tokenizer.decode([candidate["token_id"]])
    return found


def _node(llm: LLM, node: Node) -> dict[str, Any]:
    return {**plain(node), "text": llm.tokenizer.decode([node.token_id])}


def _show(llm: LLM, traces: tuple[TokenTrace, ...], tree: list[Node], at: int | None, options: XrayOptions) -> None:
    from kvik.cli.xray_terminal import print_beams, print_detail, print_text, print_tokens

    print_text(traces, llm.tokenizer.decode)
    write("\n")
    print_tokens(traces, llm.tokenizer.piece)
    if at is not None:
        write("\n")
        print_detail(traces[at], at + 1, llm.tokenizer.piece)
    print_beams(tree, llm.tokenizer.piece, options.beams)
