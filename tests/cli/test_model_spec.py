from __future__ import annotations

import pytest
from models.small_models import write_gguf

from kvik.cli import model_spec
from kvik.cli.machine import Memory
from kvik.cli.model_spec import ModelSpec, check_scored, find_models, load_models, parse_spec, parse_specs
from kvik.errors import ParameterError, TryAgainError
from kvik.params import CacheParams, EngineParams


def test_a_setting_belongs_to_the_model_before_it() -> None:
    found = parse_specs("--models", "A, weights=fp32,executor=torch,B,./c=d.gguf,kv=f32,http://host/v1?a=b")
    assert found == [
        ModelSpec("A", (("weights", "f32"), ("executor", "torch"))), ModelSpec("B"),
        ModelSpec("./c=d.gguf", (("kv", "f32"),)), ModelSpec("http://host/v1?a=b"),
    ]  # fmt: skip
    assert str(found[0]) == "A,weights=f32,executor=torch" and found[0].get("kv", "f16") == "f16"


def test_caches():
    text = "A,kv=K8V4,group_size=32,keep_first=0,rotate=true,evict=snapkv:budget=25%+window=8+heads=ada,B,evict=none,C"
    first, second, third = parse_specs("--models", text)
    assert first.cache() == CacheParams(
        k="int8", v="int4", group_size=32, keep_first=0, rotate=True, policy="snapkv:budget=25%,window=8", heads="ada"
    )
    assert str(first) == text.partition(",B")[0].replace("K8V4", "k8v4")
    assert second.cache() == CacheParams() and third.cache() is None
    assert parse_spec("--model", "A,weights=int8,kv=int4").arguments() == {
        "weights": "int8", "cache": CacheParams(k="int4", v="int4"),
    }  # fmt: skip
    assert third.arguments() == {}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "A,weigths=int8",
            r"--model: a setting of A must be one of weights, kv, .* got 'weigths'; did you mean 'weights'",
        ),
        ("A,weights=int5", r"--model: weights must be one of auto, .* got 'int5'"),
        ("A,kv=", "--model: kv must be one of"),
        ("A,executor=cuda", "--model: executor must be one of"),
        ("A,device=cuda", "--model: device must be 'cpu' with the native executor"),
        ("A,evict=snapvk", "--model: policy must be one of none, .* did you mean 'snapkv'"),
        ("A,evict=snapkv:budget=16", "--model: budget 16 is below the 32"),
        ("A,evict=snapkv:budget=25%,window=8", "--model: a setting of A must be one of .* got 'window'"),
        ("A,group_size=32", "--model: group_size 32 needs k or v in int8 or int4"),
        ("A,kv=int8,group_size=x", "--model: group_size must be 16, 32, 64 or 128, got 'x'"),
        ("A,rotate=yes", "--model: rotate must be one of true, false"),
        ("A,kv=f16,kv=f32", "--model: kv of A is given twice"),
        ("weights=int8,A", "--model begins with weights=int8, before which a model must stand"),
        ("A,,B", "--model has an empty piece"),
        ("", "--model has an empty piece"),
        ("A,kv=f16,B", "--model takes one model, got 2: A,kv=f16, B"),
    ],
)
def test_refusals(text: str, said: str) -> None:
    with pytest.raises(ParameterError, match=said):
        parse_spec("--model", text)


def test_a_text_has_no_prompt_to_evict_behind() -> None:
    check_scored("--models", parse_specs("--models", "A,evict=snapkv:at=200,B,evict=h2o,C"))
    with pytest.raises(
        ParameterError, match="--models: B,evict=snapkv: snapkv evicts at the prompt's length, and a text has none"
    ):
        check_scored("--models", parse_specs("--models", "A,B,evict=snapkv"))


@pytest.fixture
def small(tmp_path, monkeypatch):
    monkeypatch.setenv("KVIK_HOME", str(tmp_path / "store"))
    return str(write_gguf(tmp_path / "small.gguf"))


def test_models_beside_each_other(small, made) -> None:
    specs = [
        ModelSpec(small, (("weights", "int8"),)),
        ModelSpec(small, (("kv", "f32"),)),
        ModelSpec(small, (("kv", "f32"),)),
    ]
    first, second, third = load_models(specs, EngineParams(threads=1), tokens=64)
    assert len(made) == 2 and second is third and first is not second
    assert [m.settings.get("weights") for m in made] == ["int8", None]
    one = 64 * 256  # bytes of f16 keys and values of a window
    assert [m.settings["engine"].kv_bytes for m in made] == [4 * one, 8 * one]
    assert made[0].settings["engine"].threads == made[1].settings["engine"].threads == 1


def test_one_model_keeps_its_own_pool(made) -> None:
    load_models([ModelSpec("any")] * 2, EngineParams())
    assert len(made) == 1 and made[0].settings["engine"] == EngineParams()


def test_memory_is_looked_at_before_anything_is_loaded(small, made, monkeypatch) -> None:
    specs = [ModelSpec(small), ModelSpec(small, (("weights", "f32"),))]
    monkeypatch.setattr(model_spec, "memory", lambda: Memory(10**9, 300_100_000))
    with pytest.raises(TryAgainError, match=r"2 models beside each other need 300.* are free; close other programs"):
        load_models(specs, EngineParams())
    monkeypatch.setattr(model_spec, "memory", lambda: Memory(10**10, 400_000_000))
    with pytest.raises(TryAgainError, match="2 models"):
        load_models(specs, EngineParams(kv_bytes=200_000_000))
    assert made == []
    load_models(specs, EngineParams(kv_bytes=20_000_000))
    assert [m.settings["engine"].kv_bytes for m in made] == [20_000_000] * 2


def test_wrong_names_are_said_before_anything_is_measured(tmp_path, monkeypatch):
    monkeypatch.setenv("KVIK_HOME", str(tmp_path / "store"))
    small = write_gguf(tmp_path / "small.gguf")
    find_models(parse_specs("--models", f"{small},weights=int8,{small}"))
    with pytest.raises(ParameterError, match="model 'smollm' is unknown"):
        find_models(parse_specs("--models", f"{small},smollm"))
