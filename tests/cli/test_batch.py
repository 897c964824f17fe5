"""`kvik run --batch`: lines in, lines out, whatever happens in between."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from cli.fake_llm import ANSWER
from cli.test_terminal import START
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvik import jsonl
from kvik.cli import options
from kvik.cli.batch_input import BadLine, parse_line
from kvik.cli.batch_output import Results
from kvik.cli.batch_progress import duration
from kvik.errors import TryAgainError
from kvik.params import SamplingParams

TEXT = "".join(ANSWER)


@pytest.fixture
def batch(kvik, tmp_path):
    """Run lines (text, bytes, or objects) as a batch: batch([...], "--seed", "1"). Results are `batch.found()`."""

    class Batch:
        requests, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"

        def __call__(self, lines, *arguments):
            data = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
            self.requests.write_bytes(b"".join(line + b"\n" for line in data))
            return kvik("run", "--batch", str(self.requests), "--out", str(self.out), *arguments)

        def found(self):
            return [json.loads(line) for line in self.out.read_text().splitlines()]

        def by_id(self):
            return {entry["id"]: entry for entry in self.found()}

    return Batch()


def test_results_have_their_requests_id_and_all_of_a_completion(batch, made):
    ended = batch(
        [
            {"id": "one", "prompt": "hi", "seed": 7},
            {"id": 5, "prompt": [3, 4], "max_tokens": 2},
            {"messages": [{"role": "user", "content": "hi"}], "n": 2, "temperature": 0},
        ],
        "--top-k", "9", "--min-p", "0.25",
    )  # fmt: skip
    assert ended.code == 0 and ended.out == ""
    assert ended.err.startswith("3 results in ") and "tokens/s" in ended.err
    found = batch.by_id()
    assert set(found) == {"one", 5, 3}  # the third has its line's number
    one = found["one"]
    assert one["text"] == one["choices"][0]["text"] == TEXT and one["usage"]["prompt_tokens"] == 3
    assert one["receipt"]["params"]["seed"] == 7 and one["line"] == 1 and "stats" not in one
    assert found[5]["choices"][0]["token_ids"] == [5, 6] and found[5]["receipt"]["prompt"] == [3, 4]
    assert len(found[3]["choices"]) == 2
    asked = [params for _, params in made[0].asked]
    assert all(params.top_k == 9 and params.min_p == 0.25 for params in asked)
    assert sorted(params.temperature for params in asked) == [0, 0.7, 0.7]


def test_seed_for_all_or_one_each(batch, tmp_path):
    lines = [{"prompt": "a"}, {"prompt": "b"}, {"prompt": "c", "seed": 9}]
    batch(lines, "--seed", "4")
    assert [entry["receipt"]["params"]["seed"] for _, entry in sorted(batch.by_id().items())] == [4, 4, 9]
    batch.out.unlink()
    batch(lines)
    seeds = [entry["receipt"]["params"]["seed"] for _, entry in sorted(batch.by_id().items())]
    assert len(set(seeds)) == 3 and seeds[2] == 9


def test_prompts_as_kvik_run_takes_them(batch, made):
    lines = [
        {"prompt": "hi"}, {"messages": [{"role": "user", "content": "hi"}]},
        {"messages": [{"role": "system", "content": "Own."}, {"role": "user", "content": "hi"}]}, {"prompt": [1]},
    ]  # fmt: skip
    ended = batch(lines, "--system", "Be brief.")
    texts = [made[0].tokenizer.decode(ids) for ids, _ in made[0].asked]
    brief = " <system> Be brief. <user> hi <assistant>"
    assert texts == [brief, brief, " <system> Own. <user> hi <assistant>"]
    assert ended.code == 65 and "line 4: --system has no place" in ended.err
    batch.out.unlink()
    ended = batch(lines, "--raw")
    assert [made[1].tokenizer.decode(ids) for ids, _ in made[1].asked] == ["hi", "The"]
    assert "line 2: messages need the chat template, and --raw leaves it out" in ended.err


BAD = [
    (b"not json", None, "is not JSON"),
    (b"[1]", None, "must be an object, got [1]"),
    (b'{"prompt": "caf\xe9"}', None, "is not UTF-8: byte 0xe9 (at byte 15 of the line)"),
    (b'{"prompt": "a", "top_p": NaN}', None, "NaN is no number"),
    (b'{"prompt": "\\ud800"}', None, "half a surrogate pair"),
    (b'{"prompt": "a", "prompt": "b"}', None, "names 'prompt' twice"),
    (b"[" * 100_000, None, "nested too deep"),
    (b'{"id": 9' + b"9" * 5000 + b', "prompt": "a"}', None, "is not JSON"),
    (b'{"id": null, "prompt": "a"}', None, "id must be text or a whole number, got null"),
    (b'{"id": true, "prompt": "a"}', None, "id must be"),
    (b'{"id": "x", "promt": "a"}', "x", "unknown field 'promt'; did you mean 'prompt'?"),
    (b'{"id": "x"}', "x", "needs either prompt or messages"),
    (b'{"id": "x", "prompt": "a", "messages": []}', "x", "needs either prompt or messages"),
    (b'{"id": "x", "prompt": ""}', "x", "the prompt is empty"),
    (b'{"id": "x", "prompt": 5}', "x", "prompt must be text or a list of token ids, got 5"),
    (b'{"id": "x", "prompt": [1, "a"]}', "x", "list of token ids"),
    (b'{"id": "y", "prompt": [99]}', "y", "token id 99"),
    (b'{"id": "x", "prompt": "a", "top_p": 2}', "x", "top_p must be finite and in [0, 1], got 2"),
    (b'{"id": "x", "prompt": "a", "max_tokens": 0}', "x", "max_tokens"),
    (b'{"id": "good", "prompt": "a"}', "good", "id 'good' was there before"),
    (json.dumps({"id": "x", "prompt": "a " * 3000}).encode(), "x", "the context holds 2048"),
]


def test_bad_lines_are_reported_and_the_rest_runs(batch):
    lines = [{"id": "good", "prompt": "hi"}, *[line for line, _, _ in BAD], b"", {"id": "last", "prompt": "hi"}]
    ended = batch(lines)
    assert ended.code == 65
    said = ended.err.splitlines()
    errors = {entry["line"]: entry for entry in batch.found() if "error" in entry}
    for number, (_, id, message) in enumerate(BAD, 2):
        assert message in errors[number]["error"] and errors[number]["id"] == id, number
        assert any(f"{batch.requests}: line {number}: " in line and message in line for line in said), number
    assert [entry["id"] for entry in batch.found() if "error" not in entry] == ["good", "last"]
    assert said[-1].startswith(f"2 results, {len(BAD)} bad lines in ")


def test_a_line_too_long_is_passed_over_without_being_held(batch, monkeypatch):
    monkeypatch.setattr(jsonl, "MAX_LINE_BYTES", 100)
    ended = batch([{"prompt": "a " * 300}, {"prompt": "hi"}])
    assert ended.code == 65 and "line 1: has over 100 bytes" in ended.err
    assert [entry["line"] for entry in batch.found()] == [1, 2]


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.one_of(st.binary(max_size=60), st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["id", "prompt", "messages", "n", "stop", "seed", "top_p", "role", "x"]), inner, max_size=5),
    max_leaves=8,
).map(lambda value: json.dumps(value).encode())))  # fmt: skip
def test_any_line_is_a_request_or_a_bad_line(data):
    try:
        line = parse_line(3, data, SamplingParams())
    except BadLine as error:
        assert "\n" not in str(error)
    else:
        assert isinstance(line.id, str | int) and 0 <= line.mark("") < 2**64


def test_resume_runs_what_is_missing(batch, made):
    lines = [{"id": i, "prompt": "hi"} for i in range(6)]
    batch(lines)
    kept = batch.out.read_bytes().splitlines(keepends=True)
    batch.out.write_bytes(b"".join(kept[:3]) + kept[3][:40])  # a crash within a line
    ended = batch(lines, "--resume")
    assert ended.code == 0 and "3 results, 3 already there" in ended.err
    assert sorted(batch.by_id()) == list(range(6)) and len(batch.found()) == 6
    assert batch.out.read_bytes().startswith(b"".join(kept[:3]))
    assert len(made[1].asked) == 3
    assert batch(lines, "--resume").code == 0 and len(made[2].asked) == 0
    batch.out.write_bytes(b"".join(kept[:3]).removesuffix(b"\n"))  # an editor took the last line break
    assert batch(lines, "--resume").code == 0 and len(batch.found()) == 6


def test_resume_tries_bad_lines_again(batch):
    assert batch([{"id": 1, "prompt": "hi"}, {"id": 2, "prompt": ""}]).code == 65
    ended = batch([{"id": 1, "prompt": "hi"}, {"id": 2, "prompt": "mended"}], "--resume")
    assert ended.code == 0
    assert [entry["id"] for entry in batch.found() if "text" in entry] == [1, 2] and len(batch.found()) == 2


@pytest.mark.parametrize(
    ("lines", "arguments"),
    [
        ([{"id": 1, "prompt": "other"}], []),
        ([{"id": 1, "prompt": "hi"}], ["--temperature", "0"]),
        ([{"id": 1, "prompt": "hi"}], ["--raw"]),
        ([{"id": 1, "prompt": "hi", "n": 2}], []),
        ([{"id": "1", "prompt": "hi"}], []),
        ([], []),
    ],
)
def test_resume_refuses_results_of_other_requests(batch, made, lines, arguments):
    batch([{"id": 1, "prompt": "hi"}])
    before = batch.out.read_bytes()
    ended = batch(lines, "--resume", *arguments)
    assert ended.code == 65 and str(batch.out) in ended.err and ended.err.count("\n") == 1
    assert batch.out.read_bytes() == before and made[-1].asked == []


def test_standard_input(kvik, tmp_path):
    out = str(tmp_path / "out")
    ended = kvik("run", "--batch", "-", "--out", out, stdin=b'{"id": 1, "prompt": "hi"}\n')
    assert ended.code == 0 and json.loads((tmp_path / "out").read_text())["text"] == TEXT
    assert kvik("run", "--batch", "-", "--out", out, "--resume", stdin=b'{"id": 1, "prompt": "no"}\n').code == 65


def test_existing_files_are_not_written_over(batch):
    batch([{"prompt": "hi"}])
    ended = batch([{"prompt": "hi"}])
    assert ended.code == 2 and "--resume" in ended.err and ended.err.count("\n") == 1
    batch.out.write_text("a letter\nto you\n")
    ended = batch([{"prompt": "hi"}], "--resume")
    assert ended.code == 65 and "line 1 is no result" in ended.err and batch.out.read_text() == "a letter\nto you\n"
    batch.out.write_text("")
    assert batch([{"prompt": "hi"}]).code == 0


def test_wrong_usage(batch, kvik, made, tmp_path):
    requests, out = str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl")
    (tmp_path / "in.jsonl").write_text('{"prompt": "hi"}\n')
    for arguments, named in (
        (["hi", "--batch", requests, "--out", out], "--batch and a PROMPT"),
        (["--batch", requests], "--out"),
        (["hi", "--out", out], "--out needs --batch"),
        (["hi", "--resume"], "--resume needs --batch"),
        (["--batch", requests, "--out", out, "--receipt", "x"], "--receipt"),
        (["--batch", requests, "--out", requests, "--resume"], "line 1 is no result"),
        (["--batch", requests, "--out", "/dev/null"], "--out must be a file"),
        (["--batch", requests, "--out", str(tmp_path)], str(tmp_path)),
        (["--batch", str(tmp_path / "none"), "--out", out], "no such file"),
        (["--batch", requests, "--out", out, "--top-p", "2"], "--top-p"),
    ):
        ended = kvik("run", *arguments)
        assert ended.code in (2, 65, 74) and named in ended.err and ended.err.count("\n") == 1, arguments
    assert made == [] and not os.path.exists(out)
    (tmp_path / "empty").touch()
    ended = kvik("run", "--batch", str(tmp_path / "empty"), "--out", str(tmp_path / "empty"))
    assert ended.code == 2 and "same file" in ended.err


def test_ctrl_c_keeps_the_finished_and_says_how_to_go_on(batch, monkeypatch):
    make = options.make_llm

    def impatient(model, **given):
        llm = make(model, **given)
        llm.interrupt_after = 6
        return llm

    monkeypatch.setattr(options, "make_llm", impatient)
    lines = [{"id": "short", "prompt": [1], "max_tokens": 2}, *[{"id": i, "prompt": "hi"} for i in range(4)]]
    ended = batch(lines)
    assert ended.code == 130
    assert "Stopped with 1 of 5 requests finished; the same command with --resume goes on." in ended.err
    assert [entry["id"] for entry in batch.found()] == ["short"]
    monkeypatch.setattr(options, "make_llm", make)
    assert batch(lines, "--resume").code == 0 and len(batch.found()) == 5


def test_full_disk_keeps_what_is_finished(batch, monkeypatch):
    real, room = os.write, [900]

    def write(descriptor, data):
        if not os.path.sameopenfile(descriptor, descriptor) or len(data) < 100:
            return real(descriptor, data)
        if room[0] <= 0:
            raise OSError(28, "No space left on device")
        written = real(descriptor, data[: room[0]])
        room[0] -= written
        return written

    monkeypatch.setattr(os, "write", write)
    lines = [{"id": i, "prompt": "hi"} for i in range(4)]
    ended = batch(lines, "--max-sequences", "1")
    assert ended.code == 74 and "no space left" in ended.err and "--resume" in ended.err
    assert len(batch.found()) < 4  # whole lines only
    monkeypatch.setattr(os, "write", real)
    assert batch(lines, "--resume", "--max-sequences", "1").code == 0 and len(batch.found()) == 4


def test_requests_are_read_as_they_are_needed(kvik, made, tmp_path, monkeypatch):
    """Of a file without end only as many lines are held as may run and wait."""
    read = []

    def endless(file):
        for number in range(1, 40):
            read.append(number - (tmp_path / "out").read_bytes().count(b"\n"))
            yield number, b'{"prompt": [1]}\n'

    (tmp_path / "in").write_text("")
    monkeypatch.setattr("kvik.cli.batch.read_lines", endless)
    monkeypatch.setattr("kvik.cli.batch._Batch.look_ahead", lambda self, file: None)
    ended = kvik("run", "--batch", str(tmp_path / "in"), "--out", str(tmp_path / "out"),
                 "--max-sequences", "2", "--max-waiting", "3")  # fmt: skip
    assert ended.code == 0 and max(read) <= 6 and len(made[0].asked) == 39


def test_summary_as_json_and_stats(batch, capsys):
    report = json.loads(batch([{"prompt": "hi"}, b"?"], "--json", "--stats").out)
    assert (report["requests"], report["finished"], report["failed"], report["skipped"]) == (2, 1, 1, 0)
    assert report["generated"] == 8 and report["engine"]["steps"] == 8 and not report["interrupted"]
    (entry,) = [entry for entry in batch.found() if "text" in entry]
    assert entry["stats"]["preemptions"] == 0 and len(entry["stats"]["inter_token"]) == 7
    batch.out.unlink()
    assert "slots wasted" in batch([{"prompt": "hi"}], "--stats").err


def test_progress_is_a_line_now_and_then(batch, monkeypatch):
    monkeypatch.setattr("kvik.cli.batch_progress._EVERY_SECONDS", 0.0)
    err = batch([{"prompt": "hi"}] * 3, "--max-sequences", "1").err
    assert "0 of 3 requests, " in err and "1 of 3 requests, " in err and ":0" in err and " left\n" in err
    assert [duration(s) for s in (0.4, 61, 4000)] == ["0:00", "1:01", "1:06:40"]


def test_one_process_at_a_time(batch, tmp_path):
    import fcntl

    with open(batch.out, "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        ended = batch([{"prompt": "hi"}])
    assert ended.code == 75 and "another process" in ended.err


def test_a_pipe_that_stays_open_is_answered_line_by_line(tmp_path):
    out = tmp_path / "out.jsonl"
    command = [sys.executable, "-c", START.format(delay=0.0), "run", "--batch", "-", "--out", str(out)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        for number in range(1, 4):
            process.stdin.write(b'{"prompt": "hi"}\n')
            process.stdin.flush()
            end = time.monotonic() + 60
            while not (out.exists() and out.read_bytes().count(b"\n") == number):
                assert time.monotonic() < end and process.poll() is None
                time.sleep(0.01)
        process.send_signal(signal.SIGINT)  # while it waits for a line
        assert process.wait(60) == 130
        err = process.stderr.read().decode()
    assert "Stopped with 3 requests finished" in err and "Fatal" not in err
    with subprocess.Popen([*command, "--resume"], stdin=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        _, err = process.communicate(b'{"prompt": "hi"}\n' * 200, timeout=60)
    assert process.returncode == 0 and b"197 results, 3 already there" in err


def test_resume_goes_on_in_the_file_that_a_link_names(batch, tmp_path):
    lines = [{"id": 1, "prompt": "hi"}, b"?"]
    there = tmp_path / "elsewhere" / "results.jsonl"
    there.parent.mkdir()
    batch.out.symlink_to(there)
    assert batch(lines).code == 65
    assert batch(lines, "--resume").code == 65
    assert batch.out.is_symlink() and there.read_text().count("\n") == 2


def test_a_file_that_cannot_be_opened_again_is_closed_once(batch, monkeypatch):
    lines = [{"id": 1, "prompt": "hi"}, b"?"]
    assert batch(lines).code == 65
    opens, closed = [], []
    real_open, real_close = Results._open, os.close

    def open_once(self):
        if opens:
            raise TryAgainError("another process writes to it")
        opens.append(real_open(self))
        return opens[0]

    def close(descriptor):
        closed.append(descriptor)
        real_close(descriptor)

    monkeypatch.setattr(Results, "_open", open_once)
    monkeypatch.setattr(os, "close", close)
    with pytest.raises(TryAgainError):
        Results(str(batch.out), resume=True)
    assert closed.count(opens[0]) == 1


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_process_leaves_whole_lines(tmp_path, sign):
    requests, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    requests.write_text("".join(json.dumps({"id": i, "prompt": "hi"}) + "\n" for i in range(40)))
    command = [sys.executable, "-c", START.format(delay=0.02), "run", "--batch", str(requests), "--out", str(out),
               "--max-sequences", "2"]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        end = time.monotonic() + 60
        while not (out.exists() and out.stat().st_size) and time.monotonic() < end:
            time.sleep(0.01)
        process.send_signal(sign)
        _, err = process.communicate(timeout=60)
    assert process.returncode == (130 if sign == signal.SIGINT else -9)
    finished = [json.loads(line) for line in out.read_text().splitlines()]
    assert 0 < len(finished) < 40
    if sign == signal.SIGINT:
        assert f"Stopped with {len(finished)} of 40" in err
    again = subprocess.run([*command, "--resume"], capture_output=True, text=True, timeout=60, check=False)
    assert again.returncode == 0, again.stderr
    assert {json.loads(line)["id"] for line in out.read_text().splitlines()} == set(range(40))
