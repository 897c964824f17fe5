from __future__ import annotations

import json

import pytest
from cli.fake_llm import ANSWER, FakeLLM

from kvik.cli import conversation, options, strategy_options
from kvik.llm import LLM
from kvik.models import reading
from kvik.params import CacheParams, EngineParams, Grammar, SamplingParams

TEXT = "".join(ANSWER)


def test_answer_on_stdout_and_one_line_on_stderr(kvik):
    ended = kvik("run", "Why is the sky blue?")
    assert ended.code == 0
    assert ended.out == TEXT + "\n"
    (line,) = ended.err.splitlines()
    for part in ("8 generated tokens", "first token in", "tokens/s", "weights 96.4 MB", "KV 4.1 kB"):
        assert part in line


def test_prompt_goes_through_the_chat_template_unless_raw(kvik, made):
    kvik("run", "hi", "--system", "Be brief.")
    model = made[-1]
    assert model.tokenizer.decode(model.asked[0][0]) == " <system> Be brief. <user> hi <assistant>"
    kvik("run", "hi", "--raw")
    model = made[-1]
    assert model.tokenizer.decode(model.asked[0][0]) == "hi"


def test_defaults_are_the_models_own_and_every_option_arrives(kvik, made):
    kvik("run", "hi", "--seed", "3")
    assert made[-1].asked[0][1] == SamplingParams(temperature=0.7, top_k=50, top_p=0.9, max_tokens=512, seed=3)
    given = (
        "--temperature 0 --top-k 0 --top-p 1 --min-p 0.1 --n 2 --max-tokens 9 --min-tokens 1 --stop a --stop b "
        "--stop-token-ids 1,2 --stop-token-ids 3 --ignore-eos --logprobs 2 --logprobs-mode processed --seed 0"
    )
    kvik("run", "hi", *given.split())
    assert made[-1].asked[0][1] == SamplingParams(
        temperature=0.0, top_k=0, top_p=1.0, min_p=0.1, n=2, max_tokens=9, min_tokens=1, stop=("a", "b"),
        stop_token_ids=(1, 2, 3), ignore_eos=True, logprobs=2, logprobs_mode="processed", seed=0,
    )  # fmt: skip


def test_model_options_arrive(kvik, made):
    given = "-m x.gguf --weights int8 --kv k8v4 --executor torch --device cuda --threads 3"
    kvik("run", "hi", *given.split())
    assert made[-1].model == "x.gguf"
    settings = dict(made[-1].settings)
    assert settings.pop("progress") is not None
    assert settings == {
        "weights": "int8", "cache": CacheParams(k="int8", v="int4"), "executor": "torch", "device": "cuda", "engine": EngineParams(threads=3)
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "count"),
    [("4096", 4096), ("512MB", 512 * 10**6), ("1GiB", 2**30), ("1.5 kib", 1536), ("64B", 64), ("2kB", 2000)],
)
def test_sizes(text, count):
    assert options.EngineOptions(kv_bytes=text).params().kv_bytes == count


def test_engine_options_arrive(kvik, made):
    given = "--threads 2 --max-batch-tokens 9 --max-sequences 3 --max-waiting 0 --no-prefix-sharing --kv-bytes 1MiB"
    assert kvik("run", "hi", *given.split()).code == 0
    assert made[-1].settings["engine"] == EngineParams(
        threads=2, kv_bytes=2**20, max_batch_tokens=9, max_sequences=3, max_waiting=0, prefix_sharing=False
    )


@pytest.mark.parametrize("verb", [("run", "hi"), ("chat",), ("eval", "logprobs", "-"), ("bench",)])
@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--kv-bytes", "1G"], ("--kv-bytes", "GiB", "'1G'")),
        (["--kv-bytes", "0"], ("--kv-bytes", "[1, 1125899906842624]")),
        (["--kv-bytes", "10"], ("--kv-bytes", "4096")),
        (["--max-batch-tokens", "0"], ("--max-batch-tokens", "[1, 65536]")),
        (["--max-sequences", "5000"], ("--max-sequences", "[1, 4096]")),
        (["--max-waiting", "-1"], ("--max-waiting", "[0, 1000000]")),
    ],
)
def test_engine_options_out_of_range(kvik, verb, arguments, named):
    ended = kvik(*verb, *arguments)
    assert ended.code == 2 and ended.out == "" and ended.err.count("\n") == 1
    for part in named:
        assert part in ended.err


def test_options_are_the_fields_of_the_parameters():
    assert options.EngineOptions.__dataclass_fields__.keys() == EngineParams.__dataclass_fields__.keys()
    assert options.EngineOptions().params() == EngineParams()
    fields = set(SamplingParams.__dataclass_fields__) - {"grammar", "trace"}
    assert set(options.SamplingOptions.__dataclass_fields__) == fields | {"preset"}
    assert set(conversation.SETTABLE) == fields - {"n"}


def test_the_help_says_which_defaults_a_model_may_have():
    basic = {"temperature", "top_k", "top_p", "min_p"}
    assert basic | set(strategy_options.MODEL_DEFAULTS) == set(reading._HUB_SAMPLING)


def test_a_model_that_has_only_a_penalty_keeps_the_other_defaults(kvik, made, monkeypatch):
    def default_params(self):
        self._defaults = {"repetition_penalty": 1.3}
        return LLM.default_params(self)

    monkeypatch.setattr(FakeLLM, "default_params", default_params)
    kvik("run", "hi", "--seed", "1", "--max-tokens", "3")
    fields = {"temperature": 0.7, "top_k": 50, "top_p": 0.9, "repetition_penalty": 1.3}
    assert made[-1].asked[0][1] == SamplingParams(seed=1, max_tokens=3, **fields)


def test_preset_and_what_replaces_its_fields(kvik, made):
    kvik("run", "hi", "--preset", "creative", "--top-k", "7", "--seed", "1", "--max-tokens", "3")
    assert made[-1].asked[0][1] == SamplingParams.preset("creative", top_k=7, seed=1, max_tokens=3)
    ended = kvik("run", "hi", "--preset", "creativ")
    assert ended.code == 2 and "--preset must be one of factual, balanced, creative" in ended.err


def test_every_further_option_arrives(kvik, made):
    given = {
        "repetition_penalty": 1.1, "presence_penalty": 0.5, "frequency_penalty": -0.5, "no_repeat_ngram_size": 3,
        "dry_multiplier": 0.8, "dry_base": 2.0, "dry_allowed_length": 3, "dry_range": 64, "dry_breakers": (";", "!"),
        "typical_p": 0.9, "epsilon_cutoff": 0.001, "eta_cutoff": 0.002, "top_n_sigma": 2.0, "xtc_probability": 0.5,
        "xtc_threshold": 0.2, "logit_bias": ((5, -2.0), (7, 1.5)), "bad_words": ("sky", "blue"),
    }  # fmt: skip
    arguments = []
    for name, value in given.items():
        values = (
            [f"{t}={b}" for t, b in value] if name == "logit_bias" else value if isinstance(value, tuple) else [value]
        )
        for one in values:
            arguments += [f"--{name.replace('_', '-')}", str(one)]
    kvik("run", "hi", "--raw", "--seed", "1", "--max-tokens", "1", *arguments)
    asked = made[-1].asked[0][1]
    assert {name: getattr(asked, name) for name in given} == given
    assert set(given) == set(options.StrategyOptions.__dataclass_fields__) - {"preset"}


@pytest.mark.parametrize("bias", ["5", "5=x", "a=1", "5=1,5=2"])
def test_bias_that_is_none(kvik, bias, made):
    ended = kvik("run", "hi", "--logit-bias", bias)
    assert ended.code == 2 and "--logit-bias takes ID=BIAS" in ended.err and made == []


def test_json_has_the_fields_of_a_completion(kvik):
    ended = kvik("run", "hi", "--json", "--logprobs", "1", "--seed", "5")
    assert ended.err == ""
    (line,) = ended.out.splitlines()
    answer = json.loads(line)
    assert answer["text"] == TEXT
    (choice,) = answer["choices"]
    assert choice["text"] == TEXT and choice["finish_reason"] == "stop" and choice["index"] == 0
    assert choice["cumulative_logprob"] == pytest.approx(0, abs=1e-9)
    assert choice["logprobs"][0]["top"][0]["token_id"] == choice["token_ids"][0]
    assert len(choice["token_ids"]) == 8
    assert answer["usage"]["completion_tokens"] == 8 and answer["usage"]["kv_bytes_peak"] == 4096
    assert answer["usage"]["prompt_tokens"] == len(answer["prompt_tokens"]) == 3
    assert answer["params"]["seed"] == 5 and answer["params"]["logprobs"] == 1
    assert answer["timings"]["first_token_ms"] >= 0 and answer["timings"]["process_first_token_ms"] > 0


def test_json_has_no_logprobs_unless_asked(kvik):
    answer = json.loads(kvik("run", "hi", "--json").out)
    assert answer["choices"][0]["logprobs"] is None
    assert answer["choices"][0]["cumulative_logprob"] == pytest.approx(0, abs=1e-9)
    assert 0 <= answer["params"]["seed"] < 2**32  # drawn here, so that the answer can be repeated


def test_logprobs_are_printed(kvik):
    lines = kvik("run", "hi", "--logprobs", "1").out.splitlines()
    assert lines[3].split() == ["sample", "token", "logprob", "best"]
    sample, token, logprob, best, best_logprob = lines[4].split()
    assert (sample, token, best) == ("0", '"The"', '"The"') and abs(float(logprob)) < 1e-6 > abs(float(best_logprob))
    assert any('".\\n"' in line for line in lines)


def test_several_answers_have_headings(kvik):
    out = kvik("run", "hi", "--n", "2").out
    assert out == f"--- answer 1 of 2 ---\n{TEXT}\n--- answer 2 of 2 ---\n{TEXT}\n"


def test_prompt_from_stdin_loses_one_line_break(kvik, made):
    kvik("run", "-", "--raw", stdin=b"one\ntwo\n")
    assert made[-1].tokenizer.decode(made[-1].asked[0][0]) == "one\ntwo"


def test_cut_answer_says_so(kvik):
    assert "cut at max_tokens" in kvik("run", "hi", "--max-tokens", "2").err


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--temperature", "-1"], ("--temperature", "at least 0", "-1")),
        (["--top-p", "1.5"], ("--top-p", "[0, 1]", "1.5")),
        (["--top-k", "-2"], ("--top-k", "[0, 2147483647]")),
        (["--min-p", "nan"], ("--min-p", "[0, 1]")),
        (["--n", "0"], ("--n", "[1, 128]")),
        (["--max-tokens", "0"], ("--max-tokens", "at least 1")),
        (["--min-tokens", "600"], ("--min-tokens", "600", "512")),
        (["--seed", "-1"], ("--seed", "[0, 18446744073709551615]")),
        (["--logprobs", "2000"], ("--logprobs", "[0, 1024]")),
        (["--logprobs", "1", "--logprobs-mode", "cooked"], ("--logprobs-mode", "raw", "processed")),
        (["--logprobs-mode", "processed"], ("--logprobs-mode", "--logprobs")),
        (["--stop-token-ids", "1,x"], ("--stop-token-ids", "1,x")),
        (["--stop", ""], ("--stop",)),
        (["--threads", "0"], ("--threads", "[1, 256]")),
        (["--top-k", "many"], ("--top-k", "kvik run --help")),
        (["--tempreature", "1"], ("--tempreature", "kvik run --help")),
        (["--system", "x", "--raw"], ("--system", "--raw")),
        (["extra"], ("extra", "kvik run --help")),
    ],
)
def test_wrong_usage_is_one_line_naming_option_and_range(kvik, arguments, named):
    ended = kvik("run", "hi", *arguments)
    assert ended.code == 2 and ended.out == ""
    (line,) = ended.err.splitlines()
    assert line.startswith("kvik: error: ")
    for part in named:
        assert part in line


def test_options_are_checked_before_a_model_is_loaded(kvik, made):
    assert kvik("run", "hi", "--top-p", "2").code == 2
    assert kvik("run", "").code == 2
    assert made == []


def test_prompt_that_is_no_text(kvik):
    ended = kvik("run", "-", stdin=b"caf\xe9 au lait")
    assert ended.code == 65
    assert ended.err == "kvik: error: standard input: is not UTF-8: byte 0xe9 (at byte 3)\n"
    assert kvik("run", "caf\udce9").code == 65


def test_missing_prompt(kvik):
    ended = kvik("run")
    assert (ended.code, ended.err.count("\n")) == (2, 1) and "PROMPT" in ended.err
    assert kvik("run", "-").code == 2


def test_ctrl_c_keeps_what_was_said(kvik, monkeypatch):
    make = options.make_llm

    def impatient(model, **settings):
        llm = make(model, **settings)
        llm.interrupt_after = 3
        return llm

    monkeypatch.setattr(options, "make_llm", impatient)
    ended = kvik("run", "hi")
    assert ended.code == 130
    assert ended.out == "The sky is blue\n"
    assert "4 generated tokens" in ended.err and "interrupted" in ended.err
    ended = kvik("run", "hi", "--json")
    assert ended.code == 130
    answer = json.loads(ended.out)
    assert answer["choices"][0]["finish_reason"] == "cancelled"
    assert answer["choices"][0]["text"] == "The sky is blue"
    assert answer["usage"] == {
        "prompt_tokens": 3, "completion_tokens": 4, "cached_tokens": 0, "kv_bytes_now": 4096, "kv_bytes_peak": 4096,
        "kv_tokens_kept": 6, "kv_bytes_unshared": 4096,
    }  # fmt: skip


def test_ctrl_c_before_the_first_token_ends_at_once(kvik, monkeypatch):
    make = options.make_llm

    def impatient(model, **settings):
        llm = make(model, **settings)
        llm.interrupt_after = 0
        return llm

    monkeypatch.setattr(options, "make_llm", impatient)
    ended = kvik("run", "hi")
    assert (ended.code, ended.out) == (130, "")


def test_stats_on_stderr_or_in_the_object(kvik):
    ended = kvik("run", "hi", "--stats")
    assert ended.out == TEXT + "\n"
    shown = [line.split() for line in ended.err.splitlines()[1:]]
    names = {line[0] for line in shown}
    assert {"queue", "prefill", "decode", "first_token", "inter_token", "preemptions", "blocks,", "python"} <= names
    assert ["steps", "8"] in [line[:2] for line in shown]
    assert ["tokens", "10"] in [line[:2] for line in shown]  # 3 of the prompt and 7 of the answer
    answer = json.loads(kvik("run", "hi", "--stats", "--json").out)
    assert len(answer["stats"]["inter_token"]) == 7 and answer["stats"]["first_token"] > 0
    assert answer["engine"]["steps"] == 8 and answer["engine"]["generated"] == 8
    assert answer["engine"]["wasted_share"] == pytest.approx(sum(16 - used for used in range(3, 10)) / (16 * 7))
    assert answer["engine"]["matrices"] == pytest.approx(8e-6)
    assert "engine" not in json.loads(kvik("run", "hi", "--json").out)


def test_receipt(kvik, tmp_path):
    path = tmp_path / "new" / "receipt.json"
    answer = json.loads(kvik("run", "hi", "--n", "2", "--seed", "3", "--receipt", str(path), "--json").out)
    assert json.loads(path.read_text()) == answer["receipt"]
    assert answer["receipt"]["outputs"] == [choice["token_ids"] for choice in answer["choices"]]
    assert answer["receipt"]["params"]["seed"] == 3 and answer["receipt"]["prompt"] == answer["prompt_tokens"]


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--regex", "a", "--lark", 'start: "a"'], 2, "--regex and --lark exclude each other"),
        (["--regex", ""], 2, "--regex: the regex must be text"),
        (["--regex", "a", "--ignore-eos"], 2, "--ignore-eos cannot go with --regex: the text ends"),
        (["--lark", 'start: "a"', "--ignore-eos", "--beams", "2"], 2, "--ignore-eos cannot go with --lark"),
        (["--regex", "("], 2, "--regex: regular expression: unclosed group"),
        (["--json-schema", '{"minimun": 1}'], 2, "--json-schema: the schema's 'minimun'"),
        (["--json-schema", "no/such/file.json"], 65, "no/such/file.json"),
        (["--lark", "no/such/file.lark"], 65, "no/such/file.lark"),
    ],
)
def test_grammars_that_are_refused(kvik, arguments, code, said):
    ended = kvik("run", "hi", *arguments)
    assert ended.code == code and said in ended.err and ended.err.count("\n") == 1 and ended.out == ""


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--xtc-threshold 0.2", "--xtc-threshold needs --xtc-probability, which is 0"),
        ("--dry-base 2", "--dry-base needs --dry-multiplier, which is 0"),
        ("--min-tokens 5 --max-tokens 3", "--min-tokens 5 is above --max-tokens 3"),
        ("--logit-bias=-1=5", "--logit-bias: a token id must be at least 0, got -1"),
        ("--preset top_p", "--preset must be one of factual, balanced, creative, got 'top_p'"),
    ],
)
def test_options_are_named_as_they_are_typed(kvik, made, arguments, said):
    ended = kvik("run", "hi", *arguments.split())
    assert (ended.code, ended.err, made) == (2, f"kvik: error: {said}\n", [])


def test_one_beam_is_sampling(kvik, made):
    assert kvik("run", "hi", "--beams", "1", "--seed", "3", "--top-k", "4").code == 0
    (_, params) = made[-1].asked[-1]
    assert isinstance(params, SamplingParams) and (params.seed, params.top_k) == (3, 4)


def test_files_of_grammars(kvik, made, tmp_path):
    schema, grammar = tmp_path / "schema.json", tmp_path / "grammar.lark"
    schema.write_text('{"type": "nothing"}')
    ended = kvik("run", "hi", "--json-schema", str(schema))
    assert ended.code == 65 and f"{schema}: " in ended.err and "nothing" in ended.err and ended.err.count("\n") == 1
    grammar.write_bytes(b"\xff")
    assert kvik("run", "hi", "--lark", str(grammar)).code == 65
    grammar.write_text('start: "It "')
    kvik("run", "hi", "--lark", str(grammar))
    (_, params) = made[-1].asked[-1]
    assert params.grammar == Grammar.lark('start: "It "')
