"""The loop without a model: what is scheduled, when requests end, what is freed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from engine.fakes import LAYOUT, engine, run_out

from kvik.engine.request import Chunk
from kvik.errors import DataError, ParameterError
from kvik.llm import score_result
from kvik.params import CacheParams, SamplingParams
from kvik.text.tokenizer import Tokenizer
from kvik.weights.gguf import read_gguf

GREEDY = {"temperature": 0.0}


@pytest.fixture(scope="module")
def tokenizer(default_model_gguf) -> Tokenizer:
    with read_gguf(default_model_gguf) as file:
        return Tokenizer.from_gguf(file.metadata)


def finish(made, requests):
    """Runs samples to their end, checking the books after every step."""
    chunks: list[list[Chunk]] = [[] for _ in requests]
    groups = [made.add(r, c.append) for r, c in zip(requests, chunks, strict=True)]
    run_out(made)
    return [group.samples[0] for group in groups], chunks


def test_a_prompt_is_computed_in_chunks_of_the_budget(tokenizer: Tokenizer) -> None:
    made, script = engine(tokenizer, batch=32)
    request = made.request(tuple(range(100, 170)), SamplingParams(max_tokens=3, **GREEDY))
    (sequence,), _ = finish(made, [request])
    assert [len(p.tokens) for p in script.passes] == [32, 32, 6, 1, 1]
    assert [len(p.logit_rows) for p in script.passes] == [0, 0, 1, 1, 1]
    assert np.concatenate([p.slots for p in script.passes]).tolist() == list(range(72))
    assert sequence.choice().token_ids == (170, 171, 172)
    assert sequence.choice().finish_reason == "length"
    assert sequence.usage.kv_tokens_kept == 72
    assert sequence.usage.kv_bytes_now == sequence.usage.kv_bytes_peak == 5 * LAYOUT.slab_bytes


def test_requests_run_in_order_and_blocks_come_back(tokenizer: Tokenizer) -> None:
    made, _ = engine(tokenizer, num_blocks=2)
    requests = [made.request((200 + i,), SamplingParams(max_tokens=20, **GREEDY)) for i in range(5)]
    sequences, _ = finish(made, requests)
    assert [s.choice().token_ids[0] for s in sequences] == [201, 202, 203, 204, 205]


def test_chunks_join_to_the_text(tokenizer: Tokenizer) -> None:
    made, _ = engine(tokenizer)
    request = made.request((300,), SamplingParams(max_tokens=40, logprobs=2, **GREEDY))
    (sequence,), (chunks,) = finish(made, [request])
    choice = sequence.choice()
    assert "".join(c.text for c in chunks) == choice.text == tokenizer.decode(choice.token_ids, skip_special=True)
    assert tuple(t for c in chunks for t in c.token_ids) == choice.token_ids
    assert [c.finish_reason for c in chunks] == [None] * 39 + ["length"]
    assert choice.logprobs is not None and [t.token_id for t in choice.logprobs] == list(choice.token_ids)
    assert sum(t.logprob for t in choice.logprobs) == pytest.approx(choice.cumulative_logprob)
    assert all(len(t.top) == 2 and t.top[0].logprob == t.logprob for t in choice.logprobs)


def test_ends(tokenizer: Tokenizer) -> None:
    end = min(tokenizer.eos_ids)
    made, _ = engine(tokenizer)
    start = ((end - 1) % tokenizer.vocab_size,)
    (sequence,), _ = finish(made, [made.request(start, SamplingParams(max_tokens=5, **GREEDY))])
    assert (sequence.choice().finish_reason, sequence.choice().token_ids, sequence.choice().text) == (
        "stop",
        (end,),
        "",
    )
    ignoring = SamplingParams(max_tokens=5, ignore_eos=True, **GREEDY)
    (sequence,), _ = finish(made, [made.request(start, ignoring)])
    assert sequence.choice().finish_reason == "length" and len(sequence.choice().token_ids) == 5
    by_id = SamplingParams(max_tokens=9, stop_token_ids=(403,), **GREEDY)
    (sequence,), _ = finish(made, [made.request((400,), by_id)])
    assert sequence.choice().token_ids == (401, 402, 403) and sequence.choice().finish_reason == "stop"
    later = SamplingParams(max_tokens=9, min_tokens=4, stop_token_ids=(401,), **GREEDY)
    (sequence,), _ = finish(made, [made.request((400,), later)])
    assert 401 not in sequence.choice().token_ids[:4]


def test_a_stop_string_ends_the_text_before_it(tokenizer: Tokenizer) -> None:
    made, _ = engine(tokenizer)
    whole = tokenizer.decode(range(501, 521))
    stop = whole[12:17]
    before = whole[: whole.index(stop)]
    request = made.request((500,), SamplingParams(max_tokens=20, stop=(stop,), **GREEDY))
    (sequence,), (chunks,) = finish(made, [request])
    assert sequence.choice().text == before == "".join(c.text for c in chunks)
    assert sequence.choice().finish_reason == "stop"


def test_the_context_ends_a_generation(tokenizer: Tokenizer) -> None:
    made, _ = engine(tokenizer, context=20)
    (sequence,), _ = finish(made, [made.request((600,) * 17, SamplingParams(**GREEDY))])
    assert len(sequence.choice().token_ids) == 3 and sequence.choice().finish_reason == "length"


def test_without_max_tokens_a_small_pool_ends_a_generation(tokenizer: Tokenizer) -> None:
    made, _ = engine(tokenizer, num_blocks=2)
    (sequence,), _ = finish(made, [made.request((600,) * 17, SamplingParams(**GREEDY))])
    assert len(sequence.choice().token_ids) == 15 and sequence.choice().finish_reason == "length"


def test_logits_that_are_not_finite_are_refused(tokenizer: Tokenizer) -> None:
    made, script = engine(tokenizer, slab_blocks=2)
    make = script.make

    def poisoned(work, rows):
        logits = make(work, rows)
        logits[:, 7] = np.nan
        return logits

    script.make = poisoned  # type: ignore[method-assign]
    made.model = replace(made.model, path=Path("m.gguf"))
    group = made.add(made.request((5,), SamplingParams(**GREEDY)), lambda chunk: None)
    run_out(made)
    assert isinstance(group.error, DataError) and group.error.path == made.model.path
    with pytest.raises(DataError, match=r"^m\.gguf: position 1: the logit of token 7 is nan: .*kv=\"f32\""):
        raise group.error
    group = made.add_score(made.score_request((5, 6, 7), cache=CacheParams(k="f32", v="f32")))
    run_out(made)
    message = r"^m\.gguf: the logits after token 0 are not finite: the model's weights are damaged$"
    with pytest.raises(DataError, match=message):
        score_result(group)


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ((), {}, "the prompt is empty"),
        ((5,) * 100, {}, "the prompt has 100 tokens; the context holds 100"),
        ((5, -1), {}, r"token id -1 at index 1, outside \[0, 49151\]"),
        ((49152,), {}, r"token id 49152 at index 0"),
        ((5,) * 90, {"min_tokens": 11}, "min_tokens is 11; after the prompt the context holds 10"),
        ((5,), {"stop_token_ids": (49152,)}, r"stop_token_ids must be in \[0, 49151\]"),
        ((5,), {"max_tokens": 40}, "41 tokens need 3072 bytes of KV cache and kv_bytes allows 2048"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused_at_once(tokenizer: Tokenizer, prompt, params, message) -> None:
    made, script = engine(tokenizer, num_blocks=2)
    with pytest.raises(ParameterError, match=message):
        made.request(prompt, SamplingParams(**params))
    assert not script.passes


def test_cancel_frees_and_says_so(tokenizer: Tokenizer) -> None:
    made, _ = engine(tokenizer, max_sequences=1)
    chunks: list[list[Chunk]] = [[], []]
    running = made.add(made.request((5,), SamplingParams(**GREEDY)), chunks[0].append)
    waiting = made.add(made.request((6,), SamplingParams(**GREEDY)), chunks[1].append)
    made.step()
    made.cancel(running)
    made.cancel(waiting)
    made.cancel(waiting)
    assert [c[-1].finish_reason for c in chunks] == ["cancelled"] * 2
    assert chunks[0][-1].usage.completion_tokens == 1 and chunks[1][-1].usage.completion_tokens == 0
    assert made.scheduler.pool.num_held == 0 and made.stats.cancelled == 2
    assert not made.step()


def test_scores_do_not_depend_on_the_chunks(tokenizer: Tokenizer) -> None:
    ids = tuple(np.random.default_rng(0).integers(0, 1000, 90).tolist())
    results = []
    for batch in (7, 64, 100):
        made, _ = engine(tokenizer, batch=batch)
        group = made.add_score(made.score_request(ids, reduce=False))
        run_out(made)
        results.append(score_result(group))
    logits = np.zeros((90, tokenizer.vocab_size))
    logits[np.arange(90), np.array(ids) + 1] = 9
    want = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    for result in results:
        assert np.allclose(result.logprobs, want[np.arange(89), ids[1:]], atol=1e-6)
        assert result.logits is not None and np.array_equal(result.logits, logits)


def test_one_token_has_no_log_probability(tokenizer: Tokenizer) -> None:
    made, _ = engine(tokenizer)
    group = made.add_score(made.score_request((5,)))
    run_out(made)
    assert score_result(group).logprobs.shape == (0,)
