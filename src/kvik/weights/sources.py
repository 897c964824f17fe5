"""What a model's source is: which files of a folder make it, what it is called, what it is known by."""

from __future__ import annotations

import os
from pathlib import Path

from kvik.errors import DataError
from kvik.files import open_regular, storage_errors

__all__ = [
    "FOLDER_FILES", "INDEX", "SINGLE", "choose_model", "model_name", "only_model", "refuse_other_files", "source_bytes",
    "source_key",
]  # fmt: skip

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

FOLDER_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)
"""What Kvik reads of a folder beside the safetensors; README.md, for its licence field, is not part of its key."""

_KEY_BYTES = 1 << 16
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_PICKLE_REASON = "is a Python pickle, which can run any code when it is read; Kvik reads safetensors and GGUF"


def has_safetensors(names: list[str]) -> bool:
    """Whether a folder with files of these names holds a model in safetensors."""
    return SINGLE in names or INDEX in names


def only_model(folder: Path) -> Path:
    """A folder's one .gguf file, or the folder itself where it holds safetensors. DataError where it is not one model."""
    with storage_errors(folder):
        names = sorted(entry.name for entry in os.scandir(folder))
    chosen = choose_model(folder, names)
    if chosen is None:
        return folder
    os.close(open_regular(folder / chosen))
    return folder / chosen


def choose_model(where: Path | str, names: list[str]) -> str | None:
    """Of a folder's or repository's file names, the one .gguf file; None where safetensors are the model.

    Raises DataError, naming what there is, where that is not one model.
    """
    found = sorted(name for name in names if name.lower().endswith(".gguf"))
    tensors = has_safetensors(names)
    if found and tensors:
        single = SINGLE if SINGLE in names else INDEX
        some = f"{where}/{found[0]} or {where}/{single}"
        raise DataError(f"holds .gguf and safetensors, name one: {some}", path=where)
    if len(found) == 1:
        return found[0]
    if found:
        message = f"holds {len(found)} .gguf files, name one, as {where}/{found[0]}: {_shown(found)}"
        raise DataError(message, path=where)
    if tensors:
        return None
    if shards := [name for name in names if name.endswith(".safetensors")]:
        message = f"holds {_shown(shards)}, but neither {SINGLE} nor {INDEX}, which would say what they are"
        raise DataError(message, path=where)
    if pickles := [name for name in names if name.lower().endswith(_PICKLES)]:
        message = f"holds no .gguf file and no safetensors, only {pickles[0]}, which {_PICKLE_REASON}"
        raise DataError(message, path=where)
    raise DataError(f"holds no .gguf file and no safetensors, only: {_shown(names) or 'nothing'}", path=where)


def refuse_other_files(path: Path) -> None:
    """DataError for the path of a file that is part of a model, or a pickle."""
    if path.name.lower().endswith(_PICKLES):
        raise DataError(_PICKLE_REASON, path=path)
    if path.name.endswith((".safetensors", ".json")):
        raise DataError(f"is part of a model; give its folder, {path.parent}", path=path)


def model_name(path: Path) -> str:
    """What a source is called where it does not say so itself: a file's stem, a folder's name, a hub folder's id.

    config.json's "_name_or_path" is not asked: it names what a model was made from, or a path of another machine.
    """
    if not path.is_dir():
        return path.stem
    path = path.resolve()
    cached = path.parent.parent.name
    if path.parent.name == "snapshots" and cached.startswith("models--"):  # the hub's cache: models--org--name
        return cached.removeprefix("models--").replace("--", "/")
    return path.name


def source_key(path: Path) -> str:
    """SHA-256, in hexadecimal, of a source's absolute path and the names, sizes, times and ends of its files.

    Of a folder: its safetensors and index and `FOLDER_FILES`, those that are there.
    """
    import hashlib

    key = hashlib.sha256(f"{path}\0".encode("utf-8", "surrogateescape"))
    for file in _files(path) if path.is_dir() else [path]:
        descriptor = open_regular(file)
        with open(descriptor, "rb") as opened:
            status = os.fstat(descriptor)
            name = "" if file == path else f"{file.name}\0"
            key.update(f"{name}{status.st_size}\0{status.st_mtime_ns}\0".encode("utf-8", "surrogateescape"))
            key.update(opened.read(_KEY_BYTES))
            opened.seek(max(0, status.st_size - _KEY_BYTES))
            key.update(opened.read(_KEY_BYTES))
    return key.hexdigest()


def source_bytes(path: Path) -> int:
    """Bytes of a source: its file, or what its folder has of `source_key`'s files."""
    return sum(file.stat().st_size for file in (_files(path) if path.is_dir() else [path]))


def _files(folder: Path) -> list[Path]:
    with storage_errors(folder):
        names = sorted(entry.name for entry in os.scandir(folder))
    if not has_safetensors(names):
        raise DataError(f"is a folder, not a file, and holds neither {SINGLE} nor {INDEX}", path=folder)
    return [folder / name for name in names if name in (*FOLDER_FILES, INDEX) or name.endswith(".safetensors")]


def _shown(names: list[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
