"""Jobs and report of the benchmark of KV formats and eviction: what is asked, what is read, verdicts on figures known."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench import BenchError, contenders
from bench.common import Finished
from bench.contenders import Settings
from bench.kv_jobs import Sizes, plan
from bench.kv_report import best, plot, report, verdicts
from bench.kv_run import arguments, measure, settings_of, sizes_of
from bench.kv_settings import BOTH, FORMATS, SCORERS, KvSetting, evicting, formats, nominal
from bench.peers import Peers, chosen
from bench.results import Results
from bench.side_by_side import Run


@pytest.fixture
def settings(tmp_path) -> Settings:
    for name in ("llama.cpp/build/bin/llama-bench", "models/smollm2-135m.Q4_1.gguf", "tools/bin/python"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    peers = Peers(tmp_path)
    return Settings(peers=peers, kvik_python=Path(sys.executable), model=peers.variant("Q4_1"), repeat=2)


@pytest.fixture
def sizes(tmp_path) -> Sizes:
    return Sizes(tmp_path, tokens=100, items=4, stream_tokens=5000, positions=3, scorers=("tova", "snapkv,heads=ada"))


HELD = {"f16": 1000, "int8": 520, "k8v4": 400, "int4": 290}


def answer(asked: dict) -> dict:
    """What the worker would say."""
    names = list(asked["settings"])
    held = {name: HELD.get(name, 250) for name in names}
    if asked["mode"] == "bytes":
        return {name: {"bytes": held[name], "peak": 1000, "kept": 4096} for name in names}
    if asked["mode"] == "quality":
        one = {"perplexity": 10.1, "ratio": 1.01, "interval": [1.01, 1.005, 1.02], "same_top": 0.97, "kl": 0.01}
        return {name: {**one, "predictions": 100} for name in names}
    if asked["mode"] == "decode":
        rates = {name: [100.0, 80.0] if name == "f16" else [150.0, 120.0] for name in names}
        return {"rates": rates, "held": held, "matrix_bytes": 1000}
    if asked["mode"] == "prefill":
        return {"seconds": {name: [1.0, 2.0] if name == "f16" else [1.05, 2.1] for name in names}}
    if asked["mode"] == "capacity":
        return {name: {"fits": 8000 // held[name], "held": held[name]} for name in names}
    if asked["mode"] == "stream":
        return {
            "perplexity": 10.2, "recomputed": 10.0, "ratio": [1.02, 0.99, 1.04], "held": {"4096": 70, "5000": 70},
            "step_s": 0.01, "scored_s": 0.001, "recompute_s": 0.25,
        }  # fmt: skip
    one = {"share": 0.9, "points": -1.0, "low": -2.0, "high": 0.0, "p": 0.2}
    return {"found": {"full": {**one, "share": 0.91}, **{f"{n}, {p}": one for n in names for p in ("inside", "after")}}}


@pytest.fixture
def ran(monkeypatch) -> list[list[str]]:
    """Commands that would have been run; each answers as its program does."""
    commands: list[list[str]] = []

    def run_child(argv, *, env=None, timeout=900, cwd=None):
        argv = [str(part) for part in argv]
        commands.append(argv)
        found = [{"samples_ts": [12.0], "n_prompt": 0}] if "llama-bench" in argv[0] else answer(json.loads(argv[2]))
        return Finished(json.dumps(found), "", 5.0, 7)

    monkeypatch.setattr(contenders, "run_child", run_child)
    return commands


# --- settings


def test_every_scorer_at_every_share_and_with_an_allocator() -> None:
    found = evicting(["h2o", "snapkv,heads=ada"])
    assert found["h2o 10 %"] == KvSetting("f16", "h2o:budget=10%")
    assert found["snapkv,heads=ada 50 %"] == KvSetting("f16", "snapkv:budget=50%,heads=ada")
    assert found[BOTH] == KvSetting("int4", "snapkv:budget=25%") and len(found) == 7
    assert [nominal(name) for name in found] == [0.5, 0.25, 0.1, 0.5, 0.25, 0.1, 0.25]
    assert set(formats()) == {"f16", *FORMATS}
    with pytest.raises(BenchError, match="no share"):
        nominal("f16")


def test_texts_of_policies_are_what_the_library_reads() -> None:
    cache = pytest.importorskip("kvik.params.cache")
    base = cache.CacheParams()
    for kv, evict in {**formats(), **evicting()}.values():
        assert cache.cache_params(kv, evict, base).kv == kv


# --- what is run


def test_figures_of_the_jobs(settings, sizes, ran) -> None:
    jobs = plan(settings, sizes)
    held = jobs["bytes"].measure(0).figures
    assert held["int8: ratio"] == 0.52 and held["tova 25 %: ratio"] == 0.25 and held["f16: kept"] == 4096
    decode = jobs["decode kvik"].measure(0).figures
    assert decode["int4"] == 135.0 and decode["int4: faster"] == 1.5 and decode["int4: fewer"] == 2000 / 1290
    assert decode["int4: of_bytes"] == pytest.approx(1.5 * 1290 / 2000)
    assert jobs["prefill"].measure(0).figures["tova: cost"] == pytest.approx(0.05)
    capacity = jobs["capacity"].measure(0).figures
    assert capacity["keydiff 25 %: more"] == 4.0 and capacity["keydiff 25 %: of_promised"] == 1.0
    stream = jobs["stream"].measure(0).figures
    assert stream["speed"] == pytest.approx(25.0) and stream["growth"] == 1.0 and stream["change"] == pytest.approx(2.0)
    quality = jobs["end-to-end int4"].measure(0).figures
    assert quality["change"] == pytest.approx(1.0) and quality["high"] == pytest.approx(2.0) and quality["top"] == 97.0
    asked = json.loads(ran[-1][2])
    assert (asked["weights"], asked["reference"], asked["window"], asked["tokens"]) == ("auto", "f32", 4096, 100)
    assert asked["settings"] == {"int4": ["int4", "none"]}


def test_llama_cpp_decodes_behind_as_many_tokens_with_its_own_format(settings, sizes, ran) -> None:
    assert plan(settings, sizes)["decode llama.cpp q4_0"].measure(0).figures == {"decode": 12.0}
    words = " ".join(ran[0])
    assert "-d 7936" in words and "-ctk q4_0 -ctv q4_0" in words and "-fa 1" in words and "-r 1" in words


def test_recall_asks_for_both_tasks_and_all_settings(settings, sizes, ran) -> None:
    for name, task in (("needle", "needle"), ("keys", "keys"), ("needles", "needle")):
        figures = plan(settings, sizes)[f"recall {name}"].measure(0).figures
        assert figures["full: share"] == 0.91 and figures["tova 25 %, after: points"] == -1.0
        asked = json.loads(ran[-1][2])
        assert (asked["task"], asked["items"], asked["task_seed"]) == (task, 4, 1) and len(asked["settings"]) == 7


def test_speeds_come_in_every_block_and_the_rest_once(settings, sizes, ran, tmp_path) -> None:
    run = Run(plan(settings, sizes), 0, tmp_path, Results())
    measure(run, ["bytes", "quality int4", "decode kvik", "prefill"], 3)
    assert {job: len(blocks) for job, blocks in run.results.figures.items()} == {
        "bytes": 1, "quality int4": 1, "decode kvik": 3, "prefill": 3,
    }  # fmt: skip


def test_names_and_options(settings, sizes) -> None:
    for part in ("bytes", "quality", "quality int4", "end-to-end", "stream", "recall needle", "capacity", "decode llama.cpp",
                 "prefill"):  # fmt: skip
        assert chosen(plan(settings, sizes), part, None)
    parser = arguments()
    root = ["--root", str(settings.peers.root)]
    for option, value, least in (("--items", "0", 1), ("--stream-tokens", "4095", 4096), ("--positions", "0", 1)):
        with pytest.raises(BenchError, match=f"{option} must be at least {least}"):
            settings_of(parser.parse_args([*root, option, value]))
    found = sizes_of(parser.parse_args([*root, "--scorers", "h2o; snapkv,heads=ada", "--items", "7"]))
    assert found.scorers == ("h2o", "snapkv,heads=ada") and found.items == 7 and found.stream_tokens == 100_000
    with pytest.raises(BenchError, match="there is no 'snapvk'"):
        sizes_of(parser.parse_args([*root, "--scorers", "snapvk"]))


# --- the report


@pytest.fixture
def results(settings, sizes, ran, tmp_path) -> Results:
    run = Run(plan(settings, sizes), 0, tmp_path, Results())
    measure(run, list(run.jobs), 2)
    assert not run.results.failures
    return run.results


def test_verdicts(results) -> None:
    answers = {item.target.text: item for item in verdicts(results)}

    def met(text: str) -> bool:
        return answers[text].target.met(answers[text].found)

    assert met("int8: bytes ÷ f16") and met("int4: the same best token") and not met("int8: the same best token")
    assert not met("k8v4: perplexity over the f32 cache's") and met("int4: perplexity over the f32 cache's") is False
    assert answers["int4: perplexity over the f32 cache's"].note == "over windows: +0.500 to +2.000 %"
    assert met("int4: decode over f16's ÷ fewer bytes") and met("int4: decode ÷ llama.cpp's with q4_0")
    assert met("StreamingLLM: most bytes ÷ fewest") and met("StreamingLLM: a new token ÷ recomputing")
    held = answers["scorers: bytes ÷ nominal, the most"]
    assert held.note.endswith("10 %") and held.found.median == 2.5
    assert not met(f"{BOTH}: bytes ÷ f16") and met("tova: time added to prefill")
    assert met("keys: answered with the full cache") and met("needle, question after: points lost at 25 %, the best")
    assert met("sequences at once ÷ what fewer bytes promise, the fewest")


def test_the_best_at_a_quarter_is_named(results) -> None:
    found = results.figures["recall keys"][0]
    assert best(results, "recall keys", "after") == "tova 25 %"
    found["snapkv,heads=ada 25 %, after: share"] = 0.95
    found[f"{BOTH}, after: share"] = found["tova 50 %, after: share"] = 0.99
    assert best(results, "recall keys", "after") == "snapkv,heads=ada 25 %"
    assert best(results, "recall keys", "inside") == "tova 25 %"


def test_report_and_plot(results, tmp_path) -> None:
    text = report(results)
    assert "| end-to-end int4 | 10.1 | +1.000 % | +0.500 to +2.000 % | 97.00 % |" in text
    assert "| tova | after | 90.0 % (-1.0: -2.0 to +0.0)" in text and "| int4 + snapkv | inside | – |" in text
    assert "| llama.cpp q4_0 | 12.0 (12.0–12.0) | – | – | – |" in text and text.count("## Quality") == 1
    assert "| tova 10 % | 0.250 | 2.500 |" in text and f"| {BOTH} | 0.250 | – |" in text
    pytest.importorskip("matplotlib")
    plot(results, tmp_path / "plot.svg")
    assert (tmp_path / "plot.svg").stat().st_size > 10_000


def test_report_needs_no_more_than_was_measured(tmp_path) -> None:
    bare = report(Results())
    assert "not measured" in bare and "## Bytes" not in bare and all(name in bare for name in SCORERS)
    pytest.importorskip("matplotlib")
    plot(Results(), tmp_path / "empty.png")
