from __future__ import annotations

import json
from pathlib import Path

import pytest
from models.hub_folder import write_model
from weights.gguf_files import STRING, Key, build

from kvik.weights.catalogue import CATALOGUE, DEFAULT_MODEL
from kvik.weights.store import ModelStore

ENTRY = CATALOGUE[DEFAULT_MODEL]


@pytest.fixture
def store(tmp_path, monkeypatch) -> ModelStore:
    monkeypatch.setenv("KVIK_HOME", str(tmp_path / "store"))
    return ModelStore()


@pytest.fixture
def small(tmp_path) -> Path:
    path = tmp_path / "small.gguf"
    path.write_bytes(build([Key("general.architecture", STRING, "llama")], []).data)
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


def test_pull_of_a_folder_counts_its_files(kvik, store, tmp_path):
    folder = write_model(tmp_path / "m", shards=2)
    report = json.loads(kvik("models", "pull", str(folder), "--json").out)
    assert report["bytes"] == sum(file.stat().st_size for file in folder.iterdir())


def test_pull_of_what_is_here(kvik, store):
    path = put_default_model(store)
    ended = kvik("models", "pull", DEFAULT_MODEL)
    assert (ended.code, ended.out) == (0, f"{path}\n")
    report = json.loads(kvik("models", "pull", DEFAULT_MODEL, "--json").out)
    assert report == {"ref": DEFAULT_MODEL, "path": str(path), "bytes": ENTRY.member_bytes}
    ended = kvik("models", "pull", "smollm3")
    assert ended.code == 2 and f"did you mean '{DEFAULT_MODEL}'" in ended.err
