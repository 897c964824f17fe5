from __future__ import annotations

import json
import shutil

import pytest

from kvik import _native
from kvik.cli import doctor, machine


def findings(ended):
    return {finding["name"]: finding for finding in json.loads(ended.out)["findings"]}


@pytest.fixture(autouse=True)
def store(tmp_path, monkeypatch):
    monkeypatch.setenv("KVIK_HOME", str(tmp_path / "store"))
    monkeypatch.delenv("KVIK_ISA", raising=False)


def test_everything_is_in_place(kvik):
    ended = kvik("doctor", "--json")
    assert ended.code == 0 and json.loads(ended.out)["usable"] is True
    found = findings(ended)
    assert set(found) == {
        "python", "cores", "memory", "native core", "instruction set", "model store", "default model", "pytorch"
    }  # fmt: skip
    assert _native.isa_selected() in found["instruction set"]["found"]
    assert found["default model"]["state"] == "note"
    assert found["default model"]["mend"] == "kvik models pull smollm2-135m"
    lines = kvik("doctor").out.splitlines()
    assert len(lines) == len(found)
    assert any(
        line.startswith("note  default model") and line.endswith("kvik models pull smollm2-135m") for line in lines
    )


def test_wrong_instruction_set_fails(kvik, monkeypatch):
    monkeypatch.setenv("KVIK_ISA", "sse9")
    ended = kvik("doctor")
    assert ended.code == 1
    assert any(
        line.startswith("FAIL  instruction set") and line.endswith("unset KVIK_ISA") for line in ended.out.splitlines()
    )


def test_forced_instruction_set_is_told(kvik, monkeypatch):
    monkeypatch.setenv("KVIK_ISA", "portable")
    ended = kvik("doctor", "--json")
    assert ended.code == 0 and findings(ended)["instruction set"]["state"] == "note"


def test_store_that_cannot_be_written(kvik, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("KVIK_HOME", str(tmp_path / "file" / "store"))
    ended = kvik("doctor", "--json")
    assert ended.code == 1
    found = findings(ended)["model store"]
    assert found["state"] == "fail" and "KVIK_HOME" in found["mend"]


def test_full_disk(kvik, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 99, 1))
    ended = kvik("doctor", "--json")
    assert ended.code == 1 and findings(ended)["model store"]["state"] == "fail"


def test_missing_torch_is_fine_and_says_how_to_get_it(kvik, monkeypatch):
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    found = findings(kvik("doctor", "--json"))["pytorch"]
    assert found["state"] == "ok" and "kvik[torch]" in found["found"]


def test_quota_and_little_memory_are_told(kvik, monkeypatch):
    monkeypatch.setattr(doctor, "cores", lambda: machine.Cores(8, 8, 1.5))
    monkeypatch.setattr(doctor, "memory", lambda: machine.Memory(10**9, 10**8))
    ended = kvik("doctor", "--json")
    assert ended.code == 0
    found = findings(ended)
    assert found["cores"]["state"] == "note" and "--threads 1" in found["cores"]["mend"]
    assert found["memory"]["state"] == "note" and "100.0 MB of 1.0 GB" in found["memory"]["found"]


def test_limits_of_a_container(monkeypatch, tmp_path):
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("400000\n")
    monkeypatch.setattr(machine, "_CGROUP", tmp_path)
    assert machine.cores().quota == 1.5
    assert machine.memory() == (1_000_000, 600_000)
    (tmp_path / "cpu.max").write_text("max 100000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert machine.cores().quota is None
    assert machine.memory().total > 1_000_000
