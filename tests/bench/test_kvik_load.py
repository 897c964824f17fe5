"""The worker that times loading, on a small packed file."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[2] / "bench" / "workers" / "kvik_load.py"


@pytest.fixture
def worker():
    spec = importlib.util.spec_from_file_location("kvik_load", SOURCE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def packed(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("KVIK_HOME", str(tmp_path))
    path = tmp_path / "packed" / "model-1" / "weights-auto.kvik"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"w" * 3_000_001)
    return path


def test_every_way_is_taken_as_often_and_the_first_round_does_not_count(worker, packed, monkeypatch) -> None:
    def load_model(model, weights, progress):
        assert (model, weights) == ("m.gguf", "auto")
        progress("load", 0, 10)
        progress("load", 10, 10)

    monkeypatch.setattr(worker, "load_model", load_model)
    found = worker.later("m.gguf", 3)
    assert {name: len(values) for name, values in found.items()} == dict.fromkeys(
        ("load_s", "weights_s", "read_s", "read_whole_s"), 3
    )
    assert all(value > 0 for values in found.values() for value in values)
    assert all(whole >= part for whole, part in zip(found["load_s"], found["weights_s"], strict=True))


def test_a_start_that_packs_nothing_is_told(worker, packed, monkeypatch) -> None:
    monkeypatch.setattr(worker, "load_model", lambda model, weights, progress: progress("load", 1, 1))
    seconds, stages = worker.start("m.gguf")
    assert seconds > 0
    with pytest.raises(SystemExit, match="no stage 'pack' in this start, only: load"):
        stages.seconds("pack")


def test_the_store_must_hold_one_packed_file(worker, packed) -> None:
    assert worker.packed_file() == packed
    packed.unlink()
    with pytest.raises(SystemExit, match="holds 0 packed files"):
        worker.packed_file()
