"""What people prefer: two answers to each prompt side by side, blind, and what the ratings say together.

A file of ratings is one rater's: a line that says who, of what and in which order, then a line for each answer as it was
given. A later line of the same item takes the place of an earlier one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal, cast, get_args

import numpy as np

from kvik.errors import DataError, ParameterError
from kvik.evaluation.agreement import cohen_kappa, krippendorff_alpha, sign_test
from kvik.evaluation.predictions import Id, Sample, SampleFile, pair
from kvik.evaluation.statistics import LEVEL, Interval, bootstrap_mean
from kvik.files import storage_errors
from kvik.jsonl import LineFile, WithLines, read_entries, shown

__all__ = [
    "Agreement",
    "Answer",
    "Header",
    "Item",
    "Preference",
    "Ratings",
    "RatingsFile",
    "RatingsReport",
    "first_is_a",
    "items_of",
    "read_ratings",
    "summarize",
]

KIND, FORMAT = "kvik ratings", 1

Answer = Literal["a", "b", "tie", "skip", "same"]
"""Which is better; same: both answers are the same text, and nobody was asked."""
_ANSWERS: tuple[Answer, ...] = get_args(Answer)
_SHARE_OF_B: Mapping[Answer, float] = {"a": 0.0, "b": 1.0, "tie": 0.5, "same": 0.5}


@dataclass(frozen=True)
class Item:
    """Two answers to one prompt, which is None where it is not known."""

    id: Id
    prompt: str | None
    a: str
    b: str


def items_of(a: SampleFile, b: SampleFile, prompts: SampleFile | None = None) -> tuple[list[Item], list[Sample]]:
    """The items of two files of predictions, and the samples without one because there is no answer in a or b.

    prompts: requests, like those of `kvik run --batch`: a line without an id has its number for one. Raises DataError where
    ids or numbers do not fit, as `pair` does, and for an item without a prompt.
    """
    asked = {sample.id if sample.named else sample.line: sample.prompt for sample in prompts.samples} if prompts else {}
    found, missing = [], []
    for one, other in pair(a, b):
        id = one.id if one.named else other.id
        if one.prediction is None or other.prediction is None:
            missing.append(one if one.prediction is None else other)
            continue
        prompt = one.prompt if one.prompt is not None else other.prompt
        if prompts is not None:
            if id not in asked:
                raise DataError(f"has no prompt for id {shown(id)} (line {one.line} of {a.name})", path=prompts.name)
            prompt = asked[id]
        found.append(Item(id, prompt, one.prediction, other.prediction))
    return found, missing


def first_is_a(seed: int, id: Id) -> bool:
    """Whether A's answer is shown first: by seed and item alone, so that nothing before it can give it away."""
    return blake2b(f"{seed} {shown(id)}".encode(), digest_size=1).digest()[0] % 2 == 0


@dataclass(frozen=True)
class Header:
    """What the ratings of a file are of. inputs: by role (a, b, prompts): {"name", "sha256"}."""

    rater: str
    seed: int
    items: int
    inputs: Mapping[str, Mapping[str, str]]


@dataclass(frozen=True)
class Ratings:
    """One rater's. answers: the last one of each item; first: which answer was shown first, "a" or "b"."""

    name: str
    header: Header
    answers: Mapping[Id, Answer]
    first: Mapping[Id, str]


class RatingsFile(WithLines):
    """Ratings, appended as they are given; it goes on where they end.

    Raises DataError for a file of other inputs, another rater or seed (named), TryAgainError while another process writes to
    it, StorageError where that is impossible.
    """

    def __init__(self, name: str, header: Header) -> None:
        path = Path(name)
        with storage_errors(path.parent):
            self._file = LineFile(path, "--out")
        try:
            entries = self._file.entries() if self._file.size else ()
            if not entries:
                self._file.cut(0)
                self._file.write({"kind": KIND, "format": FORMAT, **_plain(header)})
                self._ratings = Ratings(name, header, {}, {})
            else:
                self._ratings = _ratings(name, entries)
                _same_header(name, self._ratings.header, header)
            self.answers: dict[Id, Answer] = dict(self._ratings.answers)
        except BaseException:
            self._file.close()
            raise

    def add(self, item: Item, answer: Answer, first: str) -> None:
        """Append an answer. first: "a" or "b"."""
        self._file.write({"id": item.id, "answer": answer, "first": first}, hint="the ratings so far are kept")
        self.answers[item.id] = answer


def _plain(header: Header) -> dict[str, Any]:
    return {**asdict(header), "inputs": {role: dict(given) for role, given in header.inputs.items()}}


def _same_header(name: str, there: Header, now: Header) -> None:
    for what in ("rater", "seed"):
        if getattr(there, what) != getattr(now, what):
            raise DataError(
                f"has ratings with {what} {shown(getattr(there, what))}, not {shown(getattr(now, what))}; name another --out",
                path=name,
            )
    for role in dict.fromkeys((*there.inputs, *now.inputs)):
        one, other = there.inputs.get(role), now.inputs.get(role)
        if one is None or other is None or one["sha256"] != other["sha256"]:
            shown_one, shown_other = (given["name"] if given else "none" for given in (one, other))
            raise DataError(
                f"has ratings of other inputs: {role} was {shown_one}"
                + (f", now it is {shown_other}" if shown_one != shown_other else ", which has changed since")
                + "; name another --out", path=name,
            )  # fmt: skip


def read_ratings(name: str) -> Ratings:
    """A file of ratings; half a last line is left out. Raises DataError naming the line of what is none."""
    return _ratings(name, read_entries(Path(name)).entries)


def _ratings(name: str, entries: Sequence[tuple[int, Mapping[str, Any]]]) -> Ratings:
    if not entries:
        raise DataError("has no ratings: it is empty", path=name)
    header = _header(name, entries[0][1])
    answers: dict[Id, Answer] = {}
    firsts: dict[Id, str] = {}
    for number, entry in entries[1:]:
        id, answer, first = entry.get("id"), entry.get("answer"), entry.get("first")
        if not isinstance(id, str | int) or isinstance(id, bool) or answer not in _ANSWERS or first not in ("a", "b"):
            raise DataError(f"line {number}: is no rating", path=name)
        answers[id], firsts[id] = cast(Answer, answer), first
    return Ratings(name, header, answers, firsts)


def _header(name: str, entry: Mapping[str, Any]) -> Header:
    rater, seed, items, inputs = (entry.get(field) for field in ("rater", "seed", "items", "inputs"))
    if (
        entry.get("kind") != KIND or entry.get("format") != FORMAT or not isinstance(rater, str)
        or not isinstance(seed, int) or not isinstance(items, int) or not isinstance(inputs, dict)
        or not {"a", "b"} <= set(inputs)
        or not all(isinstance(i, dict) and isinstance(i.get("name"), str) and isinstance(i.get("sha256"), str) for i in inputs.values())
    ):  # fmt: skip
        raise DataError("is no file of ratings: its first line does not say who rated what", path=name)
    return Header(rater, seed, items, inputs)


@dataclass(frozen=True)
class Preference:
    """What was preferred.

    Attributes:
        a, b, ties: how often A or B was better, or neither; same texts are ties. same: how many of those.
        skipped: items that were shown and not judged.
        share_b: how often B was preferred, a tie being half; with its interval over items. None where nothing was judged.
        p_value: of the sign test, ties left out.
    """

    a: int
    b: int
    ties: int
    same: int
    skipped: int
    share_b: Interval | None
    p_value: float


@dataclass(frozen=True)
class Agreement:
    """How much raters agree beyond chance, over items whose answers differ; a skipped one has no label of who skipped it.

    Attributes:
        measure: Cohen's kappa for two raters, Krippendorff's alpha for more.
        value: None where it cannot be told. items: those that at least two have judged.
    """

    measure: str
    value: float | None
    items: int


@dataclass(frozen=True)
class RatingsReport:
    """All raters' ratings of the same two files.

    Attributes:
        together: each item by the mean of those who judged it: above a half is won by B, below by A. None for one rater.
        agreement: None for one rater.
        first, second: how often the answer that was shown first, or second, was preferred: how much the place did.
    """

    inputs: Mapping[str, Mapping[str, str]]
    raters: Mapping[str, Preference]
    together: Preference | None
    agreement: Agreement | None
    first: int
    second: int


def summarize(ratings: Sequence[Ratings], *, level: float = LEVEL, seed: int = 0) -> RatingsReport:
    """Everything that files of ratings say. Raises ParameterError for a rater who comes twice, DataError for files whose
    inputs differ."""
    if not ratings:
        raise ParameterError("there are no ratings to report")
    by_rater: dict[str, Ratings] = {}
    for one in ratings:
        rater = one.header.rater
        if rater in by_rater:
            raise ParameterError(f"rater {rater!r} comes twice: in {by_rater[rater].name} and {one.name}")
        by_rater[rater] = one
        _same_inputs(ratings[0], one)
    raters = {rater: _preference([[a] for a in one.answers.values()], level, seed) for rater, one in by_rater.items()}
    placed = [
        one.first[id] == answer for one in ratings for id, answer in one.answers.items() if answer in ("a", "b")
    ]  # fmt: skip
    several = len(ratings) > 1
    ids = dict.fromkeys(id for one in ratings for id in one.answers)
    items = [[one.answers[id] for one in ratings if id in one.answers] for id in ids]
    return RatingsReport(
        ratings[0].header.inputs, raters, _preference(items, level, seed) if several else None,
        _agreement(ratings, list(ids)) if several else None, sum(placed), len(placed) - sum(placed),
    )  # fmt: skip


def _same_inputs(one: Ratings, other: Ratings) -> None:
    for role in ("a", "b"):
        if one.header.inputs[role]["sha256"] != other.header.inputs[role]["sha256"]:
            names = one.header.inputs[role]["name"], other.header.inputs[role]["name"]
            raise DataError(f"{one.name} and {other.name} rate other files: {role} is {names[0]} and {names[1]}")


def _preference(items: Sequence[Sequence[Answer]], level: float, seed: int) -> Preference:
    """items: for each, the answers of those who were shown it."""
    shares = []
    skipped = same = 0
    for answers in items:
        judged = [_SHARE_OF_B[answer] for answer in answers if answer != "skip"]
        skipped += not judged
        same += "same" in answers
        if judged:
            shares.append(sum(judged) / len(judged))
    found = np.array(shares)
    a, b = int((found < 0.5).sum()), int((found > 0.5).sum())
    share = bootstrap_mean(found, level=level, seed=seed) if shares else None
    return Preference(a, b, len(shares) - a - b, same, skipped, share, sign_test(a, b))


def _agreement(ratings: Sequence[Ratings], ids: Sequence[Id]) -> Agreement:
    labels = [
        [answer if (answer := one.answers.get(id)) in ("a", "b", "tie") else None for id in ids] for one in ratings
    ]  # fmt: skip
    judged = [i for i in range(len(ids)) if sum(row[i] is not None for row in labels) > 1]
    if len(ratings) > 2:
        return Agreement("Krippendorff's alpha", krippendorff_alpha(labels), len(judged))
    one, other = ([row[i] for i in judged] for row in labels)
    return Agreement("Cohen's kappa", cohen_kappa(one, other) if judged else None, len(judged))
