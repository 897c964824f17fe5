"""`kvik replay`: receipts that repeat, that do not, and that are none."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvik.cli import options
from kvik.engine.receipt import receipt_from_json, receipt_to_json
from kvik.errors import DataError
from kvik.params import CacheParams, SnapKV


@pytest.fixture
def receipt(kvik, tmp_path):
    """A receipt's path: receipt("--n", "2")."""

    def make(*arguments):
        path = tmp_path / "receipt.json"
        assert kvik("run", "hi", "--receipt", str(path), *arguments).code == 0
        return path

    return make


def changed(path, change):
    found = json.loads(path.read_text())
    change(found)
    path.write_text(json.dumps(found))
    return str(path)


def test_identical(kvik, made, receipt):
    path = receipt("--n", "2", "--seed", "5")
    ended = kvik("replay", str(path))
    assert (ended.code, ended.err) == (0, "") and ended.out == "identical: 16 tokens in 2 choices\n"
    settings = made[-1].settings
    assert made[-1].model == "fake"  # its file is not there
    assert [settings[name] for name in ("weights", "executor", "device")] == ["auto", "native", "cpu"]
    assert settings["cache"] == CacheParams()
    kvik("replay", str(path), "--model", "x.gguf", "--max-batch-tokens", "7")
    assert made[-1].model == "x.gguf" and made[-1].settings["engine"].max_batch_tokens == 7


@pytest.mark.parametrize("tight", [[], ["--kv-bytes", "300kB", "--max-batch-tokens", "9", "--max-sequences", "5"]])
def test_identical_in_a_crowd(kvik, made, receipt, tight):
    path = receipt("--ignore-eos", "--max-tokens", "100", "--n", "2")
    ended = kvik("replay", str(path), "--crowd", "32", "--seed", "3", *tight)
    assert ended.code == 0, ended.err
    assert ended.out.startswith("identical: 200 tokens in 2 choices, among ")
    engine = made[-1].engine
    assert engine.stats.requests > 20 and not engine.has_work
    engine.scheduler.check_integrity()
    again = json.loads(kvik("replay", str(path), "--crowd", "32", "--seed", "3", "--json", *tight).out)
    assert again["identical"] and again["engine"]["steps"] == engine.stats.steps  # the same crowd


def test_the_cache_is_repeated(kvik, made, receipt):
    words = "a b c d e f g h i j k l m n o p q r s t u v w x y z " * 4
    asked = ("run", words, "--raw", "--kv", "k8v4", "--kv-group-size", "32", "--evict", "snapkv:budget=50%,window=4")
    path = receipt()
    assert kvik(*asked, "--receipt", str(path)).code == 0
    cache = CacheParams(k="int8", v="int4", group_size=32, policy=SnapKV(budget=0.5, window=4))
    assert json.loads(path.read_text())["cache"] == cache.as_dict()
    for crowd in ([], ["--crowd", "12", "--seed", "2"]):
        ended = kvik("replay", str(path), *crowd)
        assert ended.code == 0 and "identical" in ended.out, ended.err
        assert made[-1].settings["cache"] == cache and cache in made[-1].caches
    assert len(set(made[-1].caches)) > 1  # others of the crowd keep theirs otherwise


def test_first_difference_is_named(kvik, receipt):
    path = receipt("--n", "2")
    wrong = changed(path, lambda found: found["outputs"][1].__setitem__(3, 2))
    ended = kvik("replay", wrong)
    assert ended.code == 65 and ended.out == ""
    assert ended.err == f'kvik: error: {path}: choice 1 differs at token 3: 2 " sky", replayed 4 " blue"\n'
    ended = kvik("replay", wrong, "--json")
    assert ended.code == 65
    found = json.loads(ended.out)
    assert not found["identical"] and found["difference"] == {
        "choice": 1, "index": 3, "receipt_token": 2, "replayed_token": 4, "receipt_reason": "stop",
        "replayed_reason": "stop",
    }  # fmt: skip


def test_other_lengths_and_ends(kvik, receipt, monkeypatch):
    path = receipt()
    longer = changed(path, lambda found: found["outputs"][0].append(1))
    assert 'token 8: 1 "The", replayed its end (stop)' in kvik("replay", longer).err
    shorter = changed(path, lambda found: found.update(outputs=[[1, 2]], finish_reasons=["length"]))
    assert 'token 2: its end (length), replayed 3 " is"' in kvik("replay", shorter).err
    cut = changed(path, lambda found: found.update(finish_reasons=["cancelled"]))
    assert kvik("replay", cut).code == 0  # as far as it came
    other = changed(path, lambda found: found.update(outputs=[[*range(1, 8), 0]], finish_reasons=["length"]))
    assert "ends with 'length', replayed with 'stop'" in kvik("replay", other).err


def test_a_model_that_says_something_else(kvik, receipt, monkeypatch):
    path, make = receipt(), options.make_llm

    def other(model, **settings):
        llm = make(model, **settings)
        llm.says = lambda follow: np.where(follow == 5, 6, follow)
        return llm

    monkeypatch.setattr(options, "make_llm", other)
    ended = kvik("replay", str(path), "--crowd", "3")
    assert ended.code == 65 and 'token 4: 5 ".\\n", replayed 6 "Really"' in ended.err


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda r: r["model"].update(digest="d2"), "digest d2, /fake.gguf has d1: other weights"),
        (lambda r: r["cache"].update(k="int5"), "cache: k must be one of"),
        (lambda r: r["cache"].pop("policy"), "cache has no field 'policy'"),
        (lambda r: r.update(version="9.9"), "is of Kvik 9.9"),
        (lambda r: r["params"].update(seed=None), "seed is missing"),
        (lambda r: r["params"].update(top_p=7), "top_p"),
        (lambda r: r["params"].pop("top_p"), "params has no field 'top_p'"),
        (lambda r: r.update(extra=1), "unknown field 'extra'"),
        (lambda r: r.pop("prompt"), "no field 'prompt'"),
        (lambda r: r.update(prompt=[]), "prompt is empty"),
        (lambda r: r.update(prompt=[1.5]), "1.5"),
        (lambda r: r.update(prompt=[60, 99]), "its prompt is none of its model"),
        (lambda r: r.update(outputs=[]), "0 outputs"),
        (lambda r: r.update(finish_reasons=["tired"]), "'tired'"),
        (lambda r: r.update(model=[]), "model is no object"),
        (lambda r: r["model"].update(isa=5), "model.isa"),
    ],
)
def test_refused(kvik, receipt, change, said):
    ended = kvik("replay", changed(receipt(), change))
    assert ended.code == 65 and ended.out == "" and ended.err.count("\n") == 1
    assert said in ended.err


def test_another_instruction_set_is_no_obstacle(kvik, receipt):
    ended = kvik("replay", changed(receipt(), lambda found: found["model"].update(isa="avx512")))
    assert ended.code == 0 and "on portable where the receipt is of avx512" in ended.out


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"null", b"[" * 100_000, b"\xff", b'{"version": NaN}'])
def test_what_is_no_receipt(kvik, made, text):
    ended = kvik("replay", "-", stdin=text)
    assert ended.code == 65 and ended.err.count("\n") == 1 and made == []


def test_wrong_usage(kvik, receipt):
    path = str(receipt())
    for arguments, named in (
        (["--crowd", "-1"], "--crowd"),
        (["--seed", "-1"], "--seed"),
        (["--kv-bytes", "x"], "--kv"),
    ):
        ended = kvik("replay", path, *arguments)
        assert ended.code == 2 and named in ended.err


@given(st.data())
def test_one_changed_byte_is_refused_or_read(data):
    text = bytearray(_RECEIPT.encode())
    text[data.draw(st.integers(0, len(text) - 1))] = data.draw(st.integers(32, 126))
    try:
        found = receipt_from_json(text.decode(), "r")
    except DataError as error:
        assert str(error).startswith("r: is no receipt: ")
    else:
        assert receipt_from_json(receipt_to_json(found), "r") == found


_MODEL = dict.fromkeys(("name", "path", "digest", "weights", "kv", "executor", "device"), "x")
_PARAMS = {
    "n": 1, "max_tokens": 40, "min_tokens": 0, "temperature": 0.7, "top_k": 50, "top_p": 0.9, "min_p": 0.0, "seed": 23,
    "stop": [], "stop_token_ids": [], "ignore_eos": False, "logprobs": None, "logprobs_mode": "raw",
}  # fmt: skip
_RECEIPT = json.dumps({
    "version": "0.1.0", "model": {**_MODEL, "isa": None}, "params": _PARAMS, "prompt": [1], "outputs": [[3]],
    "finish_reasons": ["length"],
})  # fmt: skip
