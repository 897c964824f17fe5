"""`kvik bench`: how fast a model runs on this machine, and where a step's time goes."""

from __future__ import annotations

import random
import resource
import sys
from dataclasses import dataclass, replace
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvik.cli.bench_cache import CacheOptions, compare_cache
from kvik.cli.cache_options import check_prompt
from kvik.cli.machine import cores, memory, processor
from kvik.cli.options import EngineOptions, Json, ModelOptions, add_verb
from kvik.cli.output import amount, note, print_json, print_table, write
from kvik.errors import ParameterError
from kvik.params import MAX_SEED, policy_name

if TYPE_CHECKING:
    from kvik.engine.sequence import Group
    from kvik.llm import LLM
    from kvik.params import SamplingParams

__all__ = ["register"]

_BANDWIDTH_MIB, _BANDWIDTH_REPEATS = 512, 5  # beyond any cache of the processor
_PARTS = ("matrices", "attention", "rest", "python")


def register(app: typer.Typer) -> None:
    """Add the verb."""
    add_verb(app, "bench", bench)


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """What is measured."""

    prompt_tokens: Annotated[int, typer.Option(help="Tokens of the prompt, at least 1.", metavar="N")] = 512
    new_tokens: Annotated[int, typer.Option(help="Tokens to decode, at least 1.", metavar="N")] = 128
    sequences: Annotated[int, typer.Option(help="Sequences at once, at least 1.", metavar="N")] = 1
    depth: Annotated[int, typer.Option(help="Tokens in the context before decoding, at least 0.", metavar="N")] = 0
    repeat: Annotated[int, typer.Option(help="Measured rounds, at least 1; one more goes ahead.", metavar="N")] = 5
    seed: Annotated[int, typer.Option(help="Of the random prompts and of sampling.", metavar="N")] = 0

    def check(self) -> None:
        """Raise ParameterError naming the option and its range."""
        least = {"prompt_tokens": 1, "new_tokens": 1, "sequences": 1, "depth": 0, "repeat": 1, "seed": 0}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise ParameterError(f"--{name.replace('_', '-')} must be at least {low}, got {getattr(self, name)}")
        if self.seed > MAX_SEED:
            raise ParameterError(f"--seed must be in [0, {MAX_SEED}], got {self.seed}")

    def refuse_changed(self, *names: str) -> None:
        """Raise ParameterError for those that --no-kv-cache has no use for."""
        for name in names:
            if getattr(self, name) != getattr(BenchOptions, name):
                raise ParameterError(f"--{name.replace('_', '-')} has no effect with --no-kv-cache; leave it out")


def bench(
    model: ModelOptions, engine: EngineOptions, options: BenchOptions, cache: CacheOptions, json: Json = False
) -> None:
    """Measure how fast a model runs here: medians over several rounds, after one that does not count.

    Prompts are random tokens. Prefill and the first token's time are of --prompt-tokens with one token drawn. Decoding
    starts from an empty context, or from --depth tokens, and includes sampling with the model's default settings. With
    --sequences N, N prompts come at once and speeds are of all together; first_token_ms is the median over them.

    \b
    prefill_tok_s   prompt tokens per second, until the first token is out
    decode_tok_s    tokens per second after the first one
    first_token_ms  from the request to its first token
    load_ms         until the model is ready, the engine's imports included
    step_ms         a decode step by where its time goes; python is all that is not in the other three
    read_gb_s       bytes of the matrices a decode step reads, over its time in matrices (native executor)
    bandwidth_gb_s  what this machine's memory gives the same threads
    peak_rss_bytes  most memory the process held, before bandwidth is measured

    With --no-kv-cache it measures instead what keys and values in memory are worth: the time of a new token with them,
    and with the whole sequence computed again, by the length of the sequence.

    \b
    Examples:
      kvik bench
      kvik bench --json --threads 2 --sequences 16 --depth 512 --repeat 9
      kvik bench --no-kv-cache --max-length 1024 --plot cache.svg
    """
    options.check()
    cache.check()
    if cache.no_kv_cache:
        options.refuse_changed("prompt_tokens", "new_tokens", "sequences", "depth")
    machine = replace(engine.params(), prefix_sharing=engine.prefix_sharing and not cache.no_kv_cache)
    begun = perf_counter()
    llm = model.load(machine)
    load_ms = 1e3 * (perf_counter() - begun)
    if cache.no_kv_cache:
        compare_cache(llm, cache, options.repeat, options.seed, json=json)
        return
    _check_fits(llm, options)
    params = replace(llm.default_params(), seed=options.seed, ignore_eos=True)
    _round(llm, params, options, 0)  # the first touch of the weights does not count
    rounds = []
    for number in range(1, options.repeat + 1):
        rounds.append(_round(llm, params, options, number))
        if sys.stderr.isatty():
            speeds = f"prefill {rounds[-1]['prefill_tok_s']:.0f}, decode {rounds[-1]['decode_tok_s']:.0f} tokens/s"
            note(f"round {number} of {options.repeat}: {speeds}", dim=True)
    report = _report(llm, options, rounds, load_ms)
    if json:
        print_json(report)
    else:
        _show(report)


def _check_fits(llm: LLM, options: BenchOptions) -> None:
    admission, cache, params = llm.engine.admission, llm.engine.admission.cache, llm.engine.params
    context, pool = admission.context(cache), admission.pool
    if options.sequences > params.max_sequences:
        raise ParameterError(
            f"--sequences is {options.sequences}; --max-sequences allows {params.max_sequences} at once"
        )
    if options.sequences > 1 and options.depth > 1 and not params.prefix_sharing:  # the first would go on meanwhile
        raise ParameterError(
            "--sequences and --depth beyond 1 need prefix sharing to begin together; leave out --no-prefix-sharing"
        )
    deep = max(1, options.depth)
    for name, prompt, new in (
        ("--prompt-tokens", options.prompt_tokens, 1), ("--depth and --new-tokens", deep, options.new_tokens + 1),
    ):  # fmt: skip
        if prompt + new > context:
            raise ParameterError(f"{name} need a context of {prompt + new} tokens; {llm.info.name} has {context}")
        check_prompt(cache, prompt, f"--evict with {name.partition(' ')[0]} {prompt}")
        need = admission.room(cache, prompt).slabs(0, prompt + new, options.sequences)
        if need > pool.num_slabs:
            raise ParameterError(
                f"{name} with --sequences need {need * pool.slab_bytes} bytes of KV cache; --kv-bytes allows {pool.nbytes}"
            )
    evictor = admission.evictor(cache, deep)
    if options.sequences > 1 and deep > 1 and evictor is not None and not evictor.hits_allowed(deep - 1):
        raise ParameterError(
            "--sequences and --depth beyond 1 need prefix sharing to begin together, and --evict "
            f"{policy_name(evictor.policy)} takes no cached prefix"
        )


def _round(llm: LLM, params: SamplingParams, options: BenchOptions, number: int) -> dict[str, float]:
    """One prefill and one decode, each with prompts of its own."""
    draw = random.Random(f"{options.seed} {number}")
    ordinary = [token for token in range(llm.info.vocab_size) if token not in llm.tokenizer.special_ids]
    prompts = [draw.choices(ordinary, k=options.prompt_tokens) for _ in range(options.sequences)]
    begun = perf_counter()
    answers = llm.generate(prompts, replace(params, max_tokens=1))
    prefilling = perf_counter() - begun
    waits = [answer.stats.first_token for answer in answers if answer.stats and answer.stats.first_token is not None]
    found = {
        "prefill_tok_s": options.sequences * options.prompt_tokens / prefilling,
        "first_token_ms": 1e3 * median(waits),
    }
    contexts = [draw.choices(ordinary, k=max(1, options.depth)) for _ in range(options.sequences)]
    return {**found, **_decode(llm, params, contexts, options.new_tokens)}


def _decode(llm: LLM, params: SamplingParams, contexts: list[list[int]], new_tokens: int) -> dict[str, float]:
    """Speed and times of so many steps in which every sequence has a token.

    What is deep is computed before, so that prefix hits let all begin together.
    """
    if len(contexts) > 1 and len(contexts[0]) > 1:
        llm.generate(contexts, replace(params, max_tokens=1))
    engine, stats = llm.engine, llm.engine.stats
    groups: list[Group] = []
    try:
        for context in contexts:
            groups.append(engine.add(llm.request(context, replace(params, max_tokens=None)), lambda chunk: None))
        while any(group.times.first_token is None for group in groups):
            engine.step()
        stats.reset()
        begun = perf_counter()
        for _ in range(new_tokens):
            engine.step()
        decoding = perf_counter() - begun
    finally:
        for group in groups:
            engine.cancel(group)
    steps = {name: 1e3 * getattr(stats, name) / stats.steps for name in _PARTS[:3]}
    steps["python"] = 1e3 * decoding / stats.steps - sum(steps.values())
    found = {"decode_tok_s": stats.generated / decoding, **steps}
    if llm.info.executor == "native":  # the torch executor reads tensors of its own, not the packed ones
        found["read_gb_s"] = 1e-9 * llm.info.matrix_bytes * stats.steps / stats.matrices
    return found


def _report(llm: LLM, options: BenchOptions, rounds: list[dict[str, float]], load_ms: float) -> dict[str, Any]:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    values = {name: [one[name] for one in rounds] for name in rounds[0]}
    middle = {name: median(each) for name, each in values.items()}
    info, machine = llm.info, cores()
    return {
        **{name: middle[name] for name in ("prefill_tok_s", "decode_tok_s", "first_token_ms")},
        "load_ms": load_ms,
        "step_ms": {name: middle[name] for name in _PARTS},
        "read_gb_s": middle.get("read_gb_s"),
        "bandwidth_gb_s": bandwidth(info.threads) / 1e9,
        "peak_rss_bytes": peak,
        "range": {name: {"min": min(each), "max": max(each)} for name, each in values.items()},
        "model": info,
        "machine": {
            "processor": processor(), "cores": machine.allowed, "cores_of_machine": machine.machine,
            "memory_bytes": memory().total,
        },
        "settings": options,
    }  # fmt: skip


def bandwidth(threads: int) -> float:
    """Bytes per second that `threads` threads read from memory together."""
    from kvik import _native

    return _native.Pool(threads).measure_bandwidth(_BANDWIDTH_MIB, _BANDWIDTH_REPEATS)


def _show(report: dict[str, Any]) -> None:
    spread = report["range"]

    def row(name: str, unit: str, digits: int = 1) -> list[str]:
        low, high = spread[name]["min"], spread[name]["max"]
        return [name, f"{report[name]:.{digits}f}", unit, f"{low:.{digits}f} to {high:.{digits}f}"]

    info, step = report["model"], report["step_ms"]
    how = ", ".join(filter(None, (f"weights {info.weights}", f"kv {info.cache.text}", info.executor, info.isa)))
    sequences = report["settings"].sequences
    many = f", {sequences} sequences" if sequences > 1 else ""
    write(f"{info.name}: {how}, {info.threads} threads{many}\n")
    write(f"{report['machine']['processor']}\n\n")
    whole = sum(step.values())
    print_table(
        [
            row("prefill_tok_s", "tokens/s"),
            row("decode_tok_s", "tokens/s"),
            row("first_token_ms", "ms"),
            ["load_ms", f"{report['load_ms']:.1f}", "ms", ""],
            *([f"step {name}", f"{step[name]:.3f}", "ms", f"{step[name] / whole:.1%}"] for name in _PARTS),
            *([row("read_gb_s", "GB/s")] if report["read_gb_s"] is not None else []),
            ["bandwidth_gb_s", f"{report['bandwidth_gb_s']:.1f}", "GB/s", ""],
            ["peak_rss_bytes", amount(report["peak_rss_bytes"]), "", ""],
        ],
        "<><<",
    )
