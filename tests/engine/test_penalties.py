"""Edits on the engine's path: what a sequence said changes what it says next, whatever happens to it meanwhile."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from engine.fakes import engine, run_out

from kvik.decoding import Words
from kvik.engine.admission import MOST_LISTS
from kvik.engine.receipt import receipt_from_json, receipt_to_json
from kvik.engine.request import Receipt
from kvik.errors import ParameterError
from kvik.params import PRESETS, CacheParams, Grammar, SamplingParams
from kvik.text.tokenizer import Tokenizer
from kvik.text.words import MAX_BREAKER_BYTES, MAX_BREAKER_TAIL, Pieces, bad_word_ids, breaker_ids
from kvik.weights.gguf import read_gguf

GREEDY = {"temperature": 0.0}


@pytest.fixture(scope="module")
def tokenizer(default_model_gguf) -> Tokenizer:
    with read_gguf(default_model_gguf) as file:
        return Tokenizer.from_gguf(file.metadata)


def say(tokenizer: Tokenizer, prompt: tuple[int, ...] = (300,), **options: object) -> tuple[tuple[int, ...], str]:
    """Token ids and finish reason; the model goes on with the next higher id."""
    made, _ = engine(tokenizer)
    group = made.add(made.request(prompt, SamplingParams(**GREEDY, **options)), lambda chunk: None)  # type: ignore[arg-type]
    run_out(made)
    choice = group.samples[0].choice()
    return choice.token_ids, choice.finish_reason


def test_a_bias_decides(tokenizer: Tokenizer) -> None:
    assert say(tokenizer, max_tokens=3, logit_bias={301: -100.0, 700: 1.0})[0] == (700, 701, 702)
    assert say(tokenizer, max_tokens=3, logit_bias={700: 100.0})[0] == (700, 700, 700)


def test_penalties_look_at_what_was_said(tokenizer: Tokenizer) -> None:
    stuck = {"logit_bias": {700: 12.0, 701: 11.0}}
    assert say(tokenizer, max_tokens=4, **stuck)[0] == (700, 701, 700, 701)
    assert say(tokenizer, max_tokens=3, no_repeat_ngram_size=1, **stuck)[0] == (700, 701, 702)
    near = {"logit_bias": {700: 10.0, 701: 9.5}}
    assert say(tokenizer, max_tokens=3, **near)[0] == (700, 701, 700)
    assert say(tokenizer, max_tokens=3, presence_penalty=2.0, **near)[0] == (700, 701, 702)
    assert say(tokenizer, (700, 300), max_tokens=1, repetition_penalty=2.0, **stuck)[0] == (701,)


def test_bad_words_with_and_without_a_space(tokenizer: Tokenizer) -> None:
    (word,) = tokenizer.encode(" blue", add_special=False)
    (bare,) = tokenizer.encode("blue", add_special=False)
    assert {(word,), (bare,)} <= set(bad_word_ids(tokenizer, "blue"))
    for before, banned in ((word - 1, word), (bare - 1, bare)):
        assert say(tokenizer, (before,), max_tokens=1)[0] == (banned,)
        assert say(tokenizer, (before,), max_tokens=1, bad_words=("blue",))[0] != (banned,)


def test_breakers_are_the_tokens_that_have_them(tokenizer: Tokenizer) -> None:
    newline = {ids for ids in breaker_ids(Pieces(tokenizer), ("\n",)) if len(ids) == 1}
    assert newline == {(t,) for t in range(tokenizer.vocab_size) if b"\n" in tokenizer.piece(t, t)}
    two = breaker_ids(Pieces(tokenizer), ("ab",))
    (b,) = tokenizer.encode("b", add_special=False)
    assert any(len(ids) == 2 and ids[1] == b and tokenizer.piece(ids[0], ids[0]).endswith(b"a") for ids in two)


@pytest.mark.parametrize("mode", ["raw", "processed"])
def test_nothing_left_is_no_token(tokenizer: Tokenizer, mode: str) -> None:
    options = {"min_tokens": 1, "stop_token_ids": tuple(range(49152)), "logprobs": 2, "logprobs_mode": mode}
    for temperature in (0.0, 1.0):
        made, _ = engine(tokenizer)
        params = SamplingParams(temperature=temperature, **options)  # type: ignore[arg-type]
        group = made.add(made.request((5,), params), lambda chunk: None)
        run_out(made)
        choice = group.samples[0].choice()
        assert choice.finish_reason == "no_token" and choice.token_ids == () and choice.cumulative_logprob == 0.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"logit_bias": {49152: 1.0, 3: 1.0, 50000: 2.0}}, r"logit_bias .*\[0, 49151\]: 49152, 50000$"),
        ({"stop_token_ids": (49152,)}, "stop_token_ids"),
    ],
)
def test_what_the_vocabulary_lacks_is_refused_by_name(tokenizer: Tokenizer, options, message: str) -> None:
    made, _ = engine(tokenizer)
    with pytest.raises(ParameterError, match=message):
        made.request((5,), SamplingParams(**options))


def breakers_by_definition(tokenizer: Tokenizer, breakers: tuple[str, ...]) -> set[tuple[int, ...]]:
    """Each token beside each beginning of each breaker."""
    found: set[tuple[int, ...]] = set()
    for text in breakers:
        wanted = text.encode()[:MAX_BREAKER_BYTES]
        for token in range(tokenizer.vocab_size):
            piece = tokenizer.piece(token, token)
            if wanted in piece:
                found.add((token,))
                continue
            for size in range(1, min(len(piece), len(wanted) - 1) + 1):
                if piece.endswith(wanted[:size]):
                    rest = wanted[size:].decode(errors="ignore")
                    if tail := tokenizer.encode(rest, add_special=False, first=False)[:MAX_BREAKER_TAIL]:
                        found.add((token, *tail))
    return found


@pytest.mark.parametrize(
    "breakers", [("\n", ":", '"', "*"), ("e", "the end", "aaaa"), ("été", "語語", "<|im_end|>", "x" * 60)]
)
def test_breakers_are_those_of_each_token(tokenizer: Tokenizer, breakers: tuple[str, ...]) -> None:
    found = breaker_ids(Pieces(tokenizer), breakers)
    assert len(set(found)) == len(found) and set(found) == breakers_by_definition(tokenizer, breakers)


def test_long_breakers_take_little(tokenizer: Tokenizer) -> None:
    pieces = Pieces(tokenizer)
    breakers = tuple("eatnrsdoilyghmcu"[i] * 3 + " once upon a time there was a model, it"[: 37 - i] for i in range(16))
    begun = time.perf_counter()
    assert breaker_ids(pieces, breakers)
    assert time.perf_counter() - begun < 0.3  # some hundredths on an idle machine


def test_words_are_looked_for_once(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    made, _ = engine(tokenizer)
    params = SamplingParams(dry_multiplier=1.0, dry_breakers=(":",), bad_words=("blue",))
    first = made.request((5,), params)
    assert set(first.words.bad) == set(bad_word_ids(tokenizer, "blue")) and first.words.breakers
    monkeypatch.setattr(Tokenizer, "encode", lambda *_, **__: pytest.fail("encoded again"))
    second = made.request((6,), params)
    assert second.words.bad is first.words.bad and second.words.breakers is first.words.breakers
    states = [made.add(request, lambda chunk: None).samples[0].state for request in (first, second)]
    assert states[0]._breakers is states[1]._breakers is first.words.breakers
    assert made.request((5,), SamplingParams()).words == Words()


def test_words_are_remembered_by_many_threads_at_once(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    made, _ = engine(tokenizer)
    monkeypatch.setattr(made.admission, "_breaker_ids", lambda texts: ((len(texts[0]),),))
    wanted = [SamplingParams(dry_multiplier=1.0, dry_breakers=("x" * size,)) for size in range(1, 60)]
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda params: made.request((5,), params).words.breakers, wanted * 20))
    assert found == [((len(params.dry_breakers[0]),),) for params in wanted * 20]
    assert len(made.admission._breakers) == MOST_LISTS


def test_bad_words_are_bounded_together() -> None:
    assert len(SamplingParams(bad_words=("x" * 64,) * 256).bad_words) == 256
    with pytest.raises(ParameterError, match=r"^bad_words takes at most 16,384 characters together, got 16,385$"):
        SamplingParams(bad_words=("x" * 64,) * 255 + ("x" * 65,))


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(seed=3, logit_bias={5: 1.5, 2: -100.0}, bad_words=("a", "b")),
        SamplingParams(seed=3, dry_multiplier=0.5, dry_breakers=("x",), xtc_probability=0.3, xtc_threshold=0.2),
        SamplingParams(seed=3, grammar=Grammar.json_schema({"type": "string"})),
        *(SamplingParams.preset(name, seed=3) for name in PRESETS),
    ],
    ids=str,
)
def test_receipts_hold_every_field(params: SamplingParams) -> None:
    from dataclasses import asdict

    model = dict.fromkeys(("name", "path", "digest", "weights", "kv", "executor", "device"), "x") | {"isa": None}
    receipt = Receipt("1", model, "sampling", asdict(params), CacheParams().as_dict(), (1,), ((2,),), ("length",))
    read = receipt_from_json(receipt_to_json(receipt), "it")
    assert SamplingParams(**read.params) == params
