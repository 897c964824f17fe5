from __future__ import annotations

import json

import pytest
from cli.fake_llm import ANSWER

from kvik.cli import options
from kvik.params import SamplingParams

TEXT = "".join(ANSWER)


def prompts(model):
    return [model.tokenizer.decode(ids) for ids, _ in model.asked]


def test_each_line_is_a_message_and_history_is_kept(kvik, made):
    ended = kvik("chat", "--system", "Be kind.", stdin=b"hi\n\nmore\n")
    assert ended.code == 0
    assert ended.out == f"{TEXT}\n{TEXT}\n"
    first, second = prompts(made[0])
    assert first == " <system> Be kind. <user> hi <assistant>"
    assert second == f" <system> Be kind. <user> hi <assistant> {TEXT} <user> more <assistant>"
    assert len(ended.err.splitlines()) == 2


def test_block_is_one_message(kvik, made):
    kvik("chat", "--raw", stdin=b'"""\none\n\ntwo\n"""\n')
    assert prompts(made[0]) == ["one\n\ntwo"]


def test_block_without_end(kvik):
    ended = kvik("chat", stdin=b'"""\none\n')
    assert ended.code == 2 and '"""' in ended.err


def test_commands(kvik, made, tmp_path):
    saved = tmp_path / "talk.json"
    lines = [
        "/set temperature 0", "/set max_tokens 3", "/set stop 'a b' c", "/set seed 4", "/set ignore_eos off",
        "/set seed", "hi", "/system Be brief.", "/system", "again", f"/save {saved}", "/clear", "//slash", "/exit",
        "never heard",
    ]  # fmt: skip
    ended = kvik("chat", stdin="\n".join(lines).encode())
    assert ended.code == 0
    assert made[0].asked[0][1] == SamplingParams(
        temperature=0.0, top_k=50, top_p=0.9, max_tokens=3, stop=("a b", "c"), seed=4
    )
    first, second, third = prompts(made[0])
    assert first == " <user> hi <assistant>"
    assert second == " <system> Be brief. <user> hi <assistant> The sky is <user> again <assistant>"
    assert third == " <system> Be brief. <user> /slash <assistant>"
    assert "seed 4\n" in ended.err and "Be brief.\n" in ended.err
    kept = json.loads(saved.read_text())
    assert [message["role"] for message in kept["messages"]] == ["system", "user", "assistant", "user", "assistant"]
    assert kept["params"]["max_tokens"] == 3


def test_help_names_every_command(kvik):
    err = kvik("chat", stdin=b"/?\n/set\n").err
    for part in ("/set", "/system", "/clear", "/save", "/exit", "temperature", "logprobs_mode"):
        assert part in err


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("/sett x 1", "/set"),
        ("/set temperatur 1", "temperature"),
        ("/set temperature warm", "temperature"),
        ("/set top_p 3", "[0, 1]"),
        ("/set ignore_eos perhaps", "on or off"),
        ("/set max_tokens 0", "max_tokens"),
        ("/set stop 'open", "stop"),
        ("/save", "/save"),
        ("/set n 2", "temperature"),
    ],
)
def test_wrong_commands_end_a_pipe_with_one_line(kvik, line, named):
    ended = kvik("chat", stdin=line.encode())
    assert ended.code == 2
    (said,) = ended.err.splitlines()
    assert named in said


@pytest.mark.parametrize(
    ("first", "name", "said"),
    [
        ("dry_multiplier 1", "dry_base 2", "dry_base needs dry_multiplier, which is 0; first /set dry_base 1.75"),
        ("dry_multiplier 1", "dry_breakers a", "first set dry_breakers back to its default"),
        ("xtc_probability 1", "xtc_threshold 0.3", "which is 0; first /set xtc_threshold 0.1"),
    ],
)
def test_what_must_be_reset_first_is_said(kvik, first, name, said):
    off = f"{first.split()[0]} 0"
    ended = kvik("chat", stdin="".join(f"/set {line}\n" for line in (first, name, off)).encode())
    assert ended.code == 2 and said in ended.err
    reset = said.partition("; first ")[2]
    if reset.startswith("/set"):
        lines = (f"/set {first}", f"/set {name}", reset, f"/set {off}")
        assert kvik("chat", stdin="\n".join(lines).encode()).code == 0


def test_json_is_a_line_an_answer(kvik):
    ended = kvik("chat", "--json", stdin=b"hi\nmore\n")
    answers = [json.loads(line) for line in ended.out.splitlines()]
    assert [answer["text"] for answer in answers] == [TEXT, TEXT]
    assert answers[1]["usage"]["prompt_tokens"] > answers[0]["usage"]["prompt_tokens"]
    assert ended.err == ""


def test_conversation_longer_than_the_context(kvik):
    ended = kvik("chat", stdin=b"word " * 3000)
    assert ended.code == 2 and "2048" in ended.err and ended.out == ""


def test_ctrl_c_in_a_pipe_keeps_the_answer(kvik, monkeypatch):
    make = options.make_llm

    def impatient(model, **settings):
        llm = make(model, **settings)
        llm.interrupt_after = 2
        return llm

    monkeypatch.setattr(options, "make_llm", impatient)
    ended = kvik("chat", stdin=b"hi\nmore\n")
    assert (ended.code, ended.out) == (130, "The sky is\n")


def test_bad_bytes_name_their_place(kvik):
    ended = kvik("chat", stdin=b"/?\nab\xff\n")
    assert ended.code == 65 and "(at byte 5)" in ended.err


def test_refused(kvik):
    assert "--n" in kvik("chat", "--n", "2").err
    assert kvik("chat", "--raw", "--system", "x").code == 2
