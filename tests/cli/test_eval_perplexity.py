"""`kvik eval perplexity` on a fake model whose log-probabilities are all -2."""

from __future__ import annotations

import fcntl
import json
import math
import os

import pytest

import kvik.evaluation.window_scores as window_scores
from kvik.cli import options
from kvik.errors import TryAgainError

LINES = "one two three four\n" * 300


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(LINES)
    return str(file)


@pytest.fixture
def small_groups(monkeypatch):
    """A window, at most 100 tokens, at a time."""
    monkeypatch.setattr(window_scores, "GROUP_TOKENS", 1)


def test_figures(kvik, text):
    ended = kvik("eval", "perplexity", text, "--window", "100")
    assert ended.code == 0, ended.err
    first, _, head, row, _, *notes = ended.out.splitlines()
    assert first == f"1 text, {len(LINES):,} bytes and 1,200 words predicted"
    assert head.split()[:4] == ["model", "tokens", "perplexity", "95"]
    tokens = 300 * 4 + 1  # the line break belongs to the next word
    nats = 2 * tokens
    assert row.split() == [
        "smollm2-135m", f"{tokens:,}", f"{math.exp(2):.4f}", f"{math.exp(2):.4f}", "to", f"{math.exp(2):.4f}",
        f"{math.exp(nats / len(LINES)):.4f}", f"{math.exp(nats / 1200):.4f}", f"{nats / len(LINES) / math.log(2):.4f}",
        "2.0000", "0.0000", "excellent",
    ]  # fmt: skip
    assert notes == ["Windows of 100 tokens, 99 of them new. The band is the guide's, for GPT-2 on English text."]


def test_json_has_the_names_of_the_api(kvik, text, tmp_path):
    lines = tmp_path / "lines.jsonl"
    lines.write_text('{"text": "one two"}\n\n{"text": "", "id": 3}\n{"text": "three"}\n')
    ended = kvik("eval", "perplexity", text, str(lines), "--json", "--models", "a,weights=f32,b")
    report = json.loads(ended.out)
    assert [fact["texts"] for fact in report["texts"]] == [1, 3]
    assert [one["model"] for one in report["models"]] == ["a,weights=f32", "b"]
    figures = report["models"][0]["perplexity"]
    assert figures["texts"] == 4 and figures["texts_without"] == 1 and figures["window"] == 2048
    assert figures["nll"] == 2 and figures["by_position"][0]["first"] == 1
    (gap,) = report["differences"]
    assert gap["bits_per_byte"]["value"] == 0 == gap["nll"]["high"]
    assert report["band_of"] == "GPT-2 on English text"


def test_differences_and_texts_without_are_said(kvik, tmp_path):
    lines = tmp_path / "lines.JSONL"
    lines.write_text('{"text": "one two"}\n{"text": ""}')
    out = kvik("eval", "perplexity", str(lines), "--models", "a,b").out
    assert "1 of 2 texts has nothing to predict: empty, or one token." in out
    assert "± and interval need more than one segment of 2,048 bytes." in out
    assert "less a, on the same segments of the texts:" in out and out.splitlines()[-1].split() == [
        "b",
        "+0.0000",
        "-",
        "+0.0000",
        "-",
    ]


def test_standard_input(kvik):
    report = json.loads(kvik("eval", "perplexity", "-", "--json", stdin=LINES.encode()).out)
    assert report["models"][0]["perplexity"]["bytes"] == len(LINES)
    assert kvik("eval", "perplexity", "-", "-", stdin=b"one two").code == 2


@pytest.mark.parametrize(
    ("data", "name", "code", "said"),
    [
        (b"", "a.txt", 65, "no text has a token to predict: 1 text, 1 empty"),
        (b"ab" + b"one " * 20000 + b"\xe9c", "a.txt", 65, "a.txt: is not UTF-8: byte 0xe9 (at byte 80002)"),
        (b"one \xf0\x9f\xa5", "a.txt", 65, "a.txt: is not UTF-8: byte 0xf0 (at byte 4)"),
        (b'{"text": "a"}\n{"text": 3}\n', "a.jsonl", 65, 'a.jsonl: line 2 needs "text", a string'),
        (b'{"text": "a"}\n\nnonsense\n', "a.jsonl", 65, "a.jsonl: line 3 is not JSON: "),
        (b'{"prompt": "a"}\n', "a.jsonl", 65, 'a.jsonl: line 1 needs "text", a string'),
    ],
)
def test_bad_texts(kvik, made, tmp_path, data, name, code, said):
    (tmp_path / name).write_bytes(data)
    ended = kvik("eval", "perplexity", str(tmp_path / name))
    assert ended.code == code and said in ended.err and ended.err.count("\n") == 1
    assert not made or not data, "nothing is loaded for texts that cannot be read"


def test_characters_across_pieces(kvik, tmp_path):
    (tmp_path / "a.txt").write_bytes("x🥪".encode() * 30000)
    assert json.loads(kvik("eval", "perplexity", str(tmp_path / "a.txt"), "--json").out)["texts"][0]["bytes"] == 150000


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--window", "1"], "--window must be at least 2, got 1"),
        (["--window", "2049"], "--window must be an integer in [2, 2048], the model's context, got 2049"),
        (["--window", "64", "--stride", "64"], "--stride must be in [1, 63], below --window, got 64"),
        (["--stride", "0"], "--stride must be at least 1, got 0"),
        (["--stride", "2048"], "--stride must be an integer in [1, 2047], below the window, got 2048"),
        (["--models", "a,weight=f32"], "did you mean 'weights'?"),
        (["--plot", "x.gif"], "--plot writes .png, .svg, .pdf, got 'x.gif'"),
        (["--tokenizer", "x"], "--tokenizer needs --endpoint"),
        (
            ["--endpoint", "http://x", "--api-key-env", "KVIK_NO_SUCH"],
            "--api-key-env names KVIK_NO_SUCH, which is not set",
        ),
        (["--endpoint", "http://x", "--threads", "1"], "--threads is about a model run here, and --endpoint is not"),
        (["--endpoint", "http://x", "--endpoint-context", "1"], "--endpoint-context must be at least 2, got 1"),
        (["--endpoint", "http://x", "--endpoint-timeout", "0"], "--endpoint-timeout must be in (0, 86400], got 0"),
    ],
)
def test_options_out_of_range(kvik, text, arguments, said):
    ended = kvik("eval", "perplexity", text, *arguments)
    assert ended.code == 2 and said in ended.err and ended.err.count("\n") == 1


def test_an_endpoint_is_measured_after_the_models(kvik, made, text, monkeypatch):
    asked = []

    class Endpoint:
        def __init__(self, url, **settings):
            asked.append((url, settings))

        def __enter__(self):
            return options.make_llm("behind the server")

        def __exit__(self, *_):
            asked.append("closed")

    monkeypatch.setattr("kvik.evaluation.endpoint.Endpoint", Endpoint)
    monkeypatch.setattr("kvik.cli.endpoint_options.load_tokenizer", lambda ref: f"tokens of {ref}")
    monkeypatch.setenv("KVIK_TEST_KEY", "secret")
    ended = kvik(
        "eval", "perplexity", text, "--models", "a", "--endpoint", "http://x/v1", "--endpoint-model", "m", "--json",
        "--endpoint-context", "512", "--endpoint-timeout", "300", "--api-key-env", "KVIK_TEST_KEY", "--tokenizer", "t",
    )  # fmt: skip
    report = json.loads(ended.out)
    assert [one["model"] for one in report["models"]] == ["a", "http://x/v1"] and "secret" not in ended.out
    settings = {"model": "m", "api_key": "secret", "tokenizer": "tokens of t", "context_length": 512, "timeout": 300}
    assert asked == [("http://x/v1", settings), "closed"]
    made.clear()
    kvik("eval", "perplexity", text, "--endpoint", "http://x/v1")
    assert [llm.model for llm in made] == ["behind the server"], "no default model beside it"


def test_missing_files(kvik, tmp_path):
    ended = kvik("eval", "perplexity", str(tmp_path / "none.txt"))
    assert ended.code == 65 and "none.txt: no such file" in ended.err
    assert kvik("eval", "perplexity").code == 2


class Stops:
    """A fake that stops at its `at`-th call of score by raising `error`."""

    def __init__(self, monkeypatch, at, error):
        self.calls = 0
        make = options.make_llm

        def made(model, **settings):
            llm = make(model, **settings)
            score = llm.score

            def stopping(*arguments, **more):
                self.calls += 1
                if self.calls == at:
                    raise error
                return score(*arguments, **more)

            llm.score = stopping
            return llm

        monkeypatch.setattr(options, "make_llm", made)


class TestGoingOn:
    @pytest.fixture
    def asked(self, text, tmp_path, small_groups):
        return (
            "eval",
            "perplexity",
            text,
            "--window",
            "100",
            "--models",
            "a,b",
            "--json",
            "--out",
            str(tmp_path / "o.jsonl"),
        )

    @pytest.mark.parametrize("at", [1, 4, 14, 20])
    @pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt(), 130), (TryAgainError("the server is down"), 75)])
    def test_after_a_stop(self, kvik, asked, monkeypatch, at, error, code):
        want = kvik(*asked[:-2]).out
        with monkeypatch.context() as patch:
            Stops(patch, at, error)
            ended = kvik(*asked)
        assert ended.code == code and f"the same command goes on where {asked[-1]} ends" in ended.err
        with monkeypatch.context() as patch:
            second = Stops(patch, 0, None)
            ended = kvik(*asked)
        assert ended.code == 0 and ended.out == want
        assert second.calls == 26 - (at - 1), "what was there is not scored again"
        with monkeypatch.context() as patch:
            third = Stops(patch, 1, None)
            assert kvik(*asked).out == want and third.calls == 0

    def test_half_a_last_line_is_dropped(self, kvik, asked):
        want = kvik(*asked).out
        with open(asked[-1], "rb") as file:
            whole = file.read()
        for size in (len(whole) - 1, len(whole) // 2, 30, 0):
            with open(asked[-1], "wb") as file:
                file.write(whole[:size])
            assert kvik(*asked).out == want
            with open(asked[-1], "rb") as file:
                assert file.read() == whole

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            (("--window", "50"), "--window: {out} was begun with 100, now it is 50; name another --out"),
            (("--stride", "50"), "--stride: {out} was begun with none, now it is 50"),
            (("--models", "a,b,c"), "--models: {out} was begun with a, b, now it is a, b, c"),
            (("TEXT", ""), "TEXT: {out} was begun with 5700 bytes in 1, digest"),
        ],
    )
    def test_other_settings_are_refused(self, kvik, asked, text, change, said):
        kvik(*asked)
        if change[0] == "TEXT":
            with open(text, "a") as file:
                file.write("more")
            change = ()
        ended = kvik(*asked, *change)
        assert ended.code == 2 and said.format(out=asked[-1]) in ended.err

    def test_another_model_is_refused(self, kvik, asked, monkeypatch):
        kvik(*asked)
        make = options.make_llm

        def other(model, **settings):
            from dataclasses import replace

            llm = make(model, **settings)
            llm.info = replace(llm.info, digest="d2")
            return llm

        monkeypatch.setattr(options, "make_llm", other)
        ended = kvik(*asked)
        assert ended.code == 2 and "was begun with another model: its digest was d1, now it is d2" in ended.err

    def test_files_of_something_else(self, kvik, asked, text):
        for data in (b"words\n", b'{"kvik": "something"}\n', b"[]\n"):
            with open(asked[-1], "wb") as file:
                file.write(data)
            ended = kvik(*asked)
            assert ended.code == 65 and "line 1 is not of kvik eval perplexity" in ended.err
            with open(asked[-1], "rb") as file:
                assert file.read() == data
        ended = kvik(*asked[:-1], text)
        assert ended.code == 2 and "--out and TEXT are the same file" in ended.err

    def test_another_process(self, kvik, asked):
        with open(asked[-1], "wb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            ended = kvik(*asked)
        assert ended.code == 75 and "another process writes to it" in ended.err

    def test_no_room(self, kvik, asked, monkeypatch):
        want = kvik(*asked[:-2]).out
        write, left = os.write, [12]

        def full(descriptor, data):
            left[0] -= 1
            if left[0] == 0:
                return write(descriptor, data[:10])
            if left[0] < 0:
                raise OSError(28, "No space left on device")
            return write(descriptor, data)

        with monkeypatch.context() as patch:
            patch.setattr(os, "write", full)
            ended = kvik(*asked)
        assert ended.code == 74 and "no space left" in ended.err and "the same command goes on" in ended.err
        with open(asked[-1], "rb") as file:
            assert file.read().endswith(b"}\n"), "no half line"
        assert kvik(*asked).out == want


def test_plot(kvik, text, tmp_path):
    picture = tmp_path / "loss.svg"
    ended = kvik("eval", "perplexity", text, "--models", "a,b", "--plot", str(picture))
    assert ended.code == 0 and b"</svg>" in picture.read_bytes()


def test_figures_are_said_before_a_picture_fails(kvik, text, tmp_path):
    (tmp_path / "file").write_text("")
    ended = kvik("eval", "perplexity", text, "--plot", str(tmp_path / "file" / "loss.svg"))
    assert ended.code == 74 and "bits/byte" in ended.out and ended.err.count("\n") == 1
