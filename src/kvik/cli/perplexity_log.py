"""The --out file of `kvik eval perplexity`: what the same command needs to go on where it was stopped.

One JSON object a line: what was asked; then of each model who it is, and the figures of its groups of windows in order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kvik.errors import DataError, ParameterError
from kvik.evaluation.window_scores import GroupScores
from kvik.jsonl import LineFile, WithLines, parse_object

__all__ = ["PerplexityLog"]

_HEAD = {"kvik": "eval perplexity", "format": 1}
_HINT = "what is there is kept; the same command goes on"


class PerplexityLog(WithLines):
    """A file that goes on. A last line that was not finished is dropped.

    Args:
        name: the file's. settings: what was asked, by option; a file that was begun with others is refused.

    Raises ParameterError for other settings, DataError for a file of something else, TryAgainError while another process
    writes to it.
    """

    def __init__(self, name: str, settings: Mapping[str, Any]) -> None:
        self.name = name
        self._file = LineFile(Path(name), "--out")
        try:
            self._models = self._read(settings)
        except BaseException:
            self._file.close()
            raise

    def begin(self, model: int, identity: Mapping[str, Any]) -> Iterator[GroupScores]:
        """What is known of the model's groups. identity: who it is, by what is shown of it; another one is refused."""
        there = self._models.get(model)
        if there is None:
            self._write({"model": model, **identity})
            self._models[model] = dict(identity)
            return iter(())
        for key, value in identity.items():
            if there.get(key) != value:
                raise ParameterError(
                    f"{self.name} was begun with another model: its {key} was {there.get(key)}, now it is {value}; name "
                    "another --out"
                )  # fmt: skip
        return self._groups(model)

    def add(self, model: int, scores: GroupScores) -> None:
        """Keep a group's figures. StorageError when there is no room for them."""
        self._write({"model": model, **scores._asdict()})

    def sync(self) -> None:
        """See to it that they last."""
        self._file.sync()

    def _write(self, entry: Mapping[str, Any]) -> None:
        self._file.write(entry, hint=_HINT)

    def _read(self, settings: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
        """The models that were begun; writes the first line where there is none."""
        models: dict[int, dict[str, Any]] = {}
        begun = False
        for number, entry in self._entries():
            if not begun:
                self._compare(entry, settings)
                begun = True
            elif isinstance(entry.get("model"), int) and "number" not in entry:
                models[entry["model"]] = entry
            elif _scores(entry) is None:
                raise self._wrong(number)
        if not begun:
            self._write({**_HEAD, "settings": settings})
        return models

    def _entries(self) -> Iterator[tuple[int, dict[str, Any]]]:
        end = 0
        with open(self._file.path, "rb") as file:
            for number, data in enumerate(file, 1):
                if not data.endswith(b"\n"):
                    self._file.cut(end)
                    return
                end += len(data)
                try:
                    entry = parse_object(data)
                except DataError:
                    raise self._wrong(number) from None
                yield number, entry

    def _compare(self, entry: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
        there = entry.get("settings")
        if not isinstance(there, dict) or any(entry.get(key) != value for key, value in _HEAD.items()):
            raise self._wrong(1)
        for option, value in settings.items():
            if there.get(option) != value:
                was, now = (", ".join(v) if isinstance(v, list) else v for v in (there.get(option), value))
                raise ParameterError(
                    f"{option}: {self.name} was begun with {_said(was)}, now it is {_said(now)}; name another --out"
                )

    def _groups(self, model: int) -> Iterator[GroupScores]:
        expected = 0
        for number, entry in self._entries():
            if entry.get("model") != model or "number" not in entry:
                continue
            scores = _scores(entry)
            if scores is None or scores.number != expected:
                raise self._wrong(number)
            expected += 1
            yield scores

    def _wrong(self, number: int) -> DataError:
        return DataError(f"line {number} is not of kvik eval perplexity; name another --out", path=self.name)


def _said(value: Any) -> str:
    return "none" if value is None else str(value)


def _scores(entry: Mapping[str, Any]) -> GroupScores | None:
    try:
        segments, positions = (
            tuple((int(at), float(nll)) for at, nll in entry[name]) for name in ("segments", "positions")
        )
        return GroupScores(int(entry["number"]), str(entry["tokens"]), segments, positions)
    except (KeyError, TypeError, ValueError):
        return None
