"""The options of `kvik run` that say how an answer is searched for, and what it has to be."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Annotated

from kvik.cli.naming import flag, naming_options
from kvik.cli.options import SamplingOptions
from kvik.cli.strategy_options import choices, option
from kvik.errors import DataError, ParameterError
from kvik.params import BeamParams, Grammar, beam_params

__all__ = ["BeamOptions", "GrammarOptions"]

BEAM_PANEL, GRAMMAR_PANEL = "Beam search", "Structured output"
_WHEN = {"true": True, "false": False, "never": "never"}


@dataclass(frozen=True, kw_only=True)
class BeamOptions:
    """The fields that only BeamParams has; None is what was not given."""

    num_beams: Annotated[
        int | None,
        option(("--beams", "--num-beams"), "Follow so many beams instead of sampling, 1 to 64; --n best are printed. 1 samples.",
                BEAM_PANEL, "", metavar="N"),
    ] = None  # fmt: skip
    length_penalty: Annotated[
        float | None,
        option("--length-penalty", "A beam's score is its log-probability / length ** X: above 0 favours longer answers.",
                BEAM_PANEL, f"{BeamParams.length_penalty:g}", metavar="X"),
    ] = None  # fmt: skip
    early_stopping: Annotated[
        str | None,
        option("--early-stopping", "true: end when as many answers as beams are finished; false: when a better one is "
                "unlikely; never: when none can come.", BEAM_PANEL, "false", metavar="WHEN",
                autocompletion=choices("true", "false", "never")),
    ] = None  # fmt: skip
    num_beam_groups: Annotated[
        int | None,
        option(("--beam-groups", "--num-beam-groups"), "Groups of beams that diverge, a divisor of --beams.", BEAM_PANEL,
                f"{BeamParams.num_beam_groups}", metavar="N"),
    ] = None  # fmt: skip
    diversity_penalty: Annotated[
        float | None,
        option("--diversity-penalty", "Subtracted for each beam of an earlier group that takes the same token.",
                BEAM_PANEL, f"{BeamParams.diversity_penalty:g}", metavar="X"),
    ] = None  # fmt: skip

    def params(self, sampling: SamplingOptions) -> BeamParams | None:
        """The search, with what the sampling options say of any answer; None without --beams, and with one beam.

        ParameterError names an option that cannot apply.
        """
        given = {f.name: value for f in fields(self) if (value := getattr(self, f.name)) is not None}
        if "early_stopping" in given:
            wanted = given["early_stopping"].lower()
            if wanted not in _WHEN:
                raise ParameterError(f"--early-stopping must be true, false or never, got {self.early_stopping!r}")
            given["early_stopping"] = _WHEN[wanted]
        with naming_options(SamplingOptions, BeamParams):
            if self.num_beams not in (None, 1):
                return beam_params(sampling.given() | given)
            given.pop("num_beams", None)
            if given:
                raise ParameterError(f"{next(iter(given))} needs num_beams above 1")
        return None


@dataclass(frozen=True, kw_only=True)
class GrammarOptions:
    """What the answer has to be: one of the kinds of Grammar."""

    json_schema: Annotated[
        str | None,
        option("--json-schema", "The answer is JSON of this schema: a file, or JSON itself.", GRAMMAR_PANEL, "",
                metavar="FILE"),
    ] = None  # fmt: skip
    regex: Annotated[
        str | None,
        option("--regex", "The whole answer matches this regular expression.", GRAMMAR_PANEL, "", metavar="PATTERN"),
    ] = None
    lark: Annotated[
        str | None,
        option("--lark", "The answer is text of this Lark grammar: a file, or the grammar itself.", GRAMMAR_PANEL, "",
                metavar="FILE"),
    ] = None  # fmt: skip

    def grammar(self, ignore_eos: bool) -> Grammar | None:
        """ParameterError names an option; DataError or StorageError a file. ignore_eos: whether that is given too."""
        given = [(f.name, value) for f in fields(self) if (value := getattr(self, f.name)) is not None]
        if not given:
            return None
        if len(given) > 1:
            raise ParameterError(f"{flag(given[0][0])} and {flag(given[1][0])} exclude each other")
        ((kind, text),) = given
        if ignore_eos:
            raise ParameterError(f"--ignore-eos cannot go with {flag(kind)}: the text ends where the grammar does")
        path = self._path(kind, text)
        if path is not None:
            from kvik.cli.input import read_text

            text = read_text(path)
        with self.naming():
            return Grammar(kind, text)  # type: ignore[arg-type] # the fields are the kinds

    @contextmanager
    def naming(self) -> Iterator[None]:
        """Where a ParameterError is about the grammar, name the option; or the file, which then is bad data."""
        try:
            yield
        except ParameterError as error:
            kind, text = next(((f.name, v) for f in fields(self) if (v := getattr(self, f.name)) is not None), ("", ""))
            if not kind or not str(error).startswith("grammar: "):
                raise
            reason, path = str(error).removeprefix("grammar: "), self._path(kind, text)
            if path is not None:
                raise DataError(reason, path=path) from None
            raise ParameterError(f"{flag(kind)}: {reason}") from None

    @staticmethod
    def _path(kind: str, text: str) -> str | None:
        """The file that is named, if it is one: a schema begins with a brace, a grammar has a colon after a name."""
        itself = {
            "json_schema": text.lstrip().startswith("{") or text.strip() in ("true", "false"),
            "lark": "\n" in text or re.search(r"\bstart\s*:", text) is not None,
        }
        return None if itself.get(kind, True) else text
