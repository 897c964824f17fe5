"""Every strategy on rows of the default model, full vocabulary: the native sampler beside the definition."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from test_matrix import MORE, STRATEGIES, params_of

from kvik import LLM, EngineParams
from kvik.decoding.sampler import Sampler, sample_rows, sample_rows_by_definition
from kvik.decoding.state import DecodingState
from kvik.engine.admission import Admission
from kvik.params import SamplingParams

TEXT = "The three laws of motion say that a body stays as it is unless a force acts on it, and that a force"
DRAWN = {name: fields for name, fields in (STRATEGIES | MORE).items() if "num_beams" not in fields}


@pytest.fixture(scope="module")
def rows(default_model_gguf: Path) -> tuple[Admission, list[int], np.ndarray]:
    llm = LLM(str(default_model_gguf), engine=EngineParams(kv_bytes=64_000_000))
    ids = llm.tokenizer.encode(TEXT)
    logits = llm.score([ids], reduce=False)[0].logits
    assert logits is not None and logits.shape == (len(ids), llm.info.vocab_size)
    return llm.engine.admission, ids, logits


@pytest.mark.parametrize("strategy", DRAWN)
def test_native_and_definition_agree(rows: tuple[Admission, list[int], np.ndarray], strategy: str) -> None:
    admission, ids, logits = rows
    places = [3, 7, 11, len(ids) - 1]
    params = params_of({**DRAWN[strategy], "logprobs": 40, "logprobs_mode": "processed", "seed": 9})
    assert isinstance(params, SamplingParams)
    requests = []
    for place in places:
        state: DecodingState = admission.decoding_state(admission.request(tuple(ids[:2]), params))
        for token in ids[2 : place + 1]:  # what was said so far, as an answer
            state.accept(token)
        requests.append(Sampler(logits.shape[1], params, 9).request(place + 1, state))
    got = sample_rows(logits[places], requests)
    want = sample_rows_by_definition(logits[places], requests)
    for ours, theirs in zip(got, want, strict=True):
        assert ours.token_id == theirs.token_id
        assert [t.token_id for t in ours.top] == [t.token_id for t in theirs.top]
        assert np.allclose([t.logprob for t in ours.top], [t.logprob for t in theirs.top], atol=1e-6)
