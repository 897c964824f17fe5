"""What this machine is: processor, cores, memory. Linux's own files, limits of containers included."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

__all__ = ["Cores", "Memory", "cores", "memory", "processor"]

_CGROUP = Path("/sys/fs/cgroup")


class Cores(NamedTuple):
    """Cores of the machine, those this process may run on, and how many's worth of time it may take (None: all)."""

    machine: int
    allowed: int
    quota: float | None


class Memory(NamedTuple):
    """Bytes: of the machine or of the container's limit, and what of them is free to use."""

    total: int
    available: int


def processor() -> str:
    """The processor's name."""
    for line in _lines(Path("/proc/cpuinfo")):
        name, _, value = line.partition(":")
        if name.strip() in ("model name", "Hardware"):
            return value.strip()
    return os.uname().machine


def cores() -> Cores:
    """See `Cores`."""
    quota = None
    limit = " ".join(_lines(_CGROUP / "cpu.max")).split()
    if len(limit) == 2 and limit[0] != "max":
        quota = int(limit[0]) / int(limit[1])
    return Cores(os.cpu_count() or 1, len(os.sched_getaffinity(0)), quota)


def memory() -> Memory:
    """See `Memory`."""
    known = {}
    for line in _lines(Path("/proc/meminfo")):
        name, _, value = line.partition(":")
        known[name] = int(value.split()[0]) * 1024
    total, available = known["MemTotal"], known["MemAvailable"]
    limit, used = _number(_CGROUP / "memory.max"), _number(_CGROUP / "memory.current")
    if limit is not None and used is not None and limit < total:
        total, available = limit, min(available, max(0, limit - used))
    return Memory(total, available)


def _number(path: Path) -> int | None:
    text = "".join(_lines(path)).strip()
    return int(text) if text.isdigit() else None


def _lines(path: Path) -> list[str]:
    """The lines of a file of the kernel; none where it does not exist (no container, another kernel)."""
    try:
        return path.read_text().splitlines()
    except FileNotFoundError:
        return []
