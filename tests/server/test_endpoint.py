"""`kvik serve` as a model of evaluation: what it says over HTTP is what the library says here."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
from server.conftest import Served

from kvik import AsyncLLM, BeamParams, ParameterError, SamplingParams
from kvik.evaluation.endpoint import Endpoint

TEXTS = ["Once upon a time there was a small machine.", "Grüße aus 東京, 😀!", "def f(x):\n    return x + 1\n" * 8]


@pytest.fixture
def endpoint(served: Served) -> Iterator[Endpoint]:
    with Endpoint(served.url, timeout=30, retries=0) as made:
        yield made


@pytest.mark.parametrize("own", [False, True], ids=["its tokenizer", "ours"])
def test_logprobs_and_tokens_are_the_local_models(served: Served, llm: AsyncLLM, own: bool) -> None:
    local = llm.llm
    with Endpoint(served.url + "/v1", tokenizer=local.tokenizer if own else None) as endpoint:
        ids = [endpoint.tokenizer.encode(text) for text in TEXTS]
        assert ids == [local.tokenizer.encode(text) for text in TEXTS]
        for many in (TEXTS, ids):
            for found, right in zip(endpoint.score(many), local.score(many), strict=True):
                assert found.token_ids == right.token_ids
                np.testing.assert_array_equal(found.logprobs, right.logprobs)
        late = endpoint.score(ids, first=[3, 2, len(ids[2]) - 1])
        assert [len(one.logprobs) for one in late] == [len(ids[0]) - 3, len(ids[1]) - 2, 1]
        for text in ids:
            after = [None, *text]
            for token, before in zip(text, after, strict=False):
                assert endpoint.tokenizer.piece(token, before) == local.tokenizer.piece(token, before)
        assert endpoint.info.context_length == local.info.context_length
        assert endpoint.tokenizer.bos_id == (local.tokenizer.bos_id if own else None)
        assert endpoint.tokenizer.add_bos == local.tokenizer.add_bos


def test_answers_are_the_local_models(endpoint: Endpoint, llm: AsyncLLM) -> None:
    local = llm.llm
    sampling = SamplingParams(n=2, max_tokens=8, seed=5, top_k=40, typical_p=0.9, stop=("zzz",), logprobs=2)
    beams = BeamParams(num_beams=3, num_return_sequences=2, max_tokens=5)
    ends = SamplingParams(temperature=0, max_tokens=9, min_tokens=2, stop=("e",), ignore_eos=True)
    for params in (sampling, beams, ends):
        (found,), (right,) = endpoint.generate(TEXTS[0][:30], params), local.generate(TEXTS[0][:30], params)
        for one, other in zip(found.choices, right.choices, strict=True):
            assert (one.text, one.token_ids) == (other.text, other.token_ids)
            assert one.cumulative_logprob == pytest.approx(other.cumulative_logprob, abs=1e-9)
    noted = endpoint.generate("Once", sampling)[0].choices[0].logprobs
    assert noted is not None and len(noted) == 8 and len(noted[0].top) >= 2
    messages = [{"role": "user", "content": "Say hello."}]
    assert endpoint.chat(messages, SamplingParams(temperature=0, max_tokens=8)).text == (
        local.chat(messages, SamplingParams(temperature=0, max_tokens=8)).text
    )


def test_the_servers_refusals_are_told(endpoint: Endpoint, start: Callable[..., Served]) -> None:
    with pytest.raises(
        ParameterError, match=r"/v1/completions: status 400: prompt has 8193 tokens; the model's context"
    ):
        endpoint.score([[1] * 8193])
    with (
        Endpoint(endpoint.url, "gpt-9") as other,
        pytest.raises(ParameterError, match="status 404: no model 'gpt-9' here"),
    ):
        other.score([[1, 2]])
    locked = start("--api-key", "sk-right")
    with (
        Endpoint(locked.url, api_key="sk-wrong") as shut,
        pytest.raises(ParameterError, match=r"status 401: .*API key"),
    ):
        shut.score([[1, 2]])
    with Endpoint(locked.url, api_key="sk-right") as opened:
        assert opened.score([[1, 2]])[0].logprobs.shape == (1,)
