"""--kv, --evict and what is beside them: shared by the verbs, checked before a model is loaded, named in errors."""

from __future__ import annotations

import dataclasses
import json

import pytest

from kvik.cli.cache_options import CacheOptions
from kvik.params import H2O, CacheParams, SnapKV, StreamingLLM

WORDS = " a b c d e f g h i j k l m n o p q r s t u v w x y z" * 4  # 104 tokens


def test_options_are_the_fields_of_the_parameters():
    fields = set(CacheParams.__dataclass_fields__) - {"k", "v", "policy"}
    assert {f.name for f in dataclasses.fields(CacheOptions)} == {"kv", "evict", *(f"kv_{name}" for name in fields)}
    assert CacheOptions().cache() == CacheParams()


@pytest.mark.parametrize(
    ("given", "want"),
    [
        ("--kv int8", CacheParams(k="int8", v="int8")),
        ("--kv bf16/int4 --kv-group-size 128 --kv-keep-first 16 --kv-rotate",
         CacheParams(k="bf16", v="int4", group_size=128, keep_first=16, rotate=True)),
        ("--evict snapkv:budget=25%,window=8", CacheParams(policy=SnapKV(budget=0.25, window=8))),
        ("--evict h2o:budget=30,heads=ada --kv-layers pyramid", CacheParams(policy=H2O(budget=30), layers="pyramid", heads="ada")),
        ("--evict streamingllm:window=64 --kv k8v4",
         CacheParams(k="int8", v="int4", policy=StreamingLLM(window=64))),
    ],
)  # fmt: skip
@pytest.mark.parametrize("verb", ["run", "compare decoding", "xray"])
def test_arrive(kvik, made, given, want, verb):
    options = given.replace("--kv ", "--kv-format ") if verb == "xray" else given
    ended = kvik(*verb.split(), WORDS, "--raw", "--max-tokens", "3", *options.split())
    assert ended.code == 0, ended.err
    assert made[-1].settings["cache"] == want == made[-1].caches[-1]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("--kv int5", "--kv must be one of f32, f16, bf16, int8, int4, k8v4, got 'int5'; did you mean 'int"),
        ("--kv k8v3", "--kv takes 32, 16, 8 or 4 bits, got 'k8v3'"),
        ("--evict snapvk", "--evict: policy must be one of none, streamingllm"),
        ("--evict snapkv:budget=0", "--evict: budget must be"),
        ("--evict snapkv:windw=4", "--evict: a field of snapkv must be one of budget"),
        ("--evict snapkv:budget=16", "--evict: budget 16 is below the 32 that snapkv always keeps"),
        ("--kv int8 --kv-group-size 48", "--kv-group-size must be 16, 32, 64 or 128, got 48"),
        ("--kv-group-size 32", "--kv-group-size 32 needs --kv int8 or int4, they are f16 and f16"),
        ("--kv int8 --kv-keep-first -1", "--kv-keep-first must be in [0, 1024]"),
        ("--kv-layers pyramid", "--kv-layers 'pyramid' needs a policy with a budget, there is none"),
        ("--evict h2o --kv-heads adda", "--kv-heads must be one of uniform, ada"),
        ("--evict h2o,heads=ada --kv-heads uniform", "--evict: policy must be one of"),
        (
            "--evict h2o:heads=ada --kv-heads uniform",
            "--kv-heads is uniform and --evict says heads=ada; give one of them",
        ),
        ("--evict tova --kv-heads ada", "heads 'ada' cannot go with tova"),
    ],
)
def test_refused_before_a_model_is_loaded(kvik, made, given, said):
    ended = kvik("run", "hi", *given.split())
    assert ended.code == 2 and made == [] and ended.out == ""
    (line,) = ended.err.splitlines()
    assert said in line


@pytest.mark.parametrize(
    ("evict", "said"),
    [
        (
            "snapkv",
            "--evict: budget 25% keeps 26 of 104 tokens and is below the 32 that snapkv always keeps (window=32)",
        ),
        ("h2o:budget=200,every=0", "--evict: budget 200 is above the prompt's 104 tokens"),
    ],
)
def test_policies_that_make_no_sense_for_the_prompt(kvik, evict, said):
    ended = kvik("run", WORDS, "--raw", "--evict", evict)
    assert ended.code == 2 and said in ended.err and ended.err.count("\n") == 1


def test_the_line_says_what_was_kept(kvik):
    ended = kvik("run", WORDS, "--raw", "--evict", "h2o:budget=20", "--max-tokens", "5")
    assert ended.code == 0 and "24 of 108 tokens kept (" in ended.err
    assert "tokens kept" not in kvik("run", WORDS, "--raw", "--max-tokens", "5").err
    usage = json.loads(kvik("run", WORDS, "--raw", "--evict", "h2o:budget=20", "--max-tokens", "5", "--json").out)[
        "usage"
    ]
    assert usage["kv_tokens_kept"] == 24 and usage["kv_bytes_now"] == 2 * 4096 < usage["kv_bytes_peak"]


def test_stats_count_evictions(kvik):
    ended = kvik("run", WORDS, "--raw", "--evict", "h2o:budget=20", "--max-tokens", "5", "--stats")
    assert "  evictions" in ended.err and "84 tokens given up" in ended.err


def test_a_line_of_a_batch_has_its_own(kvik, made, tmp_path):
    lines = [
        {"prompt": WORDS, "kv": "int8"}, {"prompt": WORDS, "evict": {"policy": "h2o", "budget": 20}}, {"prompt": WORDS},
        {"prompt": WORDS, "evict": "snapkv"}, {"prompt": "hi", "kv": {"k": "int9"}}, {"prompt": "hi"},
    ]  # fmt: skip
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    asked = (
        "run",
        "--batch",
        str(source),
        "--out",
        str(out),
        "--raw",
        "--kv",
        "k8v4",
        "--evict",
        "tova:budget=40,at=60",
    )
    ended = kvik(*asked)
    assert ended.code == 65
    tova = CacheParams(k="int8", v="int4", policy="tova:budget=40,at=60")
    assert made[-1].caches == [
        CacheParams(k="int8", v="int8", policy=tova.policy), CacheParams(k="int8", v="int4", policy=H2O(budget=20)), tova, tova,
    ]  # fmt: skip
    found = {line["line"]: line for line in map(json.loads, out.read_text().splitlines())}
    assert found[4]["error"].startswith("evict: budget 25% keeps 26 of 104") and found[5]["error"].startswith(
        "kv.k must"
    )
    assert found[2]["receipt"]["cache"]["policy"].startswith("h2o:budget=20")
    lines[0]["kv"] = "int4"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    ended = kvik(*asked, "--resume")
    assert ended.code == 65 and "of another request than line 1" in ended.err
