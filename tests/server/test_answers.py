"""What the endpoints answer, beside what the Python API does."""

from __future__ import annotations

import pytest
from server.conftest import MODEL, NAMED

from kvik import SamplingParams

GREEDY = {"temperature": 0}
STORY = "Once upon a time"


def text_of(pieces, index=0):
    return "".join(c["text"] for e in pieces for c in e["choices"] if c["index"] == index)


def test_completion_is_what_the_library_says(client, llm):
    answer = client.complete(STORY, max_tokens=12, seed=5)
    (same,) = llm.llm.generate([STORY], SamplingParams(max_tokens=12, seed=5))
    (choice,) = answer["choices"]
    assert choice["text"] == same.text and choice["finish_reason"] == "length" and choice["logprobs"] is None
    assert answer["object"] == "text_completion" and answer["model"] == MODEL
    assert answer["usage"]["prompt_tokens"] == 4 and answer["usage"]["completion_tokens"] == 12
    assert answer["usage"]["total_tokens"] == 16


def test_completion_has_16_tokens_unless_told(client):
    assert client.complete(STORY, ignore_eos=True)["usage"]["completion_tokens"] == 16


def test_stream_is_the_whole_in_pieces(client):
    fields = {"max_tokens": 16, "seed": 3, "n": 2, "logprobs": 2}
    whole = client.complete(STORY, **fields)
    pieces = client.complete(STORY, **fields, stream=True, stream_options={"include_usage": True})
    assert pieces[-1]["choices"] == [] and pieces[-1]["usage"]["completion_tokens"] == 32
    assert all(piece["usage"] is None for piece in pieces[:-1])
    for index, choice in enumerate(whole["choices"]):
        assert text_of(pieces, index) == choice["text"]
        noted = [c["logprobs"] for e in pieces for c in e["choices"] if c["index"] == index and c["logprobs"]]
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            assert [one for piece in noted for one in piece[name]] == choice["logprobs"][name]


def test_prompts_of_every_form(client, llm):
    ids = llm.llm.tokenizer.encode(STORY)
    other = "The capital of France is"
    more = llm.llm.tokenizer.encode(other)
    one = client.complete(STORY, max_tokens=4, **GREEDY)["choices"]
    assert client.complete(ids, max_tokens=4, **GREEDY)["choices"] == one
    both = client.complete([STORY, other], max_tokens=4, n=2, **GREEDY)
    assert [c["index"] for c in both["choices"]] == [0, 1, 2, 3]
    assert [c["text"] for c in both["choices"][:2]] == [one[0]["text"]] * 2
    assert client.complete([ids, more], max_tokens=4, n=2, **GREEDY)["choices"] == both["choices"]
    pieces = client.complete([STORY, other], max_tokens=4, n=2, **GREEDY, stream=True)
    assert [text_of(pieces, i) for i in range(4)] == [c["text"] for c in both["choices"]]


def test_same_seed_same_text_alone_and_beside_others(client):
    body = {**NAMED, "prompt": STORY, "max_tokens": 16, "seed": 11}
    alone = client.post("/v1/completions", body).json()["choices"]
    others = [("/v1/completions", {**NAMED, "prompt": f"{i} apples", "max_tokens": 16}) for i in range(8)]
    beside = client.together(others[0], ("/v1/completions", body), *others[1:])[1].json()["choices"]
    assert alone == beside


def test_stop_strings_never_leak(client):
    whole = client.complete(STORY, max_tokens=24, **GREEDY)["choices"][0]["text"]
    stop = whole[20:28]
    assert len(stop) == 8
    cut = whole[: whole.index(stop)]
    assert client.complete(STORY, max_tokens=24, stop=stop, **GREEDY)["choices"][0]["text"] == cut
    pieces = client.complete(STORY, max_tokens=24, stop=[stop], stream=True, **GREEDY)
    said = ""
    for piece in pieces:
        said += piece["choices"][0]["text"]
        assert cut.startswith(said)
    assert said == cut and pieces[-1]["choices"][0]["finish_reason"] == "stop"


def test_chat_is_what_the_library_says(client, llm):
    messages = [{"role": "user", "content": "Name a colour."}]
    same = llm.llm.chat(messages, SamplingParams(max_tokens=10, temperature=0))
    answer = client.chat("Name a colour.", max_completion_tokens=10, **GREEDY)
    (choice,) = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": same.text}
    assert answer["object"] == "chat.completion" and answer["usage"]["prompt_tokens"] == len(same.prompt_tokens)
    parts = [{"type": "text", "text": "Name a "}, {"type": "text", "text": "colour."}]
    body = {**NAMED, "messages": [{"role": "user", "content": parts, "name": None}], "max_tokens": 10, **GREEDY}
    again = client.post("/v1/chat/completions", body).json()
    assert again["choices"] == answer["choices"] and again["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
    pieces = client.chat("Name a colour.", max_tokens=10, stream=True, **GREEDY)
    deltas = [piece["choices"][0]["delta"] for piece in pieces]
    assert deltas[0]["role"] == "assistant" and not any("role" in delta for delta in deltas[1:])
    assert "".join(delta["content"] for delta in deltas) == same.text
    assert pieces[-1]["choices"][0]["finish_reason"] == choice["finish_reason"]


def test_chat_logprobs(client):
    answer = client.chat("Say hi.", max_tokens=4, logprobs=True, top_logprobs=3, **GREEDY)
    noted = answer["choices"][0]["logprobs"]["content"]
    assert len(noted) == 4 and all(len(one["top_logprobs"]) == 3 for one in noted)
    for one in noted:
        assert one["top_logprobs"][0]["token"] == one["token"] and bytes(one["bytes"]).decode() == one["token"]
        assert one["logprob"] == pytest.approx(one["top_logprobs"][0]["logprob"]) and one["logprob"] <= 0
    pieces = client.chat("Say hi.", max_tokens=4, logprobs=True, top_logprobs=3, stream=True, **GREEDY)
    assert [one for p in pieces for one in p["choices"][0]["logprobs"]["content"]] == noted


def test_echo_and_logprobs_are_the_score(client, llm):
    """What evaluation harnesses send: token ids, echo, logprobs, one token or none generated."""
    text = "The capital of France is Paris. 🦜"
    ids = llm.llm.tokenizer.encode(text)
    (score,) = llm.llm.score([text], top=2)
    scored = client.complete([ids], echo=True, logprobs=2, max_tokens=0)
    (choice,) = scored["choices"]
    noted = choice["logprobs"]
    assert choice["text"] == text and scored["usage"]["completion_tokens"] == 0
    assert noted["token_logprobs"] == [None, *score.logprobs.tolist()]
    assert noted["top_logprobs"][0] is None and len(noted["tokens"]) == len(ids)
    for token, logprob, top, best in zip(
        noted["tokens"][1:], noted["token_logprobs"][1:], noted["top_logprobs"][1:], score.top, strict=True
    ):
        assert top[token] == logprob or top[token] == pytest.approx(logprob)
        assert max(top.values()) == best[0].logprob and len(top) in (2, 3)
    for start, end, token in zip(noted["text_offset"], noted["text_offset"][1:], noted["tokens"], strict=False):
        assert token.startswith("bytes:") or text[start:end] == token
    more = client.complete(ids, echo=True, logprobs=2, max_tokens=3, **GREEDY)
    longer = more["choices"][0]["logprobs"]
    assert longer["token_logprobs"][: len(ids)] == noted["token_logprobs"] and len(longer["tokens"]) == len(ids) + 3
    assert more["choices"][0]["text"].startswith(text)
    pieces = client.complete(ids, echo=True, logprobs=2, max_tokens=3, stream=True, **GREEDY)
    assert text_of(pieces) == more["choices"][0]["text"]
    streamed = [c["logprobs"] for e in pieces for c in e["choices"] if c["logprobs"]]
    assert [offset for one in streamed for offset in one["text_offset"]] == longer["text_offset"]
    assert client.complete(text, echo=True, max_tokens=0)["choices"][0]["logprobs"] is None


def test_our_own_fields(client):
    fields = {"top_k": 1, "min_p": 0.1, "min_tokens": 3, "cache_salt": "a", "logprobs_mode": "processed", "logprobs": 0}
    answer = client.complete(STORY, max_tokens=5, receipt=True, **fields)
    receipt = answer["receipt"]
    assert receipt["params"]["top_k"] == 1 and receipt["params"]["min_p"] == 0.1 and receipt["params"]["seed"] >= 0
    assert len(receipt["outputs"][0]) == 5 and receipt["prompt"]
    assert receipt["model"]["path"] == MODEL and client.app.state.service.info.path not in str(receipt)
    assert answer["choices"][0]["logprobs"]["token_logprobs"] == [0.0] * 5  # one token is left to draw
    pieces = client.complete([STORY, "b"], max_tokens=2, receipt=True, stream=True)
    assert len(pieces[-1]["receipt"]) == 2 and pieces[-1]["choices"] == []
    (token,) = set(receipt["outputs"][0][:1])
    ended = client.complete(STORY, max_tokens=5, stop_token_ids=[token], **GREEDY)
    assert ended["choices"][0]["finish_reason"] == "stop" and ended["usage"]["completion_tokens"] == 1


def test_salt_keeps_prefixes_apart(client):
    text = "A secret that is longer than a block of sixteen tokens, so that it could be found again by others here."
    client.complete(text, max_tokens=1, echo=True, logprobs=0, cache_salt="mine")

    def cached(**fields):
        return client.complete(text, max_tokens=1, **fields)["usage"]["prompt_tokens_details"]["cached_tokens"]

    assert cached(cache_salt="mine") > 0 and cached(cache_salt="yours") == 0 and cached() == 0


def test_fields_that_ask_for_nothing(client):
    nothing = {
        "presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}, "best_of": 1, "suffix": None, "user": "me",
        "stop": None, "seed": None, "store": False, "metadata": {"a": "b"}, "logprobs": None, "stream_options": None,
    }  # fmt: skip
    assert client.complete(STORY, max_tokens=2, **nothing)["choices"]
    chat = {"parallel_tool_calls": True, "response_format": {"type": "text"}, "tools": [], "tool_choice": "none"}
    assert client.chat("Hi", max_tokens=2, **chat)["choices"]


def test_tokenize_and_back(client, llm):
    text = "Hello, wörld!"
    made = client.post("/tokenize", {**NAMED, "prompt": text, "return_token_strs": True}).json()
    assert made["tokens"] == llm.llm.tokenizer.encode(text) and made["count"] == len(made["tokens"])
    assert made["max_model_len"] == 8192 and len(made["token_strs"]) == made["count"]
    assert client.post("/detokenize", {"tokens": made["tokens"]}).json() == {"prompt": text}
    messages = [{"role": "user", "content": "Hi"}]
    assert client.post("/tokenize", {"messages": messages}).json()["tokens"] == llm.llm.chat_ids(messages)
    long = "word " * 3000  # in a thread
    assert client.post("/tokenize", {"prompt": long}).json()["count"] == len(llm.llm.tokenizer.encode(long))


def test_what_is_there(client):
    (card,) = client.get("/v1/models").json()["data"]
    assert card["id"] == MODEL and client.get(f"/v1/models/{MODEL}").json() == card
    assert client.get("/v1/models/other").status_code == 404
    assert client.get("/health").json() == {"status": "ok"}
    assert client.get("/version").json()["version"]


def test_metrics_count(client):
    client.complete(STORY, max_tokens=6, ignore_eos=True)
    found = {}
    for line in client.get("/metrics").text.splitlines():
        if not line.startswith("#"):
            name, _, value = line.rpartition(" ")
            found[name] = float(value)
    label = f'{{model_name="{MODEL}"}}'
    assert found[f"kvik:prompt_tokens_total{label}"] == 4
    assert found[f"kvik:generation_tokens_total{label}"] >= 6
    assert found[f'kvik:request_success_total{{finished_reason="length",model_name="{MODEL}"}}'] == 1
    assert found[f"kvik:inter_token_latency_seconds_count{label}"] == 5
    for name in (
        "time_to_first_token",
        "e2e_request_latency",
        "request_queue_time",
        "request_prefill_time",
        "request_decode_time",
    ):
        assert found[f"kvik:{name}_seconds_count{label}"] == 1
        assert found[f'kvik:{name}_seconds_bucket{{le="+Inf",model_name="{MODEL}"}}'] == 1
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
        assert found[f"kvik:{name}{label}"] == 0
    for name in ("num_preemptions", "prefix_cache_queries", "prefix_cache_hits"):
        assert f"kvik:{name}_total{label}" in found
