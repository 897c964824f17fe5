"""Stop strings: the same end however the text comes."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvik.errors import ParameterError
from kvik.text.stop import StopChecker


def plain(text: str, stops: list[str]) -> tuple[str, str | None]:
    """The definition: the first end at which the text so far ends with a stop string; the longest of these."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            longest = max(found, key=len)
            return text[: end - len(longest)], longest
    return text, None


def streamed(parts: list[str], stops: list[str]) -> tuple[str, str | None]:
    checker = StopChecker(stops)
    text = ""
    for part in parts:
        emitted, matched = checker.add(part)
        text += emitted
        if matched is not None:
            return text, matched
    return text + checker.finish(), None


few = st.text("ab\n", max_size=6)


@given(parts=st.lists(few, max_size=12), stops=st.lists(st.text("ab\n", min_size=1, max_size=5), max_size=4))
@settings(max_examples=1000, deadline=None)
def test_streaming_is_the_definition(parts: list[str], stops: list[str]) -> None:
    assert streamed(parts, stops) == plain("".join(parts), stops)


@given(
    text=st.text("ab\n", max_size=30), stops=st.lists(st.text("ab\n", min_size=1, max_size=5), min_size=1, max_size=4)
)
@settings(max_examples=300, deadline=None)
def test_exactly_what_may_become_a_stop_string_is_held_back(text: str, stops: list[str]) -> None:
    checker = StopChecker(stops)
    shown = ""
    for at, char in enumerate(text, 1):
        emitted, matched = checker.add(char)
        shown += emitted
        if matched is not None:
            break
        held = max((n for stop in stops for n in range(len(stop)) if text[:at].endswith(stop[:n])), default=0)
        assert shown == text[: at - held]


def test_the_first_completed_counts_and_of_these_the_longest() -> None:
    assert streamed(["xab", "cd"], ["abcd", "bc"]) == ("xa", "bc")
    assert streamed(["xabc"], ["c", "abc", "bc"]) == ("x", "abc")
    assert streamed(["aab"], ["ab"]) == ("a", "ab")


def test_nothing_is_held_back_without_stop_strings() -> None:
    assert StopChecker([]).add("abc") == ("abc", None)


def test_a_match_stays() -> None:
    checker = StopChecker(["."])
    assert checker.add("a.b") == ("a", ".")
    assert checker.add("c") == ("", ".")
    assert checker.finish() == ""


def test_text_held_back_comes_out_in_the_end() -> None:
    checker = StopChecker(["</s>"])
    assert checker.add("hello </") == ("hello ", None)
    assert checker.finish() == "</"
    assert checker.finish() == ""


@pytest.mark.parametrize("stop", [[""], ["a", ""], [1], "ab"])
def test_what_is_no_list_of_strings_is_refused(stop: object) -> None:
    with pytest.raises(ParameterError, match="stop takes a list of strings"):
        StopChecker(stop)  # type: ignore[arg-type]


def test_a_fork_goes_its_own_way() -> None:
    one = StopChecker(["abc", "cd"])
    assert one.add("xab") == ("x", None)
    other = one.fork()
    assert one.add("c") == ("", "abc")
    assert other.add("ad") == ("abad", None) and other.finish() == ""
    third = StopChecker(["abc"])
    third.add("ab")
    assert third.fork().finish() == "ab" and third.add("c").matched == "abc"
