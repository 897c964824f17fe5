"""Jobs and report of the evaluation benchmark: what is run, what is read from it, and verdicts on figures known."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench import BenchError, contenders, evaluation_jobs, evaluation_text
from bench.agreement import Keys, beside, overlap
from bench.common import Finished
from bench.contenders import Settings
from bench.evaluation_jobs import FIRST, SCORED, WINDOW, Inputs, plan
from bench.evaluation_report import report, verdicts
from bench.evaluation_run import arguments, measure, settings_of
from bench.jobs import check
from bench.llama_perplexity import read
from bench.peers import Peers, chosen
from bench.results import Results
from bench.side_by_side import Run

WORKERS = Path(__file__).resolve().parents[2] / "bench" / "workers"


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, WORKERS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --- llama-perplexity's output


def said(losses: list[float], scored: int, **changed: str) -> tuple[str, str]:
    """What llama-perplexity prints for windows with these summed losses, and its log; a part of it changed."""
    so_far = np.exp(np.cumsum(losses) / (scored * np.arange(1, len(losses) + 1)))
    parts = {
        "windows": "0.02 minutes\n" + "".join(f"[{at}]{value:.4f}," for at, value in enumerate(so_far, 1)) + "\n\n",
        "model": "0.00.642.554 I llama_model_loader: - kv  31: tokenizer.chat_template str = {% for message in messages[1]7.0,",
        "tokens": "0.01.485.993 I perplexity: tokenization took 250.5 ms",
        "begin": f"0.01.486.009 I perplexity: calculating perplexity over {len(losses)} chunks, n_ctx=2048, n_seq=1",
        "pass": "0.05.622.973 I perplexity: 4.12 seconds per pass - ETA 0.06.925.434 I ",
        "estimate": f"Final estimate: PPL = {so_far[-1]:.4f} +/- 0.12345",
        "load": "0.06.925.500 I llama_perf_context_print:        load time =      99.00 ms",
        "total": "0.06.925.501 I llama_perf_context_print:       total time =   12250.50 ms /  6145 tokens",
    }
    printed = {**parts, **changed}
    return printed.pop("windows"), "\n".join(printed.values()) + "\n"


def test_losses_of_windows_are_taken_apart() -> None:
    losses = [2400.0, 2100.0, 2650.0]
    found = read(*said(losses, 1023), 3, 1023)
    assert found.nll == pytest.approx(losses, rel=1e-4) and found.seconds == 12.0
    assert found.perplexity == pytest.approx(np.exp(sum(losses) / 3069), rel=1e-4) and found.error == 0.12345


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"estimate": ""}, "printed no final estimate"),
        ({"estimate": "Final estimate: PPL = nan +/- 0.1"}, "final estimate is 'nan'"),
        ({"estimate": "Final estimate: PPL = -3 +/- 0.1"}, "final estimate is '-3'"),
        ({"estimate": "Final estimate: PPL = 99.0 +/- 0.1"}, "99.0 in the end"),
        ({"estimate": "Final estimate: PPL = 9 +/- 1\nFinal estimate: PPL = 9 +/- 1"}, "printed 2 final estimate"),
        ({"estimate": "Unexpected negative standard deviation of log(prob)"}, "printed no final estimate"),
        ({"windows": "[1]10.0,[3]10.0,[2]10.0,"}, "told of 3 windows, not of 3 in order"),
        ({"windows": "[1]10.0,[2]10.0,"}, "told of 2 windows"),
        ({"windows": "[1]1e400,[2]x,[3]10.0,"}, "after window 1 is '1e400'"),
        ({"windows": ""}, "told of 0 windows"),
        ({"total": "llama_perf_context_print:       total time = inf ms / 1 tokens"}, "total time is 'inf'"),
        ({"total": "llama_perf_context_print:       total time = 200.0 ms / 1 tokens"}, "200.0 ms in all"),
        ({"total": ""}, "printed no total time"),
        ({"tokens": "perplexity: tokenization took \x00\ufffd ms"}, "tokenization is"),
    ],
)
def test_output_that_does_not_tell_all_is_refused(changed, expected) -> None:
    with pytest.raises(BenchError, match=expected):
        read(*said([2400.0, 2100.0, 2650.0], 1023, **changed), 3, 1023)


def test_nothing_at_all_is_refused() -> None:
    with pytest.raises(BenchError, match="printed no"):
        read("", "", 3, 1023)


# --- what is run


@pytest.fixture
def settings(tmp_path) -> Settings:
    for name in ("llama.cpp/build/bin/llama-perplexity", "models/smollm2-135m.Q4_1.gguf", "transformers/bin/python",
                 "models/smollm2-135m-bf16/config.json", "tools/bin/python"):  # fmt: skip
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    peers = Peers(tmp_path)
    return Settings(peers=peers, kvik_python=Path(sys.executable), model=peers.variant("Q4_1"), repeat=2)


@pytest.fixture
def inputs(tmp_path) -> Inputs:
    return Inputs(tmp_path, windows=3, long_texts=1, samples=10)


LOSSES = [2400.0, 2100.0, 2650.0]


@pytest.fixture
def ran(monkeypatch) -> list[list[str]]:
    """Commands that would have been run; each answers as its program does."""
    commands: list[list[str]] = []

    def run_child(argv, *, env=None, timeout=900, cwd=None):
        argv = [str(part) for part in argv]
        commands.append(argv)
        if "llama-perplexity" in argv[0]:
            return Finished(*said(LOSSES, SCORED), 14.0, 7)
        asked = json.loads(argv[2])
        if "out" in asked:
            np.save(asked["out"], np.array(LOSSES) + 1)
        found = {
            "seconds": [2.0, 4.0, 9.0] if "pairs" in asked else 2.0, "warm_up_s": 1.0, "perplexity": 9.5,
            "standard_error": 0.1, "kl_mean": 0.1, "same_top": 0.9, "value": 3.5, "keys": [[4100, 4200]], "tokens": 8192,
            "figures": {"corpus": 30.0},
        }  # fmt: skip
        return Finished(json.dumps(found), "", 5.0, 7)

    monkeypatch.setattr(contenders, "run_child", run_child)
    monkeypatch.setattr(evaluation_jobs, "run_child", run_child)
    return commands


def word(argv: list[str], option: str) -> str:
    return argv[argv.index(option) + 1]


def test_all_evaluate_the_same_text(settings, inputs, ran) -> None:
    jobs = plan(settings, inputs)
    names = ("llama.cpp Q4_1 fa=1", "transformers bf16", "kvik")
    theirs, plain, ours = (jobs[f"perplexity {name}"].measure(0).figures for name in names)
    assert theirs["tok_s"] == 3 * 2048 / 12.0 and plain["tok_s"] == ours["tok_s"] == 3 * 2048 / 2.0
    assert (theirs["whole_s"], plain["whole_s"], ours["whole_s"]) == (14.0, 4.0, 4.0)  # warm-ups left out
    assert (word(ran[0], "-c"), word(ran[0], "-t"), word(ran[0], "-fa")) == ("2048", "2", "on")
    assert (word(ran[0], "--chunks"), word(ran[0], "-f")) == ("3", str(inputs.text))
    asked = [json.loads(argv[2]) for argv in ran[1:]]
    assert asked[0]["tokens"] == str(inputs.tokens) and asked[0]["first"] == FIRST == 1025
    assert asked[1]["text"] == str(inputs.text) and asked[1]["window"] == WINDOW
    assert np.load(inputs.losses("llama.cpp Q4_1 fa=1")) == pytest.approx(LOSSES, rel=1e-4)
    assert np.array_equal(np.load(inputs.losses("transformers bf16")), np.array(LOSSES) + 1)


def test_both_find_keys_in_the_same_texts_and_score_the_same_pairs(settings, inputs, ran) -> None:
    jobs = plan(settings, inputs)
    for name in ("longppl kvik", "longppl plain"):
        assert jobs[name].measure(0).figures["tok_s"] == 8192 / 2.0
    ours, theirs = (json.loads(argv[2]) for argv in ran)
    assert {key: ours[key] for key in ("long", "short", "slide")} == {
        key: theirs[key] for key in ("long", "short", "slide")
    }
    assert jobs["bleu sacrebleu"].measure(0).figures == {"pairs_s": 10 / 4.0, "corpus": 30.0}
    assert jobs["rouge kvik"].measure(0).figures["pairs_s"] == 10 / 4.0
    assert [json.loads(argv[2])["mode"] for argv in ran[2:]] == ["bleu", "rouge"]
    assert Path(ran[2][1]).name == "metrics_worker.py" and Path(ran[3][1]).name == "kvik_evaluation.py"


def test_losses_of_another_number_of_windows_fail_the_job(settings, inputs, ran) -> None:
    other = Inputs(inputs.folder, windows=4)
    with pytest.raises(BenchError, match=r"kvik gave losses \[3\], not 4 finite ones"):
        plan(settings, other)["agreement kvik"].measure(0)
    with pytest.raises(BenchError, match="told of 3 windows, not of 4"):
        plan(settings, other)["perplexity llama.cpp Q4_1 fa=0"].measure(0)


def test_names_and_needs(settings, inputs) -> None:
    jobs = plan(settings, inputs)
    for part in ("agreement", "perplexity", "divergence", "longppl", "rouge", "bleu", "perplexity llama.cpp Q4_1"):
        assert chosen(jobs, part, None)
    check(jobs, ["perplexity kvik", "perplexity llama.cpp Q4_1 fa=0", "longppl plain", "bleu sacrebleu"])
    (settings.peers.root / "transformers/bin/python").unlink()
    for name, expected in {
        "perplexity llama.cpp Q8_0 fa=1": "--only models",
        "longppl plain": "--only transformers",
    }.items():
        with pytest.raises(BenchError, match=expected):
            check(jobs, [name])


def test_agreement_is_measured_once(settings, inputs, ran, tmp_path) -> None:
    run = Run(plan(settings, inputs), 0, tmp_path, Results())
    measure(run, ["agreement kvik", "bleu kvik"], 3)
    assert {job: len(blocks) for job, blocks in run.results.figures.items()} == {"agreement kvik": 1, "bleu kvik": 3}


@pytest.mark.parametrize(
    ("option", "least"), [("--windows", 2), ("--samples", 1), ("--long-texts", 1), ("--repeat", 1)]
)
def test_sizes_too_small_are_refused(option, least, settings) -> None:
    options = arguments().parse_args(["--root", str(settings.peers.root), option, str(least - 1)])
    with pytest.raises(BenchError, match=f"{option} must be at least {least}"):
        settings_of(options)


# --- texts


def test_pairs_are_seeded_about_100_words_and_alike() -> None:
    predictions, references = evaluation_text.pairs(50, 7)
    assert (predictions, references) == evaluation_text.pairs(50, 7) != evaluation_text.pairs(50, 8)
    lengths = [len(text.split()) for text in references]
    assert 80 < np.mean(lengths) < 110 and min(lengths) >= 60
    assert all(5 <= text.count("\n") + 1 <= 7 for text in references)
    kept = [
        len(set(a.split()) & set(b.split())) / len(set(b.split())) for a, b in zip(predictions, references, strict=True)
    ]
    assert 0.7 < np.mean(kept) < 0.99


def test_english_goes_on_with_docstrings() -> None:
    topics = len("\n\n".join(evaluation_text.topics()))
    assert len(evaluation_text.english(1)) < topics
    longer = evaluation_text.english(topics + 1000)
    assert len(longer) > topics and longer == evaluation_text.english(topics + 1000)


class PairsOfLetters:
    """Tokens are pairs of letters within a word, or one; a text's tokens are known from its spaces on."""

    def encode(self, text: str, add_special: bool = True) -> list[int]:
        found = []
        for line in text.replace("\n", " \n ").split(" "):
            found += [0, *(int.from_bytes(line[i : i + 2].encode()) for i in range(0, len(line), 2))]
        return found[1:]

    def decode_bytes(self, ids: list[int]) -> bytes:
        return b"".join(b" " if token == 0 else token.to_bytes(2).lstrip(b"\0") for token in ids).replace(
            b" \n ", b"\n"
        )


def test_a_piece_has_just_its_tokens() -> None:
    worker, tokenizer = load("kvik_evaluation"), PairsOfLetters()
    ids = tokenizer.encode("the quick brown\nfox jumps over\nthe lazy dog and so on")
    for count in (4, 7, 11):
        end, part, text = worker.piece(tokenizer, ids, 1, count)
        assert end > count and part == ids[end - count : end] == tokenizer.encode(text) and not text.endswith("\n")
    end, part, text = worker.piece(tokenizer, ids, 1, 11, echo=3)
    assert part == ids[end - 8 : end] + ids[end - 8 : end - 5] == tokenizer.encode(text)
    with pytest.raises(SystemExit, match="no piece of 99 tokens from token 0 on"):
        worker.piece(tokenizer, ids, 0, 99)


# --- the plain LongPPL


def test_plain_longppl_is_the_definition(tmp_path) -> None:
    torch = pytest.importorskip("torch")
    worker = load("transformers_evaluation")
    vocabulary, draw = 11, np.random.default_rng(0)
    ids = draw.integers(0, vocabulary, 160).tolist()

    def row(before: list[int]) -> np.ndarray:  # of a context: certain of things that only long contexts tell
        return np.random.default_rng([len(before), *before[:2], before[-1]]).normal(0, 6, vocabulary)

    def model(given, use_cache, logits_to_keep):
        (one,) = given.tolist()
        rows = np.stack([row(one[: at + 1]) for at in range(len(one))])[-logits_to_keep:]
        return SimpleNamespace(logits=torch.tensor(rows)[None])

    def logprob(before: list[int], token: int) -> float:
        logits = row(before)
        return float(logits[token] - np.log(np.exp(logits).sum()))

    short, slide = 20, 8
    wanted = {}
    for at in range(short, len(ids)):
        begin = (at - short) // slide * slide
        whole, part = logprob(ids[:at], ids[at]), logprob(ids[begin:at], ids[at])
        if whole - part > 2 and whole > -2:
            wanted[at] = whole
    assert len(wanted) > 2
    path = tmp_path / "long.json"
    path.write_text(json.dumps([{"ids": ids}, {"ids": ids[:short]}]))
    found = worker.longppl(model, {"long": path, "short": short, "slide": slide})
    assert found["keys"] == [list(wanted), []] and found["tokens"] == 180
    assert found["value"] == pytest.approx(np.exp(-np.mean(list(wanted.values()))), rel=1e-5)


def test_key_tokens_of_both_over_those_of_either() -> None:
    assert overlap(Keys(1.0, [[1, 2], [3]]), Keys(1.0, [[2, 5], [3]])) == 2 / 4
    assert overlap(Keys(None, [[], []]), Keys(None, [[], []])) is None


# --- the report


def test_an_engine_finds_the_same_within_one_standard_error() -> None:
    draw = np.random.default_rng(3)
    ours = draw.normal(2500, 100, 49)
    near, far = beside(ours, ours + draw.normal(2, 5, 49), 1023), beside(ours, ours + 60, 1023)
    assert near.errors < 1 < far.errors
    assert far.difference == pytest.approx((60 / 1023,) * 3) and far.errors == pytest.approx(60 / (100 / 7), rel=0.3)
    assert near.difference.low < 2 / 1023 < near.difference.high
    with pytest.raises(BenchError, match="cannot be compared"):
        beside(ours, ours[1:], 1023)
    with pytest.raises(BenchError, match="one window tells nothing"):
        beside(ours[:1], ours[:1], 1023)


def figures() -> Results:
    found = Results()
    for block, speed in enumerate((1.0, 0.5, 0.8)):
        for job, rate in {
            "perplexity kvik": 3000, "perplexity llama.cpp Q4_1 fa=0": 400, "perplexity llama.cpp Q4_1 fa=1": 500,
            "perplexity llama.cpp BF16 fa=1": 1500, "perplexity transformers bf16": 2000, "divergence kvik": 1500,
            "longppl kvik": 900, "longppl plain": 200,
        }.items():  # fmt: skip
            seconds = 1e5 / (rate * speed)
            found.figures.setdefault(job, {})[block] = {
                "tok_s": rate * speed, "seconds": seconds, "whole_s": seconds + 1, "peak_rss_bytes": 9e8,
            }  # fmt: skip
        for job, rate in {"rouge kvik": 500, "rouge rouge-score": 100, "bleu kvik": 95, "bleu sacrebleu": 100}.items():
            found.figures.setdefault(job, {})[block] = {"pairs_s": rate * speed, "rouge1": 0.7}
    return found


def test_verdicts(inputs) -> None:
    np.save(inputs.losses("kvik"), np.array(LOSSES))
    np.save(inputs.losses("llama.cpp Q4_1 fa=0"), np.array(LOSSES) + 3)
    np.save(inputs.losses("llama.cpp Q4_0 fa=1"), np.array(LOSSES) + 300)
    np.save(inputs.losses("transformers bf16"), np.array(LOSSES) + 900)
    answers = {item.target.text: item for item in verdicts(figures(), inputs)}

    def met(text: str) -> bool:
        return answers[text].target.met(answers[text].found)

    same = answers["perplexity ÷ llama-perplexity, same file"]
    assert same.found == pytest.approx((6.0, 6.0, 6.0)) and same.note == "perplexity llama.cpp Q4_1 fa=1"
    assert not met("perplexity ÷ transformers in bf16")
    assert met("time of the divergence of two layouts ÷ that of one perplexity") and met("LongPPL ÷ a window at a time")
    assert met("rouge ÷ rouge-score") and not met("bleu ÷ sacrebleu")
    begin = "difference of the mean loss to Kvik's ÷ its standard error, "
    assert met(begin + "llama.cpp Q4_1 fa=0") and not met(begin + "transformers bf16")
    assert begin + "llama.cpp Q4_0 fa=1" not in answers


def test_report_needs_no_more_than_was_measured(inputs) -> None:
    np.save(inputs.losses("kvik"), np.array(LOSSES))
    np.save(inputs.losses("llama.cpp Q4_0 fa=1"), np.array(LOSSES) + 300)
    for engine, keys in (("kvik", [[1, 2]]), ("plain", [[2]])):
        evaluation_jobs.save_keys(inputs.keys(engine), Keys(3.5, keys))
    text = report(figures(), inputs)
    assert "Key tokens of both ÷ of either: 0.5000." in text and "| kvik | 3.5000 | 2 |" in text
    assert "## The same result" in text and "llama.cpp Q4_0 fa=1" in text and "+0.29326" in text
    bare = report(Results(), Inputs(inputs.folder / "nowhere"))
    assert "## Perplexity" not in bare and "## The same result" not in bare and "not measured" in bare
