from __future__ import annotations

import json
import re
from dataclasses import fields
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
from cli.fake_llm import VOCABULARY

from kvik.cli import xray as verb
from kvik.cli.xray_html import page, shown
from kvik.cli.xray_terminal import print_text
from kvik.cli.xray_tree import beam_tree, path_of, tree_svg
from kvik.decoding.beam import BeamChoice, BeamEnd, BeamStep
from kvik.decoding.pipeline import DrawRequest
from kvik.decoding.trace import trace_token
from kvik.params import BeamParams, Grammar, SamplingParams

RUN = ("xray", "hi", "--raw", "--max-tokens", "5", "--seed", "1")
HOSTILE = [
    b"</script><script>alert(1)</script>", b'"><img src=x onerror=alert(1)>', b"<!--", b"]]>", b"\xff\xfe", b"\x00\x1b[2J",
    "\u202egnp.exe".encode(), "\u2028\u2029".encode(), b"&lt;b&gt;", b"' onmouseover='x", b"\n\n", b"\t", b"", b"${x}`",
    "‍👩".encode(), b"</style>", b"\\u003c", b"a" * 5000,
]  # fmt: skip


class Read(HTMLParser):
    """Tags with attributes, and the text inside scripts."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.tags, self.scripts, self.said, self._in = [], [], [], None
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._in = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        self._in = None

    def handle_data(self, data):
        if self._in == "script":
            self.scripts[-1] += data
        else:
            self.said.append(data)


def traces_of(pieces, count=None):
    draw = np.random.default_rng(0)
    rows = [(draw.normal(size=len(pieces)) * 2).astype(np.float32) for _ in range(count or len(pieces))]
    params = SamplingParams(temperature=0.8, top_k=9, top_p=0.9)
    return [trace_token(row, DrawRequest(params, 0, 0, i), i % len(pieces)) for i, row in enumerate(rows)]


def made(pieces, prompt="hi", raw=True):
    steps = [
        BeamStep((BeamChoice(0, 0, -1.0), BeamChoice(0, 1, -2.0)), ()),
        BeamStep((BeamChoice(0, 2, -1.5), BeamChoice(0, 3, -2.5)), (BeamEnd(1, 4, -2.25, -1.125),)),
        BeamStep((), (BeamEnd(0, 5, -1.75, -0.6), BeamEnd(1, 6, -4.0, -1.3))),
    ]
    tree = beam_tree(steps, [[0, 2, 5], [1, 4]])
    facts = {"model": "<m>", "strategy": "a & b", "prompt": prompt, "raw": raw, "beams": 2, "temperature": 0.8}
    return page(traces_of(pieces), tree, lambda token: pieces[token], facts)


def test_page_of_hostile_texts():
    text = made(HOSTILE, prompt="</title><script>alert(2)</script>\u202e\x00")
    text.encode()
    read = Read(text)
    assert [tag for tag, _ in read.tags].count("script") == 2 and len(read.scripts) == 2
    names = {tag for tag, _ in read.tags}
    assert not names & {"img", "iframe", "link", "object", "embed", "form", "base", "video", "a"}
    for tag, attributes in read.tags:
        assert not {"src", "href", "action", "srcdoc", "xlink:href"} & set(attributes), tag
        assert not [name for name in attributes if name.startswith("on")], tag
    data = json.loads(read.scripts[0])
    assert len(data["tokens"]) == len(HOSTILE) and data["names"][0] == shown(HOSTILE[0])
    for character in "\u202e\u2028\x00\x1b":
        assert character not in text


def test_page_loads_nothing_and_runs_only_its_own_script():
    text = made([b"a", b" b", b"c", b"d", b"e", b"f", b"g"])
    assert re.findall(r"https?://[^\s\"']*", text) == ["http://www.w3.org/2000/svg"]  # a name, not an address
    assert not re.search(
        r"url\(|@import|fetch\(|XMLHttp|import\(|eval\(|innerHTML|insertAdjacent|document\.write", text
    )
    (policy,) = [a["content"] for tag, a in Read(text).tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'")
    import base64
    import hashlib

    digest = base64.b64encode(hashlib.sha256(Read(text).scripts[1].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy


def test_page_says_the_text_without_scripts():
    pieces = [b"The", b" sky", b" is", b" blue", b".\n", b"Really", b" blue!"]
    said = "".join(Read(made(pieces)).said)
    assert "The sky is blue.⏎\nReally blue!" in said and "hi" in said
    assert "asked" in "".join(Read(made(pieces, raw=False)).said)


def test_numbers_on_the_page_are_those_of_the_trace():
    pieces = [bytes([97 + i]) for i in range(20)]
    data = json.loads(Read(made(pieces)).scripts[0])
    for told, one in zip(data["tokens"], traces_of(pieces), strict=True):
        assert told["p"] == pytest.approx(one.probability, rel=1e-3) and told["rank"] == one.rank
        assert told["h"] == pytest.approx(one.entropy / np.log(2), rel=1e-3) and told["n"] == one.nucleus
        assert [s[:3] for s in told["stages"]] == [list(s[:3]) for s in one.stages]
        assert [data["names"][b[0]] for b in told["best"]] == [shown(pieces[c.token_id]) for c in one.candidates]
        assert [b[1] or None for b in told["best"]] == [c.removed_by for c in one.candidates]
        assert len(told["sweep"]) == len(one.sweep) and len(told["sweep"][0][3]) == len(one.candidates)


def test_page_of_no_token():
    text = page(
        [],
        [],
        lambda token: b"",
        {"model": "m", "strategy": "", "prompt": "x", "raw": True, "beams": 0, "temperature": 1},
    )
    assert json.loads(Read(text).scripts[0])["tokens"] == [] and "NaN" not in Read(text).scripts[0]


def test_tree():
    steps = [
        BeamStep((BeamChoice(0, 7, -1.0), BeamChoice(0, 8, -2.0)), ()),
        BeamStep((BeamChoice(1, 9, -2.5), BeamChoice(1, 7, -3.0)), (BeamEnd(0, 1, -1.5, -0.75),)),
        BeamStep((), (BeamEnd(0, 1, -2.75, -0.9), BeamEnd(1, 2, -9.0, -3.0))),
    ]
    tree = beam_tree(steps, [[7, 1], [8, 9, 1]])
    ids = [[tree[at].token_id for at in path_of(tree, i)] for i in range(len(tree))]
    assert ids == [[7], [8], [8, 9], [8, 7], [7, 1], [8, 9, 1], [8, 7, 2]]
    assert [node.best for node in tree] == [True, False, False, False, True, False, False]
    assert [node.kept for node in tree] == [True, True, True, False, True, True, False]
    assert [node.slot for node in tree] == [0, 1, 0, 1, 2, 0, 1] and tree[4].score == -0.75
    svg = tree_svg(tree, lambda token: "<&>" * 20)
    read = Read(svg)
    groups = [a["class"] for tag, a in read.tags if tag == "g" and "data-node" in a]
    assert sorted(groups) == sorted(
        ["node best", "node kept", "node kept", "node lost", "node best ended", "node kept ended", "node lost ended"]
    )
    assert {tag for tag, _ in read.tags} == {"svg", "text", "path", "g", "rect"}


def test_beams_that_are_still_followed_are_kept():
    tree = beam_tree([BeamStep((BeamChoice(0, 3, -1.0), BeamChoice(0, 4, -1.5)), ())], [[3]])
    assert [(node.kept, node.best) for node in tree] == [(True, True), (True, False)]
    assert tree_svg([], str).startswith("<svg")


def test_table(kvik):
    ended = kvik(*RUN, "--temperature", "1", "--top-k", "50", "--top-p", "0.9")
    assert ended.code == 0 and ended.err == ""
    lines = ended.out.splitlines()
    assert lines[0] == "The sky is blue."
    assert "entropy" in lines[3] and "nucleus 0.9" in lines[3] and "removed by" in lines[3]
    assert '" sky"' in lines[5] and f"top_k {VOCABULARY - 50}" in lines[5] and "top_p 49" in lines[5]
    assert 'token 1, "The": rank 1' in ended.out and "the same logits at other temperatures" in ended.out


def test_json(kvik, made):
    ended = kvik(*RUN, "--json", "--beams", "2", "--beam-tokens", "3", "--temperature", "0.5")
    report = json.loads(ended.out)
    assert report["text"] == "The sky is blue.\n" and report["params"]["trace"] is True
    assert [one["text"] for one in report["tokens"]] == ["The", " sky", " is", " blue", ".\n"]
    assert report["tokens"][0]["rank"] == 1 and report["tokens"][0]["candidates"][0]["text"] == "The"
    assert [node["text"] for node in report["beams"] if node["best"]] == ["The", " sky", " is"]
    assert made[0].asked[0][1].max_tokens == 5 and made[0].asked[1][1].num_beams == 2


def test_beams_have_what_the_answer_has(kvik, made):
    given = (
        "--min-tokens 4 --stop q --stop-token-ids 9 --ignore-eos --repetition-penalty 2 --no-repeat-ngram-size 3 "
        "--top-k 5 --beams 2 --beam-tokens 3"
    )
    assert kvik(*RUN, *given.split()).code == 0
    assert made[0].asked[1][1] == BeamParams(
        num_beams=2, num_return_sequences=2, max_tokens=3, min_tokens=3, trace=True, stop=("q",), stop_token_ids=(9,),
        ignore_eos=True, repetition_penalty=2.0, no_repeat_ngram_size=3,
    )  # fmt: skip


def test_fields_that_answer_and_beams_share():
    common = {f.name for f in fields(BeamParams)} & {f.name for f in fields(SamplingParams)}
    assert set(verb._SHARED) == common - {"max_tokens", "min_tokens", "logprobs", "trace"}


def test_beams_obey_the_grammar():
    asked = []

    class Model:
        def generate(self, prompts, params):
            asked.append(params)
            return [SimpleNamespace(beams=(), choices=())]

    grammar = Grammar.regex("[0-9]+")
    verb._follow(Model(), [1], SamplingParams(grammar=grammar), verb.XrayOptions(beams=2))
    assert asked[0].grammar == grammar


def test_html(kvik, tmp_path):
    path = tmp_path / "page.html"
    ended = kvik(*RUN, "--html", str(path), "--beams", "3")
    assert ended.code == 0 and ended.err == f"{path}: open it in a browser\n"
    data = json.loads(Read(path.read_text()).scripts[0])
    assert [data["names"][one["t"]] for one in data["tokens"]] == ["The", "␣sky", "␣is", "␣blue", ".⏎"]
    assert data["nodes"]


def test_plot(kvik, tmp_path):
    path = tmp_path / "sweep.svg"
    ended = kvik(*RUN, "--plot", str(path), "--at", "2")
    assert ended.code == 0 and "token 2," in ended.out and path.read_bytes().startswith(b"<?xml")


def test_colours_only_on_a_terminal(kvik, monkeypatch, capsys):
    assert "\x1b" not in kvik(*RUN).out
    pieces = [b"a", b"\x1b[2J", "é".encode()[:1], "é".encode()[1:], b"\n"]
    traces = traces_of(pieces)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    print_text(traces, lambda ids: b"".join(pieces[i] for i in ids).decode(errors="replace"))
    out = capsys.readouterr().out
    assert "\x1b[48;5;" in out and "\x1b[2J" not in out and "␛[2J" in out and "é" in out
    monkeypatch.setenv("NO_COLOR", "1")
    print_text(traces, lambda ids: b"".join(pieces[i] for i in ids).decode(errors="replace"))
    assert "\x1b" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--beams", "65"], "--beams must be in [0, 64], got 65"),
        (["--beam-tokens", "3"], "--beam-tokens needs --beams"),
        (["--beams", "2", "--beam-tokens", "0"], "--beam-tokens must be in [1, 2048]"),
        (["--at", "0"], "--at must be at least 1"),
        (["--max-tokens", "0"], "--max-tokens must be in [1, 2048]"),
        (["--n", "2"], "--n has no effect"),
        (["--logprobs", "2"], "--logprobs has no effect"),
        (["--logprobs-mode", "processed"], "--logprobs-mode has no effect"),
        (["--temperature", "-1"], "--temperature must be finite and at least 0"),
        (["--plot", "x.txt"], "--plot writes .png, .svg, .pdf"),
    ],
)
def test_refused_before_a_model_is_loaded(kvik, made, arguments, named):
    ended = kvik("xray", "hi", *arguments)
    assert ended.code == 2 and ended.out == "" and made == []
    (line,) = ended.err.splitlines()
    assert named in line


def test_refused_later(kvik, tmp_path):
    ended = kvik(*RUN, "--at", "9")
    assert ended.code == 2 and "--at is 9; the answer has 5 tokens" in ended.err
    (tmp_path / "file").touch()
    ended = kvik(*RUN, "--html", str(tmp_path / "file" / "page.html"))
    assert ended.code == 74 and ended.err.count("\n") == 1
    assert kvik("xray", "").code == 2
