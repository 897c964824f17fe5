"""`kvik models`: what is in the model store, and what a model file holds."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvik.cli.options import Json, add_group, add_verb, complete_models
from kvik.cli.output import Progress, amount, note, print_json, print_table, write
from kvik.errors import DataError, ParameterError

if TYPE_CHECKING:
    from kvik.weights.store import ModelStore

__all__ = ["register"]

Name = Annotated[
    str,
    typer.Argument(
        metavar="NAME", show_default=False, help="Name in `kvik models list`.", autocompletion=complete_models
    ),
]
Ref = Annotated[
    str,
    typer.Argument(
        metavar="REF",
        show_default=False,
        help="Catalogue name, .gguf file, folder or hub id.",
        autocompletion=complete_models,
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
    from kvik.weights.store import ModelStore

    with Progress() as progress:
        path = ModelStore().resolve(ref, progress).path
    size = path.stat().st_size
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


def show(ref: Ref, json: Json = False) -> None:
    """Show what a model file holds: architecture, tensor types, bytes, context, template, licence, packed forms.

    Nothing is fetched or packed for it.

    \b
    Examples:
      kvik models show smollm2-135m
      kvik models show ./model.gguf --json
    """
    from kvik.weights.store import ModelStore

    store = ModelStore()
    report = _described(store, _local(store, ref))
    if json:
        print_json(report)
        return
    types = ", ".join(f"{name} {t['tensors']} ({amount(t['bytes'])})" for name, t in report["tensor_types"].items())
    packed = ", ".join(f"{form['weights']} ({amount(form['bytes'])})" for form in report["packed"])
    lines = [
        ("name", report["name"]),
        ("file", str(report["path"])),
        ("bytes", f"{amount(report['bytes'])} ({report['bytes']})"),
        ("architecture", report["architecture"]),
        ("parameters", f"{report['parameters'] / 1e6:.1f} million"),
        ("tensors", types),
        ("context", f"{report['context_length']} tokens" if report["context_length"] else None),
        ("chat template", "yes" if report["chat_template"] else "no"),
        ("licence", report["license"]),
        ("packed forms", packed or "none yet"),
    ]
    print_table([[name, value or "not said"] for name, value in lines], "<<")


def _local(store: ModelStore, ref: str) -> Path:
    """The file of a reference that is here already."""
    from kvik.weights.catalogue import find

    name = find(ref, store.catalogue)
    if name is not None and not any(model.name == name and model.bytes for model in store.list()):
        raise ParameterError(f"{name} is not in the store; fetch it with `kvik models pull {name}`")
    return store.resolve(ref).path


def _described(store: ModelStore, path: Path) -> dict[str, Any]:
    from kvik.weights.gguf import read_gguf

    with read_gguf(path) as file:
        known = file.metadata
        types: dict[str, dict[str, int]] = {}
        parameters = 0
        for tensor in file.tensors.values():
            of_type = types.setdefault(tensor.type.name, {"tensors": 0, "bytes": 0})
            of_type["tensors"] += 1
            of_type["bytes"] += tensor.nbytes
            parameters += math.prod(tensor.shape)
        architecture = known.get("general.architecture")
        return {
            "name": known.get("general.name") or path.stem,
            "path": path,
            "bytes": file.size,
            "architecture": architecture,
            "parameters": parameters,
            "tensor_types": types,
            "context_length": known.get(f"{architecture}.context_length"),
            "chat_template": isinstance(known.get("tokenizer.chat_template"), str),
            "license": known.get("general.license") or _catalogue_licence(store, path),
            "packed": _packed(store.folder_for(path)),
        }


def _catalogue_licence(store: ModelStore, path: Path) -> str | None:
    """What the catalogue knows of a file of the store that does not say its licence."""
    name = path.parent.name if path.parent.parent == store.root / "models" else ""
    return store.catalogue[name].licence if name in store.catalogue else None


def _packed(folder: Path) -> list[dict[str, Any]]:
    from kvik.weights.packed import read_packed

    forms = []
    for path in sorted(folder.glob("weights-*.kvik")):
        weights = path.stem.removeprefix("weights-")
        try:
            packed = read_packed(path, verify=False)
        except DataError as error:
            note(f"damaged packed weights are made again when they are needed: {error}")
            continue
        forms.append(
            {"weights": weights, "bytes": path.stat().st_size, "layouts": packed.bytes_by_layout(), "path": path}
        )
    return forms
