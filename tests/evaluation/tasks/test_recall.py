"""Recall tasks: the same for a seed, of exact lengths, with one answer in the text; what counts as answered."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from types import SimpleNamespace

import pytest
from evaluation.fake_text_model import BOS, ByteTokens
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st

from kvik.errors import ParameterError
from kvik.evaluation.tasks import (
    TASKS,
    answer_params,
    compared,
    given,
    key_values,
    needle,
    recall_items,
    recalled,
)
from kvik.evaluation.tasks.texts import names

CASES = [("needle", {}), ("needle", {"needles": 5}), ("keys", {}), ("keys", {"lines": 6})]
each_case = pytest.mark.parametrize(("task", "more"), CASES)


@each_case
def test_a_seed_and_a_number_decide_an_item(smollm, task, more) -> None:
    items = recall_items(task, smollm, 6, 400, seed=3, **more)
    assert items == recall_items(task, smollm, 6, 400, seed=3, **more)
    assert items[2:] == recall_items(task, smollm, 4, 400, seed=3, first=2, **more)
    others = recall_items(task, smollm, 6, 400, seed=4, **more)
    assert len({item.prompt for item in items + others}) == 12
    with pytest.raises(FrozenInstanceError):
        items[0].answer = "1"


@each_case
@pytest.mark.parametrize("tokens", [201, 400, 777])
def test_lengths_are_exact_and_the_answer_stands_once(smollm, task, more, tokens) -> None:
    for item in recall_items(task, smollm, 8, tokens, **more):
        text = smollm.decode_bytes(item.prompt).decode()
        assert len(item.prompt) == tokens and text.count(item.answer) == 1 and text.endswith(item.question)
        assert smollm.decode_bytes(item.prompt[slice(*item.fact)]).decode().count(item.answer) == 1
        assert item.answer not in item.question and 0 <= item.depth <= 1
        assert smollm.decode_bytes(item.prompt[item.context_tokens :]).decode() == item.question
        behind = item.prompt[item.fact[0] :]  # the pieces' seams are the text's own
        whole = smollm.encode(smollm.decode_bytes(behind).decode() + f" {item.answer}", add_special=False, first=False)
        assert whole == [*behind, *item.answer_ids]


@settings(deadline=None, max_examples=40)
@drawn(st.sampled_from(CASES), st.integers(600, 2500), st.integers(0, 2**63), st.booleans(), st.integers(1, 3))
def test_lengths_are_exact_for_any_tokens(case, tokens, seed, add_bos, width) -> None:
    task, more = case
    item = TASKS[task](ByteTokens(width, add_bos), tokens, seed=seed, **more)
    assert len(item.prompt) == tokens and (item.prompt[0] == BOS) == add_bos
    assert 0 < item.fact[0] < item.fact[1] <= item.context_tokens < tokens


def test_where_tokens_are_evicted(smollm) -> None:
    item = needle(smollm, 300)
    assert item.at("inside") == 300 and item.at("after") == item.context_tokens < 300
    with pytest.raises(ParameterError, match="question must be one of inside, after, got 'before'"):
        item.at("before")


def test_facts_stand_everywhere(smollm) -> None:
    depths = [item.depth for item in recall_items("needle", smollm, 60, 300)]
    assert min(depths) < 0.15 and max(depths) > 0.85
    assert 0.3 < sum(depths) / len(depths) < 0.7
    lines = [item.depth for item in recall_items("keys", smollm, 60, 300)]
    assert max(lines) - min(lines) > 0.7


def test_the_list_has_as_many_lines_as_asked_for_or_fit(smollm) -> None:
    few = smollm.decode_bytes(key_values(smollm, 600, lines=6).prompt).decode()
    full = smollm.decode_bytes(key_values(smollm, 600).prompt).decode()
    assert few.count(": ") == 6 and full.count(": ") > 30


def test_names_are_all_different_and_the_first_share_no_word() -> None:
    import random

    found = list(names(random.Random(1)))
    assert len(set(found)) == len(found) == 4900
    assert len({word for name in found[:70] for word in name.split()}) == 140


@pytest.mark.parametrize(
    ("task", "tokens", "more", "expected"),
    [
        ("needle", 0, {}, "tokens must be"), ("needle", 30, {}, "1 needles and the question take"),
        ("needle", 300, {"needles": 71}, "needles must be in .1, 70."), ("needle", 300, {"seed": -1}, "seed must be at least 0"),
        ("keys", 20, {}, "1 lines and the question do not fit in a prompt of 20 tokens"),
        ("keys", 60, {"lines": 40}, "40 lines and the question do not fit"), ("keys", 300, {"lines": 0}, "lines must be in .1, 4900."), ("keys", 300, {"digits": 1}, "digits must be in"),
        ("keys", 300, {"lines": True}, "lines must be an integer"), ("needles", 300, {}, "task must be one of needle, keys, got 'needles'; did you mean"),
    ],
)  # fmt: skip
def test_refusals(smollm, task, tokens, more, expected) -> None:
    with pytest.raises(ParameterError, match=expected):
        recall_items(task, smollm, 1, tokens, **more)


# --- scoring


def completion(tokens):
    return SimpleNamespace(choices=(SimpleNamespace(token_ids=tuple(tokens)),))


def test_an_answer_counts_when_all_its_tokens_are_right(smollm) -> None:
    items = recall_items("keys", smollm, 4, 200)
    right = [list(item.answer_ids) for item in items]
    wrong_end, short = [*right[1][:-1], right[1][-1] + 1], right[2][:-1]
    found = recalled(items, [completion(ids) for ids in (right[0], wrong_end, short, right[3])])
    assert found.right == (True, False, False, True) and found.share.value == 0.5
    assert given(items[0], right[0]) and not given(items[0], [*right[0], 5])
    with pytest.raises(ValueError, match="zip"):
        recalled(items, [])
    params = answer_params(items[0])
    assert (params.max_tokens, params.temperature, params.ignore_eos) == (len(right[0]), 0.0, True)


def test_two_caches_are_compared_over_the_same_items(smollm) -> None:
    items = recall_items("keys", smollm, 40, 200)
    answers = [completion(item.answer_ids) for item in items]
    full = recalled(items, answers)
    less = recalled(items, [completion([])] * 10 + answers[10:])
    assert compared(full, full) == ((0.0, 0.0, 0.0), 1.0)
    found = compared(full, less)
    assert found.difference.value == -0.25 and found.difference.high < 0 and found.p < 0.01
