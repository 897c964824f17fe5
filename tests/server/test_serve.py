"""`kvik serve` as a process: OpenAI's client, connections that end, signals, ports."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import subprocess
import sys
import time

import httpx
import openai
import pytest
from server.conftest import events

MESSAGES = [{"role": "user", "content": "Name three colours."}]
LONG = {"prompt": "Once upon a time", "max_tokens": 8000, "ignore_eos": True, "temperature": 0}


@pytest.fixture(scope="module")
def model(default_model_gguf):
    return str(default_model_gguf)


@pytest.fixture
def ask(served):
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


def until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_says_where_it_is(served, model):
    assert served.line.count("\n") == 1
    assert served.line.startswith(f"kvik: {model} at http://127.0.0.1:") and "199" in served.line
    assert "threads" in served.line and httpx.get(f"{served.url}/health").json() == {"status": "ok"}


def test_openai_client(ask, model):
    assert [card.id for card in ask.models.list()] == [model]
    fields = {"model": model, "messages": MESSAGES, "max_tokens": 12, "temperature": 0}
    whole = ask.chat.completions.create(**fields, n=2, logprobs=True, top_logprobs=2)
    assert whole.choices[0].message.content == whole.choices[1].message.content != ""
    assert whole.choices[0].logprobs.content[0].top_logprobs[0].logprob <= 0
    with ask.chat.completions.create(**fields, stream=True, stream_options={"include_usage": True}) as stream:
        pieces = list(stream)
    assert "".join(p.choices[0].delta.content for p in pieces[:-1]) == whole.choices[0].message.content
    assert pieces[-1].usage.completion_tokens == 12 and pieces[-1].usage.prompt_tokens_details.cached_tokens > 0
    own = ask.completions.create(model=model, prompt=["a", "b"], max_tokens=3, extra_body={"top_k": 1, "receipt": True})
    assert [choice.index for choice in own.choices] == [0, 1] and len(own.receipt) == 2


def test_openai_client_sees_errors(ask, model):
    with pytest.raises(openai.NotFoundError) as missing:
        ask.completions.create(model="gpt-4", prompt="a")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        ask.chat.completions.create(model=model, messages=MESSAGES, presence_penalty=3)
    assert bad.value.param == "presence_penalty" and "[-2, 2]" in bad.value.message


def test_asynchronous_client_with_many_streams(served, model):
    async def run():
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", timeout=60) as client:

            async def one(number):
                prompt = f"{number} little birds"
                fields = {"model": model, "prompt": prompt, "max_tokens": 10, "seed": number}
                whole = await client.completions.create(**fields)
                said = [piece.choices[0].text async for piece in await client.completions.create(**fields, stream=True)]
                assert "".join(said) == whole.choices[0].text

            await asyncio.gather(*(one(number) for number in range(8)))

    asyncio.run(run())


@pytest.mark.parametrize("stream", [True, False])
def test_client_that_leaves_is_cancelled(served, model, stream):
    aborted = 'kvik:request_success_total{finished_reason="abort"'
    before = served.metric(aborted)
    host, port = served.url.removeprefix("http://").split(":")
    body = json.dumps({**LONG, "model": model, "stream": stream})
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall((head + body).encode())
        if stream:
            assert connection.recv(65536).startswith(b"HTTP/1.1 200")
        until(lambda: served.metric("kvik:num_requests_running") == 1)
        assert served.metric("kvik:kv_cache_usage_perc") > 0
    until(lambda: served.metric("kvik:kv_cache_usage_perc") == 0)
    assert served.metric(aborted) == before + 1


def test_body_in_chunks_above_the_limit(served):
    def parts():
        for _ in range(40):
            yield b" " * 500_000

    response = httpx.post(f"{served.url}/v1/completions", content=parts())
    assert response.status_code == 413 and response.json()["error"]["code"] == "body_too_large"
    announced = httpx.post(f"{served.url}/v1/completions", content=b" " * 17_000_000)
    assert announced.status_code == 413
    large = json.dumps({"model": "x", "prompt": "a", "user": "u" * 5_000_000})
    assert httpx.post(f"{served.url}/v1/completions", content=large).status_code == 404  # read, and its model unknown


def test_port_in_use(served, model):
    port = served.url.rpartition(":")[2]
    command = [sys.executable, "-m", "kvik.cli", "serve", model, "--port", port]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 75 and done.stdout == ""
    assert done.stderr == (
        f"kvik: error: port {port} of 127.0.0.1 is in use; end what uses it, or choose another with --port\n"
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--port", "70000"), "--port must be in [0, 65535]"),
        (("--api-key", "a b"), "--api-key"),
        (("--max-body-bytes", "0"), "--max-body-bytes"),
        (("--drain-seconds", "-1"), "--drain-seconds"),
        (("--max-sequences", "0"), "--max-sequences must be in [1, 4096]"),
        (("--host", "no such host"), "--host"),
    ],
)
def test_bad_options(arguments, said, capsys):
    from kvik.cli.app import main

    assert main(["serve", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_sigterm_finishes_what_runs_and_refuses_what_comes(start, model):
    served = start()
    body = {**LONG, "max_tokens": 300, "model": model, "stream": True}
    with (
        httpx.Client(timeout=60) as client,
        client.stream("POST", f"{served.url}/v1/completions", json=body) as response,
    ):
        lines = response.iter_text()
        text = next(lines)
        served.process.send_signal(signal.SIGTERM)
        until(lambda: httpx.get(f"{served.url}/health").status_code == 503)
        late = httpx.post(f"{served.url}/v1/completions", json=body)
        assert late.status_code == 503 and late.json()["error"]["code"] == "shutting_down"
        text += "".join(lines)
    assert events(text)[-1]["choices"][0]["finish_reason"] == "length"
    assert served.process.wait(timeout=20) == 0 and served.process.stderr.read() == ""


def test_sigterm_does_not_wait_for_ever(start, model):
    served = start("--drain-seconds", "0.2")
    body = {**LONG, "model": model, "stream": True}
    with (
        httpx.Client(timeout=60) as client,
        client.stream("POST", f"{served.url}/v1/completions", json=body) as response,
    ):
        lines = response.iter_text()
        text = next(lines)
        served.process.send_signal(signal.SIGTERM)
        text += "".join(lines)
    assert events(text)[-1]["error"]["code"] == "shutting_down"
    assert served.process.wait(timeout=20) == 0


def test_ctrl_c_twice_ends_at_once(start, model):
    served = start()
    body = {**LONG, "model": model, "stream": True}
    with (
        httpx.Client(timeout=60) as client,
        client.stream("POST", f"{served.url}/v1/completions", json=body) as response,
    ):
        pieces = response.iter_bytes()
        next(pieces)
        served.process.send_signal(signal.SIGINT)
        until(lambda: httpx.get(f"{served.url}/health").status_code == 503)
        served.process.send_signal(signal.SIGINT)
        assert served.process.wait(timeout=20) == 130
