"""LongPPL on models that remember: a token is probable where it stood in the context before."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from evaluation.fake_text_model import BOS, ByteTokens, Info, Scored

from kvik.errors import DataError, ParameterError
from kvik.evaluation.longppl import KeyRule, longppl
from kvik.evaluation.statistics import block_bootstrap
from kvik.evaluation.token_spans import inside, joined, shortened, tokenized

WORDS = ["abcdef", "ghijkl", "mnopqr", "stuvwx", "ABCDEF", "GHIJKL", "中文", "🥪yz", "äøå", "012345"]  # 6 bytes each


def some_text(words: int, seed: int = 0) -> str:
    return "".join(random.Random(seed).choices(WORDS, k=words))


def logprob(ids: Sequence[int], at: int, shift: float) -> float:
    """The nearer a token stood before, the more probable it is; a little by its id, so that no two are alike."""
    token = ids[at]
    back = next((d for d in range(1, at + 1) if ids[at - d] == token), None)
    return -(0.3 + shift if back is not None else 6.0) - token % 7 / 100


class Memory:
    """calls: first tokens and lengths of what was scored."""

    def __init__(
        self, width: int = 1, *, add_bos: bool = False, context: int = 4000, shift: float = 0.0, name: str = "memory"
    ) -> None:
        self.tokenizer = ByteTokens(width, add_bos)
        self.info = Info(name, f"{name} {width} {shift}", context)
        self.shift = shift
        self.calls: list[list[tuple[int, int]]] = []

    def score(self, inputs: Any, *, reduce: bool = True, top: int = 0, first: Any = 1) -> list[Scored]:
        assert reduce and not top and all(1 <= f < len(ids) for f, ids in zip(first, inputs, strict=True))
        self.calls.append([(f, len(ids)) for f, ids in zip(first, inputs, strict=True)])
        return [
            Scored(f, np.array([logprob(ids, at, self.shift) for at in range(f, len(ids))]))
            for f, ids in zip(first, inputs, strict=True)
        ]


def plain(model: Memory, judge: Memory, texts: list[str], rule: KeyRule) -> tuple[list[float], list[float]]:
    """The nll of the key tokens and of all tokens, by the definition, a token at a time."""
    keys, every = [], []
    for text in texts:
        characters = [at for at, c in enumerate(text) for _ in c.encode()]  # of each byte, its character
        ids = [BOS] * judge.tokenizer.add_bos + judge.tokenizer.encode(text)
        key_characters: set[int] = set()
        for at in range(rule.window, len(ids)):
            begin = (at - rule.window) // rule.stride * rule.stride
            long, short = logprob(ids, at, judge.shift), logprob(ids[begin:], at - begin, judge.shift)
            if long - short > rule.alpha and long > rule.beta:
                start = judge.tokenizer.width * (at - judge.tokenizer.add_bos)
                key_characters |= set(characters[start : start + judge.tokenizer.width])
        own = [BOS] * model.tokenizer.add_bos + model.tokenizer.encode(text)
        for at in range(1, len(own)):
            start = model.tokenizer.width * (at - model.tokenizer.add_bos)
            nll = -logprob(own, at, model.shift)
            every.append(nll)
            if set(characters[start : start + model.tokenizer.width]) <= key_characters:
                keys.append(nll)
    return keys, every


@pytest.mark.parametrize("width", [1, 2, 3])
@pytest.mark.parametrize("judge_width", [1, 3])
@pytest.mark.parametrize(("window", "stride"), [(16, 4), (9, 1), (8, 30)])
def test_the_definition(width: int, judge_width: int, window: int, stride: int) -> None:
    texts = [some_text(40, 1), some_text(1, 2), some_text(25, 3), ""]
    model, judge = Memory(width, shift=0.2, add_bos=width == 2), Memory(judge_width, add_bos=judge_width == 3)
    rule = KeyRule(2.0, -2.0, window, stride)
    found = longppl(model, judge, texts, window=window, stride=stride)
    keys, every = plain(model, judge, texts, rule)
    assert 0 < len(keys) < len(every)
    assert (found.key_tokens, found.tokens) == (len(keys), len(every))
    assert found.share == len(keys) / len(every)
    assert found.value == pytest.approx(math.exp(np.mean(keys)), rel=1e-12)
    assert found.perplexity == pytest.approx(math.exp(np.mean(every)), rel=1e-12)
    assert [key.nll for key in found.keys] == pytest.approx(keys)
    assert found.rule == rule and (found.texts, found.texts_cut) == (4, 0)
    for key in found.keys:
        assert texts[key.text].encode()[key.offset :].startswith(key.token.encode()[:1]) or "�" in key.token


def test_a_model_that_judges_itself_is_run_once() -> None:
    text = some_text(40)
    model, judge = Memory(), Memory()
    found, again = longppl(model, model, text, window=32, stride=16), longppl(model, judge, text, window=32, stride=16)
    assert found == again and found.key_tokens > 0
    n = len(text.encode())
    starts = range(16, n - 32, 16)  # the first window is the text's own beginning
    assert model.calls[0] == [(1, n), *((32, min(48, n - start)) for start in starts)]
    assert judge.calls == [[(32, n), *((32, min(48, n - start)) for start in starts)]]


def test_only_strictly_above_counts() -> None:
    text = "ab" + "c" * 20 + "a" + "d" * 20
    model = Memory()
    a = model.tokenizer.encode("a")[0] % 7 / 100
    long = -0.3 - a
    gain = long - (-6.0 - a)
    assert longppl(model, model, text, window=8, stride=4, alpha=gain - 1e-9).key_tokens == 1
    assert longppl(model, model, text, window=8, stride=4, alpha=gain + 1e-9).value is None
    assert longppl(model, model, text, window=8, stride=4, beta=long - 1e-9).key_tokens == 1
    found = longppl(model, model, text, window=8, stride=4, beta=long)
    assert found.value is found.nll is found.interval is found.standard_error is None
    assert (found.key_tokens, found.share, found.keys) == (0, 0.0, ()) and found.perplexity > 1


def test_texts_within_the_window_have_no_key_tokens() -> None:
    model = Memory()
    found = longppl(model, model, ["abcabc", "", "a" * 40], window=32, stride=8)
    assert found.value is None and (found.texts, found.texts_short, found.judged) == (3, 2, 8)
    assert longppl(model, Memory(), "abcabc", window=32).tokens == 5


def test_the_interval_is_of_segments_with_key_tokens() -> None:
    texts = [some_text(450, seed) for seed in range(3)]
    model = Memory(shift=0.1)
    found = longppl(model, model, texts, window=40, stride=40)
    sums: dict[int, list[float]] = {}
    bases = np.cumsum([0] + [len(text.encode()) for text in texts])
    for key in found.keys:
        sums.setdefault(int(bases[key.text] + key.offset) // 2048, []).append(key.nll)
    spread = block_bootstrap([math.fsum(s) for s in sums.values()], [len(s) for s in sums.values()])
    assert len(sums) > 2 and found.standard_error == pytest.approx(spread.standard_error)
    assert found.interval is not None and found.interval.low < found.value < found.interval.high
    assert found.interval.low == pytest.approx(math.exp(spread.interval.low))
    assert longppl(model, model, texts[0][:1500], window=40, stride=40).interval is None


class TestRefusals:
    def test_a_text_beyond_a_context_is_named(self) -> None:
        model, judge = Memory(context=100, name="small"), Memory(3, context=50, name="judge")
        with pytest.raises(DataError, match="text 1 has 120 tokens for the model small, whose context is 100"):
            longppl(model, judge, ["a" * 90, "a" * 120], window=8)
        with pytest.raises(DataError, match="text 0 has 51 tokens for the evaluator judge, whose context is 50"):
            longppl(model, judge, ["a" * 152], window=8)

    def test_or_cut(self) -> None:
        text = some_text(40)
        model, judge = Memory(context=101), Memory(3, context=50)
        found = longppl(model, judge, [text, "abc"], window=8, stride=4, cut=True)
        kept = text.encode()[:101].decode(errors="ignore")
        assert found.texts_cut == 1 and found.tokens == len(kept.encode()) - 1 + 2
        assert found.keys == longppl(model, judge, [kept, "abc"], window=8, stride=4).keys

    def test_no_more_is_read_than_a_context(self) -> None:
        model, judge = Memory(context=101), Memory(3, context=50)
        text = some_text(40)
        taken = 0

        def endless() -> Iterator[str]:
            nonlocal taken
            yield text
            while True:
                taken += 1
                yield "more and more "

        with pytest.raises(DataError, match=r"text 0 has [\d,]+ tokens or more for the evaluator .* 50; .*--cut"):
            longppl(model, judge, [endless()], window=8)
        found = longppl(model, judge, [endless()], window=8, stride=4, cut=True)
        assert found.texts_cut == 1 and taken < 1000
        assert found.keys == longppl(model, judge, text, window=8, stride=4, cut=True).keys

    def test_tokenizers_that_read_other_characters(self) -> None:
        model, judge = Memory(name="one"), Memory(name="two")
        encode = judge.tokenizer.encode
        judge.tokenizer.encode = lambda text, **more: encode(text.lower(), **more)  # type: ignore[method-assign]
        with pytest.raises(DataError, match="text 0: the tokenizers of two and one normalize it differently"):
            longppl(model, judge, "Abc" * 20, window=8)

    @pytest.mark.parametrize(
        ("settings", "said"),
        [
            ({"window": 0}, "window must be an integer of at least 1, got 0"), ({"stride": 0}, "stride must be"),
            ({"window": 4000}, "window must be below 4000, the context of memory"), ({"window": True}, "window"),
            ({"alpha": math.nan}, "alpha must be a finite number"), ({"beta": math.inf}, "beta must be a finite number"),
        ],
    )  # fmt: skip
    def test_settings(self, settings: dict[str, Any], said: str) -> None:
        with pytest.raises(ParameterError, match=said):
            longppl(Memory(), Memory(), "abc", **settings)

    @pytest.mark.parametrize("texts", [[], "", ["", "a"]])
    def test_nothing_to_predict(self, texts: Any) -> None:
        with pytest.raises(DataError, match="the texts have no token to predict"):
            longppl(Memory(), Memory(), texts, window=8)

    def test_log_probabilities_that_are_not_finite(self) -> None:
        class Broken(Memory):
            def score(self, inputs: Any, **more: Any) -> list[Scored]:
                return [Scored(s.first, s.logprobs - np.inf) for s in super().score(inputs, **more)]

        with pytest.raises(DataError, match="broken does not give every token a finite log-probability"):
            longppl(Broken(name="broken"), Memory(), "abc" * 9, window=8)


class TestSpans:
    def test_whole_characters(self) -> None:
        text = tokenized(ByteTokens(2), "a中b🥪")  # 1, 3, 1, 4 bytes
        assert text.spans.tolist() == [[0, 4], [1, 4], [4, 9], [5, 9], [5, 9]]
        assert text.data.decode() == "a中b🥪" and not text.front
        text = tokenized(ByteTokens(1, add_bos=True), "")
        assert text.ids == [BOS] and text.front and text.spans.shape == (0, 2)

    def test_spans_that_touch_are_one(self) -> None:
        runs = joined(np.array([[0, 2], [2, 5], [4, 5], [7, 9]]))
        assert runs.tolist() == [[0, 5], [7, 9]] and joined(np.empty((0, 2), np.int64)).shape == (0, 2)
        spans = np.array([[0, 5], [1, 3], [4, 6], [5, 7], [7, 9], [8, 10], [3, 3]])
        assert inside(spans, runs).tolist() == [True, True, False, False, True, False, False]
        assert not inside(spans, np.empty((0, 2), np.int64)).any()

    @pytest.mark.parametrize("width", [1, 2, 5])
    def test_shortened(self, width: int) -> None:
        text, tokenizer = some_text(60), ByteTokens(width, add_bos=True)
        for tokens in (2, 7, 60):
            kept = shortened(tokenizer, text, tokens)
            room = (tokens - 1) * width
            assert text.startswith(kept) and room - 4 < len(kept.encode()) <= room
        assert shortened(tokenizer, text, 10_000) == text
