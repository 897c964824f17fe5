"""The page of `kvik xray --kv --html`: the text by how many heads keep each token, and a map of layers, heads and tokens."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

from kvik.cli.output import amount
from kvik.cli.xray_html import ASSETS, document, running, script_of, shown
from kvik.cli.xray_kv_events import Event, name_of
from kvik.params import policy_name

if TYPE_CHECKING:
    from kvik.cli.xray_kv import KvXray

__all__ = ["MOST_CELLS", "page", "shown_events"]

MOST_CELLS = 3_000_000
"""Of all events that are shown, layers x heads x tokens: 5 bytes each before base64."""

_LEGEND = "".join(
    f'<span><i class="s{state}"></i>{told}</span>'
    for state, told in (
        (2, "kept for its score (stronger: better rank)"), (3, "one of the first, always kept"),
        (4, "one of the last, always kept"), (1, "given up here"), (0, "gone before"),
    )
)  # fmt: skip


def page(found: KvXray, pieces: Sequence[bytes], model: str) -> str:
    """The whole page. pieces: bytes of the tokens."""
    chosen = shown_events(found.events)
    title = f"x-ray of the KV cache: {policy_name(found.cache.policy)}, {model}"  # type: ignore[arg-type]
    events = [_event(found.events[at], at) for at in chosen]
    data = {
        "names": [shown(piece) for piece in pieces], "prompt": found.num_prompt, "events": events,
        "all": len(found.events), "unit": name_of(found.cache.policy),  # type: ignore[arg-type]
    }  # fmt: skip
    style = (ASSETS / "page.css").read_text() + (ASSETS / "kv.css").read_text()
    return document(title, _body(found, pieces, model, chosen), data, style, script_of("kv.js"))


def shown_events(events: Sequence[Event]) -> list[int]:
    """Which events the page has: all, or the first, the last and some between, evenly, where they are too much."""
    if not events:
        return []
    largest = max(event.states.size for event in events)
    most = max(1, MOST_CELLS // largest)
    if len(events) <= most:
        return list(range(len(events)))
    return sorted({round(at) for at in np.linspace(0, len(events) - 1, most)})


def _event(event: Event, at: int) -> dict[str, Any]:
    """Arrays as base64, little-endian: states a byte, ranks 16 bits, scores the upper 16 bits of float32."""
    ranks = np.minimum(event.ranks, 65535).astype("<u2")
    scores = (np.ascontiguousarray(event.scores).view(np.uint32) >> 16).astype("<u2")
    return {
        "number": at + 1, "n": event.num_tokens, "layers": event.layers, "heads": event.states.shape[1],
        "attention": event.attention_kept, "states": _base64(event.states), "ranks": _base64(ranks),
        "scores": _base64(scores),
    }  # fmt: skip


def _base64(array: Any) -> str:
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()


def _body(found: KvXray, pieces: Sequence[bytes], model: str, chosen: Sequence[int]) -> str:
    usage, first = found.answer.usage, found.events[chosen[0]]
    kept = usage.kv_tokens_kept
    figures = [
        ("tokens", f"{len(found.tokens)}"), ("kept at the end", f"{kept:.0f}"),
        ("KV at the end", amount(usage.kv_bytes_now)), ("at most", amount(usage.kv_bytes_peak)),
    ]  # fmt: skip
    told = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in figures)
    some = "" if len(chosen) == len(found.events) else f" ({len(chosen)} of {len(found.events)} are in this file)"
    keepers, pairs = first.keepers, first.pairs
    spans = "".join(
        _token(at, piece, float(keepers[at]) / pairs if at < first.num_tokens else 0.0, at >= found.num_prompt)
        for at, piece in enumerate(pieces)
    )
    return f"""<body class="kv">
<header>
<div class="mark"><b>x-ray</b><span>KV cache of {escape(model)}</span><button id="theme" type="button" aria-label="Light or dark" title="Light or dark"></button></div>
<p class="how">{escape(found.cache.text)}</p>
<dl class="figures">{told}</dl>
</header>
<nav class="events" id="events" aria-label="Events">{escape(some)}</nav>
<p class="told" id="told"></p>
<section class="map" aria-label="Layers and heads by tokens">
<div class="bar"><h2>Every layer and head, token by token</h2>
<label>width of a token <select id="zoom"><option value="0">as fits</option><option value="3">3</option><option value="6">6</option><option value="12">12</option></select></label></div>
<div class="frame"><canvas id="labels"></canvas><div class="scroll" id="scroll" tabindex="0" role="region" aria-label="Map, scrolls sideways"><div class="sheet"><canvas id="map"></canvas><i id="column"></i><i id="row"></i></div></div><canvas id="counts"></canvas></div>
<p class="read" id="read" aria-live="polite">Point at the map: layer, head and token are told here.</p>
<div class="legend" aria-hidden="true">{_LEGEND}</div>
</section>
<main>
<section class="reading" aria-label="The text">
<div class="text" id="text" role="listbox" aria-label="Tokens; arrow keys go from one to the next" aria-orientation="horizontal">{spans}</div>
<div class="legend" aria-hidden="true"><span>kept by no head</span><i class="ramp"></i><span>by all</span><span class="other"><u class="answer">underlined</u> was generated</span></div>
</section>
<aside class="panel" id="panel" aria-label="The chosen token"><noscript>The panel of a token needs scripts.</noscript></aside>
</main>
<footer>made by kvik xray; this file is complete: it loads nothing</footer>
</body>"""


def _token(index: int, piece: bytes, share: float, generated: bool) -> str:
    """A token in the running text. Line breaks are shown and made."""
    inner = running(piece)
    classes = "tok answer" if generated else "tok"
    return (
        f'<span class="{classes}" role="option" aria-selected="false" tabindex="-1" data-i="{index}" style="--s:{share:.3f}">'
        f"{inner}</span>"
    )
