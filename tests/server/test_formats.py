"""response_format and grammar over HTTP."""

from __future__ import annotations

import json
import re

import jsonschema
import pytest
from server.conftest import NAMED

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}
ASKED = "Describe a person."
CHAT, COMPLETE = "/v1/chat/completions", "/v1/completions"


def body(path, **fields):
    asked = {"messages": [{"role": "user", "content": ASKED}]} if path == CHAT else {"prompt": ASKED}
    return {**NAMED, **asked, **fields}


def test_json_schema(client):
    for fields in ({"temperature": 1.5, "seed": 3}, {"temperature": 0}, {"num_beams": 3}):
        answer = client.chat(ASKED, response_format=FORMAT, max_tokens=100, **fields)
        (choice,) = answer["choices"]
        assert choice["finish_reason"] == "stop"
        jsonschema.validate(json.loads(choice["message"]["content"]), SCHEMA)
    answer = client.complete([ASKED, "Another."], response_format=FORMAT, max_tokens=100, n=2, seed=7)
    for choice in answer["choices"]:
        jsonschema.validate(json.loads(choice["text"]), SCHEMA)


def test_streams_give_the_same(client):
    fields = {"response_format": FORMAT, "max_tokens": 100, "seed": 5, "temperature": 1.2}
    whole = client.chat(ASKED, **fields)["choices"][0]["message"]["content"]
    pieces = client.chat(ASKED, **fields, stream=True)
    assert "".join(c["delta"].get("content") or "" for e in pieces for c in e["choices"]) == whole


def test_json_object_and_text(client):
    answer = client.chat(ASKED, response_format={"type": "json_object"}, max_tokens=200, temperature=0)
    assert answer["choices"][0]["message"]["content"].startswith("{")
    if answer["choices"][0]["finish_reason"] == "stop":
        assert isinstance(json.loads(answer["choices"][0]["message"]["content"]), dict)
    plain = client.chat(ASKED, max_tokens=9, temperature=0)["choices"]
    assert client.chat(ASKED, max_tokens=9, temperature=0, response_format={"type": "text"})["choices"] == plain


def test_our_own_grammar(client):
    answer = client.complete(ASKED, grammar={"kind": "regex", "text": "[0-9]{4}"}, seed=1, receipt=True)
    assert re.fullmatch("[0-9]{4}", answer["choices"][0]["text"])
    assert "[0-9]{4}" in json.dumps(answer["receipt"])


SCHEMA_FIELD = "response_format.json_schema"


@pytest.mark.parametrize("path", [CHAT, COMPLETE])
@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({"response_format": "json"}, "response_format", "an object"),
        ({"response_format": {}}, "response_format.type", "text, json_object, json_schema"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "xml"),
        ({"response_format": {"type": "json_object", "schema": {}}}, "response_format.schema", "unknown field"),
        ({"response_format": {"type": "json_schema"}}, SCHEMA_FIELD, "is missing"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, f"{SCHEMA_FIELD}.schema", "missing"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}}, f"{SCHEMA_FIELD}.name", "missing"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {}, "strct": True}}},
         f"{SCHEMA_FIELD}.strct", "did you mean 'strict'"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"minimun": 1}}}},
         "response_format", "'minimun'"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {}, "strict": "yes"}}},
         f"{SCHEMA_FIELD}.strict", "true or false"),
        ({"grammar": {"kind": "regex", "text": "(a"}}, "grammar", "unclosed group"),
        ({"grammar": {"kind": "regexp", "text": "a"}}, "grammar", "did you mean 'regex'"),
        ({"grammar": {"kind": "regex"}}, "grammar.text", "missing"),
        ({"grammar": {"kind": "regex", "text": "a"}, "response_format": FORMAT}, "grammar", "exclude"),
        ({"grammar": {"kind": "regex", "text": "a"}, "ignore_eos": True}, "ignore_eos", "grammar"),
    ],
)  # fmt: skip
def test_refusals_name_the_field(client, path, fields, param, said):
    error = client.refused(path, body(path, **fields))
    assert error["param"] == param and said in error["message"]


def test_the_openai_client(served):
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="-") as client:
        answer = client.chat.completions.create(
            model=client.models.list().data[0].id,
            messages=[{"role": "user", "content": ASKED}],
            response_format=FORMAT,
            max_tokens=100,
        )
    jsonschema.validate(json.loads(answer.choices[0].message.content), SCHEMA)
