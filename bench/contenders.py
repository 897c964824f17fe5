"""How each engine is run: every measurement is a process of its own that is gone afterwards."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from bench import BenchError
from bench.common import Finished, first_output, foreign_process, middle, run_child
from bench.peers import REPOSITORY, Peers

START_PROMPT = "What is a cache?"
START_TOKENS = 8
START_CONTEXT = 1024
KVIK_FIELDS = (
    "prefill_tok_s", "decode_tok_s", "first_token_ms", "load_ms", "step_ms", "read_gb_s", "bandwidth_gb_s",
    "peak_rss_bytes",
)  # fmt: skip
STEP_FIELDS = ("matrices", "attention", "rest", "python")


class Measurement(NamedTuple):
    """Figures by name (tokens per second, seconds, bytes, GB/s) and what the engine itself reported."""

    figures: dict[str, float]
    raw: Any


@dataclass(frozen=True)
class Settings:
    """The work every contender does.

    Attributes:
        threads: worker threads of every engine.
        prompt, new: tokens of the prefill, tokens of the decode.
        depth: tokens in the context before the informative decode; 0 leaves that out.
        repeat: repeats inside one measurement; their median counts.
        model: what Kvik runs, a GGUF or a folder; the peers run the files that setup_peers.py made.
    """

    peers: Peers
    kvik_python: Path
    model: Path
    threads: int = 2
    prompt: int = 512
    new: int = 128
    depth: int = 0
    repeat: int = 3
    seed: int = 0

    def kvik_env(self) -> dict[str, str]:
        """Kvik's packed files stay with the peers, so that a run leaves the user's model store alone."""
        return {"KVIK_HOME": str(self.peers.root / "kvik-home")}

    def need_kvik(self) -> None:
        """BenchError where Kvik or its model is missing."""
        if not self.kvik_python.exists():
            raise BenchError(f"{self.kvik_python} is missing: build Kvik or name its Python with --kvik-python")
        if not self.model.exists():
            raise BenchError(f"the model {self.model} is missing")


def last_json(done: Finished, program: str) -> Any:
    """The JSON object on the last line of stdout, or the whole of it."""
    text = done.stdout.strip()
    for part in (text, text.splitlines()[-1] if text else ""):
        try:
            return json.loads(part)
        except json.JSONDecodeError:
            continue
    raise BenchError(f"{program} printed no JSON: {text[:200]!r}")


# --- Kvik


def kvik_bench(settings: Settings, prompt: int, new: int, depth: int = 0, sequences: int = 1) -> dict[str, Any]:
    """One `kvik bench --json`. Peak memory is as it says, taken before its own bandwidth test with 512 MiB buffers."""
    options = {
        "--model": settings.model, "--prompt-tokens": prompt, "--new-tokens": new, "--sequences": sequences,
        "--depth": depth, "--threads": settings.threads, "--repeat": settings.repeat,
    }  # fmt: skip
    words = [str(word) for pair in options.items() for word in pair]
    done = run_child(
        [settings.kvik_python, "-m", "kvik.cli", "bench", "--json", *words], env=settings.kvik_env(), cwd=REPOSITORY
    )
    found: dict[str, Any] = last_json(done, "kvik bench")
    missing = [name for name in KVIK_FIELDS if name not in found]
    missing += [f"step_ms.{name}" for name in STEP_FIELDS if name not in found.get("step_ms", {})]
    if missing:
        raise BenchError(f"kvik bench --json lacks {', '.join(missing)}")
    return found


def kvik(settings: Settings) -> Measurement:
    found = kvik_bench(settings, settings.prompt, settings.new)
    step = {f"step_{name}_ms": float(found["step_ms"][name]) for name in STEP_FIELDS}
    figures = {
        "prefill": float(found["prefill_tok_s"]), "decode": float(found["decode_tok_s"]),
        "load_s": found["load_ms"] / 1e3, "first_token_s": found["first_token_ms"] / 1e3,
        "read_gb_s": float(found["read_gb_s"]), "own_bandwidth_gb_s": float(found["bandwidth_gb_s"]),
        "peak_rss_bytes": float(found["peak_rss_bytes"]), **step,
    }  # fmt: skip
    return Measurement(figures, found)


def decode_kvik(settings: Settings, depth: int = 0) -> Measurement:
    found = kvik_bench(settings, 16, settings.new, depth)
    return Measurement({"decode": float(found["decode_tok_s"])}, found)


def start_kvik(settings: Settings) -> Measurement:
    """A second start of the command a user types; the first one, which packs the weights, is run's warm-up."""
    script = settings.kvik_python.parent / "kvik"
    program: list[str | Path] = [script] if script.exists() else [settings.kvik_python, "-m", "kvik.cli"]
    seen = first_output(
        [*program, "run", START_PROMPT, "--model", settings.model, "--temperature", "0",
         "--max-tokens", str(START_TOKENS), "--threads", str(settings.threads)], env=settings.kvik_env(),
    )  # fmt: skip
    return Measurement({"first_s": seen.seconds, "peak_rss_bytes": float(seen.peak_rss_bytes)}, seen.text)


# --- llama.cpp


def llama_bench(settings: Settings, model: Path, flash: int, *more: str) -> tuple[list[dict[str, Any]], Finished]:
    """One `llama-bench`, which warms up before each test."""
    done = run_child(
        [settings.peers.llama("llama-bench"), "-m", model, "-t", str(settings.threads), "-fa", str(flash),
         "-r", str(settings.repeat), "-o", "json", *more]
    )  # fmt: skip
    found: list[dict[str, Any]] = last_json(done, "llama-bench")
    return found, done


def llama(settings: Settings, model: Path, flash: int) -> Measurement:
    """Prefill and decode of one file; decode computes logits but samples nothing."""
    tests, done = llama_bench(settings, model, flash, "-p", str(settings.prompt), "-n", str(settings.new))
    figures = {"peak_rss_bytes": float(done.peak_rss_bytes)}
    for test in tests:
        figures["prefill" if test["n_prompt"] else "decode"] = middle(test["samples_ts"])
    return Measurement(figures, tests)


def decode_llama(settings: Settings, depth: int = 0, flash: int = 0) -> Measurement:
    tests, _ = llama_bench(
        settings, settings.peers.variant("Q4_1"), flash, "-p", "0", "-n", str(settings.new), "-d", str(depth)
    )
    return Measurement({"decode": middle(tests[-1]["samples_ts"])}, tests)


def start_llama(settings: Settings) -> Measurement:
    """llama.cpp's completion binary at its quickest: no warm-up run, a small context, the same chat turn."""
    seen = first_output(
        [settings.peers.llama("llama-completion"), "-m", settings.peers.variant("Q4_1"), "-t", str(settings.threads),
         "-c", str(START_CONTEXT), "-st", "-p", START_PROMPT, "-n", str(START_TOKENS), "--temp", "0",
         "--no-display-prompt", "--no-warmup"]
    )  # fmt: skip
    return Measurement({"first_s": seen.seconds, "peak_rss_bytes": float(seen.peak_rss_bytes)}, seen.text)


# --- OpenVINO, transformers, the machine


def run_worker(
    python: Path, program: str, request: Mapping[str, Any], env: Mapping[str, str] | None = None, timeout: float = 900
) -> tuple[Any, Finished]:
    """What a program of bench/workers answers to a request, both JSON."""
    argv = [python, REPOSITORY / "bench" / "workers" / program, json.dumps(request)]
    done = run_child(argv, env=env, timeout=timeout)
    return last_json(done, program), done


def worker(settings: Settings, python: Path, program: str, request: Mapping[str, Any]) -> Measurement:
    full = {
        "mode": "speed", "threads": settings.threads, "prompt": settings.prompt, "new": settings.new,
        "repeat": settings.repeat, **request,
    }  # fmt: skip
    found, done = run_worker(python, program, full)
    figures = {name: middle(found[name]) for name in ("prefill", "decode")}
    return Measurement({**figures, "load_s": found["load_s"], "peak_rss_bytes": float(done.peak_rss_bytes)}, found)


def openvino(settings: Settings, variant: str, backend: str) -> Measurement:
    request = {"model": str(settings.peers.variant(variant)), "backend": backend}
    return worker(settings, settings.peers.python("openvino"), "openvino_worker.py", request)


def transformers(settings: Settings) -> Measurement:
    request = {"model": str(settings.peers.dequantized()), "dtype": "bf16"}
    return worker(settings, settings.peers.python("transformers"), "transformers_worker.py", request)


def vllm_dtype() -> str:
    """vLLM's number format here: oneDNN has no products in bf16 without AVX-512, and PyTorch's own are slower than f32."""
    return "bfloat16" if "avx512f" in Path("/proc/cpuinfo").read_text().split() else "float32"


def vllm_env(settings: Settings) -> dict[str, str]:
    """4 GiB of cache, the threads unbound as everybody's, compiled code kept with the peers, nothing sent anywhere."""
    return {
        "VLLM_CPU_KVCACHE_SPACE": "4", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(settings.threads),
        "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CACHE_ROOT": str(settings.peers.root / "vllm-cache"),
    }  # fmt: skip


def bandwidth(settings: Settings) -> Measurement:
    found = last_json(run_child([settings.peers.bandwidth(), str(settings.threads)]), "bandwidth")
    return Measurement({"gb_s": found["best_gb_s"], "median_gb_s": found["median_gb_s"]}, found)


def foreign(settings: Settings, block: int, decode: Callable[[], Measurement]) -> Measurement:
    """Decode alone and beside one foreign process that keeps a core busy, in random order; `kept` is the ratio."""

    def disturbed() -> Measurement:
        with foreign_process(sys.executable):
            return decode()

    if random.Random(f"{settings.seed}/{block}").random() < 0.5:
        alone, beside = decode(), disturbed()
    else:
        beside, alone = disturbed(), decode()
    rates = alone.figures["decode"], beside.figures["decode"]
    figures = {"idle": rates[0], "disturbed": rates[1], "kept": rates[1] / rates[0]}
    return Measurement(figures, {"idle": alone.raw, "disturbed": beside.raw})
