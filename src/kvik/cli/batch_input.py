"""Lines of a --batch file: read one by one, each checked by itself."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from hashlib import blake2b
from queue import Empty, Queue
from threading import Thread
from types import MappingProxyType
from typing import IO, Any

from kvik.cli.naming import flag
from kvik.errors import DataError, KvikError, ParameterError
from kvik.jsonl import parse_object, read_lines, shown
from kvik.params import (
    AnyParams,
    BeamParams,
    CacheParams,
    SamplingParams,
    any_params,
    beam_params,
    json_biases,
    json_cache,
)

__all__ = ["BadLine", "Line", "id_mark", "parse_line", "read_live"]

_LINES_AHEAD = 64
_SAMPLING = tuple(f.name for f in fields(SamplingParams))
_SEARCH = tuple(f.name for f in fields(BeamParams))
_PARAMS = tuple(dict.fromkeys((*_SAMPLING, *_SEARCH)))
_FIELDS = ("id", "prompt", "messages", "preset", "kv", "evict", *_PARAMS)

Id = str | int


class BadLine(DataError):
    """A line that is no request. id: where it has one."""

    def __init__(self, message: str, id: Id | None = None) -> None:
        super().__init__(message)
        self.id = id


@dataclass(frozen=True)
class Line:
    """A request as it was written. prompt: text, token ids, or None where messages is the conversation."""

    number: int
    id: Id
    prompt: str | list[int] | None
    messages: list[dict[str, Any]] | None
    params: AnyParams
    kv: Any = None
    evict: Any = None

    def cache(self, base: CacheParams) -> CacheParams:
        """How its keys and values are kept, where those of lines that do not say are `base`."""
        return json_cache(self.kv, self.evict, base) or base

    @property
    def evicts(self) -> bool:
        """Whether it says itself what is evicted."""
        return self.evict is not None or (isinstance(self.kv, dict) and "policy" in self.kv)

    def mark(self, context: str) -> int:
        """64 bits that tell this request from others. context: what it was asked of, and how."""
        asked = [self.prompt, self.messages, asdict(self.params), context]
        cache = [self.kv, self.evict]
        return _mark(json.dumps(asked if cache == [None, None] else [*asked, cache], sort_keys=True))


def id_mark(id: Id) -> int:
    """64 bits instead of an id, so that millions of them take little memory. 3 and "3" are two ids."""
    return _mark(json.dumps(id))


def _mark(text: str) -> int:
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest())


def read_live(file: IO[bytes], busy: Callable[[], bool]) -> Iterator[tuple[int, bytes] | None]:
    """`read_lines` of a pipe that may stay open: None where no line is there yet while `busy`, else it waits for one.

    A thread reads up to 64 lines ahead of the taker. It has a reader of its own: at exit Python could not close that of
    `file` while the thread waits in it.
    """
    ahead: Queue[tuple[int, bytes] | Exception | None] = Queue(_LINES_AHEAD)

    def read() -> None:
        try:
            with open(file.fileno(), "rb", closefd=False) as own:
                for found in read_lines(own):
                    ahead.put(found)
            ahead.put(None)
        except Exception as error:
            ahead.put(error)

    Thread(target=read, name="kvik-batch-lines", daemon=True).start()
    while True:
        try:
            found = ahead.get(block=not busy())
        except Empty:
            yield None
            continue
        if found is None:
            return
        if isinstance(found, Exception):
            raise found
        yield found


def parse_line(number: int, data: bytes, defaults: AnyParams, given: Mapping[str, Any] = MappingProxyType({})) -> Line:
    """The request of a line. BadLine says what is wrong with it.

    given: of defaults to sample by, what the command line said, by the names of SamplingParams. A line with num_beams
    above 1 is a beam search by these and its own fields; the rest of defaults is about sampling.
    """
    try:
        found = parse_object(data)
    except DataError as error:
        raise BadLine(str(error)) from None
    id = found.pop("id", number)
    if isinstance(id, bool) or not isinstance(id, str | int):
        raise BadLine(f"id must be text or a whole number, got {shown(id)}")
    try:
        return _request(number, id, found, defaults, given)
    except KvikError as error:
        raise BadLine(str(error), id) from None


def _request(number: int, id: Id, found: dict[str, Any], defaults: AnyParams, given: Mapping[str, Any]) -> Line:
    for name in found:
        if name not in _FIELDS:
            near = difflib.get_close_matches(name, _FIELDS, 1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(_FIELDS)}"
            raise BadLine(f"unknown field {name!r}{hint}")
    if ("prompt" in found) == ("messages" in found):
        raise BadLine("needs either prompt or messages")
    prompt, messages = found.pop("prompt", None), found.pop("messages", None)
    if messages is None and not (isinstance(prompt, str) or (isinstance(prompt, list) and all(map(_is_id, prompt)))):
        raise BadLine(f"prompt must be text or a list of token ids, got {shown(prompt)}")
    if not prompt and messages is None:
        raise BadLine("the prompt is empty")
    kv, evict = found.pop("kv", None), found.pop("evict", None)
    line = Line(number, id, prompt, messages, _params(found, defaults, given), kv, evict)
    line.cache(CacheParams())  # what is wrong whatever the command line says
    return line


def _params(found: dict[str, Any], defaults: AnyParams, given: Mapping[str, Any]) -> AnyParams:
    if "logit_bias" in found:
        found["logit_bias"] = json_biases(found["logit_bias"])
    beams = found.get("num_beams", 1)
    one = beams == 1 and not isinstance(beams, bool)
    if isinstance(defaults, BeamParams):
        if "num_beams" in found and one:
            raise ParameterError("num_beams 1 is sampling, and --beams makes every line a beam search")
        return beam_params(found, defaults)
    return any_params(found, defaults) if one else _search(found, given)


def _search(found: dict[str, Any], given: Mapping[str, Any]) -> BeamParams:
    """The search of a line under what the command line said, which is named as options are."""
    if "num_return_sequences" in found and "n" not in found:
        given = {name: value for name, value in given.items() if name != "n"}
    try:
        return beam_params({**given, **found})
    except ParameterError as error:
        name, _, rest = str(error).partition(" ")
        if name in given and name not in found:
            raise ParameterError(f"{flag(name)} {rest}") from None
        raise


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
