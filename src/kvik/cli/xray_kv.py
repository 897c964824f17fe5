"""`kvik xray --kv`: which tokens each layer and head of the KV cache keeps, and why."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from kvik.cli.cache_options import check_prompt
from kvik.cli.output import amount, note, print_json, print_table, quoted, write
from kvik.cli.xray_kv_events import FIRST, KEPT, LAST, Event, events_of, streamed
from kvik.errors import ParameterError
from kvik.params import CacheParams, SamplingParams, StreamingLLM

if TYPE_CHECKING:
    from kvik.engine.moving import EvictionRecord
    from kvik.engine.request import Completion
    from kvik.llm import LLM

__all__ = ["KvXray", "check_evicts", "look", "report", "write_page"]

_MOST_WORDS = 12


class KvXray(NamedTuple):
    """An answer and what was given up on the way. tokens: prompt and answer, as far as they were computed."""

    answer: Completion
    cache: CacheParams
    tokens: tuple[int, ...]
    num_prompt: int
    events: list[Event]


def check_evicts(cache: CacheParams) -> None:
    """ParameterError where nothing is ever given up."""
    if cache.policy is None:
        raise ParameterError("--kv shows what --evict gives up; name a policy, like --evict snapkv:budget=25%")


def look(llm: LLM, ids: Sequence[int], params: SamplingParams) -> KvXray:
    """Answer a prompt with the engine's cache, and note its events."""
    cache = llm.info.cache
    records: list[EvictionRecord] = []
    check_evicts(cache)
    check_prompt(cache, len(ids))
    llm.engine.on_evict = records.append
    try:
        (answer,) = llm.generate([list(ids)], params)
    finally:
        llm.engine.on_evict = None
    tokens = (*ids, *answer.choices[0].token_ids[:-1])
    if isinstance(cache.policy, StreamingLLM):
        shape = llm.engine.model.shape
        layers = [layer for layer, window in enumerate(shape.windows) if not window]
        gone = len(tokens) > cache.policy.sinks + cache.policy.window
        events = [streamed(cache.policy, layers, shape.num_kv_heads, len(tokens))] if gone else []
    else:
        assert cache.scorer is not None
        events = events_of(records, cache.scorer)
    return KvXray(answer, cache, tokens, len(ids), events)


def report(llm: LLM, found: KvXray, *, json: bool) -> None:
    """On standard output."""
    if json:
        print_json(_plain(llm, found))
        return
    info, usage = llm.info, found.answer.usage
    write(f"{info.name}: {found.cache.text}\n")
    write(
        f"{found.num_prompt} prompt tokens, {usage.completion_tokens} generated; KV {amount(usage.kv_bytes_now)} at the end, "
        f"{amount(usage.kv_bytes_peak)} at most, {usage.kv_tokens_kept:.0f} of {len(found.tokens)} tokens kept\n"
    )
    if not found.events:
        write("nothing was given up\n")
        return
    for number, event in enumerate(found.events, 1):
        write(_told(event, number) + "\n")
    write("\n")
    _print_layers(found.events[-1])
    write("\n")
    _print_tokens(llm, found, found.events[0])
    write(f"\n{found.answer.text}\n")


def _told(event: Event, number: int) -> str:
    counts, kept = event.counts, event.attention_kept
    spread = f"{counts.min()}" if counts.min() == counts.max() else f"{counts.min()} to {counts.max()}"
    share = "" if kept is None else f"; the kept ones had {kept:.1%} of the attention that was ranked"
    return (
        f"event {number}, after {event.num_tokens} tokens: {spread} kept in each of {len(event.layers)} layers x "
        f"{event.states.shape[1]} heads{share}"
    )


def _print_layers(event: Event) -> None:
    """A line a layer, of the last event."""
    rows = [["layer", "kept by each head", "first", "last", "by score", "least score kept", "attention kept"]]
    for place, layer in enumerate(event.layers):
        states = event.states[place]
        kept = states == KEPT
        least = [float(row[mask].min()) for row, mask in zip(event.scores[place], kept, strict=True) if mask.any()]
        own = event._replace(
            states=states[None], ranks=event.ranks[place : place + 1], scores=event.scores[place : place + 1]
        )
        share = own.attention_kept
        rows.append([
            str(layer), _range([float(count) for count in event.counts[place]]), str((states == FIRST).sum(1).max()),
            str((states == LAST).sum(1).max()), f"{kept.sum() / len(states):.0f}", _range(least) if least else "-",
            "-" if share is None else f"{share:.1%}",
        ])  # fmt: skip
    print_table(rows, "><>>>>>")


def _range(values: Sequence[float]) -> str:
    """Of the heads: one figure, or the least and the most."""
    low, high = f"{min(values):.3g}", f"{max(values):.3g}"
    return low if low == high else f"{low} to {high}"


def _print_tokens(llm: LLM, found: KvXray, event: Event) -> None:
    """The tokens that most layers and heads keep, and the text as half of them have it, after the first event."""
    keepers = event.keepers
    by_score = (event.states == KEPT).sum((0, 1))
    order = sorted(range(event.num_tokens), key=lambda at: (-int(by_score[at]), at))[:_MOST_WORDS]
    rows = [["token", "text", "kept for its score by", "best rank"]]
    for at in order:
        if by_score[at]:
            ranks = event.ranks[:, :, at]
            text = quoted(llm.tokenizer.decode_bytes([found.tokens[at]]))
            rows.append([str(at), text, f"{by_score[at]} of {event.pairs}", str(ranks[ranks > 0].min())])
    if len(rows) > 1:
        print_table(rows, "><>>")
    gone = int((keepers == 0).sum())
    write(f"{gone} of {event.num_tokens} tokens are given up by every layer and head\n\nwhat half of them keep:\n")
    write(_fragments(llm, found.tokens, keepers * 2 >= event.pairs) + "\n")


def _fragments(llm: LLM, tokens: Sequence[int], kept: Any) -> str:
    """The kept tokens' text, with an ellipsis where others were."""
    parts: list[str] = []
    run: list[int] = []
    for token, stays in zip(tokens, kept, strict=False):  # tokens go on after the event
        if stays:
            run.append(token)
            continue
        if run:
            parts.append(llm.tokenizer.decode(run))
            run = []
        if not parts or parts[-1] != " … ":
            parts.append(" … ")
    return "".join([*parts, llm.tokenizer.decode(run) if run else ""])


def _plain(llm: LLM, found: KvXray) -> dict[str, Any]:
    """What --json prints: of each event and layer and head the tokens kept, by index."""
    events = [
        {
            "num_tokens": event.num_tokens, "layers": event.layers, "counts": event.counts.tolist(),
            "kept": [[np.flatnonzero(head >= KEPT).tolist() for head in layer] for layer in event.states],
            "kept_for_score": [[np.flatnonzero(head == KEPT).tolist() for head in layer] for layer in event.states],
            "keepers": event.keepers.tolist(), "attention_kept": event.attention_kept,
        }
        for event in found.events
    ]  # fmt: skip
    return {
        "text": found.answer.text, "tokens": [llm.tokenizer.decode([token]) for token in found.tokens],
        "token_ids": found.tokens, "num_prompt": found.num_prompt, "cache": found.cache.as_dict(), "events": events,
        "usage": found.answer.usage, "model": llm.info,
    }  # fmt: skip


def write_page(llm: LLM, found: KvXray, name: str) -> None:
    """The picture, whole or not at all."""
    from kvik.cli.xray_kv_html import page
    from kvik.files import atomic_write

    if not found.events:
        raise ParameterError(f"--html has nothing to show: nothing was given up in {len(found.tokens)} tokens")
    pieces = [llm.tokenizer.piece(token) for token in found.tokens]
    text = page(found, pieces, llm.info.name)
    with atomic_write(Path(name)) as file:
        file.write(text.encode(errors="replace"))
    note(f"{name}: open it in a browser")
