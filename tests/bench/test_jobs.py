"""Which jobs there are, what they need, and what is run for them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench import BenchError, contenders, loading, same_file
from bench.by_size import jobs as by_size_jobs
from bench.common import Finished
from bench.contenders import Settings
from bench.jobs import check, default_model
from bench.peers import Peers, chosen
from bench.random_gguf import SHAPES, f16_tensor, tensors
from bench.results import ENGINES
from bench.side_by_side import plan, warm_up


@pytest.fixture
def settings(tmp_path) -> Settings:
    return Settings(peers=Peers(tmp_path), kvik_python=Path(sys.executable), model=tmp_path / "model.gguf", depth=9)


@pytest.fixture
def ran(monkeypatch) -> list[tuple[list[str], dict[str, str]]]:
    """Commands and environments that would have been run; each answers as its program does."""
    commands = []

    def run_child(argv, *, env=None, timeout=900, cwd=None):
        argv = [str(part) for part in argv]
        commands.append((argv, dict(env or {})))
        if "llama-bench" in argv[0]:
            found = [{"n_prompt": 7, "samples_ts": [90.0]}, {"n_prompt": 0, "samples_ts": [30.0, 50.0, 40.0]}]
        elif argv[1].endswith("kvik_load.py"):
            found = {"seconds": 2.0, "packing_s": 1.5}
            if json.loads(argv[2])["mode"] == "load":
                found = {name: [1.0, 3.0, 2.0] for name in ("load_s", "weights_s", "read_s", "read_whole_s")}
        else:
            found = dict.fromkeys(contenders.KVIK_FIELDS, 1.0) | {"step_ms": dict.fromkeys(contenders.STEP_FIELDS, 1.0)}
        return Finished(json.dumps(found), "", 1.0, 500_000_000)

    monkeypatch.setattr(contenders, "run_child", run_child)
    monkeypatch.setattr(loading, "run_child", run_child)
    return commands


def put(settings: Settings, name: str) -> Path:
    path = settings.peers.root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x" * 1000)
    return path


def test_names_begin_with_what_they_are_chosen_by(settings) -> None:
    names = list(plan(settings))
    for part in (
        "kvik",
        "bandwidth",
        "llama.cpp",
        "openvino",
        "transformers",
        "start",
        "foreign",
        "depth",
        "bf16",
        "q4_k_m",
        "load",
    ):
        assert chosen(names, part, None), part
    assert chosen(names, "q4_k_m", None) == ["q4_k_m kvik", "q4_k_m llama.cpp fa=0", "q4_k_m llama.cpp fa=1"]
    assert chosen(names, "load", None) == ["load default", "load bf16", "load q4_k_m"]
    common = [name for name in names if name.startswith(ENGINES)]
    assert len(common) == 1 + 8 + 3 + 1 and "q4_k_m kvik" not in common


def test_what_is_missing_is_named_with_the_step_that_makes_it(settings) -> None:
    jobs = plan(settings)
    for name, said in {
        "kvik": "the model .*model.gguf is missing", "llama.cpp Q8_0 fa=0": "--only llama.cpp",
        "openvino Q4_1 PA": "--only openvino", "transformers bf16": "--only transformers",
        "bf16 kvik": "--only transformers", "q4_k_m kvik": "--only q4_k_m", "load q4_k_m": "--only q4_k_m",
        "load default": "the model .*model.gguf is missing", "bandwidth": "--only bandwidth",
    }.items():  # fmt: skip
        with pytest.raises(BenchError, match=said):
            check(jobs, [name])
    put(settings, "llama.cpp/build/bin/llama-bench")
    with pytest.raises(BenchError, match="--only q4_k_m"):
        check(jobs, ["q4_k_m llama.cpp fa=0"])
    put(settings, "models/random-1b.Q4_K_M.gguf")
    check(jobs, ["q4_k_m kvik", "q4_k_m llama.cpp fa=0", "load q4_k_m"])
    with pytest.raises(BenchError, match="--only sizes"):
        check(by_size_jobs(settings), ["4B kvik"])


def test_both_engines_run_the_same_1b_file_and_work(settings, ran) -> None:
    file = put(settings, "models/random-1b.Q4_K_M.gguf")
    put(settings, "llama.cpp/build/bin/llama-bench")
    jobs = plan(settings)
    figures = jobs["q4_k_m llama.cpp fa=1"].measure(0).figures
    assert (figures["prefill"], figures["decode"]) == (90.0, 40.0)
    jobs["q4_k_m kvik"].measure(0)
    (theirs, _), (ours, _) = ran
    assert theirs[theirs.index("-m") + 1] == ours[ours.index("--model") + 1] == str(file)
    assert theirs[theirs.index("-p") + 1] == ours[ours.index("--prompt-tokens") + 1] == "128"
    assert theirs[theirs.index("-n") + 1] == ours[ours.index("--new-tokens") + 1] == "32"
    assert theirs[theirs.index("-fa") + 1] == "1"


def test_the_bf16_folder_runs_beside_the_bf16_file_measured_already(settings, ran) -> None:
    folder = put(settings, "models/smollm2-135m-bf16/config.json").parent
    jobs = plan(settings)
    jobs["bf16 kvik"].measure(0)
    (ours, environment) = ran[0]
    assert ours[ours.index("--model") + 1] == str(folder) and ours[ours.index("--prompt-tokens") + 1] == "512"
    assert environment["KVIK_HOME"] == str(settings.peers.root / "kvik-home")
    assert [name for name in jobs if name.startswith("bf16")] == ["bf16 kvik"]
    assert set(same_file.peers_of(same_file.FILES[0])) <= set(default_model(settings))


def test_a_load_job_packs_in_a_store_of_its_own_and_leaves_nothing(settings, ran) -> None:
    put(settings, "models/smollm2-135m-bf16/config.json")
    put(settings, "models/smollm2-135m-bf16/model.safetensors")
    figures, raw = plan(settings)["load bf16"].measure(0)
    (pack, first), (load, second) = ran
    assert [json.loads(argv[2])["mode"] for argv in (pack, load)] == ["pack", "load"]
    assert first == second and not Path(first["KVIK_HOME"]).exists()
    assert first["KVIK_HOME"] != str(settings.peers.root / "kvik-home")
    assert figures["pack_s"] == 2.0 and figures["weights_s"] == figures["read_s"] == 2.0
    assert figures["over_file_mb"] == pytest.approx((500_000_000 - 1000) / 1e6)  # config.json is no weights
    assert raw["load"]["read_s"] == [1.0, 3.0, 2.0]


def test_warm_up_packs_what_is_measured(settings, monkeypatch) -> None:
    started = []
    monkeypatch.setattr(contenders, "start_kvik", lambda s: started.append(s.model.name))
    monkeypatch.setattr(contenders, "start_llama", lambda s: started.append("llama.cpp"))
    put(settings, "models/smollm2-135m-bf16/config.json")
    warm_up(settings, ["bf16 kvik", "load default"])
    assert started == ["smollm2-135m-bf16"]
    warm_up(settings, ["start kvik", "llama.cpp BF16 fa=0"])
    assert started[1:] == ["model.gguf", "llama.cpp"]


def test_random_f16_weights_have_the_wanted_scale_and_whole_k_blocks() -> None:
    weights = f16_tensor(np.random.default_rng(0), 256, 512)
    assert weights.dtype == np.float16 and weights.shape == (256, 512)
    assert weights.astype(np.float64).std() == pytest.approx(512**-0.5, rel=0.02)
    assert all(len(dims) == 1 or dims[1] % 256 == 0 for _, dims in tensors(SHAPES["1B"]))
