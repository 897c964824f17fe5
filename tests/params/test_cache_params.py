"""Formats and eviction as a user writes them down: texts, round trips, and one clear line for what is wrong."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import kvik
from kvik.params import GROUP_SIZES, KV_FORMATS, CacheParams, cache_params, kv_text, parse_kv

FORMATS = st.sampled_from(KV_FORMATS)
POLICIES = st.sampled_from([
    None, kvik.StreamingLLM(sinks=8, window=100), kvik.H2O(budget=0.1, recent=0.25), kvik.SnapKV(budget=512, window=16),
    kvik.TOVA(budget=0.333, at=7), kvik.KeyDiff(every=1), kvik.ExpectedAttention(budget=1.0, sinks=0),
])  # fmt: skip


@st.composite
def caches(draw: st.DrawFn) -> CacheParams:
    fields: dict[str, Any] = {
        "k": draw(FORMATS),
        "v": draw(FORMATS),
        "policy": draw(POLICIES),
        "rotate": draw(st.booleans()),
    }
    if "int" in fields["k"] + fields["v"]:
        fields |= {"group_size": draw(st.sampled_from(GROUP_SIZES)), "keep_first": draw(st.integers(0, 1024))}
    if isinstance(fields["policy"], kvik.H2O | kvik.SnapKV | kvik.KeyDiff):
        fields |= {
            "layers": draw(st.sampled_from(["uniform", "pyramid"])),
            "heads": draw(st.sampled_from(["uniform", "ada"])),
        }
    return CacheParams(**fields)


@pytest.mark.parametrize(
    ("text", "formats"),
    [("f16", ("f16", "f16")), ("FP16", ("f16", "f16")), ("bfloat16", ("bf16", "bf16")), ("int8", ("int8", "int8")),
     ("k8v4", ("int8", "int4")), ("k16v8", ("f16", "int8")), ("int8/int4", ("int8", "int4")), ("bf16/fp32", ("bf16", "f32"))],
)  # fmt: skip
def test_formats_by_text(text: str, formats: tuple[str, str]) -> None:
    assert parse_kv(text) == formats
    assert parse_kv(kv_text(*parse_kv(text))) == formats


@pytest.mark.parametrize(
    ("text", "line"),
    [("int88", "kv must be one of f32, f16, bf16, int8, int4, k8v4, got 'int88'; did you mean 'int8'?"),
     ("k8v5", "kv takes 32, 16, 8 or 4 bits, got 'k8v5'"),
     ("int8/int", "kv (values) must be one of f32, f16, bf16, int8, int4, got 'int'"), (8, "kv must be a string, got 8")],
)  # fmt: skip
def test_wrong_formats(text: Any, line: str) -> None:
    with pytest.raises(kvik.ParameterError, match=re.escape(line)):
        parse_kv(text)


@given(caches())
def test_round_trips(params: CacheParams) -> None:
    assert CacheParams.from_dict(json.loads(json.dumps(params.as_dict()))) == params
    assert cache_params(params.kv, params.evict, params) == params
    assert hash(params) == hash(CacheParams.from_dict(params.as_dict()))
    assert params.kv in params.text and "\n" not in params.text


def test_texts_for_people() -> None:
    assert CacheParams().text == "f16"
    params = CacheParams(
        k="int8", v="int4", group_size=32, keep_first=0, rotate=True, policy="h2o:budget=12.5%", heads="ada"
    )
    assert params.text == (
        "k8v4, groups of 32, first 0 kept, rotated, h2o:budget=12.5%,every=64,recent=0.5,heads=ada"
    )  # fmt: skip


@given(caches(), FORMATS)
def test_some_of_it_is_changed(base: CacheParams, kv: str) -> None:
    assert cache_params(None, None, base) == base
    changed = cache_params(kv, None, base)
    assert (changed.k, changed.v, changed.policy, changed.heads) == (kv, kv, base.policy, base.heads)
    kept = cache_params(None, "none", base)
    assert kept.policy is None and kept.layers == kept.heads == "uniform" and kept.kv == base.kv
    one = cache_params(None, "snapkv:layers=pyramid, budget=0.5 ,heads=ada,kernel=1", base)
    assert (one.layers, one.heads, one.policy) == ("pyramid", "ada", kvik.SnapKV(budget=0.5, kernel=1))


def test_a_base_with_integers_becomes_one_without() -> None:
    base = CacheParams(k="int4", v="int4", group_size=128, keep_first=16)
    assert cache_params("f32", None, base) == CacheParams(k="f32", v="f32")
    assert cache_params("int8", None, base) == CacheParams(k="int8", v="int8", group_size=128, keep_first=16)


@pytest.mark.parametrize(
    ("fields", "line"),
    [({"k": "int9"}, "k must be one of f32, f16, bf16, int8, int4, got 'int9'; did you mean 'int8'?"),
     ({"k": 8}, "k must be a string, got 8"),
     ({"k": "int8", "group_size": 48}, "group_size must be 16, 32, 64 or 128, got 48"),
     ({"k": "int8", "group_size": True}, "group_size must be an integer, got True"),
     ({"v": "int8", "keep_first": 1025}, "keep_first must be in [0, 1024], got 1025"),
     ({"keep_first": 8}, "keep_first 8 needs k or v in int8 or int4, they are f16 and f16"),
     ({"group_size": 16}, "group_size 16 needs k or v in int8 or int4, they are f16 and f16"),
     ({"rotate": 1}, "rotate must be True or False, got 1"),
     ({"policy": 0.25}, "policy must be a policy or its text, got 0.25"),
     ({"policy": kvik.params.Scorer()}, "policy must be a policy or its text"),
     ({"policy": "snap"}, "policy must be one of none, streamingllm, h2o, snapkv, tova, keydiff, expectedattention, got 'snap'"),
     ({"layers": "pyramids", "policy": "h2o"}, "layers must be one of uniform, pyramid, got 'pyramids'; did you mean 'pyramid'?"),
     ({"heads": "ada"}, "heads 'ada' needs a policy with a budget, there is none"),
     ({"layers": "pyramid", "policy": "streamingllm"}, "layers 'pyramid' needs a policy with a budget, streamingllm has none"),
     ({"heads": "ada", "policy": "tova"}, "heads 'ada' cannot go with tova: its heads keep the same tokens")],
)  # fmt: skip
def test_wrong_fields(fields: dict[str, Any], line: str) -> None:
    with pytest.raises(kvik.ParameterError, match=re.escape(line)):
        CacheParams(**fields)


def test_wrong_json() -> None:
    with pytest.raises(kvik.ParameterError, match=re.escape("got 'polcy'; did you mean 'policy'?")):
        CacheParams.from_dict({"polcy": "h2o"})
    with pytest.raises(kvik.ParameterError, match="cache must be an object, got 'int8'"):
        CacheParams.from_dict("int8")  # type: ignore[arg-type]
    with pytest.raises(kvik.ParameterError, match="policy h2o: layers is given twice"):
        cache_params(None, "h2o:layers=pyramid,layers=uniform", CacheParams())
    with pytest.raises(kvik.ParameterError, match="evict must be a string, got 5"):
        cache_params(None, 5, CacheParams())  # type: ignore[arg-type]
