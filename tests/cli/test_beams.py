"""`kvik run --beams`, beams in batches, and their receipts."""

from __future__ import annotations

import json
from dataclasses import fields

import pytest
from cli.fake_llm import ANSWER

from kvik.cli import options
from kvik.cli.answer_options import BeamOptions
from kvik.cli.batch_input import BadLine, parse_line
from kvik.params import BeamParams, SamplingParams

TEXT = "".join(ANSWER)


def test_the_best_answer_is_printed_when_the_search_has_ended(kvik, made):
    ended = kvik("run", "hi", "--beams", "3")
    assert ended.code == 0 and ended.out == TEXT + "\n"
    assert made[-1].asked[0][1] == BeamParams(num_beams=3, max_tokens=options.DEFAULT_MAX_TOKENS)
    (line,) = ended.err.splitlines()
    for part in ("8 generated tokens", "answer in", "tokens/s", "without sharing"):
        assert part in line


def test_every_option_arrives(kvik, made):
    given = (
        "--beams 4 --n 2 --length-penalty -0.5 --early-stopping never --beam-groups 2 --diversity-penalty 0.3 "
        "--max-tokens 9 --min-tokens 1 --stop a --stop-token-ids 1,2 --ignore-eos --logprobs 2"
    )
    ended = kvik("run", "hi", *given.split())
    assert ended.code == 0, ended.err
    assert made[-1].asked[0][1] == BeamParams(
        num_beams=4, num_return_sequences=2, length_penalty=-0.5, early_stopping="never", num_beam_groups=2,
        diversity_penalty=0.3, max_tokens=9, min_tokens=1, stop=("a",), stop_token_ids=(1, 2), ignore_eos=True, logprobs=2,
    )  # fmt: skip
    assert ended.out.count("--- answer ") == 2
    for text, value in (("true", True), ("False", False), ("never", "never")):
        kvik("run", "hi", "--beams", "2", "--early-stopping", text)
        assert made[-1].asked[0][1].early_stopping == value


def test_options_are_the_fields_that_only_beams_have():
    common = {f.name for f in fields(BeamParams)} & {f.name for f in fields(SamplingParams)}
    own = {f.name for f in fields(BeamParams)} - common - {"num_return_sequences"}
    assert {f.name for f in fields(BeamOptions)} == own


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--beams 65", "--beams must be in [1, 64], got 65"),
        ("--beams 2 --n 3", "--n 3 is above --beams 2"),
        ("--beams 4 --beam-groups 3", "--beam-groups 3 does not divide --beams 4"),
        ("--beams 4 --diversity-penalty 1", "--diversity-penalty needs --beam-groups above 1"),
        ("--beams 4 --early-stopping soon", "--early-stopping must be true, false or never, got 'soon'"),
        ("--beams 4 --temperature 0", "--temperature cannot go with --beams: a beam search draws nothing"),
        ("--beams 4 --top-k 5", "--top-k cannot go with --beams"),
        ("--beams 4 --seed 5", "--seed cannot go with --beams"),
        ("--beams 4 --logprobs 1 --logprobs-mode processed", "--logprobs-mode cannot go with --beams"),
        ("--beams 4 --preset factual", "--preset cannot go with --beams: a beam search draws nothing"),
        *(
            (
                f"--beams 4 {given}",
                f"{given.split()[0]} cannot go with --beams: it is not one of a beam search's parameters",
            )
            for given in (
                "--logit-bias 3=1",
                "--bad-words a",
                "--dry-multiplier 1",
                "--presence-penalty 1",
                "--frequency-penalty 1",
            )
        ),
        ("--beams 1 --length-penalty 2", "--length-penalty needs --beams above 1"),
        ("--length-penalty 2", "--length-penalty needs --beams"),
        ("--beam-groups 2", "--beam-groups needs --beams"),
        ("--beams 200", "--beams must be in [1, 64], got 200"),
    ],
)
def test_refused_before_a_model_is_loaded(kvik, made, arguments, said):
    ended = kvik("run", "hi", *arguments.split())
    assert ((ended.code, ended.out, made) == (2, "", []) and ended.err == f"kvik: error: {said}\n") or said in ended.err


def test_what_asks_for_nothing_is_taken(kvik, made):
    assert kvik("run", "hi", "--beams", "2", "--temperature", "1", "--top-p", "1").code == 0


def test_json_has_scores_and_the_receipt_repeats(kvik, tmp_path):
    path = tmp_path / "receipt.json"
    ended = kvik("run", "hi", "--beams", "3", "--n", "2", "--max-tokens", "20", "--json", "--receipt", str(path))
    answer = json.loads(ended.out)
    first, second = answer["choices"]
    assert first["text"] == TEXT and first["score"] == pytest.approx(first["cumulative_logprob"] / 8, abs=1e-6)
    assert first["score"] >= second["score"] and answer["params"]["num_beams"] == 3 and answer["beams"] is None
    receipt = json.loads(path.read_text())
    assert (
        receipt["kind"] == "beam" and receipt["params"]["num_return_sequences"] == 2 and "seed" not in receipt["params"]
    )
    assert kvik("replay", str(path)).code == 0
    ended = kvik("replay", str(path), "--crowd", "8", "--max-batch-tokens", "9", "--kv-bytes", "300kB")
    assert ended.code == 0 and "in 2 choices" in ended.out
    receipt["outputs"][0][3] = 2
    path.write_text(json.dumps(receipt))
    ended = kvik("replay", str(path))
    assert ended.code == 65 and "choice 0 differs at token 3" in ended.err


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda r: r.update(kind="ray"), "kind is 'ray', none of sampling, beam"),
        (lambda r: r.pop("kind"), "no field 'kind'"),
        (lambda r: r.update(kind="sampling"), "params has"),
        (lambda r: r["params"].update(num_beams=65), "num_beams"),
        (lambda r: r.update(outputs=[]), "num_return_sequences is 1, with 0 outputs"),
        (lambda r: r.update(finish_reasons=["cancelled"]), "was cancelled"),
    ],
)
def test_receipts_that_are_none(kvik, tmp_path, change, said):
    path = tmp_path / "receipt.json"
    kvik("run", "hi", "--beams", "2", "--receipt", str(path))
    found = json.loads(path.read_text())
    change(found)
    path.write_text(json.dumps(found))
    ended = kvik("replay", str(path))
    assert ended.code == 65 and said in ended.err


def test_lines_of_a_batch(kvik, made, tmp_path):
    requests, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = [{"prompt": "hi", "num_beams": 3, "n": 2}, {"prompt": "hi"}, {"prompt": "hi", "num_beams": 2, "top_k": 5}]
    requests.write_text("".join(json.dumps(line) + "\n" for line in lines))
    ended = kvik("run", "--batch", str(requests), "--out", str(out), "--max-tokens", "20")
    assert ended.code == 65 and "line 3: top_k cannot go with num_beams" in ended.err
    assert made[-1].asked[0][1] == BeamParams(num_beams=3, num_return_sequences=2, max_tokens=20)
    found = {entry["line"]: entry for entry in map(json.loads, out.read_text().splitlines())}
    assert found[1]["text"] == TEXT and len(found[1]["choices"]) == 2 and found[1]["receipt"]["kind"] == "beam"
    assert found[2]["text"] == TEXT and found[2]["receipt"]["kind"] == "sampling"


def test_a_batch_of_beams(kvik, made, tmp_path):
    requests, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    requests.write_text('{"prompt": "hi"}\n{"prompt": "hi", "length_penalty": 0, "seed": 3}\n')
    ended = kvik("run", "--batch", str(requests), "--out", str(out), "--beams", "2", "--early-stopping", "true")
    assert ended.code == 65 and "line 2: seed cannot go with num_beams" in ended.err
    assert made[-1].asked[0][1] == BeamParams(num_beams=2, early_stopping=True, max_tokens=options.DEFAULT_MAX_TOKENS)


def test_beam_fields_of_a_line_need_beams():
    with pytest.raises(BadLine, match="length_penalty needs num_beams"):
        parse_line(1, b'{"prompt": "a", "length_penalty": 2}', SamplingParams())
    given = {"stop": ("x",), "max_tokens": 7, "n": 2}
    found = parse_line(1, b'{"prompt": "a", "num_beams": 2}', SamplingParams(temperature=0.3), given)
    assert found.params == BeamParams(num_beams=2, num_return_sequences=2, stop=("x",), max_tokens=7)
    found = parse_line(1, b'{"prompt": "a", "num_beams": 2, "num_return_sequences": 1}', SamplingParams(), given)
    assert found.params.num_return_sequences == 1


def lines_of(kvik, tmp_path, lines, *options):
    requests, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    requests.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return kvik("run", "--batch", str(requests), "--out", str(out), *options)


def test_options_are_the_defaults_of_a_line_with_beams(kvik, made, tmp_path):
    lines = [{"prompt": "hi", "num_beams": 2}, {"prompt": "hi", "num_beams": 2, "repetition_penalty": 3}]
    options = "--repetition-penalty 5 --no-repeat-ngram-size 1 --temperature 1 --max-tokens 4 --logprobs 1"
    ended = lines_of(kvik, tmp_path, lines, *options.split())
    assert ended.code == 0, ended.err
    assert [(p.repetition_penalty, p.no_repeat_ngram_size, p.max_tokens, p.logprobs) for _, p in made[-1].asked] == [
        (5.0, 1, 4, 1),
        (3, 1, 4, 1),
    ]


@pytest.mark.parametrize(
    "given", ["--bad-words a", "--logit-bias 3=1", "--preset factual", "--temperature 0.5", "--top-k 5", "--seed 4"]
)
def test_options_that_a_line_with_beams_cannot_have(kvik, made, tmp_path, given):
    ended = lines_of(kvik, tmp_path, [{"prompt": "hi", "num_beams": 2}, {"prompt": "hi"}], *given.split())
    assert ended.code == 65 and f"line 1: {given.split()[0]} cannot go with num_beams: " in ended.err
    assert [type(params) for _, params in made[-1].asked] == [SamplingParams]


def test_one_beam_of_a_line_is_sampling(kvik, made, tmp_path):
    lines = [{"prompt": "hi", "num_beams": 1, "top_k": 3}, {"prompt": "hi", "num_beams": 1, "length_penalty": 2}]
    ended = lines_of(kvik, tmp_path, [*lines, {"prompt": "hi", "num_beams": True}])
    assert ended.code == 65 and "line 2: length_penalty needs num_beams above 1" in ended.err
    assert "line 3: num_beams must be an integer" in ended.err
    ((_, params),) = made[-1].asked
    assert isinstance(params, SamplingParams) and params.top_k == 3
    (tmp_path / "out.jsonl").unlink()
    ended = lines_of(kvik, tmp_path, lines[:1], "--beams", "2")
    assert ended.code == 65 and "num_beams 1 is sampling, and --beams makes every line a beam search" in ended.err
