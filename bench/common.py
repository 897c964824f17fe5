"""What every measurement of bench/ shares: order of the blocks, statistics, child processes, tables."""

from __future__ import annotations

import os
import random
import signal
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from bench import BenchError

RESAMPLES = 10_000
LEVEL = 0.95


class Interval(NamedTuple):
    """A median and the ends of its bootstrap interval."""

    median: float
    low: float
    high: float


def block_orders(names: Sequence[str], blocks: int, seed: int) -> list[list[str]]:
    """Every name once in each of `blocks` blocks, each block in its own random order, the same for the same seed."""
    if blocks < 1:
        raise BenchError(f"--blocks must be at least 1, got {blocks}")
    if len(set(names)) != len(names):
        raise BenchError("a contender is named twice")
    draw = random.Random(seed)
    return [draw.sample(list(names), len(names)) for _ in range(blocks)]


def bootstrap_median(
    values: Sequence[float], *, seed: int = 0, resamples: int = RESAMPLES, level: float = LEVEL
) -> Interval:
    """Median of the values and its percentile-bootstrap interval (Efron 1979): resample blocks with replacement.

    values: one per block, finite. A single value gives an interval of no width, which is no evidence: the report
    prints the number of blocks beside it.
    """
    sample = np.asarray(values, dtype=np.float64)
    if sample.ndim != 1 or sample.size == 0 or not np.isfinite(sample).all():
        raise BenchError(f"the median needs at least one finite value, got {list(values)}")
    rng = np.random.default_rng(seed)
    picks = rng.integers(0, sample.size, (resamples, sample.size))
    low, high = np.quantile(np.median(sample[picks], axis=1), [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(np.median(sample)), float(low), float(high))


def paired_ratios(ours: Mapping[int, float], theirs: Mapping[int, float]) -> list[float]:
    """ours / theirs for each block that has both, in block order."""
    both = sorted(ours.keys() & theirs.keys())
    for block in both:
        if not theirs[block] > 0:
            raise BenchError(f"block {block}: cannot divide by {theirs[block]}")
    return [ours[block] / theirs[block] for block in both]


@dataclass(frozen=True)
class Target:
    """A figure the project wants to reach.

    Attributes:
        text: what is compared, in a few words.
        bound: the figure.
        sense: "at least": the interval's lower end must reach the bound; "at most": its upper end.
        unit: printed behind figures.
    """

    text: str
    bound: float
    sense: Literal["at least", "at most"] = "at least"
    unit: str = ""

    def binding(self, found: Interval) -> float:
        """The end of the interval that decides."""
        return found.low if self.sense == "at least" else found.high

    def met(self, found: Interval) -> bool:
        end = self.binding(found)
        return end >= self.bound if self.sense == "at least" else end <= self.bound


class Verdict(NamedTuple):
    """A target and what was found; `found` is None where it could not be measured, and `note` says why."""

    target: Target
    found: Interval | None
    blocks: int
    note: str = ""


def verdict(target: Target, values: Sequence[float], note: str = "") -> Verdict:
    if not values:
        return Verdict(target, None, 0, note or "not measured")
    return Verdict(target, bootstrap_median(values), len(values), note)


def number(value: float | None) -> str:
    """Three or four significant digits, no exponent in the range that occurs here; a dash for None."""
    if value is None:
        return "–"
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 100:
        return f"{value:.0f}"
    if size >= 10:
        return f"{value:.1f}"
    if size >= 0.1:
        return f"{value:.2f}"
    return f"{value:.3g}"


def spread(found: Interval | None) -> str:
    """ "median (low–high)"."""
    return "–" if found is None else f"{number(found.median)} ({number(found.low)}–{number(found.high)})"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; `|` inside cells is escaped."""
    for row in rows:
        if len(row) != len(header):
            raise BenchError(f"a table row has {len(row)} cells under {len(header)} headings: {list(row)}")
    lines = [list(header), ["---"] * len(header), *map(list, rows)]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def verdict_table(verdicts: Sequence[Verdict]) -> str:
    """Each target with figure, the interval's deciding end, bound, and whether it is met."""
    rows = []
    for target, found, blocks, note in verdicts:
        sign = "≥" if target.sense == "at least" else "≤"
        if found is None:
            figure, end, answer = "–", "–", "not measured"
        else:
            figure = number(found.median) + target.unit
            end = number(target.binding(found)) + target.unit
            answer = "met" if target.met(found) else "**missed**"
        wanted = f"{sign} {number(target.bound)}{target.unit}"
        rows.append([target.text, figure, end, wanted, answer, str(blocks), note])
    return markdown_table(["target", "median", "deciding end (95 %)", "wanted", "", "blocks", "note"], rows)


class Finished(NamedTuple):
    """A child that exited with 0."""

    stdout: str
    stderr: str
    seconds: float
    peak_rss_bytes: int


def run_child(
    argv: Sequence[str | Path], *, env: Mapping[str, str] | None = None, timeout: float = 900, cwd: Path | None = None
) -> Finished:
    """Run a command to its end and take its own peak resident memory from the kernel (wait4).

    The peak counts the largest single process of the command, and pages of mapped files while they are resident. It is
    never below this process's own peak (exec keeps the larger), so whoever measures memory must stay small.
    """
    name = Path(str(argv[0])).name
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        started = time.perf_counter()
        try:
            child = subprocess.Popen(
                [str(part) for part in argv], stdin=subprocess.DEVNULL, stdout=out, stderr=err,
                env={**os.environ, **(env or {})}, cwd=cwd, start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            raise BenchError(f"cannot start {argv[0]}: {error.strerror}") from error
        late = threading.Event()

        def stop() -> None:
            late.set()
            os.killpg(child.pid, signal.SIGKILL)

        timer = threading.Timer(timeout, stop)
        timer.start()
        try:
            _, status, usage = os.wait4(child.pid, 0)
        except BaseException:  # Ctrl-C: the child is in a session of its own and would go on
            os.killpg(child.pid, signal.SIGKILL)
            raise
        finally:
            timer.cancel()
        seconds = time.perf_counter() - started
        child.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        err.seek(0)
        stdout, stderr = out.read().decode(errors="replace"), err.read().decode(errors="replace")
    if child.returncode != 0:
        last = (stderr.strip() or stdout.strip() or "it printed nothing").splitlines()[-1]
        why = f"did not end within {timeout:g} s" if late.is_set() else f"ended with {child.returncode}"
        raise BenchError(f"{name} {why}: {last}\n  command: {' '.join(map(str, argv))}")
    return Finished(stdout, stderr, seconds, usage.ru_maxrss * 1024)


class FirstOutput(NamedTuple):
    """When a command's first visible character came and how it ended."""

    seconds: float
    text: str
    peak_rss_bytes: int


def first_output(
    argv: Sequence[str | Path], *, env: Mapping[str, str] | None = None, timeout: float = 120
) -> FirstOutput:
    """Seconds from starting a process to its first character on stdout that is not white space."""
    with tempfile.TemporaryFile() as err:
        started = time.perf_counter()
        try:
            child = subprocess.Popen(
                [str(part) for part in argv], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=err,
                env={**os.environ, **(env or {})}, start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            raise BenchError(f"cannot start {argv[0]}: {error.strerror}") from error
        timer = threading.Timer(timeout, lambda: os.killpg(child.pid, signal.SIGKILL))
        timer.start()
        try:
            assert child.stdout is not None
            first, text = None, b""
            while part := os.read(child.stdout.fileno(), 1 << 16):
                text += part
                if first is None and text.strip():
                    first = time.perf_counter() - started
            _, status, usage = os.wait4(child.pid, 0)
            child.stdout.close()
        except BaseException:
            os.killpg(child.pid, signal.SIGKILL)
            raise
        finally:
            timer.cancel()
        child.returncode = os.waitstatus_to_exitcode(status)
        err.seek(0)
        stderr = err.read().decode(errors="replace").strip()
    if child.returncode != 0 or first is None:
        last = stderr.splitlines()[-1] if stderr else "no output"
        raise BenchError(f"{Path(str(argv[0])).name} ended with {child.returncode}: {last}")
    return FirstOutput(first, text.decode(errors="replace"), usage.ru_maxrss * 1024)


_SPIN = "while True: pass"


@contextmanager
def foreign_process(python: str | Path) -> Iterator[int]:
    """One process that keeps a core busy while the block runs, by its id; the system decides which core."""
    child = subprocess.Popen([str(python), "-c", _SPIN], stdin=subprocess.DEVNULL, start_new_session=True)
    try:
        time.sleep(0.3)
        if child.poll() is not None:
            raise BenchError(f"the foreign process ended at once with {child.returncode}")
        yield child.pid
    finally:
        child.kill()
        child.wait()


def middle(values: Sequence[float]) -> float:
    """The median of repeats inside one measurement."""
    return float(statistics.median(values))


def drawing() -> Any:
    """matplotlib's pyplot, which draws to files, the same bytes each time."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "kvik"
    from matplotlib import pyplot

    return pyplot
