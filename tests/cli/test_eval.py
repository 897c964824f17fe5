from __future__ import annotations

import json
import math

import pytest


def test_tokens_logprobs_and_totals(kvik, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("one two\nthree")
    ended = kvik("eval", "logprobs", str(file))
    assert ended.code == 0
    head, first, second, third, totals = ended.out.splitlines()
    assert head.split() == ["id", "logprob", "token"]
    assert first.split() == ["8", "-", '"one"']
    assert second.split() == ["9", "-2.0000", '"', 'two"']
    assert third.split() == ["10", "-2.0000", '"\\nthree"']
    assert totals == f"3 tokens, mean log-probability -2.0000, perplexity {math.exp(2):.4f}"


def test_json(kvik):
    report = json.loads(kvik("eval", "logprobs", "-", "--json", stdin=b"one two three").out)
    assert report["token_ids"] == [8, 9, 10] and report["tokens"] == ["one", " two", " three"]
    assert report["logprobs"] == [-2.0, -2.0]
    assert (report["num_tokens"], report["num_scored"]) == (3, 2)
    assert report["total_logprob"] == -4.0 and report["mean_logprob"] == -2.0
    assert report["perplexity"] == pytest.approx(math.exp(2))


@pytest.mark.parametrize(("text", "said"), [(b"", "0 tokens: the text is empty"), (b"one", "1 token: nothing comes")])
def test_nothing_to_score_is_said(kvik, text, said):
    ended = kvik("eval", "logprobs", "-", stdin=text)
    assert ended.code == 0 and ended.out.splitlines()[-1].startswith(said)
    report = json.loads(kvik("eval", "logprobs", "-", "--json", stdin=text).out)
    assert report["perplexity"] is None and report["mean_logprob"] is None and report["logprobs"] == []


def test_bad_bytes_missing_files_and_folders(kvik, tmp_path):
    file = tmp_path / "latin.txt"
    file.write_bytes(b"ab\xe9c")
    ended = kvik("eval", "logprobs", str(file))
    assert ended.code == 65 and ended.err == f"kvik: error: {file}: is not UTF-8: byte 0xe9 (at byte 2)\n"
    assert kvik("eval", "logprobs", str(tmp_path / "none")).code == 65
    assert "folder" in kvik("eval", "logprobs", str(tmp_path)).err


def test_best_tokens_at_each_place(kvik):
    lines = kvik("eval", "logprobs", "-", "--top", "2", stdin=b"one two").out.splitlines()
    assert lines[0].split() == ["id", "logprob", "token", "best"]
    assert lines[1].split() == ["8", "-", '"one"'] and lines[2].endswith('"<|end|>" -1.000  "The" -2.000')
    report = json.loads(kvik("eval", "logprobs", "-", "--json", "--top", "1", stdin=b"one two").out)
    assert report["top"] == [[{"token_id": 0, "logprob": -1.0}]]
    assert "top" not in json.loads(kvik("eval", "logprobs", "-", "--json", stdin=b"one two").out)
    ended = kvik("eval", "logprobs", "-", "--top", "2000", stdin=b"one two")
    assert ended.code == 2 and "--top must be in [0, 1024], got 2000" in ended.err
