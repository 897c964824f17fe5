"""`kvik compare kv` on a fake model, and its divergence against plain arithmetic."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest

from kvik.cli.compare_kv import KvOptions, side_by_side
from kvik.engine.request import LogitRows
from kvik.evaluation.compare_kv import compare_caches
from kvik.evaluation.rows import compare_rows, kl_divergence, log_softmax
from kvik.params import H2O, TOVA, CacheParams, SamplingParams

WORDS = " a b c d e f g h i j k l m n o p q r s t u v w x y z" * 4  # 104 tokens
FULL, INT8 = CacheParams(), CacheParams(k="int8", v="int8")


def names(**given):
    return list(KvOptions(**given).caches())


def test_each_with_each_or_in_pairs():
    assert names() == ["int8", "k8v4", "int4"]
    assert names(kv=["f16", "int8"], evict=["none", "h2o:budget=9"]) == [
        "int8",
        "f16 h2o:budget=9",
        "int8 h2o:budget=9",
    ]
    assert names(kv=["f16", "int8"], evict=["none", "h2o:budget=9"], zip=True) == ["int8 h2o:budget=9"]
    assert names(evict=["h2o"]) == ["f16 h2o"] and names(kv=["int8", "i8"]) == ["int8"]
    assert names(kv=["f16"], against="f32") == ["f16"]
    some = KvOptions(
        kv=["f16", "int4"], evict=["none", "h2o"], kv_group_size=32, kv_heads="ada", kv_rotate=True
    ).caches()
    assert some["int4"] == CacheParams(k="int4", v="int4", group_size=32, rotate=True)
    assert some["f16 h2o"] == CacheParams(policy=H2O(), heads="ada", rotate=True)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("--kv int5", "--kv must be one of"),
        ("--evict snapvk", "--evict: policy must be one of"),
        ("--against int8", "--against must be f16, bf16 or f32, got 'int8'"),
        ("--against int9", "--against must be one of"),
        ("--kv f16", "--kv and --evict name nothing beside the full cache in f16"),
        ("--zip --kv int8 --kv int4 --evict none", "--zip needs as many --kv as --evict, got 2 and 1"),
        ("--evict h2o --kv-group-size 32", "--kv-group-size has no effect: no cache here has int8 or int4"),
        ("--kv int8 --kv-heads ada", "--kv-heads has no effect: no cache here has a budget"),
        ("--kv int8 --kv-group-size 7", "--kv-group-size must be 16"),
        ("--repeat 0", "--repeat must be in [1, 100]"),
        ("--max-tokens 1025", "--max-tokens must be in [1, 1024]"),
        ("--seed -1", "--seed must be in"),
        ("--plot x.txt", "--plot writes"),
    ],
)
def test_refused_before_a_model_is_loaded(kvik, made, given, said):
    ended = kvik("compare", "kv", "hi", *given.split())
    assert ended.code == 2 and made == [] and ended.err.count("\n") == 1 and said in ended.err


def test_of_a_file(kvik, made, tmp_path):
    path, plot = tmp_path / "words.txt", tmp_path / "kv.svg"
    path.write_text(WORDS + "\n")
    asked = (
        "compare",
        "kv",
        str(path),
        "--raw",
        "--kv",
        "f16",
        "--kv",
        "int4",
        "--evict",
        "none",
        "--evict",
        "tova:budget=20",
    )
    ended = kvik(*asked, "--repeat", "2", "--plot", str(plot))
    assert ended.code == 0, ended.err
    lines = ended.out.splitlines()
    assert "104 prompt tokens, 2 runs" in lines[1]
    assert [line.split("  ")[0] for line in lines[3:8]] == [
        "cache", "full, f16", "int4", "f16 tova:budget=20", "int4 tova:budget=20",
    ]  # fmt: skip
    assert "int4: the same text" in lines and "The sky is blue." in ended.out and plot.read_bytes().startswith(b"<?xml")
    llm = made[-1]
    assert llm.settings["cache"] == CacheParams(k="int4", v="int4")  # whose blocks are the largest
    assert len(llm.caches) == 4 * 3 and llm.caches.count(FULL) == 3
    report = json.loads(kvik(*asked, "--repeat", "1", "--json").out)
    full, int4, tova, both = report["caches"]
    assert full["moved"] is None and int4["moved"]["kl_mean"] == 0 and int4["moved"]["same_top"] == 1
    assert int4["moved"]["tokens"] == len(full["token_ids"]) == full["common"] == 8
    assert both["cache"]["policy"].startswith("tova:budget=20") and both["cache"]["k"] == "int4"
    assert tova["kv_bytes_now"] < full["kv_bytes_now"] and tova["kv_tokens_kept"] == 20 + 7 < full["kv_tokens_kept"]
    assert report["settings"]["prompt"] == WORDS


def test_a_policy_without_sense_for_the_prompt(kvik):
    ended = kvik("compare", "kv", WORDS, "--raw", "--evict", "snapkv:budget=25%")
    assert ended.code == 2 and "--evict: budget 25% keeps 26 of 104 tokens" in ended.err


class Model:
    """Logits depend on the token and, with a cache that is not full, are blunter; its answers too."""

    info = SimpleNamespace(name="m", digest="d", vocab_size=6)
    tokenizer = SimpleNamespace(vocab_size=6)

    def __init__(self):
        self.asked = []

    def generate(self, prompts, params, *, cache=None):
        self.asked.append(cache)
        ids = (1, 2, 3, 4) if cache == FULL else (1, 2, 5)
        choice = SimpleNamespace(text=str(ids), token_ids=ids, finish_reason="stop")
        usage = SimpleNamespace(kv_bytes_now=100, kv_bytes_peak=200, kv_tokens_kept=5.0, completion_tokens=len(ids))
        return [SimpleNamespace(choices=(choice,), usage=usage, stats=SimpleNamespace(decode=0.5))]

    def logits(self, ids, cache):
        rows = np.random.default_rng(3).normal(0, 3, (6, 6)).astype(np.float32)[list(ids)]
        return rows if cache == FULL else rows * np.float32(0.5) - np.eye(6, dtype=np.float32)[3] * 2

    def score_rows(self, ids, *, first=1, cache=None):
        logits = self.logits(ids[first - 1 : -1], cache)
        for start in range(0, len(logits), 3):
            yield LogitRows(first + start, logits[start : start + 3])


def test_divergence_is_of_the_full_caches_answer():
    model = Model()
    full, other = compare_caches(
        model, [0, 1], FULL, {"int8": INT8}, SamplingParams(temperature=0), repeat=2, compare=compare_rows
    )
    assert model.asked == [FULL, INT8, INT8, FULL, FULL, INT8]  # one round that does not count, then turn about
    assert full.moved is None and full.tokens_per_second == 6 and other.tokens_per_second == 4
    ids = [1, 1, 2, 3]  # before each token of the full cache's answer
    p, q = (log_softmax(model.logits(ids, cache)) for cache in (FULL, INT8))
    kl = kl_divergence(p, q)
    same = p.argmax(1) == q.argmax(1)
    assert other.moved == pytest.approx((4, kl.mean(), kl.max(), same.mean(), np.flatnonzero(~same)[0]))
    assert 0 < same.sum() < 4 and other.common == 2 and other.text == "(1, 2, 5)"


def test_texts_side_by_side():
    one = SimpleNamespace(text="a b c d e f g h i j k\nnew", cache=FULL, name="full")
    other = SimpleNamespace(text="x", cache=CacheParams(policy=TOVA()), name="f16 tova")
    assert side_by_side(one, other, 43) == [
        "full, f16            │ f16 tova", "                     │", "a b c d e f g h i j  │ x", "k                    │",
        "new                  │",
    ]  # fmt: skip
