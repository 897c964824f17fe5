"""Predictions and their references: files of JSON objects, one a line, paired by id or by order.

A line of predictions has "prediction" or "text" (so results of `kvik run --batch` are predictions as they are), a line of
references has "reference" or "references", text or a list of texts; a file may have both. "id", "prompt" and whatever else
a metric takes by sample may stand beside them.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kvik.errors import DataError
from kvik.files import open_regular
from kvik.jsonl import parse_object, read_lines, shown

__all__ = ["Id", "Sample", "SampleFile", "need_references", "pair", "read_samples", "with_references"]

Id = str | int

PREDICTION, REFERENCE = ("prediction", "text"), ("reference", "references")


@dataclass(frozen=True)
class Sample:
    """One line, or what two lines say together.

    Attributes:
        id: as given, else the number of the sample, from 1.
        line: its number in the file it is read from, from 1.
        prediction: None where there is none: `missing` says why.
        references: None where the file has none.
        prompt: what was asked, where it is there: text, or a conversation's last message.
        fields: all else the line has, by name.
        named: whether the id was given.
    """

    id: Id
    line: int
    prediction: str | None
    missing: str | None
    references: tuple[str, ...] | None
    prompt: str | None
    fields: Mapping[str, Any]
    named: bool


@dataclass(frozen=True)
class SampleFile:
    """A file's samples in order. sha256: of its bytes, in hex."""

    name: str
    samples: tuple[Sample, ...]
    sha256: str

    @property
    def named(self) -> bool:
        """Whether its samples have ids of their own."""
        return bool(self.samples) and self.samples[0].named


def read_samples(name: str, wanted: Sequence[str] = PREDICTION) -> SampleFile:
    """The samples of a file.

    wanted: fields of which each line must have one: PREDICTION, or REFERENCE, or ("prompt", "messages"). Raises DataError
    naming file and line for what is no JSON object, lacks them all, has a field of a wrong type, or an id that was there
    before (both lines said); and for a file without samples.
    """
    found: list[Sample] = []
    lines: dict[Id, int] = {}
    with open(open_regular(Path(name)), "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        file.seek(0)
        for number, data in read_lines(file):
            try:
                sample = _sample(number, len(found) + 1, parse_object(data), wanted)
                if sample.named and sample.id in lines:
                    raise DataError(f"id {shown(sample.id)} is that of line {lines[sample.id]} already")
                if found and sample.named != found[0].named:
                    has, lacks = (number, found[0].line) if sample.named else (found[0].line, number)
                    raise DataError(f"either all lines have an id or none: line {has} has one, line {lacks} has none")
            except DataError as error:
                raise DataError(f"line {number}: {error}", path=name) from None
            lines[sample.id] = number
            found.append(sample)
    if not found:
        raise DataError("has no samples: it is empty", path=name)
    return SampleFile(name, tuple(found), digest)


def pair(first: SampleFile, second: SampleFile) -> Iterator[tuple[Sample, Sample]]:
    """Samples of both that belong together, in the order of `first`: by id where both files have ids, else by order.

    Raises DataError for ids that one of them lacks (how many, and the first) and, by order, for different numbers.
    """
    if not (first.named and second.named):
        if len(first.samples) != len(second.samples):
            raise DataError(
                f"{first.name} has {len(first.samples)} samples and {second.name} {len(second.samples)}; without ids in "
                "both they are paired by order"
            )
        return zip(first.samples, second.samples, strict=True)
    others = {sample.id: sample for sample in second.samples}
    _require_ids(first, {sample.id for sample in first.samples}, second)
    _require_ids(second, set(others), first)
    return ((sample, others[sample.id]) for sample in first.samples)


def _require_ids(there: SampleFile, ids: set[Id], other: SampleFile) -> None:
    missing = [sample for sample in other.samples if sample.id not in ids]
    if missing:
        count = "id is" if len(missing) == 1 else "ids are"
        first = "" if len(missing) == 1 else "first "
        raise DataError(
            f"{len(missing)} {count} in {other.name} only, {first}{shown(missing[0].id)} (line {missing[0].line})",
            path=there.name,
        )


def with_references(predictions: SampleFile, references: SampleFile) -> SampleFile:
    """The predictions with the references of another file, and what its lines say beside them.

    What both say of a sample is taken from the predictions, but the references. Raises DataError as `pair` does.
    """
    joined = [
        replace(
            one, id=one.id if one.named else other.id, references=other.references, fields={**other.fields, **one.fields},
            prompt=other.prompt if one.prompt is None else one.prompt,
        )
        for one, other in pair(predictions, references)
    ]  # fmt: skip
    return replace(predictions, samples=tuple(joined))


def need_references(samples: SampleFile) -> None:
    """Raise DataError naming the first line without references."""
    for sample in samples.samples:
        if sample.references is None:
            raise DataError(f'line {sample.line}: has no "reference" or "references"', path=samples.name)


def _sample(line: int, number: int, found: dict[str, Any], wanted: Sequence[str]) -> Sample:
    id = found.pop("id", None)
    if id is not None and (isinstance(id, bool) or not isinstance(id, str | int)):
        raise DataError(f"id must be text or a whole number, got {shown(id)}")
    missing = _error(found) if "prediction" in wanted else None
    if missing is None and not any(found.get(name) is not None for name in wanted):
        raise DataError(_lacking(found, wanted))
    prediction = _text(found, PREDICTION)
    references = _references(found)
    return Sample(
        number if id is None else id, line, prediction, missing, references, _prompt(found), found, id is not None
    )


def _error(found: Mapping[str, Any]) -> str | None:
    """Why a line of batch results has no text: its request failed."""
    error = found.get("error")
    return f"no prediction: {error}" if isinstance(error, str) and not any(n in found for n in PREDICTION) else None


def _lacking(found: Mapping[str, Any], wanted: Sequence[str]) -> str:
    names = " or ".join(f'"{name}"' for name in wanted)
    null = next((name for name in wanted if name in found), None)
    if null is not None:
        return f"{null} must not be null"
    near = next((name for name in found if difflib.get_close_matches(name, wanted, 1)), None)
    return f"needs {names}" + ("" if near is None else f"; it has {near!r}")


def _text(found: dict[str, Any], names: Sequence[str]) -> str | None:
    """The text of the first of the fields that is there."""
    for name in names:
        value = found.get(name)
        if value is not None:
            if not isinstance(value, str):
                raise DataError(f"{name} must be text, got {shown(value)}")
            del found[name]
            return value
    return None


def _references(found: dict[str, Any]) -> tuple[str, ...] | None:
    there = [name for name in REFERENCE if found.get(name) is not None]
    if not there:
        return None
    if len(there) > 1:
        raise DataError('has both "reference" and "references"; a list may stand in either')
    value = found.pop(there[0])
    several = [value] if isinstance(value, str) else value
    if not isinstance(several, list) or not all(isinstance(text, str) for text in several):
        raise DataError(f"{there[0]} must be text or a list of texts, got {shown(value)}")
    if not several:
        raise DataError(f"{there[0]} must name at least one, got []")
    return tuple(several)


def _prompt(found: Mapping[str, Any]) -> str | None:
    """What was asked: text, or the last message of a conversation."""
    prompt, messages = found.get("prompt"), found.get("messages")
    if isinstance(prompt, str):
        return prompt
    if isinstance(messages, list) and messages and isinstance(messages[-1], dict):
        content = messages[-1].get("content")
        return content if isinstance(content, str) else None
    return None
