"""`kvik eval rate`: a person says which of two answers is better, not knowing which is whose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from kvik.cli.options import Json
from kvik.cli.output import note, print_json, print_table, write
from kvik.errors import DataError, ParameterError
from kvik.params import MAX_SEED

if TYPE_CHECKING:
    from kvik.cli.rating_screen import Keys
    from kvik.evaluation.ratings import Answer, Header, Item, Preference, RatingsFile, RatingsReport

__all__ = ["RateOptions", "rate"]


@dataclass(frozen=True, kw_only=True)
class RateOptions:
    """Who rates what, and where the ratings go."""

    out: Annotated[
        str | None,
        typer.Option(
            "--out", metavar="FILE", show_default=False, help="Where the ratings go, and go on where they end."
        ),
    ] = None
    rater: Annotated[
        str | None,
        typer.Option("--rater", metavar="NAME", show_default=False, help="Who rates; a file is one rater's."),
    ] = None
    prompts: Annotated[
        str | None,
        typer.Option(
            "--prompts", metavar="FILE", show_default=False,
            help='JSON lines with "prompt" or "messages", like those of kvik run --batch.',
        ),
    ] = None  # fmt: skip
    seed: Annotated[
        int | None,
        typer.Option("--seed", metavar="N", show_default="0", help="Decides which answer of an item is shown first."),
    ] = None
    report: Annotated[bool, typer.Option("--report", help="FILES are ratings: say what they say together.")] = False

    def check(self, files: Sequence[str], json: bool) -> None:
        """Raise ParameterError for options that do not go together or are out of range."""
        if self.report:
            for name in ("out", "rater", "prompts", "seed"):
                if getattr(self, name) is not None:
                    raise ParameterError(f"--{name} cannot be with --report, which only reads ratings")
            return
        if json:
            raise ParameterError("--json needs --report: what is rated is shown to a person")
        if len(files) != 2:
            raise ParameterError(f"two files of predictions are compared, got {len(files)}; --report reads ratings")
        for name in ("out", "rater"):
            if not (getattr(self, name) or "").strip():
                raise ParameterError(f"--{name} is needed to rate")
        if self.seed is not None and not 0 <= self.seed <= MAX_SEED:
            raise ParameterError(f"--seed must be in [0, {MAX_SEED}], got {self.seed}")


def rate(
    files: Annotated[
        list[str],
        typer.Argument(metavar="FILES", show_default=False, help="Two files of predictions; with --report, ratings."),
    ],
    options: RateOptions,
    json: Json = False,
) -> None:
    """Rate the answers of two files side by side, blind: which one is whose is not shown.

    One key a judgement: 1 or 2 for the better one, = for equal ones, s to skip, b to go back, q to leave. From a pipe they
    are lines. Each is kept at once; the same command goes on where the ratings end.

    \b
    Examples:
      kvik eval rate a.jsonl b.jsonl --out anna.jsonl --rater anna
      kvik eval rate --report anna.jsonl bo.jsonl
    """
    options.check(files, json)
    if options.report:
        _report(files, json)
    else:
        _rate(files, options)


def _report(files: Sequence[str], json: bool) -> None:
    from kvik.evaluation.ratings import read_ratings, summarize

    found = summarize([read_ratings(name) for name in files])
    if json:
        print_json(found)
    else:
        show_report(found)


def _rate(files: Sequence[str], options: RateOptions) -> None:
    from kvik.cli.rating_screen import Keys
    from kvik.evaluation.predictions import read_samples
    from kvik.evaluation.ratings import Header, RatingsFile, items_of, read_ratings, summarize

    assert options.out is not None and options.rater is not None  # as `check` saw to it
    a, b = (read_samples(name) for name in files)
    prompts = None if options.prompts is None else read_samples(options.prompts, ("prompt", "messages"))
    items, missing = items_of(a, b, prompts)
    if missing:
        note(f"{len(missing)} items are left out, one of their answers is missing; first id {missing[0].id}")
    if not items:
        raise DataError("have no item with two answers", path=" and ".join(files))
    inputs = {
        role: {"name": file.name, "sha256": file.sha256}
        for role, file in (("a", a), ("b", b), ("prompts", prompts))
        if file is not None
    }
    header = Header(options.rater, options.seed or 0, len(items), inputs)
    with RatingsFile(options.out, header) as ratings, Keys() as keys:
        session = _Session(items, ratings, header, keys)
        try:
            finished = session.run()
        except KeyboardInterrupt:
            write("\n")
            session.say_rest(options.out)
            raise
    if finished:
        write("\n")
        show_report(summarize([read_ratings(options.out)]))
    else:
        session.say_rest(options.out)


class _Session:
    """Items one after the other, until all have an answer or the rater leaves."""

    def __init__(self, items: Sequence[Item], ratings: RatingsFile, header: Header, keys: Keys) -> None:
        self._items, self._ratings, self._header, self._keys = items, ratings, header, keys
        self._same = [item.a == item.b for item in items]

    def run(self) -> bool:
        """Whether all have an answer."""
        place = self._next()
        while place is not None:
            if self._same[place]:
                self._ratings.add(self._items[place], "same", "a")
                place = self._next()
                continue
            key = self._ask(place)
            if key == "q":
                return False
            place = self._back(place) if key == "b" else self._next()
        return True

    def _next(self) -> int | None:
        """The first item without an answer."""
        answers = self._ratings.answers
        return next((place for place, item in enumerate(self._items) if item.id not in answers), None)

    def _back(self, place: int) -> int:
        for before in range(place - 1, -1, -1):
            if not self._same[before]:
                return before
        note("this is the first item")
        return place

    def _ask(self, place: int) -> str:
        """Show an item and keep what is said of it; the key."""
        from kvik.cli.rating_screen import LEGEND, show_item
        from kvik.evaluation.ratings import first_is_a

        item = self._items[place]
        first: Answer = "a" if first_is_a(self._header.seed, item.id) else "b"
        second: Answer = "b" if first == "a" else "a"
        judged: dict[str, Answer] = {"1": first, "2": second, "=": "tie", "s": "skip"}
        keys = {answer: key for key, answer in judged.items()}
        before = self._ratings.answers.get(item.id)
        show_item(
            item, first == "a", f"{place + 1} of {len(self._items)}", None if before is None else keys.get(before)
        )
        write(LEGEND)
        key = self._keys.next()
        if key in judged:
            self._ratings.add(item, judged[key], first)
        return key

    def say_rest(self, out: str) -> None:
        left = sum(item.id not in self._ratings.answers for item in self._items)
        note(f"{len(self._items) - left} of {len(self._items)} items are done; the same command goes on in {out}")


def show_report(found: RatingsReport) -> None:
    """Wins, preference and agreement for people."""
    write(f"A: {found.inputs['a']['name']}\nB: {found.inputs['b']['name']}\n\n")
    rows = [_row(name, preference) for name, preference in found.raters.items()]
    if found.together is not None:
        rows.append(_row("together", found.together))
    print_table(
        [["rater", "A wins", "B wins", "ties", "skipped", "share of B", "95 % interval", "p"], *rows], "<>>>>><>"
    )
    whole = found.together or next(iter(found.raters.values()))
    write("\nShare of B: how often B was preferred, a tie is half; p: sign test, without ties.\n")
    if whole.same:
        write(f"{whole.same} of the ties are the same text twice, which nobody was asked about.\n")
    if found.first + found.second:
        write(f"The answer shown first was preferred {found.first} times, the second {found.second} times.\n")
    if found.agreement is not None:
        value = found.agreement.value
        said = "cannot be told" if value is None else f"{value:.4f}"
        write(f"{found.agreement.measure} {said}, over {found.agreement.items} items that at least two have judged.\n")


def _row(name: str, preference: Preference) -> list[str]:
    from kvik.cli.compare_runs import p_text

    share = preference.share_b
    shares = ["-", "-"] if share is None else [f"{share.value:.4f}", f"{share.low:.4f} to {share.high:.4f}"]
    return [
        name, str(preference.a), str(preference.b), str(preference.ties), str(preference.skipped), *shares,
        p_text(preference.p_value),
    ]  # fmt: skip
