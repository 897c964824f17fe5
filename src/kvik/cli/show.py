"""`kvik models show`: what a model's source holds and how it would run."""

from __future__ import annotations

import textwrap
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from kvik.cli.options import Json, Ref, WeightsOption
from kvik.cli.output import amount, note, plain, print_json, print_table, write
from kvik.errors import DataError, ParameterError

if TYPE_CHECKING:
    from kvik.models.config import ModelConfig, RopeConfig
    from kvik.models.facts import ModelFacts, TemplateFacts, TensorGroup
    from kvik.weights.packed import PackedWeights
    from kvik.weights.store import ModelStore

__all__ = ["show"]

DEFAULT_TOKENS = 2048
_WIDTH = 80
_FORMATS = ("f16", "int8", "k8v4", "int4")
_LAYOUTS = {"vector": "vector (f32)", "unpacked": "not packed", "unreadable": "cannot be read"}


class _Form(NamedTuple):
    """A packed form that is in the store."""

    weights: str
    path: Path
    packed: PackedWeights


def show(
    ref: Ref,
    weights: WeightsOption = "auto",
    quality: Annotated[
        bool, typer.Option("--quality", help="Also run the model: how far this format is from f32 weights.")
    ] = False,
    tokens: Annotated[
        int | None,
        typer.Option(metavar="N", show_default=str(DEFAULT_TOKENS), help="With --quality: predictions to compare."),
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", show_default="the manual inside Python",
            help="With --quality: the text they are of, in UTF-8; - is standard input.",
        ),
    ] = None,
    json: Json = False,
) -> None:  # fmt: skip
    """Show what a model holds: architecture, sizes, tensor types, what runs at which layout, context, template, licence.

    Nothing is fetched or packed for it, unless --quality runs the model.

    \b
    Examples:
      kvik models show smollm2-135m
      kvik models show ./folder --weights int8 --json
      kvik models show smollm2-135m --weights int4 --quality
    """
    from kvik.models.facts import read_facts
    from kvik.weights.layouts import parse_weights
    from kvik.weights.store import ModelStore

    for name, value in (("--tokens", tokens), ("--text", text)):
        if value is not None and not quality:
            raise ParameterError(f"{name} needs --quality, which runs the model")
    kept, store = parse_weights(weights), ModelStore()
    path = _local(store, ref)
    found = None
    if quality:
        from kvik.cli.quality import measure, print_quality

        # the model is packed for it, after which the rounding errors of the tensors are known
        found = measure(path, kept, store, DEFAULT_TOKENS if tokens is None else tokens, text)
    forms = _packed_forms(store.folder_for(path))
    errors = next((form.packed.notes["largest_error"] for form in forms if form.weights == kept), None)
    facts = read_facts(path, kept, errors)
    report = _report(store, facts, forms)
    if json:
        print_json(report if found is None else {**report, "quality": found})
        return
    _print(report, facts)
    if found is not None:
        print_quality(found)


def _local(store: ModelStore, ref: str) -> Path:
    """The source of a reference that is here already."""
    from kvik.weights.catalogue import find

    name = find(ref, store.catalogue)
    if name is not None and not any(model.name == name and model.bytes for model in store.list()):
        raise ParameterError(f"{name} is not in the store; fetch it with `kvik models pull {name}`")
    return store.resolve(ref).path


def _packed_forms(folder: Path) -> list[_Form]:
    from kvik.weights.packed import read_packed

    forms = []
    for path in sorted(folder.glob("weights-*.kvik")):
        try:
            forms.append(_Form(path.stem.removeprefix("weights-"), path, read_packed(path, verify=False)))
        except DataError as error:
            note(f"damaged packed weights are made again when they are needed: {error}")
    return forms


def _report(store: ModelStore, facts: ModelFacts, forms: list[_Form]) -> dict[str, Any]:
    """What --json prints: the facts, and what the store knows beside them."""
    packed = [
        {"weights": weights, "bytes": path.stat().st_size, "layouts": form.bytes_by_layout(), "path": path}
        for weights, path, form in forms
    ]
    context = facts.config.context_length if facts.config else None
    kv = kv_bytes(facts.config) if facts.config else None
    licence = facts.license or _catalogue_licence(store, facts.path)
    return {**plain(facts), "license": licence, "context_length": context, "packed": packed, "kv": kv}


def _catalogue_licence(store: ModelStore, path: Path) -> str | None:
    """What the catalogue knows of a file of the store that does not say its licence."""
    name = path.parent.name if path.parent.parent == store.root / "models" else ""
    return store.catalogue[name].licence if name in store.catalogue else None


def _print(report: dict[str, Any], facts: ModelFacts) -> None:
    packed = [f"{form['weights']} ({amount(form['bytes'])}) in {form['path']}" for form in report["packed"]]
    runs = f"family {facts.family}" if facts.family else "nothing here"
    lines = [
        ("name", facts.name),
        ("source", str(facts.path)),
        ("bytes", f"{amount(facts.bytes)} ({facts.bytes})"),
        ("architecture", f"{facts.architecture or 'not said'}, run by {runs}"),
        ("refused", facts.refused),
        ("parameters", f"{facts.parameters / 1e6:.1f} million"),
        *(_sizes(facts.config) if facts.config else ()),
        *_text_side(facts),
        ("licence", report["license"] or ("not said" if facts.config else None)),
        *[("packed forms" if i == 0 else "", form) for i, form in enumerate(packed or ["none yet"])],
    ]
    rows = []
    width = _WIDTH - max(len(name) for name, _ in lines) - 2
    for name, value in lines:
        if value is not None:
            pieces = textwrap.wrap(value, width, break_long_words=False, break_on_hyphens=False)
            rows += [["" if i else name, piece] for i, piece in enumerate(pieces)]
    print_table(rows, "<<")
    write("\n")
    _print_groups(facts)


def _sizes(c: ModelConfig) -> list[tuple[str, str | None]]:
    experts = f"{c.experts_used} of {c.num_experts} experts" if c.num_experts else None
    attention = f"{c.num_heads} heads of {c.head_size}, {c.num_kv_heads} of keys and values"
    feed_forward = f"{c.intermediate_size} wide" + (f", {experts} a token" if experts else "")
    return [
        ("layers", f"{c.num_layers}, {c.hidden_size} wide"),
        ("attention", attention + ("; queries and keys normalized" if c.qk_norm else "")),
        ("feed-forward", feed_forward),
        ("windows", _windows(c)),
        ("positions", _positions(c)),
        ("context", f"{c.context_length} tokens"),
        *_caches(c),
    ]


def _caches(c: ModelConfig) -> list[tuple[str, str | None]]:
    """Bytes of keys and values in the usual formats."""
    return [
        (
            f"KV in {one['kv']}",
            f"{amount(one['token_bytes'])} a token, {amount(one['context_bytes'])} for the whole context",
        )
        for one in kv_bytes(c)
    ]


def kv_bytes(c: ModelConfig) -> list[dict[str, Any]]:
    """Of each usual format that the model can have: bytes of a token in the long run, and of a sequence as long as the context."""
    from kvik.cache.layout import kv_layout

    kinds = [kv for kv in _FORMATS if c.head_size % 2 == 0 or not kv.endswith("4")]
    layouts = [(kv, kv_layout(c, kv)) for kv in kinds]
    return [
        {"kv": kv, "token_bytes": layout.token_bytes, "context_bytes": layout.bytes_at(c.context_length)}
        for kv, layout in layouts
    ]


def _windows(c: ModelConfig) -> str | None:
    """How many layers see how much; None where all see all."""
    counts = Counter(window for window in c.windows if window is not None)
    if not counts:
        return None
    parts = [f"{size} tokens in {count} of {c.num_layers} layers" for size, count in counts.items()]
    return ", ".join(parts) + ("" if counts.total() == c.num_layers else ", the others see all")


def _positions(c: ModelConfig) -> str:
    if c.rope is None:
        return "learned"
    local = f"; {_rope(c.rope_local)} in layers with a window" if c.rope_local else ""
    return f"rotary, {_rope(c.rope)}{local}"


def _rope(rope: RopeConfig) -> str:
    scaled = "" if rope.kind == "default" else f", {rope.kind} scaling by {rope.factor:g}"
    return f"base {rope.theta:.10g}{scaled}" + (", divisors from the file" if rope.divisors else "")


def _text_side(facts: ModelFacts) -> list[tuple[str, str | None]]:
    c = facts.config
    if c is None:
        return []
    defaults = [f"{name} {value:g}" for name, value in facts.defaults.items()]
    unused = f"not followed: {', '.join(facts.unused_defaults)}" if facts.unused_defaults else None
    rows = "" if c.vocab_size == facts.vocabulary else f", weights for {c.vocab_size}"
    head = "the embedding's weights" if c.tied_embeddings else "weights of its own"
    return [
        ("vocabulary", f"{facts.vocabulary} tokens{rows}; the output head has {head}"),
        ("chat template", _template(facts.chat_template)),
        ("defaults", "; ".join(filter(None, (", ".join(defaults), unused))) or "none of its own"),
    ]


def _template(template: TemplateFacts | None) -> str:
    if template is None:
        return "none"
    first = textwrap.shorten(template.first_line, 60, placeholder="…") or template.first_line[:59] + "…"
    if template.refused:
        return f"cannot be used: {template.refused}; begins {first}"
    return f"{', '.join(template.roles) or 'no role at all'}; begins {first}"


def _print_groups(facts: ModelFacts) -> None:
    if facts.refused and facts.config is None:
        rows = [[group.type, str(group.tensors), amount(group.bytes)] for group in facts.groups]
        print_table([["type", "tensors", "in the file"], *rows], "<>>")
        return
    rows = [
        [
            group.type, str(group.tensors), amount(group.bytes), _LAYOUTS.get(group.layout or "", group.layout or ""),
            amount(group.packed_bytes) if group.packed_bytes else "-", _rounding(group),
        ]
        for group in facts.groups
    ]  # fmt: skip
    count, held = sum(group.tensors for group in facts.groups), sum(group.bytes for group in facts.groups)
    whole = "-" if facts.packed_bytes is None else amount(facts.packed_bytes)
    rows.append(["together", str(count), amount(held), "", whole, ""])
    header = ["type", "tensors", "in the file", f"as {facts.weights}", "packed", "largest rounding error"]
    print_table([header, *rows], "<>><><")


def _rounding(group: TensorGroup) -> str:
    if not group.packed_bytes:
        return "-"
    if group.exact is None:
        return "seen when packed"
    return "exact" if group.exact else f"{group.largest_error:.2g}"
