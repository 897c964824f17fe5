from __future__ import annotations

import json
from dataclasses import replace

import pytest

from kvik.cli import bench, bench_cache, options


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(bench, "bandwidth", lambda threads: 30e9)


def test_json(kvik, made):
    ended = kvik("bench", "--json", "--prompt-tokens", "20", "--new-tokens", "6", "--repeat", "3", "--depth", "5")
    assert ended.code == 0 and ended.err == ""
    report = json.loads(ended.out)
    for name in ("prefill_tok_s", "decode_tok_s", "first_token_ms", "load_ms", "read_gb_s", "peak_rss_bytes"):
        assert report[name] > 0, name
    assert report["bandwidth_gb_s"] == 30
    assert set(report["step_ms"]) == {"matrices", "attention", "rest", "python"}
    assert report["read_gb_s"] == pytest.approx(1.0)  # the fake's step spends a microsecond in matrices
    assert report["step_ms"]["matrices"] == pytest.approx(1e-3)
    for name in ("prefill_tok_s", "decode_tok_s", "first_token_ms", "read_gb_s"):
        assert report["range"][name]["min"] <= report[name] <= report["range"][name]["max"]
    assert report["settings"] == {
        "prompt_tokens": 20, "new_tokens": 6, "sequences": 1, "depth": 5, "repeat": 3, "seed": 0
    }  # fmt: skip
    assert report["model"]["name"] == "fake" and report["machine"]["cores"] >= 1
    asked = made[0].asked
    assert [(len(prompt), params.max_tokens) for prompt, params in asked] == [
        (20, 1),
        (5, None),
    ] * 4  # a round to warm up
    assert all(params.ignore_eos and params.temperature == 0.7 for _, params in asked)
    assert 0 not in {token for prompt, _ in asked for token in prompt}  # special tokens


def test_prompts_are_those_of_the_seed(kvik, made):
    for seed in ("1", "1", "2"):
        kvik("bench", "--json", "--prompt-tokens", "20", "--new-tokens", "1", "--repeat", "1", "--seed", seed)
    first, again, other = ([prompt for prompt, _ in model.asked] for model in made)
    assert first == again != other
    assert first[0] != first[2]  # each round has its own


def test_empty_context_is_one_token(kvik, made):
    kvik("bench", "--prompt-tokens", "4", "--new-tokens", "2", "--repeat", "1")
    assert [len(prompt) for prompt, _ in made[0].asked] == [4, 1] * 2


def test_table(kvik):
    out = kvik("bench", "--prompt-tokens", "4", "--new-tokens", "2", "--repeat", "1").out
    for name in (
        "fake:",
        "prefill_tok_s",
        "decode_tok_s",
        "step python",
        "read_gb_s",
        "bandwidth_gb_s",
        "peak_rss_bytes",
    ):
        assert name in out


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--sequences", "0"], ("--sequences", "at least 1")),
        (["--sequences", "9", "--max-sequences", "8"], ("--sequences is 9", "--max-sequences allows 8")),
        (["--sequences", "9", "--kv-bytes", "64kB"], ("--prompt-tokens with --sequences", "--kv-bytes")),
        (
            ["--sequences", "2", "--depth", "2", "--no-prefix-sharing"],
            ("--sequences and --depth", "--no-prefix-sharing"),
        ),
        (["--prompt-tokens", "0"], ("--prompt-tokens", "at least 1")),
        (["--repeat", "0"], ("--repeat", "at least 1")),
        (["--depth", "-1"], ("--depth", "at least 0")),
        (["--prompt-tokens", "2048"], ("--prompt-tokens", "2049", "2048")),
        (["--depth", "2000", "--new-tokens", "48"], ("--depth", "2049", "2048")),
        (["--evict", "snapkv:budget=1%"], ("--evict with --prompt-tokens 512: budget 1% keeps 5 of 512 tokens",)),
        (["--evict", "snapkv", "--depth", "40"], ("--evict with --depth 40: budget 25% keeps 10 of 40 tokens",)),
        (["--evict", "h2o", "--sequences", "2", "--depth", "90"], ("--sequences and --depth", "--evict h2o takes no")),
    ],
)
def test_refused(kvik, arguments, named):
    ended = kvik("bench", *arguments)
    assert ended.code == 2 and ended.out == ""
    (line,) = ended.err.splitlines()
    for part in named:
        assert part in line


def test_caches(kvik, made):
    asked = (
        "bench",
        "--kv",
        "int8",
        "--evict",
        "snapkv:budget=50%",
        "--depth",
        "200",
        "--new-tokens",
        "3",
        "--repeat",
        "1",
    )
    ended = kvik(*asked)
    assert ended.code == 0, ended.err
    assert "kv int8, snapkv:budget=50%," in ended.out and {cache.k for cache in made[-1].caches} == {"int8"}
    assert made[-1].engine.stats.evictions == 1 or made[-1].engine.stats.steps == 3


def test_torch_has_no_reading_rate(kvik, monkeypatch):
    make = options.make_llm

    def torch(model, **settings):
        llm = make(model, **settings)
        llm.info = replace(llm.info, executor="torch", isa=None)
        return llm

    monkeypatch.setattr(options, "make_llm", torch)
    arguments = ("bench", "--prompt-tokens", "4", "--new-tokens", "2", "--repeat", "1")
    assert json.loads(kvik(*arguments, "--json").out)["read_gb_s"] is None
    assert "read_gb_s" not in kvik(*arguments).out


def test_several_sequences_at_once(kvik, made):
    arguments = ("--prompt-tokens", "20", "--new-tokens", "6", "--repeat", "1", "--sequences", "3", "--depth", "40")
    report = json.loads(kvik("bench", "--json", *arguments).out)
    asked = [(len(prompt), params.max_tokens) for prompt, params in made[0].asked]
    assert asked == ([(20, 1)] * 3 + [(40, 1)] * 3 + [(40, None)] * 3) * 2
    assert report["settings"]["sequences"] == 3
    stats = made[0].engine.stats
    assert (stats.steps, stats.generated) == (6, 18)  # each step has a token of each
    assert not made[0].engine.has_work
    step = sum(report["step_ms"].values())
    assert report["decode_tok_s"] == pytest.approx(3e3 / step, rel=1e-3)
    assert ", 3 sequences" in kvik("bench", *arguments).out


class TestWithoutCache:
    arguments = ("bench", "--no-kv-cache", "--max-length", "100", "--repeat", "2")

    def test_json(self, kvik, made, monkeypatch):
        found = json.loads(kvik(*self.arguments, "--json").out)
        assert [one["length"] for one in found["lengths"]] == [16, 32, 64, 100]
        for one in found["lengths"]:
            assert one["speedup"] == pytest.approx(one["recomputed_ms"] / one["cached_ms"])
            assert one["answer_speedup"] == pytest.approx(one["answer_recomputed_ms"] / one["answer_cached_ms"])
        assert found["settings"] == {"max_length": 100, "repeat": 2, "seed": 0}
        engine = made[0].engine
        assert engine.stats.prefix_hit_tokens == 0
        assert engine.stats.prompt_tokens == 16 + 2 * (16 + 32 + 64 + 100)  # all of it, each time

    def test_table(self, kvik):
        out = kvik(*self.arguments).out
        assert "recomputed" in out and out.splitlines()[4].split()[0] == "16" and "The cache is" in out

    def test_arithmetic(self):
        found = bench_cache._with_answers([(16, 2.0, 1.0), (32, 2.0, 4.0), (64, 2.0, 40.0)])
        assert [one.speedup for one in found] == [0.5, 2.0, 20.0]
        assert found[1].answer_cached_ms == 64 and found[1].answer_recomputed_ms == 16 * 1.5 + 16 * 2.5
        assert bench_cache.crossover(found) == 32
        assert bench_cache.crossover(found[:1]) is None
        assert bench_cache._where(found, "speedup", 10) == round(32 + 32 * 8 / 18)
        assert bench_cache._where(found, "speedup", 50) is None
        assert "faster from 32 tokens on" in bench_cache.said(
            {"crossover": 32, "guide_length": 46, "guide_answer_length": None}
        )

    @pytest.mark.parametrize("ending", ["png", "svg"])
    def test_picture(self, kvik, tmp_path, ending):
        pytest.importorskip("matplotlib")
        path = tmp_path / f"cache.{ending}"
        assert kvik(*self.arguments, "--plot", str(path)).code == 0
        assert path.read_bytes()[:4] in (b"\x89PNG", b"<?xm")

    def test_missing_matplotlib_is_one_line(self, kvik, made, monkeypatch):
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        ended = kvik(*self.arguments, "--plot", "x.png")
        assert ended.code == 2 and made == []
        assert ended.err == 'kvik: error: --plot needs matplotlib: pip install "kvik[plots]"\n'

    @pytest.mark.parametrize(
        ("given", "named"),
        [
            (["--plot", "x.png"], "--plot needs --no-kv-cache"),
            (["--max-length", "64"], "--max-length needs --no-kv-cache"),
            (["--no-kv-cache", "--max-length", "15"], "at least 16"),
            (["--no-kv-cache", "--max-length", "2048"], "below 2040"),
            (["--no-kv-cache", "--plot", "x.jpeg"], ".png"),
            (["--no-kv-cache", "--sequences", "2"], "--sequences"),
        ],
    )
    def test_refused(self, kvik, given, named):
        ended = kvik("bench", *given)
        assert ended.code == 2 and named in ended.err and ended.err.count("\n") == 1
