"""A run's folder: what was measured, and every sample's scores.

    manifest.json   kind, versions, signatures of the metrics, settings, digests of what was read
    samples.jsonl   a line a sample: {"id", "prediction", "references", "scores": {metric: number or null}, "reasons": {…}}
    report.json     the figures of all samples together, written at the end

Samples are appended as they are made, so a run that was killed has all but its last line.
"""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Self

import kvik
from kvik.errors import DataError, ParameterError
from kvik.evaluation.predictions import Id
from kvik.files import atomic_write, open_regular, storage_errors
from kvik.jsonl import LineFile, parse_object, read_lines, shown

__all__ = ["MANIFEST", "REPORT", "SAMPLES", "Manifest", "Run", "RunSample", "RunWriter", "read_run"]

KIND = "kvik run"
FORMAT = 1
MANIFEST, SAMPLES, REPORT = "manifest.json", "samples.jsonl", "report.json"

_NOTHING: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class Manifest:
    """What makes a run repeatable.

    Attributes:
        metrics: signature by name.
        settings: of the command, by name.
        inputs: by role ("predictions", …): {"name", "sha256"}.
        versions: of what computed it.
    """

    metrics: Mapping[str, str]
    settings: Mapping[str, Any] = field(default_factory=lambda: _NOTHING)
    inputs: Mapping[str, Mapping[str, str]] = field(default_factory=lambda: _NOTHING)
    versions: Mapping[str, str] = field(
        default_factory=lambda: {"kvik": kvik.__version__, "python": platform.python_version()}
    )


@dataclass(frozen=True)
class RunSample:
    """A sample and its scores. scores: None where there is none, and then reasons says why."""

    id: Id
    prediction: str | None
    references: tuple[str, ...] | None
    scores: Mapping[str, float | None]
    reasons: Mapping[str, str] = field(default_factory=lambda: _NOTHING)


@dataclass(frozen=True)
class Run:
    """A run that was read. manifest: None where a samples.jsonl stands alone; torn: half a last line was left out."""

    name: str
    manifest: Manifest | None
    samples: tuple[RunSample, ...]
    torn: bool

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the metrics, in the order of their first scores."""
        return tuple(dict.fromkeys(name for sample in self.samples for name in sample.scores))


class RunWriter:
    """Writes a run into a folder, which is made where it is missing.

    Raises ParameterError where the folder holds a run already, TryAgainError while another process writes one there,
    StorageError where there is no room.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        with storage_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._file = LineFile(folder / SAMPLES, "the samples of a run")
        try:
            self.check(folder)
            with atomic_write(folder / MANIFEST) as file:
                entry = {"kind": KIND, "format": FORMAT, **asdict(_plain(manifest))}
                file.write(json.dumps(entry, ensure_ascii=False, indent=2, allow_nan=False).encode() + b"\n")
        except BaseException:
            self._file.close()
            raise

    @staticmethod
    def check(folder: Path) -> None:
        """Raise ParameterError where the folder holds a run already."""
        samples = folder / SAMPLES
        if samples.exists() and samples.stat().st_size:
            raise ParameterError(f"{folder} holds a run already; name another folder")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._file.sync()
        finally:
            self._file.close()

    def write(self, sample: RunSample) -> None:
        """Append a sample."""
        entry: dict[str, Any] = {
            "id": sample.id, "prediction": sample.prediction,
            "references": None if sample.references is None else list(sample.references), "scores": dict(sample.scores),
        }  # fmt: skip
        self._file.write({**entry, "reasons": dict(sample.reasons)} if sample.reasons else entry)


def _plain(manifest: Manifest) -> Manifest:
    """With dicts, which `asdict` copies, in place of other mappings."""
    inputs = {role: dict(given) for role, given in manifest.inputs.items()}
    return Manifest(dict(manifest.metrics), dict(manifest.settings), inputs, dict(manifest.versions))


def read_run(name: str) -> Run:
    """A run from its folder, or from its samples file; the manifest beside that is read where there is one.

    Half a last line is left out. Raises DataError naming file and line for what is no run, and for an id that comes twice.
    """
    path = Path(name)
    file = path / SAMPLES if path.is_dir() else path
    manifest = file.with_name(MANIFEST)
    beside = file.name == SAMPLES and manifest.exists()
    found = _read_manifest(manifest) if path.is_dir() or beside else None
    samples: list[RunSample] = []
    lines: dict[Id, int] = {}
    torn = False
    for number, data in _lines(file):
        try:
            sample = _sample(parse_object(data))
            if sample.id in lines:
                raise DataError(f"id {shown(sample.id)} is that of line {lines[sample.id]} already")
        except DataError as error:
            if not data.endswith(b"\n"):
                torn = True
                break
            raise DataError(f"line {number}: {error}", path=file) from None
        lines[sample.id] = number
        samples.append(sample)
    return Run(name, found, tuple(samples), torn)


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    with open(open_regular(path), "rb") as file:
        yield from read_lines(file)


def _read_manifest(path: Path) -> Manifest:
    with open(open_regular(path), "rb") as file:
        data = file.read()
    try:
        found = parse_object(data)
        if found.get("kind") != KIND or found.get("format") != FORMAT:
            raise DataError(f'is no manifest of a run: kind must be "{KIND}" and format {FORMAT}')
        for name in ("metrics", "settings", "inputs", "versions"):
            if not isinstance(found.get(name), dict):
                raise DataError(f"{name} must be an object, got {shown(found.get(name))}")
        for name, signature in found["metrics"].items():
            if not isinstance(signature, str):
                raise DataError(f"the signature of {name} must be text, got {shown(signature)}")
    except DataError as error:
        raise DataError(str(error), path=path) from None
    return Manifest(found["metrics"], found["settings"], found["inputs"], found["versions"])


def _sample(found: dict[str, Any]) -> RunSample:
    for name in ("id", "prediction", "references", "scores"):
        if name not in found:
            raise DataError(f'needs "{name}"; it is no sample of a run')
    id, prediction, references, scores = (found[name] for name in ("id", "prediction", "references", "scores"))
    if isinstance(id, bool) or not isinstance(id, str | int):
        raise DataError(f"id must be text or a whole number, got {shown(id)}")
    if not isinstance(prediction, str | None):
        raise DataError(f"prediction must be text or null, got {shown(prediction)}")
    if references is not None and not (isinstance(references, list) and all(isinstance(r, str) for r in references)):
        raise DataError(f"references must be a list of texts or null, got {shown(references)}")
    reasons = found.get("reasons", {})
    if not isinstance(scores, dict) or not all(map(_is_score, scores.values())):
        raise DataError(f"scores must be an object of numbers and nulls, got {shown(scores)}")
    if not isinstance(reasons, dict) or not all(isinstance(reason, str) for reason in reasons.values()):
        raise DataError(f"reasons must be an object of texts, got {shown(reasons)}")
    kept = {name: None if score is None else float(score) for name, score in scores.items()}
    return RunSample(id, prediction, None if references is None else tuple(references), kept, reasons)


def _is_score(value: object) -> bool:
    if value is None:
        return True
    most = sys.float_info.max
    return isinstance(value, int | float) and not isinstance(value, bool) and -most <= value <= most
