"""Jobs and report of the engine benchmark: what is run, what is read from it, and verdicts on figures known."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench import BenchError, contenders, engine_jobs, servers
from bench.common import Finished
from bench.contenders import Settings
from bench.engine_jobs import KVIK_SEQUENCES, Traffic, plan
from bench.engine_report import plot, report, verdicts
from bench.engine_run import arguments, measure
from bench.jobs import check
from bench.peers import Peers, chosen
from bench.results import Results
from bench.side_by_side import Run


@pytest.fixture
def settings(tmp_path) -> Settings:
    for name in ("llama.cpp/build/bin/llama-batched-bench", "llama.cpp/build/bin/llama-bench", "model.gguf",
                 "models/smollm2-135m.Q4_1.gguf", "models/smollm2-135m-bf16/config.json", "vllm/bin/python", "transformers/bin/python",
                 "models/dequantized/config.json"):  # fmt: skip
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return Settings(
        peers=Peers(tmp_path), kvik_python=Path(sys.executable), model=tmp_path / "model.gguf", prompt=128, new=64,
        repeat=2,
    )  # fmt: skip


@pytest.fixture
def ran(monkeypatch) -> list[list[str]]:
    """Commands that would have been run; each answers as its program does."""
    commands: list[list[str]] = []

    def run_child(argv, *, env=None, timeout=900, cwd=None):
        argv = [str(part) for part in argv]
        commands.append(argv)
        if "llama-batched-bench" in argv[0]:
            counts = argv[argv.index("-npl") + 1].split(",")
            rows = [{"pl": int(n), "speed_tg": 10.0 * int(n) + at, "speed_pp": 5.0} for at, n in enumerate(counts)]
            return Finished("words\n" + "\n".join(map(json.dumps, rows)), "", 1.0, 1)
        if "llama-bench" in argv[0]:
            depths = argv[argv.index("-d") + 1].split(",") if "-d" in argv else ["0"]
            found = [{"n_depth": int(depth), "samples_ts": [float(depth) + 1]} for depth in depths]
        elif argv[1].endswith("vllm_worker.py"):
            found = {str(n): [3.0, 9.0, 4.0] for n in json.loads(argv[2])["sequences"]}
        elif '"mode": "beams"' in argv[2]:
            found = {"seconds": [1.0, 2.0, 9.0]} | {
                name: [4, 5, 5] for name in ("python", "kv_bytes", "kv_bytes_unshared")
            }
        elif argv[1].endswith("kvik_engine.py"):
            found = {"on": [2.0, 3.0, 9.0], "off": [1.0, 3.0, 6.0], "hits": 0}
        else:
            step = {"matrices": 6.0, "attention": 1.0, "rest": 2.0, "python": 1.0}
            found = dict.fromkeys(contenders.KVIK_FIELDS, 1.0) | {"step_ms": step}
            found["decode_tok_s"] = float(argv[argv.index("--sequences") + 1])
        return Finished(json.dumps(found), "", 1.0, 1)

    monkeypatch.setattr(contenders, "run_child", run_child)
    monkeypatch.setattr(engine_jobs, "run_child", run_child)
    return commands


def word(argv: list[str], option: str) -> str:
    return argv[argv.index(option) + 1]


def test_both_engines_decode_the_same_batches(settings, ran) -> None:
    jobs = plan(settings, Traffic())
    theirs = jobs["batch llama.cpp Q4_1 fa=1"].measure(0).figures
    assert theirs["decode_16"] == pytest.approx(160 + (3 + 7) / 2)  # the first round of one sequence does not count
    assert word(ran[0], "-npl") == "1,1,4,16,32,1,4,16,32" and word(ran[0], "-fa") == "on"
    assert (word(ran[0], "-npp"), word(ran[0], "-ntg"), word(ran[0], "-c")) == ("128", "64", "8192")
    ours = jobs["batch kvik"].measure(0).figures
    assert [ours[f"decode_{n}"] for n in KVIK_SEQUENCES] == list(KVIK_SEQUENCES) and ours["python_64"] == 0.1
    assert {(word(argv, "--depth"), word(argv, "--new-tokens")) for argv in ran[1:]} == {("128", "64")}
    assert jobs["batch vllm"].measure(0).figures["decode_16"] == 4.0


def test_both_engines_go_as_deep(settings, ran) -> None:
    jobs = plan(settings, Traffic())
    theirs = jobs["deep llama.cpp Q4_1 fa=1"].measure(0).figures
    ours = jobs["deep kvik"].measure(0).figures
    assert theirs == {"decode_2048": 2049.0, "decode_4096": 4097.0, "decode_7936": 7937.0, "prefill_8000": 1.0}
    assert set(ours) == set(theirs)
    assert [(word(argv, "--depth"), word(argv, "--prompt-tokens")) for argv in ran[2:]] == [
        ("2048", "1"), ("4096", "1"), ("7936", "8000"),
    ]  # fmt: skip


def test_the_cost_of_the_index_is_of_pairs(settings, ran) -> None:
    assert plan(settings, Traffic())["index kvik"].measure(3).figures["cost"] == 1.5
    assert json.loads(ran[0][2])["seed"] == "0/index/3"


def test_both_engines_search_behind_the_same_prompts(settings, ran) -> None:
    jobs = plan(settings, Traffic())
    ours, theirs = (jobs[f"beams {name}"].measure(3).figures for name in ("kvik", "transformers"))
    assert ours["tok_s"] == theirs["tok_s"] == 32.0 and ours["of_unshared"] == 1.0
    asked = [json.loads(argv[2]) for argv in ran]
    for name in ("prompts", "new", "beams", "threads"):
        assert asked[0][name] == asked[1][name]
    assert [len(prompt) for prompt in asked[0]["prompts"]] == [128] * 3 and asked[1]["dtype"] == "bf16"


def test_names_and_needs(settings) -> None:
    jobs = plan(settings, Traffic())
    for part in (
        "batch",
        "deep",
        "capacity",
        "arrivals",
        "own-rate",
        "http",
        "waste",
        "samples",
        "beams",
        "prefix",
        "index",
    ):
        assert chosen(jobs, part, None)
    check(jobs, ["batch kvik", "batch llama.cpp Q4_1 fa=0", "batch vllm", "arrivals kvik"])
    for name, said in {
        "capacity llama-server": "--only llama.cpp",
        "batch llama.cpp Q8_0 fa=0": "--only models",
    }.items():
        with pytest.raises(BenchError, match=said):
            check(jobs, [name])
    (settings.peers.root / "vllm/bin/python").unlink()
    with pytest.raises(BenchError, match="--only vllm"):
        check(jobs, ["arrivals vllm"])


def test_rates_are_shares_of_what_was_measured(settings, tmp_path, monkeypatch) -> None:
    load = Traffic()
    with pytest.raises(BenchError, match="no common rate"):
        load.reference()
    found = {"kvik": 10.0, "llama-server": 2.0}

    def measure_capacity(settings, load, name, block):
        if name not in found:
            raise BenchError("vllm cannot serve here")
        return contenders.Measurement({"capacity": found[name] + block}, None)

    monkeypatch.setattr(engine_jobs, "measure_capacity", measure_capacity)
    results = Results()
    names = ["capacity kvik", "capacity vllm", "capacity llama-server"]
    options = arguments().parse_args(["--capacity-blocks", "3"])
    measure(Run(plan(settings, load), 0, tmp_path, results), load, names, options)
    assert load.capacities == {"kvik": 11.0, "llama-server": 3.0} and load.reference() == "llama-server"
    assert load.rate("kvik") == pytest.approx(8.8) and "vllm cannot serve here" in report(results)


@pytest.mark.parametrize(
    ("code", "said"),
    [("print('x'); raise ValueError('no AVX-512'); print('y')", "cannot serve here, it ended with 1: ValueError: no AVX"),
     ("import time; time.sleep(9)", "was not ready within 0.3 s")],
)  # fmt: skip
def test_a_server_that_does_not_come_up_is_told(settings, monkeypatch, code, said) -> None:
    command = servers.Command([sys.executable, "-c", code], {}, 5 if "print" in code else 0.3)
    monkeypatch.setitem(servers.SERVERS, "kvik", lambda settings, port: command)
    with pytest.raises(BenchError, match=said), servers.serving("kvik", settings):
        pass


def test_a_server_is_gone_afterwards(settings, monkeypatch) -> None:
    code = (
        "import sys, json\nfrom http.server import *\n"
        "class H(BaseHTTPRequestHandler):\n"
        " def do_GET(self):\n"
        "  self.send_response(200); self.end_headers(); self.wfile.write(json.dumps({'data': [{'id': 'm'}]}).encode())\n"
        "HTTPServer(('127.0.0.1', int(sys.argv[1])), H).serve_forever()"
    )
    monkeypatch.setitem(
        servers.SERVERS, "kvik", lambda settings, port: servers.Command([sys.executable, "-c", code, str(port)], {}, 20)
    )
    with servers.serving("kvik", settings) as server:
        assert server.model == "m" and servers.get(server.port, "/health")[0] == 200
    with pytest.raises(OSError):
        servers.get(server.port, "/health")


def figures() -> Results:
    found = Results()
    for block, speed in enumerate((1.0, 0.5, 0.8)):
        for job, all_figures in {
            "batch kvik": {
                "decode_1": 100,
                "decode_4": 310,
                "decode_16": 900,
                "decode_32": 900,
                "python_16": 0.05 / speed,
            },
            "batch llama.cpp Q4_0 fa=1": {"decode_16": 300, "decode_32": 330},
            "batch llama.cpp Q8_0 fa=0": {"decode_16": 200, "decode_32": 320},
            "batch vllm": {"decode_16": 200},
            "deep kvik": {"decode_2048": 90},
            "deep llama.cpp Q4_1 fa=1": {"decode_2048": 30},
            "capacity vllm": {"capacity": 2},
            "arrivals kvik": {"first_s": 1, "gap_s": 3},
            "arrivals vllm": {"first_s": 4, "gap_s": 4},
            "waste kvik": {"waste": 0.03 / speed, "preallocated_longest": 0.6 / speed},
        }.items():
            found.figures.setdefault(job, {})[block] = {name: value * speed for name, value in all_figures.items()}
    return found


def test_verdicts_are_taken_beside_the_fastest() -> None:
    answers = {item.target.text: item for item in verdicts(figures())}

    def median(text: str) -> float:
        return answers[text].found.median

    assert median("decode, 16 sequences ÷ llama.cpp's fastest") == pytest.approx(3.0)
    assert answers["decode, 32 sequences ÷ llama.cpp's fastest"].note == "batch llama.cpp Q4_0 fa=1"
    assert median("decode, 16 sequences ÷ vLLM") == pytest.approx(4.5)
    assert median("decode, 4 sequences ÷ 1 sequence, Kvik") == pytest.approx(3.1)
    assert median("decode behind 2048 tokens ÷ llama.cpp's fastest") == pytest.approx(3.0)
    first = answers["time to first token ÷ vllm, at 80% of the capacity of vllm"]
    gap = answers["inter-token latency ÷ vllm, at 80% of the capacity of vllm"]
    assert first.target.met(first.found) and not gap.target.met(gap.found)
    assert answers["slots allocated and unused"].note == "preallocated: 0.60 (0.60–0.60)"
    assert answers["decode behind 4096 tokens ÷ llama.cpp's fastest"].found is None


def test_report_and_plot_need_no_more_than_was_measured(tmp_path) -> None:
    text = report(figures())
    assert "## Decode by sequences" in text and "llama.cpp Q4_0 fa=1" in text and "Kvik 3.00 (3.00–3.00)×" in text
    assert "## Over HTTP" not in report(Results())
    plot(figures(), tmp_path / "plot.svg")
    assert (tmp_path / "plot.svg").stat().st_size > 1000


def test_ctrl_c_while_capacities_are_measured_ends_everything(settings, tmp_path, monkeypatch) -> None:
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(engine_jobs, "measure_capacity", stop)
    monkeypatch.setattr(engine_jobs, "batch_kvik", lambda settings: pytest.fail("the run went on"))
    load = Traffic()
    run = Run(plan(settings, load), 0, tmp_path, Results())
    measure(run, load, ["capacity kvik", "batch kvik"], arguments().parse_args([]))
    assert (tmp_path / "raw.json").exists() and not run.results.figures
