"""The page of `kvik xray --html`: one file that needs nothing else. What models and people wrote is text in it, never code."""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvik.cli.xray_tree import Node, path_of, tree_svg

if TYPE_CHECKING:
    from kvik.decoding.trace import TokenTrace

__all__ = ["ASSETS", "MOST_BITS", "VISIBLE", "document", "page", "running", "script_of", "shown", "surprise"]

ASSETS = Path(__file__).parent / "xray_page"
MOST_BITS = 8.0
"""Surprise from which on a token has the full colour: a probability of 0.4 %."""
VISIBLE = {code: 0x2400 + code for code in range(32)} | {0x7F: 0x2421} | dict.fromkeys(range(0x80, 0xA0), 0xFFFD)
# Marks that turn the direction of writing would reorder the page around them; separators break lines unseen.
VISIBLE |= dict.fromkeys([*range(0x2028, 0x202F), *range(0x2066, 0x206A), 0x200E, 0x200F, 0x061C], 0xFFFD)


def surprise(probability: float) -> float:
    """In bits."""
    return -math.log2(max(probability, 1e-30))


def shown(token: bytes) -> str:
    """A token's text for a label: blanks and line breaks visible, bytes that are no whole UTF-8 in hex."""
    try:
        text = token.decode()
    except UnicodeDecodeError:
        return "⟨" + token.hex(" ") + "⟩"
    text = text.replace("\r\n", "⏎").replace("\n", "⏎").replace("\t", "⇥").translate(VISIBLE)
    return text.replace(" ", "␣") or "∅"


def running(token: bytes) -> str:
    """A token's text as HTML within a running text: its line breaks are shown and made."""
    try:
        text = token.decode()
    except UnicodeDecodeError:
        text = shown(token)
    kept = {code: sign for code, sign in VISIBLE.items() if code not in (9, 10)}
    return escape(text.translate(kept)).replace("\n", '<i class="nl">⏎</i>\n') or '<i class="nl">∅</i>'


def page(
    traces: Sequence[TokenTrace],
    tree: Sequence[Node],
    piece: Callable[[int], bytes],
    facts: Mapping[str, Any],
) -> str:
    """The whole page.

    piece: a token's bytes. facts: model, strategy (a line), temperature, prompt, raw (whether the text goes on from the
    prompt), beams (how many were followed).
    """
    data, body = _data(traces, tree, piece, facts), _body(traces, tree, piece, facts)
    return document(_title(facts), body, data, (ASSETS / "page.css").read_text(), script_of("page.js"))


def script_of(name: str) -> str:
    """A page's script behind what all pages share."""
    return (ASSETS / "nodes.js").read_text() + (ASSETS / name).read_text()


def document(title: str, body: str, data: Any, style: str, script: str) -> str:
    """A file that loads nothing and whose only script is this one. title: plain text; data: what the script reads."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    return f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="referrer" content="no-referrer">
<title>{escape(title)}</title>
<style>
{style}
</style>
{body}
<script type="application/json" id="data">{_json(data)}</script>
<script>{script}</script>
</html>
"""


def _title(facts: Mapping[str, Any]) -> str:
    prompt = " ".join(facts["prompt"].translate(VISIBLE).split())
    return f"x-ray: {prompt[:60]}{'…' if len(prompt) > 60 else ''}"


def _json(value: Any) -> str:
    """JSON that nothing inside can end the script element of."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _round(value: float) -> float:
    return float(f"{value:.4g}")


def _data(
    traces: Sequence[TokenTrace], tree: Sequence[Node], piece: Callable[[int], bytes], facts: Mapping[str, Any]
) -> dict[str, Any]:
    """What the panel draws from. Numbers have four digits, which is more than a picture shows."""
    names: dict[int, int] = {}

    def name(token: int) -> int:
        return names.setdefault(token, len(names))

    tokens = [
        {
            "t": name(one.token_id), "p": _round(one.probability), "rank": one.rank, "h": _round(one.entropy / math.log(2)),
            "n": one.nucleus, "np": one.nucleus_p, "d": _round(one.drawn_probability),
            "stages": [[s.name, s.kept, s.removed, _round(s.mass)] for s in one.stages],
            "best": [
                [name(c.token_id), c.removed_by or "", [_round(share) for share in c.shares]] for c in one.candidates
            ],
            "sweep": [[s.temperature, _round(s.entropy / math.log(2)), s.nucleus, [_round(x) for x in s.shares]] for s in one.sweep],
        }
        for one in traces
    ]  # fmt: skip
    nodes = [
        [name(n.token_id), _round(n.total), None if n.score is None else _round(n.score), path_of(tree, i)]
        for i, n in enumerate(tree)
    ]
    return {
        "temperature": facts["temperature"],
        "names": [shown(piece(token)) for token in names],
        "tokens": tokens,
        "nodes": nodes,
    }


def _body(
    traces: Sequence[TokenTrace], tree: Sequence[Node], piece: Callable[[int], bytes], facts: Mapping[str, Any]
) -> str:
    bits = [surprise(one.probability) for one in traces]
    perplexity = 2 ** (sum(bits) / len(bits)) if bits else float("nan")
    first = sum(one.rank == 1 for one in traces)
    figures = [
        ("tokens", f"{len(traces)}"),
        ("perplexity", f"{perplexity:.1f}"),
        ("took the best token", f"{100 * first / max(1, len(traces)):.0f} %"),
        ("mean entropy", f"{sum(t.entropy for t in traces) / math.log(2) / max(1, len(traces)):.1f} bits"),
    ]
    told = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in figures)
    prompt = escape(facts["prompt"].translate({c: v for c, v in VISIBLE.items() if c not in (9, 10)}))
    before = f'<span class="prompt" role="none">{prompt}</span>' if facts["raw"] else ""
    asked = "" if facts["raw"] else f'<p class="asked"><span>asked</span>{prompt}</p>'
    return f"""<body>
<header>
<div class="mark"><b>x-ray</b><span>{escape(facts["model"])}</span><button id="theme" type="button" aria-label="Light or dark" title="Light or dark"></button></div>
<p class="how">{escape(facts["strategy"])}</p>
<dl class="figures">{told}</dl>
</header>
<main>
<section class="reading" aria-label="The text">
{asked}
<figure class="pulse" id="pulse" aria-hidden="true">
{_pulse(traces)}
<figcaption><span class="key bar"></span>entropy: how open the choice was <span class="key tick"></span>surprise: how improbable the token that came</figcaption>
</figure>
<div class="text" id="text" role="listbox" aria-label="Tokens; arrow keys go from one to the next" aria-orientation="horizontal">{before}{"".join(_token(i, one, piece) for i, one in enumerate(traces))}</div>
<div class="legend" aria-hidden="true"><span>certain</span><i></i><span>0.4 % or less</span><span class="other"><u>underlined</u> was not the most probable</span></div>
</section>
<aside class="panel" id="panel" aria-label="The chosen token"><noscript>The panel of a token needs scripts.</noscript></aside>
</main>
{_beams(tree, piece, facts)}
<footer>made by kvik xray; this file is complete: it loads nothing</footer>
</body>"""


def _token(index: int, one: TokenTrace, piece: Callable[[int], bytes]) -> str:
    """A token in the running text. Line breaks are shown and made."""
    raw = piece(one.token_id)
    inner = running(raw)
    heat = min(1.0, surprise(one.probability) / MOST_BITS)
    classes = "tok" if one.rank == 1 else "tok off"
    label = escape(f"{shown(raw)}, {100 * one.probability:.3g} percent, rank {one.rank}")
    return (
        f'<span class="{classes}" role="option" aria-selected="false" tabindex="-1" data-i="{index}" style="--s:{heat:.3f}" '
        f'aria-label="{label}">{inner}</span>'
    )


def _pulse(traces: Sequence[TokenTrace]) -> str:
    """Entropy as bars and surprise as ticks, a unit of width a token; it is stretched to the width of the text."""
    entropies = [one.entropy / math.log(2) for one in traces]
    bits = [surprise(one.probability) for one in traces]
    most = max([4.0, *entropies, *(min(b, 16.0) for b in bits)])
    count = max(1, len(traces))
    parts = [
        f'<svg viewBox="0 0 {count} 60" preserveAspectRatio="none" class="pulsebars"><rect id="here" x="0" y="0" width="1" height="60"/>'
    ]
    for index, (entropy, surprised) in enumerate(zip(entropies, bits, strict=True)):
        height = 56 * entropy / most
        level = 58 - 56 * min(surprised, most) / most
        parts.append(
            f'<rect class="bar" x="{index + 0.12:.2f}" y="{58 - height:.2f}" width="0.76" height="{height + 1:.2f}"/>'
        )
        parts.append(f'<path class="tick" d="M{index + 0.06:.2f} {level:.2f}h0.88"/>')
    return "".join([*parts, f'</svg><span class="most">{most:.0f} bits</span>'])


def _beams(tree: Sequence[Node], piece: Callable[[int], bytes], facts: Mapping[str, Any]) -> str:
    if not tree:
        return ""
    return f"""<section class="beams" aria-label="Beam search">
<h2>What {facts["beams"]} beams would have said</h2>
<p class="how">A column a step, the most probable beam at the top. Faded: given up. <b>Bold</b>: the answer. A thick edge ends one.</p>
<div class="scroll" tabindex="0" role="region" aria-label="Beam tree, scrolls sideways">
{tree_svg(tree, lambda token: shown(piece(token)))}
</div>
<p class="beam" id="beam" aria-live="polite">Point at a token to read its beam.</p>
</section>"""
