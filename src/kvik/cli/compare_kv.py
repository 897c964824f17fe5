"""`kvik compare kv`: KV caches side by side on one prompt."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvik.cli.answer import encode_prompt
from kvik.cli.cache_options import (
    CACHE_PANEL,
    EVICT_HELP,
    KV_HELP,
    PackingOptions,
    cache_of_texts,
    check_prompt,
    complete_evict,
    complete_kv,
)
from kvik.cli.input import argument_text, read_text
from kvik.cli.machine import cores, processor
from kvik.cli.options import EngineOptions, Json, LoadOptions, Plain, System
from kvik.cli.output import aligned, amount, note, print_json, write
from kvik.cli.pictures import check_picture
from kvik.cli.strategy_options import option
from kvik.errors import ParameterError
from kvik.params import MAX_SEED, CacheParams, SamplingParams

if TYPE_CHECKING:
    from kvik.evaluation.compare_kv import CacheMeasured

__all__ = ["KvOptions", "compare_kv"]

_MOST_REPEATS, _MOST_TOKENS, _MOST_CACHES = 100, 1024, 64
BLOCK_TOKENS = 16  # of a full block
_DEFAULT = ("int8", "k8v4", "int4")
_NEEDS = {
    "group_size": "int8 or int4", "keep_first": "int8 or int4", "layers": "a budget", "heads": "a budget",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class KvOptions(PackingOptions):
    """Which caches, and how often."""

    kv: Annotated[
        list[str] | None,
        option("--kv", KV_HELP + " May be repeated.", CACHE_PANEL, "int8, k8v4, int4; with --evict f16", metavar="FORMAT",
               autocompletion=complete_kv),
    ] = None  # fmt: skip
    evict: Annotated[
        list[str] | None,
        option("--evict", EVICT_HELP + " May be repeated.", CACHE_PANEL, "none", metavar="POLICY",
               autocompletion=complete_evict),
    ] = None  # fmt: skip
    zip: Annotated[
        bool,
        typer.Option("--zip", help="The first --kv with the first --evict, and so on; otherwise each with each."),
    ] = False
    against: Annotated[
        str,
        typer.Option("--against", metavar="FORMAT", help="Format of the full cache that all are compared with."),
    ] = CacheParams().kv
    repeat: Annotated[
        int, typer.Option("--repeat", metavar="N", help="Runs that count, 1 to 100; one more goes ahead.")
    ] = 3
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", metavar="N", help=f"Most tokens of an answer, 1 to {_MOST_TOKENS}.")
    ] = 128
    temperature: Annotated[
        float, typer.Option("--temperature", metavar="X", help="At least 0; 0 always takes the best token.")
    ] = 0.0
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Of what is drawn.")] = 0
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Answers of equal length: go on past the model's own end of text.")
    ] = False
    plot: Annotated[
        str | None,
        typer.Option(
            "--plot", metavar="FILE", show_default=False, help="Draw it into a .png, .svg or .pdf (extra kvik\\[plots])."
        ),
    ] = None  # fmt: skip

    def check(self) -> None:
        """Raise ParameterError naming the option and its range."""
        for name, high in (("repeat", _MOST_REPEATS), ("max_tokens", _MOST_TOKENS)):
            value = getattr(self, name)
            if not 1 <= value <= high:
                raise ParameterError(f"--{name.replace('_', '-')} must be in [1, {high}], got {value}")
        if not 0 <= self.seed <= MAX_SEED:
            raise ParameterError(f"--seed must be in [0, {MAX_SEED}], got {self.seed}")
        if self.plot is not None:
            check_picture("--plot", self.plot)

    def full(self) -> CacheParams:
        """The cache that keeps all."""
        found = cache_of_texts(self.against, None, {}, "--against")
        if found.packed:
            raise ParameterError(f"--against must be f16, bf16 or f32, got {self.against!r}")
        return found

    def caches(self) -> dict[str, CacheParams]:
        """By name, those asked for but the full one. Options that none of them can have are refused."""
        kvs = self.kv or (["f16"] if self.evict else list(_DEFAULT))
        evicts = self.evict or ["none"]
        if self.zip and len(kvs) != len(evicts):
            raise ParameterError(f"--zip needs as many --kv as --evict, got {len(kvs)} and {len(evicts)}")
        pairs = list(zip(kvs, evicts, strict=True)) if self.zip else [(kv, evict) for evict in evicts for kv in kvs]
        given, used, found = self.packing(), set[str](), dict[str, CacheParams]()
        full = self.full()
        for kv, evict in pairs:
            bare = cache_of_texts(kv, evict, {})
            more = {name: value for name, value in given.items() if _can_have(bare, name)}
            used |= more.keys()
            cache = cache_of_texts(kv, evict, more)
            if cache != full and cache not in found.values():
                found[_name(cache, evict)] = cache
        for name in given.keys() - used:
            flag = f"--kv-{name.replace('_', '-')}"
            raise ParameterError(f"{flag} has no effect: no cache here has {_NEEDS[name]}; leave it out")
        if not found:
            raise ParameterError(f"--kv and --evict name nothing beside the full cache in {self.against}")
        if len(found) > _MOST_CACHES:
            raise ParameterError(f"--kv and --evict make {len(found)} caches; at most {_MOST_CACHES} are compared")
        return found

    def params(self) -> SamplingParams:
        """How answers are made."""
        return SamplingParams(
            temperature=self.temperature, seed=self.seed, max_tokens=self.max_tokens, ignore_eos=self.ignore_eos
        )


def _can_have(cache: CacheParams, name: str) -> bool:
    return {"rotate": True, "layers": cache.scorer is not None, "heads": cache.scorer is not None}.get(
        name, cache.packed
    )


def _name(cache: CacheParams, evict: str) -> str:
    """Formats, and the policy as it was typed."""
    return cache.kv if cache.policy is None else f"{cache.kv} {evict}"


def compare_kv(
    model: LoadOptions,
    engine: EngineOptions,
    options: KvOptions,
    prompt: Annotated[
        str,
        typer.Argument(
            metavar="PROMPT|FILE", show_default=False,
            help="The text, a file that has it, or - to read it from standard input.",
        ),
    ],
    raw: Plain = False,
    system: System = None,
    json: Json = False,
) -> None:  # fmt: skip
    """Measure KV caches on one prompt: fewer bits, fewer tokens, or both, beside the full cache.

    Each cache answers the prompt by itself, in turn. Then each predicts the full cache's answer, token by token, and its
    distributions are compared with the full cache's.

    \b
    now, peak    bytes of keys and values at the answer's end, and the most at once; of full: now over the full cache's
    kept         tokens that are still there at the end, the mean over layers and heads
    tok/s        tokens of the answer per second after the first, median of the runs
    KL           nats, KL(full || cache), the mean over predictions of the full cache's answer; 0 is the same
    same best    share of them whose most probable token stays
    alike        tokens with which its own answer begins as the full cache's does

    \b
    Examples:
      kvik compare kv "Tell me about rivers." --max-tokens 64
      kvik compare kv report.txt --kv f16 --kv int8 --kv int4 --evict none --evict snapkv:budget=25%
      kvik compare kv report.txt --evict snapkv:budget=25% --evict h2o:budget=25% --plot caches.png
    """
    options.check()
    full, caches = options.full(), options.caches()
    machine = engine.params()
    text = _text(prompt)
    llm = model.load_with(machine, max((full, *caches.values()), key=_block_bits))
    ids = encode_prompt(llm, text, system, raw)
    for cache in caches.values():
        check_prompt(cache, len(ids))
    from kvik.evaluation.compare_kv import compare_caches
    from kvik.evaluation.rows import NativeCompare

    found = compare_caches(
        llm, ids, full, caches, options.params(), repeat=options.repeat, compare=NativeCompare(machine.threads),
        heard=_heard(options.repeat),
    )  # fmt: skip
    report = {
        "caches": found, "model": llm.info, "machine": {"processor": processor(), "cores": cores().allowed},
        "settings": {
            "prompt": text, "prompt_tokens": len(ids), "raw": raw, "repeat": options.repeat,
            "max_tokens": options.max_tokens, "temperature": options.temperature, "seed": options.seed,
            "ignore_eos": options.ignore_eos, "against": options.against,
        },
    }  # fmt: skip
    if options.plot is not None:
        from kvik.cli.compare_kv_plot import draw_plot

        draw_plot(found, report, options.plot)
    if json:
        print_json({**report, "caches": [{**one._asdict(), "cache": one.cache.as_dict()} for one in found]})
    else:
        _show(found, report)


def _block_bits(cache: CacheParams) -> tuple[int, bool]:
    """How large a block is: an engine has room for blocks as large as its own cache's."""
    bits = {"f32": 32, "f16": 16, "bf16": 16, "int8": 8, "int4": 4}
    return (bits[cache.k] + bits[cache.v]) * (cache.group_size if cache.packed else BLOCK_TOKENS), cache.packed


def _text(prompt: str) -> str:
    """Of a file, where there is one of this name; else the argument itself."""
    if prompt != "-" and len(prompt) < 4096 and "\n" not in prompt and "\0" not in prompt and Path(prompt).is_file():
        text = read_text(prompt).removesuffix("\n").removesuffix("\r")
        if not text:
            raise ParameterError(f"{prompt} is empty")
        return text
    return argument_text(prompt)


def _heard(rounds: int) -> Any:
    """A line on a terminal for each run."""

    def heard(number: int, name: str, answer: Any) -> None:
        if sys.stderr.isatty():
            which = f"round {number} of {rounds}" if number else "warming up"
            note(f"{which}: {name}, {answer.usage.completion_tokens} tokens", dim=True)

    return heard


def _show(found: Sequence[CacheMeasured], report: Mapping[str, Any]) -> None:
    info, settings, full = report["model"], report["settings"], found[0]
    write(f"{info.name}: weights {info.weights}, {info.executor}, {info.threads} threads\n")
    write(
        f"{report['machine']['processor']}; {settings['prompt_tokens']} prompt tokens, {settings['repeat']} runs of at most "
        f"{settings['max_tokens']} tokens\n\n"
    )
    rows = [["cache", "now", "peak", "of full", "kept", "tok/s", "KL", "same best", "alike"]]
    for one in found:
        share = one.kv_bytes_now / full.kv_bytes_now if full.kv_bytes_now else 1.0
        speed = "-" if one.tokens_per_second is None else f"{one.tokens_per_second:.0f}"
        moved = ["-", "-"] if one.moved is None else [f"{one.moved.kl_mean:.4f}", f"{one.moved.same_top:.1%}"]
        name = f"full, {one.cache.kv}" if one is full else one.name
        rows.append([
            name, amount(one.kv_bytes_now), amount(one.kv_bytes_peak), f"{share:.3f}", f"{one.kv_tokens_kept:.0f}", speed,
            *moved, f"{one.common} of {len(full.token_ids)}",
        ])  # fmt: skip
    for line in aligned(rows, "<>>>>>>>>"):
        write(line + "\n")
    width = shutil.get_terminal_size((100, 24)).columns
    for one in found[1:]:
        write("\n")
        if one.token_ids == full.token_ids:
            write(f"{one.name}: the same text\n")
        else:
            write("\n".join(side_by_side(full, one, min(width, 160))) + "\n")
    if all(one.token_ids == full.token_ids for one in found):
        write(f"\n{full.text}\n")


def side_by_side(full: CacheMeasured, other: CacheMeasured, width: int) -> list[str]:
    """Both texts in columns under their names."""
    column = max(20, (width - 3) // 2)
    left, right = _wrapped(full.text, column), _wrapped(other.text, column)
    left, right = [f"full, {full.cache.kv}"[:column], "", *left], [other.name[:column], "", *right]
    height = max(len(left), len(right))
    padded = zip(left + [""] * (height - len(left)), right + [""] * (height - len(right)), strict=True)
    return [f"{a:<{column}} │ {b}".rstrip() for a, b in padded]


def _wrapped(text: str, width: int) -> list[str]:
    lines: list[str] = []
    for line in text.strip().splitlines():
        lines += textwrap.wrap(line, width, replace_whitespace=True) or [""]
    return lines
