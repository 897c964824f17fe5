"""Runs the steps that normalize text and cut it into words, as a vocabulary's file describes them.

A step is a list that JSON can hold: its name, then its arguments.

    normalizers: ["NFC"], ["NFD"], ["NFKC"], ["NFKD"], ["Lowercase"], ["Replace", kind, pattern, content]
    cuts: ["Split", kind, pattern, behavior, invert], ["Digits", one by one], ["Punctuation", behavior]

kind is "Regex" (Oniguruma) or "String"; behavior says which word a match joins: "isolated", "contiguous",
"merged_with_previous" or "merged_with_next". The steps run in `tokenizers`, which models are published with.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from kvik.errors import DataError

__all__ = ["Prefix", "Step", "TextSteps", "Units", "make_cutter", "make_normalizer", "regex_cut"]

Step = Sequence[Any]


class Prefix:
    """Where a vocabulary puts a space in front of text: never; before each text between literal tokens; before those
    that do not begin with one; or before a document that does not begin with one."""

    NONE, EACH, BARE, FIRST = "", "each", "bare", "first"


class Units:
    """What of a SentencePiece text is merged by itself: runs of spaces with what follows, each space with what follows,
    or all of it, where a token holds a space after something else."""

    RUNS, SINGLE, WHOLE = " +[^ ]*|[^ ]+", " [^ ]*|[^ ]+", ""


class TextSteps:
    """From text to the words that are merged, each by itself. Safe to share between threads; made at the first use."""

    def __init__(self, normalizers: Sequence[Step], cuts: Sequence[Step] | None, prefix: str, units: str) -> None:
        """See `kvik.text.vocabulary.Vocabulary`."""
        self._normalizers, self._cuts, self._prefix = normalizers, cuts, prefix
        self._units = re.compile(units) if units else None
        self._normalize: Callable[[str], str] | None = None
        self._cut: Callable[[str], list[str]] | None = None

    def normalized(self, text: str) -> str:
        """Text between two literal tokens, normalized."""
        if self._normalizers:
            if self._normalize is None:
                self._normalize = make_normalizer(self._normalizers)
            text = self._normalize(text)
        return " " + text if text and self._prefix == Prefix.EACH else text

    def words(self, text: str, first: bool) -> list[str]:
        """The words of normalized text. first: it begins the document."""
        wanted = self._prefix == Prefix.BARE or (self._prefix == Prefix.FIRST and first)
        if wanted and not text.startswith(" "):
            text = " " + text
        if self._cuts is None:
            return [text] if self._units is None else self._units.findall(text)
        if self._cut is None:
            self._cut = make_cutter(self._cuts)
        return self._cut(text)


def regex_cut(pattern: str) -> Step:
    """Each match of a regular expression becomes a word of its own, and so does what lies between."""
    return ("Split", "Regex", pattern, "isolated", False)


def make_cutter(steps: Sequence[Step]) -> Callable[[str], list[str]]:
    """A function from text to its words, which join to the text.

    Raises DataError for an expression that is none; the function raises it for one that takes too many steps.
    """
    from tokenizers import pre_tokenizers

    made = pre_tokenizers.Sequence([_cut(*step) for step in steps])

    def cut(text: str) -> list[str]:
        return [word for word, _ in _bounded(made.pre_tokenize_str, text)]

    return cut


def make_normalizer(steps: Sequence[Step]) -> Callable[[str], str]:
    """A function from text to normalized text. Raises as `make_cutter` does."""
    from tokenizers import normalizers

    made = normalizers.Sequence([_normalizer(*step) for step in steps])
    same_for_ascii = all(step[0] in ("NFC", "NFD", "NFKC", "NFKD") for step in steps)

    def normalize(text: str) -> str:
        if same_for_ascii and text.isascii():
            return text
        normalized: str = _bounded(made.normalize_str, text)
        return normalized

    return normalize


def _bounded(function: Callable[[str], Any], text: str) -> Any:
    """Oniguruma gives up after ten million steps at one place, which `tokenizers` reports as a panic."""
    try:
        return function(text)
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise DataError(f"a regular expression of the tokenizer takes too many steps on this text: {error}") from None


def _pattern(kind: str, pattern: str) -> Any:
    from tokenizers import Regex

    if kind == "String":
        return pattern
    try:
        return Regex(pattern)
    except Exception as error:  # `tokenizers` has no exception of its own
        raise DataError(f"the tokenizer's regular expression {pattern[:80]!r} is none: {error}") from error


def _cut(name: str, *arguments: Any) -> Any:
    from tokenizers import pre_tokenizers

    if name == "Split":
        kind, pattern, behavior, invert = arguments
        return pre_tokenizers.Split(_pattern(kind, pattern), behavior, invert)
    return {"Digits": pre_tokenizers.Digits, "Punctuation": pre_tokenizers.Punctuation}[name](*arguments)


def _normalizer(name: str, *arguments: Any) -> Any:
    from tokenizers import normalizers

    if name == "Replace":
        kind, pattern, content = arguments
        return normalizers.Replace(_pattern(kind, pattern), content)
    return getattr(normalizers, name)()
