"""Files of lines: whole ones only, one writer, whatever happens."""

from __future__ import annotations

import errno
import os

import pytest

from kvik import jsonl
from kvik.errors import DataError, ParameterError, StorageError, TryAgainError
from kvik.jsonl import LineFile, read_entries


def test_lines_are_appended_and_read(tmp_path):
    path = tmp_path / "lines"
    with LineFile(path, "--out") as file:
        assert file.entries() == ()
        file.write({"text": "ø\n"})
        file.write({"n": 1})
        file.sync()
    assert read_entries(path) == (((1, {"text": "ø\n"}), (2, {"n": 1})), False, path.stat().st_size)


@pytest.mark.parametrize("torn", [b'{"n": 2', b'{"n": "\xc3', b'{"n": 2}'])
def test_the_last_line_is_cut_off_or_ended(tmp_path, torn):
    path = tmp_path / "lines"
    path.write_bytes(b'{"n": 1}\n' + torn)
    found = read_entries(path)
    assert found.torn == (torn != b'{"n": 2}') and len(found.entries) == 2 - found.torn
    with LineFile(path, "--out") as file:
        assert file.entries() == found.entries
        file.write({"n": 3})
    assert [entry["n"] for _, entry in read_entries(path).entries] == ([1, 3] if found.torn else [1, 2, 3])
    assert not read_entries(path).torn


def test_a_bad_line_in_the_middle_is_named(tmp_path):
    path = tmp_path / "lines"
    path.write_bytes(b'{"n": 1}\n\n{\n{"n": 2}\n')
    with pytest.raises(DataError, match="lines: line 3: is not JSON"):
        read_entries(path)


def test_a_line_too_long_is_refused_and_not_held(tmp_path, monkeypatch):
    monkeypatch.setattr(jsonl, "MAX_LINE_BYTES", 20)
    path = tmp_path / "lines"
    path.write_bytes(b'{"n": "' + b"x" * 1000 + b'"}')
    with pytest.raises(DataError, match="line 1: has over 20 bytes"):
        read_entries(path)


def test_a_second_writer_is_refused(tmp_path):
    with LineFile(tmp_path / "lines", "--out"), pytest.raises(TryAgainError, match="another process writes to it"):
        LineFile(tmp_path / "lines", "--out")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ParameterError, match="--out must be a file"):
        LineFile(tmp_path / "pipe", "--out")


def test_a_full_disk_leaves_whole_lines(tmp_path, monkeypatch):
    real, room = os.write, [30]

    def write(descriptor, data):
        if not room[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        done = real(descriptor, data[: room[0]])
        room[0] -= done
        return done

    path = tmp_path / "lines"
    with LineFile(path, "--out") as file:
        file.write({"n": 1})
        monkeypatch.setattr(os, "write", write)
        with pytest.raises(StorageError, match=r"no space left in .*; they are kept"):
            file.write({"text": "x" * 100}, hint="they are kept")
        monkeypatch.setattr(os, "write", real)
    assert path.read_bytes() == b'{"n": 1}\n'
