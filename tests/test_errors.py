"""Errors are one line, whatever the names in them."""

from __future__ import annotations

from pathlib import Path

import pytest

import kvik
from kvik.errors import DataError, StorageError, one_line
from kvik.files import open_regular, storage_errors


def test_a_path_breaks_no_line(tmp_path: Path) -> None:
    path = tmp_path / "a\nb\x1b[31m\u202ec.gguf"
    with pytest.raises(DataError) as missing:
        open_regular(path)
    assert str(missing.value) == f"{tmp_path}/a\\nb\\x1b[31m\\u202ec.gguf: no such file"
    assert missing.value.path == path
    with pytest.raises(StorageError) as unusable, storage_errors(tmp_path):
        path.read_bytes()
    assert str(unusable.value).splitlines() == [str(unusable.value)] and "a\\nb\\x1b[31m" in str(unusable.value)
    with pytest.raises(DataError, match=r"a\\nb") as of_model:
        kvik.LLM(path)
    assert "\n" not in str(of_model.value)


def test_what_people_can_read_stays() -> None:
    text = "naïve 中文 👩\u200d🔬 a/b\\c"
    assert one_line(text) == text
    assert one_line("\t\x00\x7f\x9b\u2028") == r"\t\x00\x7f\x9b\u2028"
