"""Regular expressions from files: what published tokenizers use passes, what could take forever does not."""

from __future__ import annotations

import time

import pytest

from kvik.errors import DataError
from kvik.text.cutting import make_cutter, make_normalizer, regex_cut
from kvik.text.pretokenizers import PRE_TOKENIZERS
from kvik.text.regex_check import regex_fault


@pytest.mark.parametrize("pattern", sorted({p for pre in PRE_TOKENIZERS.values() for p in pre.patterns}))
def test_those_of_the_models_we_know_pass(pattern: str) -> None:
    assert regex_fault(pattern) is None


@pytest.mark.parametrize(
    "pattern",
    [
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s+(?!\S)|\s",
        r"\d{1,3}(?=(?:\d{3})*\b)",
        r"[\p{Han}]+|[\p{Lu}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{M}&&[^\p{Han}]]+(?i:'s|'t)?",
        r"(?<=\S)\s|(?<digits>[0-9])|[]a]+|[^]a]|\u4e00|\x{4e00}|[[:punct:]]+",
        r"(?:[\r\n])+",
        "a{3}b{2,}?c{,5}",
    ],
)
def test_other_harmless_ones_pass(pattern: str) -> None:
    assert regex_fault(pattern) is None


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("", "expression of 0 characters"),
        ("a" * 9000, "expression of 9000 characters"),
        ("(a+)+$", "repeats what can be read in several ways"),
        ("(a|aa)+$", "repeats what"),
        ("(a|b)*c", "repeats what"),
        ("((a{0,5}){0,5})*", "repeats what"),
        ("(?:a?){30}b", "repeats what"),
        ("(?:x(?:a+))*y", "repeats what"),
        ("a{2,3}+", "repeats what"),
        ("a**", "repeats what"),
        ("*a", r"uses '*a'"),
        ("a**", "repeats what"),
        (r"\s*\s*x", "could take too long: more than one unbounded"),
        ("(?=a*a*b)", "could take too long"),
        ("(?:a*)(?:a+)b", "could take too long"),
        ("a*(?:b|a+c)", "could take too long"),
        ("a{1,999}a+b", "could take too long"),
        ("a?" * 7 + "a", "could take too long"),
        ("(?:a|aa)" * 7 + "b", "could take too long"),
        ("(?:ab?|a)" * 5 + "b", "could take too long"),
        ("a{1,5}" * 3 + "b", "could take too long"),
        ("a{,}", "uses '{,}'"),
        ("{a", "uses '{a'"),
        (r"(a)\1", r"uses '\\1'"),
        (r"(?<n>a)\k<n>", r"uses '\\k<n'"),
        (r"\g<0>", r"uses '\\g<0'"),
        (r"\X", r"uses '\\X'"),
        ("(?~ab)", r"uses '(?~a'"),
        ("(?(1)a|b)", r"uses '(?(1'"),
        ("(?x) # (", r"uses '(?x)'"),
        ("(" * 40 + ")" * 40, r"uses '(((('"),
        ("a)", "a parenthesis too many"),
        ("(a", "a parenthesis too few"),
        ("[a", r"uses '[a'"),
        ("a\\", r"uses '\\'"),
        (r"\p{Nonsense}", "is none"),
        (r"[z-a]", "is none"),
    ],
)
def test_what_could_take_forever_or_is_none_is_refused_at_once(pattern: str, words: str) -> None:
    began = time.monotonic()
    fault = regex_fault(pattern)
    assert fault is not None
    assert words in fault
    assert time.monotonic() - began < 1


def test_what_passes_takes_at_most_quadratic_time() -> None:
    for pattern, text in (
        (r"[\s\S]*\x01", "a" * 20_000),
        (r"\s*[\r\n]x", " " * 20_000),
        ("(?=q*z)q", "q" * 20_000 + "!z"),
    ):
        assert regex_fault(pattern) is None
        began = time.monotonic()
        assert "".join(make_cutter([regex_cut(pattern)])(text)) == text
        assert time.monotonic() - began < 20  # half a second when nothing else runs


def test_what_takes_too_many_steps_on_a_text_is_told() -> None:
    # An expression that would not be let in: how Oniguruma's own limit looks from outside.
    cut = make_cutter([regex_cut("(q+)+$")])
    assert cut("aqq") == ["a", "qq"]
    with pytest.raises(DataError, match="takes too many steps on this text"):
        cut("q" * 40 + "!")
    normalize = make_normalizer([("Replace", "Regex", "(q+)+$", "")])
    assert normalize("aqq") == "a"
    with pytest.raises(DataError, match="takes too many steps on this text"):
        normalize("q" * 40 + "!")


def test_what_is_no_expression_is_named() -> None:
    with pytest.raises(DataError, match=r"regular expression '\(' is none"):
        make_cutter([regex_cut("(")])
