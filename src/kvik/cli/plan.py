"""`kvik plan`: what to run, before anything is run."""

from __future__ import annotations

import textwrap
from dataclasses import fields
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvik.cli.options import Json, add_group, add_verb
from kvik.cli.output import note, print_json, print_table, write

if TYPE_CHECKING:
    from kvik.params import AnyParams
    from kvik.planning import DecodingPlan

__all__ = ["register"]

_WIDTH = 100


def register(app: typer.Typer) -> None:
    """Add the verb."""
    group = add_group(app, "plan", plan)
    add_verb(group, "decoding", decoding)


def plan() -> None:
    """Say what to run for a purpose, with reasons, before anything is run."""


def decoding(
    task: Annotated[
        str, typer.Argument(metavar="TASK", show_default=False, help="A task by name, or a sentence that describes it.")
    ],
    json: Json = False,
) -> None:
    """Say how to decode and how to ask for a task: strategy, prompting technique, reasons, parameters, command.

    Tasks: code, translation, maths, "factual QA", summarization, story, dialogue, brainstorming, general. A sentence is
    taken for the one it is nearest to by its words; where none is clear that is said, and "general" is planned for.

    \b
    Examples:
      kvik plan decoding summarization
      kvik plan decoding "Turn our German manuals into English" --json
    """
    from kvik.planning import plan_decoding

    found = plan_decoding(task)
    if json:
        print_json(_report(found))
        return
    if said := _doubt(found):
        note(said)
    _show(found)


def _given(params: AnyParams) -> dict[str, Any]:
    """The fields that are not the default."""
    return {f.name: getattr(params, f.name) for f in fields(params) if getattr(params, f.name) != f.default}


def _report(found: DecodingPlan) -> dict[str, Any]:
    from kvik.planning import STRATEGIES, TECHNIQUES

    advice, strategy = found.advice, STRATEGIES[found.advice.strategy]
    return {
        "task": found.task,
        "reading": found.reading,
        "strategy": {
            "name": advice.strategy, "what": strategy.what, "source": strategy.source, "use": strategy.use,
            "avoid": strategy.avoid, "reason": advice.reason, "otherwise": advice.otherwise,
        },
        "technique": {
            "name": advice.technique, "reason": advice.technique_reason, **TECHNIQUES[advice.technique]._asdict(),
        },
        "params": {"kind": type(advice.params).__name__, **_given(advice.params)},
        "prompt": advice.prompt,
        "command": found.command,
    }  # fmt: skip


def _doubt(found: DecodingPlan) -> str:
    """What there is to say of a sentence that is no task's for sure; empty where it is."""
    reading = found.reading
    if reading.sure:
        return ""
    if reading.nearest is None:
        return f"no word of this is known; planned for {found.task!r}. Tasks: {', '.join(_tasks())}"
    if reading.second is None:
        return f"this is no task; did you mean {reading.nearest!r}? Planned for {found.task!r}"
    return (
        f"not clear: nearest are {reading.nearest!r} ({reading.probability:.0%}) and {reading.second!r}; "
        f"planned for {found.task!r}"
    )


def _tasks() -> tuple[str, ...]:
    from kvik.planning.tasks import TASKS

    return TASKS


def _show(found: DecodingPlan) -> None:
    report, reading = _report(found), found.reading
    strategy, technique = report["strategy"], report["technique"]
    why = f" (by {', '.join(map(repr, reading.because))}; {reading.probability:.0%})" if reading.because else ""
    kind = report["params"].pop("kind")
    lines = [
        ("task", found.task + (why if reading.sure else "")),
        ("strategy", f"{strategy['name']}: {strategy['what']} ({strategy['source']})"),
        ("because", strategy["reason"]),
        ("use it for", strategy["use"]),
        ("avoid it for", strategy["avoid"]),
        *[("or" if i == 0 else "", f"{name}: {when}") for i, (name, when) in enumerate(strategy["otherwise"].items())],
        ("", ""),
        ("ask by", f"{technique['name']}: {technique['how']}"),
        ("because", technique["reason"]),
        ("use it for", technique["use"]),
        ("", ""),
        ("parameters", f"{kind}({', '.join(f'{name}={value!r}' for name, value in report['params'].items())})"),
    ]
    rows = []
    for name, value in lines:
        pieces = textwrap.wrap(value, _WIDTH - 14, break_long_words=False, break_on_hyphens=False) or [""]
        rows += [["" if i else name, piece] for i, piece in enumerate(pieces)]
    print_table(rows, "<<")
    write(f"\n{found.command}\n")
