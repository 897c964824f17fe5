"""`kvik replay`: a receipt's request once more, alone or in a crowd; the same tokens, or where they differ."""

from __future__ import annotations

import os
import random
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from kvik.cli import options
from kvik.cli.input import read_text
from kvik.cli.naming import naming_options
from kvik.cli.options import EngineOptions, Json, add_verb, complete_models
from kvik.cli.output import Progress, print_json, quoted, write
from kvik.errors import DataError, ParameterError
from kvik.params import MAX_SEED, CacheParams, EngineParams, SamplingParams

if TYPE_CHECKING:
    from kvik.engine.request import Completion, Receipt, Request
    from kvik.engine.sequence import Group
    from kvik.llm import LLM

__all__ = ["register"]

MAX_CROWD = 4096
_FACTS = ("digest", "weights", "executor", "device")
_LONGEST_PROMPT, _LONGEST_ANSWER, _MOST_SAMPLES = 400, 96, 3
_STEPS_BETWEEN = 2.0  # of the crowd's arrivals, mean, at most: all of it comes before the answer ends


def register(app: typer.Typer) -> None:
    """Add the verb."""
    add_verb(app, "replay", replay)


def replay(
    receipt: Annotated[
        str, typer.Argument(metavar="RECEIPT", show_default=False, help="A file of `kvik run --receipt`, or - .")
    ],
    engine: EngineOptions,
    crowd: Annotated[
        int, typer.Option("--crowd", metavar="N", help="Random other requests that run at the same time, 0 to 4096.")
    ] = 0,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Of the crowd.")] = 0,
    model: Annotated[
        str | None,
        typer.Option(
            "--model", "-m", metavar="REF", show_default="the receipt's", autocompletion=complete_models,
            help="Where the same model is here.",
        ),
    ] = None,
    json: Json = False,
) -> None:  # fmt: skip
    """Run a receipt's request again and compare the tokens.

    With --crowd, other requests of random lengths arrive at random times around it and share its batches, its cache and
    its prefixes; the engine's options can make that tight (--kv-bytes, --max-batch-tokens), so that it is preempted.
    Exit code 0: identical. 65: not, with the first difference; or the model here is another. An instruction set other
    than the receipt's is no obstacle: the native executor has the same bits on each.

    \b
    Examples:
      kvik run "Why is the sky blue?" --receipt sky.json && kvik replay sky.json
      kvik replay sky.json --crowd 32 --kv-bytes 32MiB --max-batch-tokens 96
    """
    from kvik.engine.receipt import cache_of, params_of, receipt_from_json

    if not 0 <= crowd <= MAX_CROWD:
        raise ParameterError(f"--crowd must be in [0, {MAX_CROWD}], got {crowd}")
    if not 0 <= seed <= MAX_SEED:
        raise ParameterError(f"--seed must be in [0, {MAX_SEED}], got {seed}")
    machine = engine.params()
    wanted = receipt_from_json(read_text(receipt), receipt)
    _check_version(wanted, receipt)
    if wanted.kind == "beam" and "cancelled" in wanted.finish_reasons:
        raise DataError(
            "is of a beam search that was cancelled: what it had found then is no beginning of its answer", path=receipt
        )
    llm = _load(wanted, model, machine)
    _check_model(wanted, llm, receipt)
    cache = cache_of(wanted)
    if max(wanted.prompt) >= llm.info.vocab_size or len(wanted.prompt) >= llm.engine.admission.context(cache):
        raise DataError("is no receipt: its prompt is none of its model", path=receipt)
    with naming_options(EngineParams):
        request = llm.request(wanted.prompt, params_of(wanted), cache=cache)
    longest = max(len(tokens) for tokens in wanted.outputs)
    pace = min(_STEPS_BETWEEN, 0.7 * longest / max(1, crowd))
    found = _among(llm, request, crowd, pace, random.Random(seed))
    difference = first_difference(wanted, found)
    if json:
        print_json({
            "identical": difference is None, "difference": difference, "crowd": crowd, "usage": found.usage,
            "stats": found.stats, "engine": llm.engine.stats, "model": llm.info,
        })  # fmt: skip
    if difference is not None:
        raise DataError(difference.told(llm), path=receipt)
    if not json:
        write(_told(llm, found, wanted, crowd))


def _check_version(wanted: Receipt, name: str) -> None:
    from kvik import __version__

    if wanted.version != __version__:
        raise DataError(f"is of Kvik {wanted.version} and this is {__version__}, which may round otherwise", path=name)


def _load(wanted: Receipt, model: str | None, machine: EngineParams) -> LLM:
    from kvik.engine.receipt import cache_of

    there = wanted.model
    ref = model or (there["path"] if os.path.exists(there["path"]) else there["name"])
    how = {name: there[name] for name in ("weights", "executor", "device")}
    with Progress() as progress, naming_options(EngineParams):
        try:
            return options.make_llm(ref, **how, cache=cache_of(wanted), engine=machine, progress=progress)
        except ParameterError as error:
            if model is not None or ref == there["path"]:
                raise
            raise DataError(f"the receipt's model is not at {there['path']}; name it with --model ({error})") from None


def _check_model(wanted: Receipt, llm: LLM, name: str) -> None:
    here = llm.identity
    for fact in _FACTS:
        if wanted.model[fact] != here[fact]:
            meaning = ": other weights or another configuration" if fact == "digest" else ""
            raise DataError(
                f"is of a model with {fact} {wanted.model[fact]}, {llm.info.path} has {here[fact]}{meaning}", path=name
            )


# ---- the crowd


def _among(llm: LLM, request: Request, crowd: int, pace: float, draw: random.Random) -> Completion:
    """The request's answer, others coming and going. pace: steps between two of them, mean."""
    arrivals: list[tuple[float, Request]] = []
    at = 0.0
    for _ in range(crowd):
        at += draw.expovariate(1) * pace
        arrivals.append((at, _other(llm, request, draw)))
    if arrivals:
        arrivals.insert(draw.randrange(min(len(arrivals), 8)), (0.0, request))
    else:
        arrivals.append((0.0, request))
    group: Group | None = None
    others: list[Group] = []
    step = 0
    try:
        while group is None or not group.done:
            while arrivals and arrivals[0][0] <= step and llm.engine.has_room:
                _, arrived = arrivals.pop(0)
                added = llm.engine.add(arrived, lambda chunk: None)
                if arrived is request:
                    group = added
                else:
                    others.append(added)
            llm.engine.step()
            step += 1
    finally:
        for other in [*others, *([group] if group else [])]:
            llm.engine.cancel(other)
    if group.error is not None:
        raise group.error
    return llm.completion(request, group)


def _other(llm: LLM, request: Request, draw: random.Random) -> Request:
    """A random request that fits; one in four begins as the receipt's, so that they share what is cached."""
    info = llm.info
    most = max(2, min(info.context_length, info.kv_pool_bytes // max(1, info.kv_bytes_per_token)) // 2)
    prompt = [draw.randrange(info.vocab_size) for _ in range(draw.randint(1, min(_LONGEST_PROMPT, most)))]
    if draw.random() < 0.25:
        prompt = [*request.prompt, *prompt]
    samples = draw.randint(1, min(_MOST_SAMPLES, llm.engine.params.max_sequences))
    while True:
        params = SamplingParams(
            n=samples, max_tokens=draw.randint(1, max(1, min(_LONGEST_ANSWER, most // 2))),
            temperature=draw.choice((0.0, 0.7, 1.3)), top_k=draw.choice((0, 40)), seed=draw.randrange(2**32),
            ignore_eos=draw.random() < 0.5,
        )  # fmt: skip
        try:
            return llm.request(prompt, params, cache=_others_cache(llm, request.cache, len(prompt), draw))
        except ParameterError:
            if len(prompt) == 1 and samples == 1:
                raise
            prompt, samples = prompt[: max(1, len(prompt) // 2)], 1


def _others_cache(llm: LLM, cache: CacheParams, prompt_tokens: int, draw: random.Random) -> CacheParams:
    """The receipt's, where its policy makes sense for another prompt, or without the policy, or one of f16."""
    plain = replace(cache, policy=None, layers=CacheParams.layers, heads=CacheParams.heads)
    chosen = draw.choice((cache, plain, CacheParams()))
    try:
        chosen.check(prompt_tokens)
        llm.engine.admission.layout(chosen)
    except ParameterError:
        return plain
    return chosen


# ---- the comparison


@dataclass(frozen=True)
class Difference:
    """The first place where the replayed answer is another. Tokens are None where an answer had ended."""

    choice: int
    index: int
    receipt_token: int | None
    replayed_token: int | None
    receipt_reason: str
    replayed_reason: str

    def told(self, llm: LLM) -> str:
        """In words."""
        if self.receipt_token == self.replayed_token:
            return f"choice {self.choice} ends with {self.receipt_reason!r}, replayed with {self.replayed_reason!r}"

        def shown(token: int | None, reason: str) -> str:
            return f"its end ({reason})" if token is None else f"{token} {quoted(llm.tokenizer.decode_bytes([token]))}"

        return (
            f"choice {self.choice} differs at token {self.index}: {shown(self.receipt_token, self.receipt_reason)}, "
            f"replayed {shown(self.replayed_token, self.replayed_reason)}"
        )


class _Ended(NamedTuple):
    tokens: tuple[int, ...]
    reason: str


def first_difference(wanted: Receipt, found: Completion) -> Difference | None:
    """None where they are the same. What was cancelled is compared as far as it came."""
    if len(wanted.outputs) != len(found.choices):  # of beam searches only
        counts = [f"{count} answers" for count in (len(wanted.outputs), len(found.choices))]
        return Difference(min(len(wanted.outputs), len(found.choices)), 0, None, None, *counts)
    for choice in found.choices:
        old = _Ended(wanted.outputs[choice.index], wanted.finish_reasons[choice.index])
        new = _Ended(choice.token_ids, choice.finish_reason)
        if old.reason == "cancelled":
            new = _Ended(new.tokens[: len(old.tokens)], old.reason)
        if old == new:
            continue
        index = next((i for i, (a, b) in enumerate(zip(old.tokens, new.tokens, strict=False)) if a != b), None)
        if index is None:
            index = min(len(old.tokens), len(new.tokens))
        tokens = [ended.tokens[index] if index < len(ended.tokens) else None for ended in (old, new)]
        return Difference(choice.index, index, tokens[0], tokens[1], old.reason, new.reason)
    return None


def _told(llm: LLM, found: Completion, wanted: Receipt, crowd: int) -> str:
    usage, stats, engine = found.usage, found.stats, llm.engine.stats
    choices = f" in {len(found.choices)} choices" if len(found.choices) > 1 else ""
    parts: list[Any] = [f"identical: {usage.completion_tokens} tokens{choices}"]
    if crowd and stats is not None:
        parts.append(f"among {engine.requests - 1} other requests")
        parts.append(f"preempted {stats.preemptions} times, {stats.cached_tokens} prompt tokens from the cache")
    if wanted.model["isa"] != llm.info.isa:
        parts.append(f"on {llm.info.isa} where the receipt is of {wanted.model['isa']}")
    return ", ".join(parts) + "\n"
