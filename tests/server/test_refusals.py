"""Bad input: each refused with the field's name, nothing ignored, nothing left running."""

from __future__ import annotations

import asyncio
import json
import threading

import httpx
import numpy as np
import pytest
from server.conftest import MODEL, NAMED, Client, events

from kvik import AsyncLLM, BeamParams, CacheParams, EngineParams, SamplingParams
from kvik.server.app import create_app
from kvik.server.service import Service

TEXT, CHAT = "/v1/completions", "/v1/chat/completions"
SAYING_HI = {**NAMED, "messages": [{"role": "user", "content": "Hi"}]}


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({"n": 0}, "n", "[1, 128]"),
        ({"n": 129}, "n", "[1, 128]"),
        ({"n": "2"}, "n", "an integer"),
        ({"temperature": -1}, "temperature", "at least 0"),
        ({"temperature": True}, "temperature", "a number"),
        ({"top_p": 1.5}, "top_p", "[0, 1]"),
        ({"top_k": -1}, "top_k", "[0, 2147483647]"),
        ({"seed": -1}, "seed", "18446744073709551615"),
        ({"stop": ["a"] * 17}, "stop", "16"),
        ({"stop": [""]}, "stop", "not empty"),
        ({"stop": {"a": 1}}, "stop", "list of strings"),
        ({"stop_token_ids": [49152]}, "stop_token_ids", "[0, 49151]"),
        ({"max_tokens": 0}, "max_tokens", "at least 1"),
        ({"max_tokens": "many"}, "max_tokens", "integer"),
        ({"max_tokens": 1.5}, "max_tokens", "integer"),
        ({"min_tokens": 20, "max_tokens": 5}, "min_tokens", "above max_tokens"),
        ({"logprobs": -1}, "logprobs", "[0, 20]"),
        ({"logprobs": 21}, "logprobs", "[0, 20]"),
        ({"logprobs": True}, "logprobs", "integer"),
        ({"logprobs_mode": "some"}, "logprobs_mode", "processed"),
        ({"stream": "yes"}, "stream", "true or false"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "needs stream"),
        ({"stream": True, "stream_options": {"include_use": True}}, "stream_options.include_use", "include_usage"),
        ({"cache_salt": 5}, "cache_salt", "a string"),
        ({"cache_salt": "\ud800"}, "cache_salt", "surrogate"),
        ({"temprature": 1}, "temprature", "did you mean 'temperature'"),
        ({"kv": "int5"}, "kv", "did you mean 'int"),
        ({"kv": 8}, "kv", "a string or an object"),
        ({"kv": {"k": "int8", "group": 64}}, "kv", "got 'group'"),
        ({"kv": {"k": "int8", "group_size": 48}}, "kv.group_size", "16, 32, 64 or 128"),
        ({"kv": {"policy": "h2o"}, "evict": "none"}, "kv.policy", "give one of them"),
        ({"evict": "snapvk"}, "evict", "did you mean 'snapkv'"),
        ({"evict": {"policy": "snapkv", "windw": 8}}, "evict", "got 'windw'"),
        ({"evict": {"policy": "snapkv", "budget": 0}}, "evict.budget", "must be in [1, "),
        ({"evict": "h2o:budget=50,every=0"}, "evict", "nothing would be evicted"),
        ({"evict": "streamingllm:window=9000"}, "evict", "the model's context is 8192"),
        ({"presence_penalty": 2.5}, "presence_penalty", "[-2, 2]"),
        ({"frequency_penalty": False}, "frequency_penalty", "must be a number"),
        ({"repetition_penalty": 0}, "repetition_penalty", "above 0"),
        ({"logit_bias": {"49152": 1, "5": 1, "70000": -1}}, "logit_bias", "49152, 70000"),
        ({"logit_bias": {"5": 101}}, "logit_bias", "[-100, 100]"),
        ({"logit_bias": {"five": 1}}, "logit_bias", "token ids as names"),
        ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias", "1,024"),
        ({"bad_words": [""]}, "bad_words", "not empty"),
        ({"bad_words": ["x" * 1000] * 17}, "bad_words", "16,384 characters"),
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size", "[0, 1024]"),
        ({"dry_base": 2}, "dry_base", "needs dry_multiplier"),
        ({"typical_p": 0}, "typical_p", "above 0"),
        ({"epsilon_cutoff": 1}, "epsilon_cutoff", "below 1"),
        ({"eta_cutoff": -0.5}, "eta_cutoff", "[0, 1]"),
        ({"top_n_sigma": -1}, "top_n_sigma", "[0, 100]"),
        ({"xtc_probability": 2}, "xtc_probability", "[0, 1]"),
        ({"xtc_threshold": 0.2}, "xtc_threshold", "needs xtc_probability"),
        ({"preset": "balancd"}, "preset", "did you mean 'balanced'"),
        ({"preset": "balanced", "num_beams": 2}, "preset", "num_beams"),
        ({"best_of": 3}, "best_of", "not supported"),
        ({"suffix": "end"}, "suffix", "not supported"),
        ({"store": True}, "store", "not supported"),
        ({"trace": True}, "trace", "not supported"),
        ({"echo": True, "max_tokens": 0, "receipt": True}, "receipt", "max_tokens is 0"),
        ({"prompt": []}, "prompt", "empty"),
        ({"prompt": ""}, "prompt", "empty"),
        ({"prompt": None}, "prompt", "missing"),
        ({"prompt": 5}, "prompt", "must be"),
        ({"prompt": ["a", 5]}, "prompt[1]", "string or a list of token ids"),
        ({"prompt": [[1, 2], [3, "x"]]}, "prompt[1]", "token ids"),
        ({"prompt": [1, 49152]}, "prompt", "outside [0, 49151]"),
        ({"prompt": [[1], [-1]]}, "prompt[1]", "outside [0, 49151]"),
        ({"prompt": "half \ud800"}, "prompt", "surrogate"),
        ({"prompt": ["x"] * 1165}, "prompt", "at most 1164"),
        ({"model": None}, "model", "missing"),
        ({"model": 5}, "model", "string"),
    ],
)  # fmt: skip
def test_completion_fields(client, fields, param, said):
    error = client.refused(TEXT, {**NAMED, "prompt": "Hi", "max_tokens": 2, **fields})
    assert error["param"] == param and said in error["message"] and error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({"messages": []}, "messages", "empty"),
        ({"messages": "Hi"}, "messages", "list"),
        ({"messages": None}, "messages", "missing"),
        ({"messages": ["Hi"]}, "messages[0]", "object"),
        ({"messages": [{"role": "user"}]}, "messages[0]", "content"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "string"),
        ({"messages": [{"role": "user", "content": "a", "colour": 1}]}, "messages[0]", "colour"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0]", "text"),
        ({"messages": [{"role": "user", "content": "\udc00"}]}, "messages[0].content", "surrogate"),
        ({"tools": 5}, "tools", "list"),
        ({"tools": [5]}, "tools[0]", "object"),
        ({"tool_choice": "required"}, "tool_choice", "auto or none"),
        ({"top_logprobs": 2}, "top_logprobs", "needs logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "[0, 20]"),
        ({"logprobs": 3}, "logprobs", "true or false"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_completion_tokens", "one of them"),
        ({"parallel_tool_calls": False}, "parallel_tool_calls", "not supported"),
        ({"reasoning_effort": "low"}, "reasoning_effort", "not supported"),
        ({"prompt": "Hi"}, "prompt", "unknown field"),
    ],
)  # fmt: skip
def test_chat_fields(client, fields, param, said):
    error = client.refused(CHAT, {**SAYING_HI, "max_tokens": 2, **fields})
    assert error["param"] == param and said in error["message"]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "no JSON"),
        (b'{"model": ', "line 1 column"),
        (b'{"model": "\xff"}', "UTF-8 at byte 11"),
        (b'{"temperature": NaN}', "NaN"),
        (b'{"temperature": -Infinity}', "-Infinity"),
        (b"[1]", "object"),
        (b'{"n": 1, "n": 2}', "twice"),
        (b'{"n": ' + b"9" * 5000 + b"}", "digits"),
        (b"[" * 100_000, "deep"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("path", [TEXT, CHAT, "/tokenize", "/detokenize"])
def test_bodies(client, path, body, said):
    error = client.refused(path, body)
    assert said in error["message"] and error["code"] == "invalid_json"


def test_long_field_names(client):
    error = client.refused(TEXT, {**NAMED, "prompt": "Hi", "temperature" * 100_000: 1})
    assert error["code"] == "unknown_parameter" and "did you mean" not in error["message"]
    assert len(error["param"]) == 100 and len(error["message"]) < 700
    error = client.refused(TEXT, ('{"%s": 1, "%s": 2}' % (("n" * 10_000,) * 2)).encode())
    assert "twice" in error["message"] and len(error["param"]) == 100


def test_numbers_beyond_floats(client):
    body = json.dumps({**NAMED, "prompt": "Hi", "temperature": 0}).replace('"temperature": 0', '"temperature": 1e999')
    assert client.refused(TEXT, body.encode())["param"] == "temperature"


def test_unknown_model(client, llm, default_model_gguf):
    for path, body in (
        (TEXT, {"prompt": "Hi"}),
        (CHAT, {"messages": SAYING_HI["messages"]}),
        ("/tokenize", {"prompt": "a"}),
    ):
        error = client.refused(path, {**body, "model": "gpt-4"}, 404)
        assert error["code"] == "model_not_found" and error["param"] == "model" and MODEL in error["message"]
    for name in (MODEL, "smollm2", str(default_model_gguf), llm.llm.info.name):
        assert client.post("/tokenize", {"model": name, "prompt": "a"}).status_code == 200


def test_context_exceeded(client):
    error = client.refused(TEXT, {**NAMED, "prompt": ["short", [5] * 8192]})
    assert error["code"] == "context_length_exceeded" and error["param"] == "prompt[1]"
    assert error["message"].count("8192") == 2
    error = client.refused(CHAT, {**NAMED, "messages": [{"role": "user", "content": "word " * 9000}]})
    assert error["code"] == "context_length_exceeded" and error["param"] == "messages" and "8192" in error["message"]
    error = client.refused(TEXT, {**NAMED, "prompt": [5] * 8193, "echo": True, "logprobs": 1, "max_tokens": 0})
    assert error["code"] == "context_length_exceeded" and "8193" in error["message"]


def test_all_prompts_are_checked_before_any_starts(client, llm):
    before = llm.llm.engine.stats.requests
    client.refused(TEXT, {**NAMED, "prompt": [[1], [2], [49152]]})
    assert llm.llm.engine.stats.requests == before


def test_detokenize_and_tokenize(client):
    assert client.refused("/detokenize", {"tokens": [1, 49152]})["param"] == "tokens[1]"
    assert client.refused("/detokenize", {"tokens": "ab"})["param"] == "tokens"
    assert client.refused("/detokenize", {})["param"] == "tokens"
    assert client.refused("/tokenize", {})["param"] == "prompt"
    assert client.refused("/tokenize", {"prompt": "a", "tools": []})["param"] == "tools"
    assert client.refused("/tokenize", {"prompt": 5})["param"] == "prompt"
    for text in ({"prompt": "word " * 9000}, {"messages": [{"role": "user", "content": "word " * 9000}]}):
        assert client.post("/tokenize", text).json()["count"] > 9000  # more than the context holds


def test_long_bodies(llm):
    client = Client(llm, max_body_bytes=100)
    assert client.refused(TEXT, b"x" * 101, 413)["code"] == "body_too_large"
    assert client.refused(TEXT, b"x" * 100)["code"] == "invalid_json"


def test_paths_and_methods(client):
    error = client.refused("/v1/embeddings", {}, 404)
    assert error["code"] == "unknown_path"
    assert client.refused("/health", {}, 405)["code"] == "method_not_allowed"


def test_api_key(llm):
    client = Client(llm, api_key="sesame")
    assert client.get("/health").status_code == 200
    for path in ("/v1/models", "/metrics", "/version"):
        assert client.get(path).status_code == 401
        assert client.get(path, authorization="Bearer sesam").status_code == 401
        assert client.get(path, authorization="sesame").status_code == 401
        assert client.get(path, authorization="Bearer sesame").status_code == 200
    assert client.refused(TEXT, {}, 401)["code"] == "invalid_api_key"


def test_overload(default_model_gguf):
    engine = EngineParams(kv_bytes=50_000_000, max_sequences=1, max_waiting=1)
    with AsyncLLM(str(default_model_gguf), engine=engine) as llm:
        body = {**NAMED, "prompt": "Hi", "max_tokens": 8, "ignore_eos": True}
        found = Client(llm).together(*[(TEXT, body)] * 5)
        codes = sorted(response.status_code for response in found)
        assert codes == [200, 200, 429, 429, 429]
        refused = next(response for response in found if response.status_code == 429)
        assert refused.headers["retry-after"] == "1" and refused.json()["error"]["code"] == "overloaded"


def test_draining(llm):
    client = Client(llm)
    client.app.state.service.draining = True
    assert client.refused(TEXT, {**NAMED, "prompt": "Hi"}, 503)["code"] == "shutting_down"
    assert client.get("/health").status_code == 503


SCORED = {**NAMED, "prompt": "A long word " * 400, "echo": True, "logprobs": 0}  # tokenized in a thread, then scored


@pytest.mark.parametrize("seconds", [60, 0])
def test_drain_finishes_what_was_taken(default_model_gguf, seconds):
    """A request is taken before the engine has it; where time is short it is told that the server ends."""
    with AsyncLLM(str(default_model_gguf), engine=EngineParams(kv_bytes=50_000_000)) as llm:

        async def run():
            app = create_app(llm, ref=MODEL)
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://kvik", timeout=60) as http:
                asking = asyncio.create_task(http.post(TEXT, json={**SCORED, "max_tokens": 3}))
                while app.state.service._idle.is_set():
                    await asyncio.sleep(0)
                drained = await app.state.service.drain(seconds)
                if not drained:
                    llm.stop()
                return await asking

        response = asyncio.run(run())
        if seconds:
            assert response.json()["usage"]["completion_tokens"] == 3
        else:
            assert response.status_code == 503 and response.json()["error"]["code"] == "shutting_down"


def test_scoring_that_is_cut_by_the_end(default_model_gguf):
    with AsyncLLM(str(default_model_gguf), engine=EngineParams(kv_bytes=50_000_000)) as llm:

        async def run():
            app = create_app(llm, ref=MODEL)
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://kvik", timeout=60) as http:
                asking = asyncio.create_task(http.post(TEXT, json={**SCORED, "max_tokens": 0}))
                while not llm.num_requests:
                    await asyncio.sleep(0.001)
                if not await app.state.service.drain(0):
                    llm.stop()
                return await asking

        response = asyncio.run(run())
        assert response.status_code == 503 and response.json()["error"]["code"] == "shutting_down"


@pytest.mark.parametrize("stream", [False, True])
def test_one_request_fails_and_others_go_on(client, llm, monkeypatch, capsys, stream):
    """Logits after one token are not finite: its request is told so, in the form it asked for."""
    bad = 40_000
    executor = llm.llm.engine.executor
    run = type(executor).run

    def damaged(self, work):
        logits = np.array(run(self, work))
        logits[work.tokens[work.logit_rows] == bad] = np.nan
        return logits

    monkeypatch.setattr(type(executor), "run", damaged)
    body = {**NAMED, "max_tokens": 6, "temperature": 0, "ignore_eos": True, "stream": stream}
    calls = [(TEXT, {**body, "prompt": prompt}) for prompt in ("Once upon", [5, bad], "Twice upon")]
    first, failed, last = client.together(*calls)
    assert failed.status_code == 500 or stream
    error = failed.json()["error"]
    assert error["code"] == "engine_error" and "is nan" in error["message"]
    path = llm.llm.info.path
    assert path not in error["message"]
    for response in (first, last):
        assert response.status_code == 200
        if stream:
            assert events(response.text)[-1]["choices"][0]["finish_reason"] == "length"
    log = capsys.readouterr().err
    assert "is nan" in log and path in log


def test_failure_within_a_stream_is_its_last_event(client, llm, monkeypatch, capsys):
    executor = llm.llm.engine.executor
    run, steps = type(executor).run, []

    def breaking(self, work):
        steps.append(len(work.tokens))
        if len(steps) > 3:
            raise RuntimeError("broken")
        return run(self, work)

    monkeypatch.setattr(type(executor), "run", breaking)
    body = {**NAMED, "prompt": "Hi", "max_tokens": 9, "ignore_eos": True, "stream": True}
    response = client.post(TEXT, body)
    said = events(response.text)
    assert response.status_code == 200 and len(said) == 4 and "defect" in said[-1]["error"]["message"]
    assert "broken" in capsys.readouterr().err  # the traceback is for the log, not for clients
    monkeypatch.undo()
    assert client.complete("Hi", max_tokens=2)["choices"]


@pytest.mark.parametrize(
    ("params", "inline"),
    [
        (SamplingParams(), True),
        (SamplingParams(bad_words=("blue",)), True),
        (SamplingParams(bad_words=("x" * 1000,) * 2), False),
        (SamplingParams(dry_multiplier=1.0), False),
        (SamplingParams(dry_multiplier=1.0, dry_breakers=("x" * 40,) * 16), False),
        (SamplingParams(dry_multiplier=1.0, dry_breakers=()), True),
        (BeamParams(num_beams=2), True),
    ],
)
def test_what_takes_long_is_checked_in_a_thread(llm, monkeypatch, params, inline):
    monkeypatch.setattr(llm.llm, "request", lambda ids, params, salt, cache: threading.current_thread())
    checked = asyncio.run(Service(llm, MODEL).request([5], params, "", CacheParams()))
    assert (checked is threading.current_thread()) == inline
