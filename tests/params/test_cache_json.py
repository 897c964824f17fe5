"""kv and evict as JSON has them: texts or objects, over an engine's cache; each wrong field under its path."""

from __future__ import annotations

import pytest

from kvik.errors import ParameterError
from kvik.params import CacheParams, ExpectedAttention, SnapKV, StreamingLLM, json_cache

BASE = CacheParams()
PACKED = CacheParams(k="int8", v="int4", group_size=32, keep_first=0, policy="snapkv:budget=50%")


@pytest.mark.parametrize(
    ("kv", "evict", "base", "want"),
    [
        ("k8v4", None, BASE, CacheParams(k="int8", v="int4")),
        ({"k": "int8"}, None, BASE, CacheParams(k="int8")),
        ({"k": "int4", "v": "int4", "group_size": 16, "rotate": True}, None, BASE,
         CacheParams(k="int4", v="int4", group_size=16, rotate=True)),
        ({"policy": "h2o:budget=8", "heads": "ada"}, None, BASE, CacheParams(policy="h2o:budget=8", heads="ada")),
        # no integers are left that would be packed in groups
        ("f16", None, PACKED, CacheParams(policy=PACKED.policy)),
        ({"k": "bf16", "v": "f16"}, None, PACKED, CacheParams(k="bf16", policy=PACKED.policy)),
        ({"v": "f16"}, None, PACKED, CacheParams(k="int8", group_size=32, keep_first=0, policy=PACKED.policy)),
        (None, "none", PACKED, CacheParams(k="int8", v="int4", group_size=32, keep_first=0)),
        (None, "snapkv:budget=64,layers=pyramid", BASE, CacheParams(policy=SnapKV(budget=64), layers="pyramid")),
        (None, {"policy": "none"}, PACKED, CacheParams(k="int8", v="int4", group_size=32, keep_first=0)),
        (None, {"policy": "snapkv", "budget": "25%", "window": 8, "heads": "ada"}, BASE,
         CacheParams(policy=SnapKV(budget=0.25, window=8), heads="ada")),
        (None, {"policy": "expectedattention", "budget": 0.5, "sinks": 2}, BASE,
         CacheParams(policy=ExpectedAttention(budget=0.5, sinks=2))),
        ("int8", {"policy": "streamingllm:sinks=2", "window": 100}, BASE,
         CacheParams(k="int8", v="int8", policy=StreamingLLM(sinks=2, window=100))),
    ],
)  # fmt: skip
def test_read(kv, evict, base, want):
    assert json_cache(kv, evict, base) == want


def test_nothing_said_is_none():
    assert json_cache(None, None, PACKED) is None


@pytest.mark.parametrize(
    ("kv", "evict", "said"),
    [
        ("int5", None, r"^kv must be one of .* got 'int5'; did you mean 'int\d'"),
        (8, None, "^kv must be a string or an object, got 8"),
        ({"k": "int9"}, None, r"^kv\.k must be one of"),
        ({"kk": "int8"}, None, r"^kv: a field must be one of .* got 'kk'"),
        ({"k": "int8", "group_size": 48}, None, r"^kv\.group_size must be 16, 32, 64 or 128, got 48"),
        ({"group_size": 32}, None, r"^kv\.group_size 32 needs k or v in int8 or int4"),
        ({"k": True}, None, r"^kv\.k must be"),
        ({"policy": "h2o"}, "none", r"^kv\.policy and evict both say"),
        ({"layers": "pyramid"}, None, r"^kv\.layers 'pyramid' needs a policy"),
        (None, 5, "^evict must be a string or an object"),
        (None, "snapvk", "^evict: policy must be one of .* did you mean 'snapkv'"),
        (None, {"budget": 0.5}, r"^evict\.policy must be the name of a policy"),
        (None, {"policy": "h2o", "window": 4}, "^evict: a field of h2o must be one of .* got 'window'"),
        (None, {"policy": "h2o", "is_share": True}, "^evict: a field of h2o must be one of .* got 'is_share'"),
        (None, {"policy": "none", "budget": 4}, "^evict: policy 'none' takes no fields, got 'budget'"),
        (None, {"policy": "snapkv", "budget": 0}, r"^evict\.budget must be"),
        (None, {"policy": "snapkv", "budget": "some"}, r"^evict\.budget must be a number, got 'some'"),
        (None, {"policy": "snapkv", "budget": True}, r"^evict\.budget must be"),
        (None, {"policy": "snapkv", "kernel": 4}, r"^evict\.kernel must be odd"),
        (None, {"policy": "h2o", "heads": "adda"}, r"^evict\.heads must be one of"),
        (None, {"policy": "streamingllm", "heads": "ada"}, r"^evict\.heads 'ada' needs a policy with a budget"),
    ],
)
def test_refused(kv, evict, said):
    with pytest.raises(ParameterError, match=said):
        json_cache(kv, evict, BASE)
