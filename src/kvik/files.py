"""Files that are whole or absent: opening what is really a file, writing atomically, locks, space."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from kvik.errors import DataError, StorageError

__all__ = ["atomic_write", "file_lock", "open_regular", "remove", "require_space", "storage_errors", "tree_bytes"]

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_POLL_SECONDS = 0.1


def open_regular(path: Path) -> int:
    """Open a regular file for reading and return its descriptor, which the caller closes.

    Raises DataError for what is missing, unreadable or no regular file. Never blocks on a FIFO or device.
    """
    descriptor = -1
    try:
        _require_regular(path, os.stat(path).st_mode)  # before opening: opening some devices already does something
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        _require_regular(path, os.fstat(descriptor).st_mode)  # it may have been replaced in between
    except FileNotFoundError:
        raise DataError("no such file", path=path) from None
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", path=path) from error
    except ValueError as error:  # a NUL character in the path
        raise DataError(f"cannot be read: {error}", path=repr(os.fspath(path))) from error
    except DataError:
        if descriptor >= 0:
            os.close(descriptor)
        raise
    return descriptor


def _require_regular(path: Path, mode: int) -> None:
    if stat.S_ISREG(mode):
        return
    kinds = (
        (stat.S_ISDIR, "a folder"),
        (stat.S_ISFIFO, "a FIFO"),
        (stat.S_ISSOCK, "a socket"),
        (stat.S_ISCHR, "a device"),
        (stat.S_ISBLK, "a device"),
    )
    kind = next((name for test, name in kinds if test(mode)), "something else")
    raise DataError(f"is {kind}, not a file", path=path)


@contextmanager
def storage_errors(folder: Path, need: int = 0, hint: str = "") -> Iterator[None]:
    """Turn an OSError inside into one StorageError line about `folder`, where `need` bytes are to be written.

    hint: what the user can do beside freeing space or mending permissions.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _NO_SPACE:
            raise StorageError(_no_space(folder, need) + _joined(hint)) from error
        named = error.filename if isinstance(error.filename, str | os.PathLike) else folder
        reason = error.strerror or str(error)
        raise StorageError(f"cannot use {os.fspath(named)}: {reason}{_joined(hint)}") from error


def _no_space(folder: Path, need: int) -> str:
    return f"no space left in {folder}" + (f": {need} bytes are needed" if need else "")


def _joined(hint: str) -> str:
    return f"; {hint}" if hint else ""


def require_space(folder: Path, need: int, hint: str = "") -> None:
    """Raise StorageError, naming folder and bytes, when the file system of an existing folder has less free."""
    import shutil

    free = shutil.disk_usage(folder).free
    if free < need:
        raise StorageError(f"{_no_space(folder, need)}, {free} are free{_joined(hint)}")


@contextmanager
def atomic_write(path: str | os.PathLike[str], *, need: int = 0) -> Iterator[IO[bytes]]:
    """Write a file that appears whole or not at all.

    Yields a binary file open for writing (and seeking); at a clean end its bytes are synced and it replaces `path`,
    after an exception it is gone and `path` is as before. Missing folders are made. need: bytes that will be written,
    checked against the free space first. Raises StorageError for every OSError inside, no space among them.
    What a killed process left behind in the same folder is removed by the next call.
    """
    path = Path(path)
    with storage_errors(path.parent, need):
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(path.parent)
        require_space(path.parent, need)
        temporary, file = _temporary(path.parent)
        try:
            with file:
                yield file
                file.flush()
                os.fsync(file.fileno())
                os.replace(temporary, path)  # while locked, so that nobody takes it for a leftover
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync(path.parent)


def _temporary(folder: Path) -> tuple[Path, IO[bytes]]:
    """A new locked file in the folder. The lock tells a file being written from one that a killed process left."""
    while True:
        path = folder / f".kvik-{os.urandom(8).hex()}.tmp"
        file = open(path, "x+b")  # noqa: SIM115 - the caller closes it
        fcntl.flock(file, fcntl.LOCK_EX)
        if os.fstat(file.fileno()).st_nlink:
            return path, file
        file.close()  # _remove_stale of another process came between the two lines above


def _remove_stale(folder: Path) -> None:
    for path in folder.glob(".kvik-*.tmp"):
        try:
            with open(path, "rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
        except (BlockingIOError, FileNotFoundError, PermissionError):
            continue  # being written, just finished, or another user's


def _sync(folder: Path) -> None:
    """Make a rename in the folder last through a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def file_lock(path: Path, waiting: Callable[[], None]) -> Iterator[None]:
    """Hold the lock file `path` (made when missing, never removed); calls `waiting` about ten times a second before.

    The operating system drops the lock with the process, so a killed holder blocks nobody.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                waiting()
                time.sleep(_POLL_SECONDS)
        yield


def remove(path: Path) -> None:
    """Delete what is at `path`: a file, a link or a whole folder; nothing where there is nothing."""
    import shutil

    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def tree_bytes(folder: Path) -> int:
    """Bytes of the files in a folder and its folders; 0 when it is missing. Links are not followed."""
    total = 0
    for where, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(where, name)).st_size
            except FileNotFoundError:
                continue  # moved or removed by another process meanwhile
    return total
