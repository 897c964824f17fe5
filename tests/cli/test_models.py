from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from weights.gguf_files import STRING, U32, Key, build, tensor

from kvik.weights.catalogue import CATALOGUE, DEFAULT_MODEL
from kvik.weights.ggml_types import GGMLType
from kvik.weights.store import ModelStore

ENTRY = CATALOGUE[DEFAULT_MODEL]


@pytest.fixture
def store(tmp_path, monkeypatch) -> ModelStore:
    monkeypatch.setenv("KVIK_HOME", str(tmp_path / "store"))
    return ModelStore()


@pytest.fixture
def small(tmp_path) -> Path:
    rng = np.random.default_rng(0)
    keys = [
        Key("general.architecture", STRING, "llama"),
        Key("general.license", STRING, "mit"),
        Key("llama.context_length", U32, 77),
    ]
    tensors = [tensor("a", GGMLType.Q4_1, (4, 64), rng), tensor("b", GGMLType.F32, (8,), rng)]
    path = tmp_path / "small.gguf"
    path.write_bytes(build(keys, tensors).data)
    return path


def put_default_model(store: ModelStore) -> Path:
    """A file of the right size; its hash is only looked at when it is fetched."""
    path = store.root / "models" / DEFAULT_MODEL / ENTRY.file_name
    path.parent.mkdir(parents=True)
    with open(path, "wb") as file:
        file.truncate(ENTRY.member_bytes)
    return path


def test_list_of_an_empty_store(kvik, store):
    ended = kvik("models", "list")
    assert ended.code == 0 and str(store.root) in ended.err
    head, row = ended.out.splitlines()
    assert head.split()[:3] == ["name", "file", "packed"] and row.split()[:3] == [DEFAULT_MODEL, "-", "-"]
    report = json.loads(kvik("models", "list", "--json").out)
    assert report["root"] == str(store.root)
    assert report["models"] == [
        {
            "name": DEFAULT_MODEL, "path": None, "bytes": 0, "packed_bytes": 0, "description": ENTRY.description,
            "license": "Apache-2.0",
        }
    ]  # fmt: skip


def test_list_and_rm(kvik, store, small):
    put_default_model(store)
    folder = store.make_folder(small)
    listed = json.loads(kvik("models", "list", "--json").out)["models"]
    assert [model["name"] for model in listed] == [DEFAULT_MODEL, folder.name]
    assert listed[0]["bytes"] == ENTRY.member_bytes and listed[1]["path"] == str(small)
    assert listed[1]["packed_bytes"] > 0
    ended = kvik("models", "rm", DEFAULT_MODEL)
    assert (ended.code, ended.out) == (0, f"{DEFAULT_MODEL} is removed, 98.4 MB are free again\n")
    assert json.loads(kvik("models", "rm", folder.name, "--json").out)["freed_bytes"] == listed[1]["packed_bytes"]
    assert small.exists() and not folder.exists()
    ended = kvik("models", "rm", DEFAULT_MODEL)
    assert ended.code == 2 and DEFAULT_MODEL in ended.err


def test_pull_of_what_is_here(kvik, store):
    path = put_default_model(store)
    ended = kvik("models", "pull", DEFAULT_MODEL)
    assert (ended.code, ended.out) == (0, f"{path}\n")
    report = json.loads(kvik("models", "pull", DEFAULT_MODEL, "--json").out)
    assert report == {"ref": DEFAULT_MODEL, "path": str(path), "bytes": ENTRY.member_bytes}
    ended = kvik("models", "pull", "smollm3")
    assert ended.code == 2 and f"did you mean '{DEFAULT_MODEL}'" in ended.err


def test_show(kvik, store, small):
    report = json.loads(kvik("models", "show", str(small), "--json").out)
    assert report == {
        "name": "small", "path": str(small), "bytes": small.stat().st_size, "architecture": "llama",
        "parameters": 4 * 64 + 8, "context_length": 77, "chat_template": False, "license": "mit", "packed": [],
        "tensor_types": {"Q4_1": {"tensors": 1, "bytes": 160}, "F32": {"tensors": 1, "bytes": 32}},
    }  # fmt: skip
    lines = dict(line.split("  ", 1) for line in kvik("models", "show", str(small)).out.splitlines())
    said = {name: value.strip() for name, value in lines.items()}
    assert said["context"] == "77 tokens" and said["chat template"] == "no" and said["licence"] == "mit"
    assert said["packed forms"] == "none yet" and said["tensors"] == "Q4_1 1 (160 bytes), F32 1 (32 bytes)"
    assert not store.root.exists()


def test_show_fetches_nothing(kvik, store):
    ended = kvik("models", "show", "smollm2")
    assert ended.code == 2 and "kvik models pull smollm2-135m" in ended.err
    assert not store.root.exists()


def test_show_of_what_is_no_model(kvik, store, tmp_path):
    path = tmp_path / "bad.gguf"
    path.write_bytes(b"GGUF\x03\x00")
    ended = kvik("models", "show", str(path))
    assert ended.code == 65 and str(path) in ended.err and ended.err.count("\n") == 1


def test_damaged_packed_form_is_told(kvik, store, small):
    folder = store.make_folder(small)
    (folder / "weights-auto.kvik").write_bytes(b"KVIKPACK and no more")
    ended = kvik("models", "show", str(small))
    assert ended.code == 0 and "damaged" in ended.err and "none yet" in ended.out
