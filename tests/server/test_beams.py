"""Beam search over HTTP, beside what the Python API says."""

from __future__ import annotations

import json

import pytest
from server.conftest import NAMED

from kvik import BeamParams
from kvik.cli.replay import first_difference
from kvik.engine.receipt import params_of, receipt_from_json

TEXT, CHAT = "/v1/completions", "/v1/chat/completions"
STORY = "Once upon a time"
BEAMS = {"num_beams": 3, "n": 2, "max_tokens": 10, "length_penalty": 0.5, "early_stopping": "never"}


def test_completion_is_what_the_library_says(client, llm):
    answer = client.complete(STORY, **BEAMS, logprobs=2, repetition_penalty=1.1, no_repeat_ngram_size=3)
    params = BeamParams(
        num_beams=3, num_return_sequences=2, max_tokens=10, length_penalty=0.5, early_stopping="never", logprobs=2,
        repetition_penalty=1.1, no_repeat_ngram_size=3,
    )  # fmt: skip
    (same,) = llm.llm.generate([STORY], params)
    assert [c["text"] for c in answer["choices"]] == [c.text for c in same.choices]
    assert [c["score"] for c in answer["choices"]] == [c.score for c in same.choices]
    assert [len(c["logprobs"]["tokens"]) for c in answer["choices"]] == [len(c.token_ids) for c in same.choices]
    assert answer["usage"]["completion_tokens"] == same.usage.completion_tokens


def test_a_stream_has_the_answers_at_its_end(client):
    whole = client.complete([STORY, "The capital"], **BEAMS)
    pieces = client.complete(
        [STORY, "The capital"], **BEAMS, stream=True, stream_options={"include_usage": True}, receipt=True
    )
    texts = {c["index"]: c["text"] for e in pieces for c in e["choices"]}
    assert texts == {c["index"]: c["text"] for c in whole["choices"]} and len(texts) == 4
    assert all(c["finish_reason"] for e in pieces for c in e["choices"])
    assert pieces[-1]["usage"] == whole["usage"] and len(pieces[-1]["receipt"]) == 2


def test_chat_and_its_receipt(client, llm):
    answer = client.chat("Name a colour.", num_beams=4, max_tokens=12, receipt=True)
    (choice,) = answer["choices"]
    assert choice["message"]["content"] and choice["score"] < 0
    receipt = receipt_from_json(json.dumps(answer["receipt"]), "answer")
    (again,) = llm.llm.generate([list(receipt.prompt)], params_of(receipt))
    assert first_difference(receipt, again) is None and again.text == choice["message"]["content"]
    pieces = client.chat("Name a colour.", num_beams=4, max_tokens=12, stream=True)
    assert "".join(c["delta"]["content"] for e in pieces for c in e["choices"]) == again.text


def test_beside_others_as_alone(client):
    body = {**NAMED, "prompt": STORY, **BEAMS}
    others = [{**NAMED, "prompt": f"{STORY} {i}", "max_tokens": 20, "seed": i} for i in range(6)]
    alone = client.post(TEXT, body).json()["choices"]
    among = client.together(*[(TEXT, one) for one in (*others[:3], body, *others[3:], body)])
    assert among[3].json()["choices"] == among[7].json()["choices"] == alone


def test_one_beam_asks_for_nothing(client):
    fields = {"max_tokens": 8, "temperature": 0}
    one, plain = client.complete(STORY, **fields, num_beams=1), client.complete(STORY, **fields)
    assert one["choices"] == plain["choices"] and "score" not in one["choices"][0]


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({"num_beams": 65}, "num_beams", "[1, 64]"),
        ({"num_beams": 0}, "num_beams", "[1, 64]"),
        ({"num_beams": True}, "num_beams", "an integer"),
        ({"num_beams": "4"}, "num_beams", "an integer"),
        ({"num_beams": 2, "n": 3}, "n", "above num_beams 2"),
        ({"num_beams": 2, "n": 0}, "n", "at least 1"),
        ({"num_beams": 4, "temperature": 0.5}, "temperature", "cannot go with num_beams"),
        ({"num_beams": 4, "top_p": 0.9}, "top_p", "cannot go with num_beams"),
        ({"num_beams": 4, "seed": 1}, "seed", "cannot go with num_beams"),
        ({"num_beams": 4, "logprobs_mode": "processed"}, "logprobs_mode", "cannot go with num_beams"),
        ({"num_beams": 4, "num_beam_groups": 3}, "num_beam_groups", "does not divide num_beams 4"),
        ({"num_beams": 4, "diversity_penalty": 1}, "diversity_penalty", "needs num_beam_groups"),
        ({"num_beams": 4, "early_stopping": "soon"}, "early_stopping", "'never'"),
        ({"num_beams": 4, "length_penalty": "x"}, "length_penalty", "a number"),
        ({"num_beams": 4, "repetition_penalty": 0}, "repetition_penalty", "above 0"),
        ({"length_penalty": 1.5}, "length_penalty", "needs num_beams above 1"),
        ({"early_stopping": True, "num_beams": 1}, "early_stopping", "needs num_beams above 1"),
    ],
)
def test_fields_out_of_range(client, fields, param, said):
    for path, more in ((TEXT, {"prompt": "Hi"}), (CHAT, {"messages": [{"role": "user", "content": "Hi"}]})):
        error = client.refused(path, {**NAMED, **more, "max_tokens": 2, **fields})
        assert error["param"] == param and said in error["message"]
