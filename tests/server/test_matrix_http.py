"""Every strategy over HTTP: whole, streamed and beside others it says what the library says, or is refused by name."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from server.conftest import NAMED, events
from test_matrix import MORE, STRATEGIES, params_of

from kvik.params import Grammar

PATH, PROMPT = "/v1/completions", "The three things I like most are"
FEATURES: dict[str, dict[str, Any]] = {
    "alone": {},
    "n": {"n": 2},
    "stop strings": {"stop": [" and", "e ", "."]},
    "logprobs": {"logprobs": 2},
    "grammar": {"grammar": {"kind": "regex", "text": "[a-z]{3,8}(, [a-z]{3,8}){2,4}"}, "ignore_eos": False},
    "processed logprobs": {"logprobs": 2, "logprobs_mode": "processed"},
}
REFUSED = {(strategy, "processed logprobs"): "logprobs_mode" for strategy in ("beam 4", "beam groups")}
MATES = tuple((PATH, {**NAMED, "prompt": f"{i} more:", "max_tokens": 12, "seed": i}) for i in range(3))


def asked(strategy: str, feature: str) -> dict[str, Any]:
    """The body of a cell."""
    own = (STRATEGIES | MORE)[strategy]
    seed = {} if "num_beams" in own else {"seed": 5}
    wanted = {"max_tokens": 12, "ignore_eos": True} | seed | own | FEATURES[feature]
    if "logit_bias" in wanted:
        wanted["logit_bias"] = {str(token): bias for token, bias in wanted["logit_bias"].items()}
    return {**NAMED, "prompt": PROMPT, **wanted}


def in_library(body: dict[str, Any]) -> Any:
    fields = {name: value for name, value in body.items() if name not in ("model", "prompt")}
    if "logit_bias" in fields:
        fields["logit_bias"] = {int(token): bias for token, bias in fields["logit_bias"].items()}
    if "grammar" in fields:
        fields["grammar"] = Grammar(**fields["grammar"])
    return params_of(fields)


@pytest.mark.parametrize(("strategy", "feature"), [*itertools.product(STRATEGIES | MORE, FEATURES)])
def test_cell(client, llm, strategy: str, feature: str) -> None:
    body = asked(strategy, feature)
    if (strategy, feature) in REFUSED:
        assert client.refused(PATH, body)["param"] == REFUSED[strategy, feature]
        return
    (want,) = llm.llm.generate([PROMPT], in_library(body))
    texts, reasons = [c.text for c in want.choices], [c.finish_reason for c in want.choices]
    assert any(texts)
    whole, streamed, *_ = client.together((PATH, body), (PATH, {**body, "stream": True}), *MATES)
    choices = whole.json()["choices"]
    assert [c["text"] for c in choices] == texts and [c["finish_reason"] for c in choices] == reasons
    pieces = [c for event in events(streamed.text) for c in event["choices"]]
    for index, choice in enumerate(choices):
        mine = [c for c in pieces if c["index"] == index]
        assert "".join(c["text"] for c in mine) == choice["text"]
        assert [c["finish_reason"] for c in mine if c["finish_reason"]] == [choice["finish_reason"]]
        if "logprobs" in body:
            noted = [c["logprobs"] for c in mine if c["logprobs"]]
            assert [x for one in noted for x in one["token_logprobs"]] == choice["logprobs"]["token_logprobs"]
            got = [t.logprob for t in want.choices[index].logprobs or ()]
            assert choice["logprobs"]["token_logprobs"] == pytest.approx(got, abs=1e-12)
    for stop in body.get("stop", ()):
        assert all(stop not in text for text in texts)
