"""What is measured of many requests and long contexts: one job per engine and question, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from bench import BenchError, contenders, servers, traffic
from bench.common import middle, run_child
from bench.contenders import Measurement, Settings, last_json
from bench.jobs import FLASH, Job, of_llama
from bench.peers import VARIANTS
from bench.trace import equal_requests, poisson_trace

SEQUENCES = (1, 4, 16, 32)
KVIK_SEQUENCES = (*SEQUENCES, 64)
VLLM_SEQUENCES = (1, 16, 32)
DEPTHS = (2048, 4096, 7936)
DEEP_NEW, LONG_PROMPT = 32, 8000
DEEP_VARIANTS = ("Q4_1", "Q4_0")
STREAMS = 16
BEAMS = 4
SHARE = 0.8  # of a server's capacity
REFERENCES = ("vllm", "llama-server")
"""Whose capacity sets the common rate: the first one that has been measured."""


@dataclass(frozen=True)
class Traffic:
    """The work over HTTP.

    Attributes:
        requests: of a trace.
        at_once: under way while a capacity is measured.
        timeout: seconds for a whole trace.
        capacities: requests per second by server; filled when they have been measured.
    """

    requests: int = 100
    at_once: int = 32
    timeout: float = 900
    capacities: dict[str, float] = field(default_factory=dict)

    def reference(self) -> str:
        """The server whose capacity sets the common rate."""
        for name in REFERENCES:
            if name in self.capacities:
                return name
        raise BenchError(f"no capacity of {' or '.join(REFERENCES)} is known, so there is no common rate")

    def rate(self, name: str) -> float:
        if name not in self.capacities:
            raise BenchError(f"the capacity of {name} is not known")
        return SHARE * self.capacities[name]


# --- batches and depth


def batch_kvik(settings: Settings) -> Measurement:
    """Decode of N sequences (tokens per second of all together) and the share of Python in a step."""
    figures, raw = {}, {}
    for count in KVIK_SEQUENCES:
        found = contenders.kvik_bench(settings, settings.prompt, settings.new, settings.prompt, count)
        step = found["step_ms"]
        figures[f"decode_{count}"] = float(found["decode_tok_s"])
        figures[f"prefill_{count}"] = float(found["prefill_tok_s"])
        figures[f"python_{count}"] = step["python"] / sum(step[name] for name in contenders.STEP_FIELDS)
        raw[count] = found
    return Measurement(figures, raw)


def batch_llama(settings: Settings, variant: str, flash: int) -> Measurement:
    """One `llama-batched-bench`; it decodes without sampling. The first of its rounds warms up and does not count."""
    counts = ",".join(str(count) for count in (1, *SEQUENCES * settings.repeat))
    context = max(8192, max(SEQUENCES) * (settings.prompt + settings.new))
    done = run_child(
        [settings.peers.llama("llama-batched-bench"), "-m", settings.peers.variant(variant), "-c", str(context),
         "-npp", str(settings.prompt), "-ntg", str(settings.new), "-npl", counts, "-t", str(settings.threads),
         "-fa", "on" if flash else "off", "--output-format", "jsonl"],
        timeout=1800,
    )  # fmt: skip
    rows = [last_json(done._replace(stdout=line), "llama-batched-bench")
            for line in done.stdout.splitlines() if line.startswith("{")][1:]  # fmt: skip
    figures = {}
    for count in SEQUENCES:
        mine = [row for row in rows if row["pl"] == count]
        if not mine:
            raise BenchError(f"llama-batched-bench told nothing of {count} sequences")
        figures[f"decode_{count}"] = middle([row["speed_tg"] for row in mine])
        figures[f"prefill_{count}"] = middle([row["speed_pp"] for row in mine])
    return Measurement(figures, rows)


def batch_vllm(settings: Settings) -> Measurement:
    request = {
        "model": str(settings.peers.bf16_folder()), "dtype": contenders.vllm_dtype(), "sequences": VLLM_SEQUENCES,
        "prompt": settings.prompt, "new": settings.new, "repeat": settings.repeat,
    }  # fmt: skip
    env, python = contenders.vllm_env(settings), settings.peers.python("vllm")
    found, _ = contenders.run_worker(python, "vllm_worker.py", request, env, timeout=1800)
    return Measurement({f"decode_{count}": middle(found[str(count)]) for count in VLLM_SEQUENCES}, found)


def deep_kvik(settings: Settings) -> Measurement:
    figures, raw = {}, {}
    for depth in DEPTHS:
        prompt = LONG_PROMPT if depth == DEPTHS[-1] else 1  # one run measures both
        found = raw[depth] = contenders.kvik_bench(settings, prompt, DEEP_NEW, depth)
        figures[f"decode_{depth}"] = float(found["decode_tok_s"])
    figures[f"prefill_{LONG_PROMPT}"] = float(raw[DEPTHS[-1]]["prefill_tok_s"])
    return Measurement(figures, raw)


def deep_llama(settings: Settings, variant: str) -> Measurement:
    """With flash attention."""
    model, depths = settings.peers.variant(variant), ",".join(map(str, DEPTHS))
    decode, _ = contenders.llama_bench(settings, model, 1, "-p", "0", "-n", str(DEEP_NEW), "-d", depths)
    prefill, _ = contenders.llama_bench(settings, model, 1, "-p", str(LONG_PROMPT), "-n", "0")
    figures = {f"decode_{test['n_depth']}": middle(test["samples_ts"]) for test in decode}
    figures[f"prefill_{LONG_PROMPT}"] = middle(prefill[-1]["samples_ts"])
    return Measurement(figures, {"decode": decode, "prefill": prefill})


# --- over HTTP


def measure_capacity(settings: Settings, load: Traffic, name: str, block: int) -> Measurement:
    """Requests per second of a saturated server, after a first trace that does not count."""
    with servers.serving(name, settings) as server:
        warm_up(server, load)
        works = poisson_trace(f"{settings.seed}/capacity/{block}", max(load.requests, 4 * load.at_once))
        found = traffic.saturate(*server, works, load.at_once, load.timeout)
    return Measurement({"capacity": traffic.capacity(found), **traffic.latencies(found)}, {"requests": len(works)})


def arrivals(settings: Settings, load: Traffic, name: str, block: int, rate_of: str) -> Measurement:
    """A Poisson trace, the same for every server in a block, at a share of the capacity of `rate_of`."""
    rate = load.rate(rate_of)
    works = poisson_trace(f"{settings.seed}/arrivals/{block}", load.requests)
    with servers.serving(name, settings) as server:
        warm_up(server, load)
        found = traffic.arrive(*server, works, rate, load.timeout)
    raw = [[a.due - found.begun, *(at - a.due for at in a.chunks)] for a in found.answers]
    return Measurement({"rate": rate, **traffic.latencies(found)}, {"rate_of": rate_of, "due and chunks": raw})


def warm_up(server: servers.Serving, load: Traffic) -> None:
    """The first requests of every length compile or touch what the later ones use."""
    traffic.saturate(*server, poisson_trace("warm-up", load.at_once), load.at_once, load.timeout)


def http_kvik(settings: Settings, load: Traffic, block: int) -> Measurement:
    """The same requests through the server and through LLM.generate: tokens per second of all streams together."""
    seed, size = f"{settings.seed}/http/{block}", (STREAMS, settings.prompt, 2 * settings.new)
    count, prompt, new = size
    with servers.serving("kvik", settings) as server:
        rounds = [equal_requests(f"{seed}/{number}", *size) for number in range(settings.repeat + 1)]
        loads = [traffic.saturate(*server, works, STREAMS, load.timeout) for works in rounds][1:]
    found = ask_kvik(settings, "api", seed, count=count, prompt=prompt, new=new)
    rates = {
        "http_tok_s": middle([traffic.total_rate(one) for one in loads]),
        "api_tok_s": count * new / middle(found["seconds"]),
    }
    return Measurement({**rates, "kept": rates["http_tok_s"] / rates["api_tok_s"]}, found)


# --- Kvik's own engine


def ask_kvik(settings: Settings, mode: str, seed: str, **more: Any) -> Any:
    request = {
        "mode": mode, "model": str(settings.model), "threads": settings.threads, "repeat": settings.repeat,
        "seed": seed, **more,
    }  # fmt: skip
    found, _ = contenders.run_worker(settings.kvik_python, "kvik_engine.py", request, settings.kvik_env(), timeout=1800)
    return found


GRAMMAR_COUNTS = (1, 16)
OWN: Mapping[str, dict[str, Any]] = {
    "grammar": {"counts": GRAMMAR_COUNTS, "new": 128},
    "waste": {"count": 200},
    "samples": {"samples": 16, "prompt": 800, "new": 100},
    "prefix": {"prompt": 2000, "tail": 8},
    "index": {"count": 32, "prompt": 256, "new": 16},
}
"""What the worker is asked about Kvik alone."""


def own_kvik(settings: Settings, mode: str, block: int) -> Measurement:
    found = ask_kvik(settings, mode, f"{settings.seed}/{mode}/{block}", **OWN[mode])
    figures = {name: middle(value) if isinstance(value, list) else float(value) for name, value in found.items()}
    if mode == "prefix":
        figures["warm_over_cold"] = figures["warm_s"] / figures["cold_s"]
    if mode == "index":  # in turns, so that each pair met the same machine
        figures["cost"] = middle([on / off for on, off in zip(found["on"], found["off"], strict=True)])
    if mode == "grammar":  # in turns as well
        for count in GRAMMAR_COUNTS:
            pairs = zip(found[f"json_{count}"], found[f"free_{count}"], strict=True)
            figures[f"kept_{count}"] = middle([json / free for json, free in pairs])
    return Measurement(figures, found)


# --- beam search


def beam_prompts(settings: Settings, block: int) -> list[list[int]]:
    """One to warm up and one for each repeat, the same for both engines."""
    works = equal_requests(f"{settings.seed}/beams/{block}", settings.repeat + 1, settings.prompt, settings.new)
    return [work.prompt for work in works]


def beams_kvik(settings: Settings, block: int) -> Measurement:
    prompts = beam_prompts(settings, block)
    found = ask_kvik(settings, "beams", "", prompts=prompts, new=settings.new, beams=BEAMS)
    figures = {name: middle(found[name]) for name in ("python", "kv_bytes", "kv_bytes_unshared")}
    figures["of_unshared"] = figures["kv_bytes"] / figures["kv_bytes_unshared"]
    return Measurement({**figures, "tok_s": settings.new / middle(found["seconds"])}, found)


def beams_transformers(settings: Settings, block: int) -> Measurement:
    request = {
        "mode": "beams", "model": str(settings.peers.dequantized()), "dtype": "bf16", "threads": settings.threads,
        "prompts": beam_prompts(settings, block), "new": settings.new, "beams": BEAMS,
    }  # fmt: skip
    python = settings.peers.python("transformers")
    found, _ = contenders.run_worker(python, "transformers_worker.py", request, timeout=1800)
    return Measurement({"tok_s": settings.new / middle(found["seconds"])}, found)


# --- all of them


def plan(settings: Settings, load: Traffic) -> dict[str, Job]:
    """Every job by name. Names begin with what --only and --skip go by."""
    peers = settings.peers
    long = replace(settings, prompt=LONG_PROMPT, new=DEEP_NEW, repeat=1)

    def ours(measure: Callable[[int], Measurement]) -> Job:
        return Job(measure, settings.need_kvik)

    def llama(program: str, variant: str, measure: Callable[[], Measurement]) -> Job:
        job = of_llama(settings, lambda: peers.variant(variant), lambda block: measure())
        return job._replace(needs=lambda: (job.needs(), peers.llama(program)))

    def batch(variant: str, flash: int) -> Job:
        return llama("llama-batched-bench", variant, lambda: batch_llama(settings, variant, flash))

    def deep(variant: str) -> Job:
        return llama("llama-bench", variant, lambda: deep_llama(long, variant))

    def own(mode: str) -> Job:
        return ours(lambda block: own_kvik(settings, mode, block))

    found = {"batch kvik": ours(lambda block: batch_kvik(settings))}
    found |= {f"batch llama.cpp {name} fa={flash}": batch(name, flash) for name in VARIANTS for flash in FLASH}
    found["batch vllm"] = Job(lambda block: batch_vllm(settings), lambda: (peers.python("vllm"), peers.bf16_folder()))
    found["deep kvik"] = ours(lambda block: deep_kvik(long))
    found |= {f"deep llama.cpp {name} fa=1": deep(name) for name in DEEP_VARIANTS}
    found |= over_http(settings, load)
    found["http kvik"] = ours(lambda block: http_kvik(settings, load, block))
    found["beams kvik"] = ours(lambda block: beams_kvik(settings, block))
    found["beams transformers"] = Job(
        lambda block: beams_transformers(settings, block), lambda: (peers.python("transformers"), peers.dequantized())
    )
    return found | {f"{mode} kvik": own(mode) for mode in OWN}


def over_http(settings: Settings, load: Traffic) -> dict[str, Job]:
    def needs(name: str) -> Callable[[], object]:
        return lambda: servers.SERVERS[name](settings, 0)

    def capacity(name: str) -> Job:
        return Job(lambda block: measure_capacity(settings, load, name, block), needs(name))

    def common(name: str) -> Job:
        return Job(lambda block: arrivals(settings, load, name, block, load.reference()), needs(name))

    found = {f"capacity {name}": capacity(name) for name in servers.SERVERS}
    found |= {f"arrivals {name}": common(name) for name in servers.SERVERS}
    found["own-rate kvik"] = Job(lambda block: arrivals(settings, load, "kvik", block, "kvik"), needs("kvik"))
    return found
