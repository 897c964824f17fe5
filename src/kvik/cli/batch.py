"""`kvik run --batch`: a file of requests, their results as they finish."""

from __future__ import annotations

import json as json_module
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import typer

from kvik.cli.answer import encode_prompt, with_seed
from kvik.cli.batch_input import BadLine, Id, Line, id_mark, parse_line, read_live
from kvik.cli.batch_output import Results
from kvik.cli.batch_progress import BatchProgress
from kvik.cli.cache_options import check_prompt
from kvik.cli.input import STDIN
from kvik.cli.output import Interrupt, note, print_json
from kvik.errors import DataError, KvikError, ParameterError
from kvik.jsonl import read_lines
from kvik.params import AnyParams, BeamParams, EngineParams, Grammar

if TYPE_CHECKING:
    from kvik.cli.options import BatchOptions, ModelOptions, SamplingOptions
    from kvik.engine.request import Completion, Request
    from kvik.llm import LLM

__all__ = ["run_batch"]

_INTERRUPTED, _BAD_LINES = 130, 65


def run_batch(
    model: ModelOptions, machine: EngineParams, asked: SamplingOptions | BeamParams, grammar: Grammar | None,
    options: BatchOptions,
    *, raw: bool, system: str | None, json: bool, stats: bool,
) -> None:  # fmt: skip
    """Run every request of the file, and end with the exit code that fits: 0, 65 after bad lines, 130 after Ctrl-C."""
    assert options.batch is not None and options.out is not None
    with _opened(options.batch) as file, Results(options.out, options.resume) as results:
        if results.same_file(file):
            raise ParameterError("--out and --batch are the same file")
        llm = model.load(machine)
        defaults = asked if isinstance(asked, BeamParams) else asked.params(llm.default_params())
        given = {} if isinstance(asked, BeamParams) else asked.given()
        if grammar is not None:
            defaults, given = replace(defaults, grammar=grammar), {**given, "grammar": grammar}
        name = STDIN if options.batch == "-" else options.batch
        batch = _Batch(llm, results, _Asking(defaults, given, raw, system), name, stats)
        total = batch.look_ahead(file) if file.seekable() else None
        with BatchProgress(total) as progress, Interrupt() as interrupt:
            batch.run(file, progress, interrupt)
        results.sync()
        report = batch.report(progress.seconds)
    _tell(report, options, json=json)
    if stats and not json:
        from kvik.cli.stats import print_engine

        print_engine(llm.engine)
    if report["interrupted"] or report["failed"]:
        raise typer.Exit(_INTERRUPTED if report["interrupted"] else _BAD_LINES)


@contextmanager
def _opened(name: str) -> Iterator[IO[bytes]]:
    if name == "-":
        yield sys.stdin.buffer if sys.stdin is not None else BytesIO()
        return
    from kvik.files import open_regular

    with open(open_regular(Path(name)), "rb") as file:
        yield file


def _tell(report: dict[str, Any], options: BatchOptions, *, json: bool) -> None:
    speed = f"{report['generated']} tokens in {report['seconds']:.1f} s, {report['tok_s']:.0f} tokens/s"
    counts = [f"{report['finished']} results"]
    counts += [
        f"{report[name]} {what}"
        for name, what in (("skipped", "already there"), ("failed", "bad lines"))
        if report[name]
    ]
    note(f"{', '.join(counts)} in {options.out}; {speed}")
    if report["interrupted"]:
        kept = report["finished"] + report["skipped"]
        whole = "" if report["requests"] is None else f" of {report['requests']}"
        note(f"Stopped with {kept}{whole} requests finished; the same command with --resume goes on.")
    if json:
        print_json(report)


class _Job(NamedTuple):
    """A request under way. mark: tells it from others."""

    number: int
    id: Id
    mark: int


@dataclass(frozen=True)
class _Asking:
    """What the command line says of all requests. given: its sampling options, see `parse_line`."""

    defaults: AnyParams
    given: Mapping[str, Any]
    raw: bool
    system: str | None

    def context(self, llm: LLM) -> str:
        info = llm.info
        return json_module.dumps([self.raw, self.system, info.digest, info.weights, info.cache.text, info.executor])

    def ids(self, llm: LLM, line: Line) -> list[int]:
        """The prompt's tokens."""
        if isinstance(line.prompt, list):
            if self.system is not None:
                raise ParameterError("--system has no place in a prompt of token ids")
            return line.prompt
        if line.messages is None:
            return encode_prompt(llm, line.prompt or "", self.system, self.raw)
        if self.raw:
            raise ParameterError("messages need the chat template, and --raw leaves it out")
        told = [] if self.system is None else [{"role": "system", "content": self.system}]
        if isinstance(line.messages, list) and any(
            isinstance(m, dict) and m.get("role") == "system" for m in line.messages
        ):
            told = []
        return llm.chat_ids([*told, *line.messages] if told else line.messages)


class _Batch:
    def __init__(self, llm: LLM, results: Results, asking: _Asking, name: str, stats: bool) -> None:
        self.llm, self.results, self.asking, self.name, self.stats = llm, results, asking, name, stats
        self._context = asking.context(llm)
        self._seen: set[int] = set()
        self._lines: int | None = None
        self._finished = self._failed = self._skipped = self._under_way = 0
        self._interrupted = False

    def look_ahead(self, file: IO[bytes]) -> int:
        """Number of requests; with results there, also that they are of these requests, before anything is computed."""
        begun = file.tell()
        self._lines = sum(1 for _ in read_lines(file))
        file.seek(begun)
        if self.results.finished:
            self._compare(file)
            file.seek(begun)
        return self._lines

    def _compare(self, file: IO[bytes]) -> None:
        seen: set[int] = set()
        for number, data in read_lines(file):
            try:
                line = parse_line(number, data, self.asking.defaults, self.asking.given)
            except BadLine:
                continue
            if id_mark(line.id) not in seen:  # a second one is a bad line
                self._is_there(line, line.mark(self._context))
                seen.add(id_mark(line.id))
        others = len(self.results.finished.keys() - seen)
        if others:
            raise DataError(f"has results of {others} requests that {self.name} has not", path=self.results.name)

    def _is_there(self, line: Line, mark: int) -> bool:
        """Whether there is a result already; DataError where that is of another request."""
        there = self.results.finished.get(id_mark(line.id))
        if there is not None and there != mark:
            raise DataError(
                f"has a result for id {line.id!r}, but of another request than line {line.number} of {self.name} "
                "(prompt, parameters, options or model differ); name another --out", path=self.results.name,
            )  # fmt: skip
        return there is not None

    def run(self, file: IO[bytes], progress: BatchProgress, interrupt: Interrupt) -> None:
        """Answer what is to be answered, until the end or Ctrl-C."""

        def stopped() -> bool:
            done = self._finished + self._failed + self._skipped
            progress.update(done, self._skipped + self._failed, self.llm.engine.stats.generated)
            return interrupt.pressed

        try:
            for job, result in self.llm.complete_each(self._requests(file, progress, interrupt), stopped):
                interrupt.gentle = True
                self._under_way -= 1
                if isinstance(result, Exception):
                    self._bad(progress, job.number, job.id, str(result))
                else:
                    self._write(job, result)
        except KeyboardInterrupt:
            self._interrupted = True
        self._interrupted = self._interrupted or interrupt.pressed

    def _requests(
        self, file: IO[bytes], progress: BatchProgress, interrupt: Interrupt
    ) -> Iterator[tuple[_Job, Request] | None]:
        """The requests of the lines that are good and have no result yet. None: no line yet, and others run."""
        lines = read_lines(file) if file.seekable() else read_live(file, lambda: self._under_way > 0)
        while True:
            interrupt.gentle = False  # waiting for a line ends at once
            if interrupt.pressed:
                return
            try:
                following = next(lines)
            except StopIteration:
                return
            finally:
                interrupt.gentle = True  # from here on a Ctrl-C waits for the end of the step, so that no line is torn
            if following is None:
                yield None
                continue
            try:
                line = parse_line(*following, self.asking.defaults, self.asking.given)
                made = self._request(line)
            except BadLine as error:
                self._bad(progress, following[0], error.id, str(error))
                continue
            if made is not None:
                self._under_way += 1
                yield made

    def _request(self, line: Line) -> tuple[_Job, Request] | None:
        """None where there is a result already."""
        id, mark = id_mark(line.id), line.mark(self._context)
        if id in self._seen:
            raise BadLine(f"id {line.id!r} was there before", line.id)
        self._seen.add(id)
        if self._is_there(line, mark):
            self._skipped += 1
            return None
        try:
            ids, cache = self.asking.ids(self.llm, line), line.cache(self.llm.info.cache)
            check_prompt(cache, len(ids), "evict" if line.evicts else "--evict")
            request = self.llm.request(ids, with_seed(line.params), cache=cache)
        except KvikError as error:
            raise BadLine(str(error), line.id) from None
        return _Job(line.number, line.id, mark), request

    def _bad(self, progress: BatchProgress, number: int, id: Id | None, error: str) -> None:
        self._failed += 1
        progress.say(f"kvik: error: {self.name}: line {number}: {error}")
        self.results.write({"id": id, "line": number, "error": error})

    def _write(self, job: _Job, found: Completion) -> None:
        entry = {
            "id": job.id, "line": job.number, "text": found.text, "choices": found.choices, "usage": found.usage,
            "receipt": found.receipt, "request": f"{job.mark:016x}",
        }  # fmt: skip
        self.results.write({**entry, "stats": found.stats} if self.stats else entry)
        self._finished += 1

    def report(self, seconds: float) -> dict[str, Any]:
        """What was done, as plain data."""
        generated = self.llm.engine.stats.generated
        report: dict[str, Any] = {
            "requests": self._lines, "finished": self._finished, "failed": self._failed, "skipped": self._skipped,
            "interrupted": self._interrupted, "seconds": seconds, "generated": generated, "tok_s": generated / seconds,
        }  # fmt: skip
        if self.stats:
            from kvik.cli.stats import engine_report

            report["engine"] = engine_report(self.llm.engine)
        return report
