"""`kvik models`: what is in the model store. `show` has a file of its own."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from kvik.cli.options import Json, Ref, add_group, add_verb, complete_models
from kvik.cli.output import Progress, amount, note, print_json, print_table, write
from kvik.cli.show import show

__all__ = ["register"]

Name = Annotated[
    str,
    typer.Argument(
        metavar="NAME", show_default=False, help="Name in `kvik models list`.", autocompletion=complete_models
    ),
]


def register(app: typer.Typer) -> None:
    """Add the verbs."""
    group = add_group(app, "models", _group)
    for name, verb in (("list", list_models), ("pull", pull), ("show", show), ("rm", remove)):
        add_verb(group, name, verb)


def _group() -> None:
    """List, fetch, show and remove models.

    The store is $KVIK_HOME, else $XDG_CACHE_HOME/kvik, else ~/.cache/kvik.
    """


def list_models(json: Json = False) -> None:
    """List the models of the store and the catalogue.

    \b
    Examples:
      kvik models list
      kvik models list --json
    """
    from kvik.weights.store import ModelStore

    store = ModelStore()
    stored = {model.name: model for model in store.list()}
    rows: list[dict[str, Any]] = []
    for name in [*store.catalogue, *(name for name in stored if name not in store.catalogue)]:
        model, entry = stored.get(name), store.catalogue.get(name)
        rows.append(
            {
                "name": name,
                "path": model.path if model else None,
                "bytes": model.bytes if model else 0,
                "packed_bytes": model.packed_bytes if model else 0,
                "description": entry.description if entry else None,
                "license": entry.licence if entry else None,
            }
        )
    if json:
        print_json({"root": store.root, "models": rows})
        return
    cells = [[r["name"], _held(r["bytes"]), _held(r["packed_bytes"]), r["description"] or str(r["path"])] for r in rows]
    print_table([["name", "file", "packed", "what it is"], *cells], "<>><")
    note(f"The store is {store.root}")


def _held(count: int) -> str:
    return amount(count) if count else "-"


def pull(ref: Ref, json: Json = False) -> None:
    """Fetch a model into the store, unless it is there.

    \b
    Examples:
      kvik models pull smollm2-135m
    """
    from kvik.weights.sources import source_bytes
    from kvik.weights.store import ModelStore

    with Progress() as progress:
        path = ModelStore().resolve(ref, progress).path
    size = source_bytes(path)
    if json:
        print_json({"ref": ref, "path": path, "bytes": size})
    else:
        write(f"{path}\n")
        note(f"{ref} is here, {amount(size)}")


def remove(name: Name, json: Json = False) -> None:
    """Remove a model from the store, with everything that was packed from it. Files outside the store stay.

    \b
    Examples:
      kvik models rm smollm2-135m
    """
    from kvik.weights.store import ModelStore

    freed = ModelStore().remove(name)
    if json:
        print_json({"name": name, "freed_bytes": freed})
    else:
        write(f"{name} is removed, {amount(freed)} are free again\n")
