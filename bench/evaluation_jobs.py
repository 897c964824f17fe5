"""What is measured of evaluation: one job per engine and question, by name, and what all of them read."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bench import BenchError, contenders, evaluation_text, llama_perplexity
from bench.agreement import Keys, Losses, save_keys
from bench.common import Finished, middle, run_child
from bench.contenders import Measurement, Settings
from bench.jobs import Job, of_llama

WINDOW = 2048
FIRST = WINDOW // 2 + 1
SCORED = WINDOW - FIRST
"""llama-perplexity scores a window's tokens from FIRST on."""
LONG, SHORT, SLIDE = 8192, 4096, 1024
ECHO = 1024
"""Tokens at the end of a long text that repeat its beginning: without, no token needs so long a context."""
REFERENCE, LAYOUTS = "auto", {"divergence kvik": "int8", "divergence kvik bf16": "bf16"}
LLAMA = (("Q4_1", 0), ("Q4_1", 1), ("Q8_0", 1), ("BF16", 1), ("Q4_0", 1))
METRICS = {"rouge": "rouge-score", "bleu": "sacrebleu"}
TIMEOUT = 3600
CHARACTERS_A_TOKEN = 5  # more than English has here, so that the text is long enough


@dataclass(frozen=True)
class Inputs:
    """What every job reads and where it writes beside its figures.

    Attributes:
        folder: of the run.
        windows: of WINDOW tokens each, in the text.
        long_texts: of LONG tokens each, for LongPPL.
        samples: pairs of texts for the metrics.
    """

    folder: Path
    windows: int = 49
    long_texts: int = 2
    samples: int = 500

    @property
    def text(self) -> Path:
        return self.folder / "text.txt"

    @property
    def tokens(self) -> Path:
        """int32 [windows, WINDOW]: those of the text."""
        return self.folder / "tokens.npy"

    @property
    def long(self) -> Path:
        """JSON, a list of {"text", "ids"}."""
        return self.folder / "long.json"

    @property
    def pairs(self) -> Path:
        return self.folder / "pairs.json"

    def losses(self, engine: str) -> Path:
        """float64 [windows]: an engine's summed losses of each window's scored tokens."""
        return self.folder / f"losses {engine}.npy"

    def keys(self, engine: str) -> Path:
        """LongPPL and its key tokens, by an engine."""
        return self.folder / f"keys {engine}.json"


# --- the inputs


def make_inputs(settings: Settings, inputs: Inputs) -> dict[str, Any]:
    """The files that all read, cut to whole windows by Kvik's tokenizer; what is worth printing of them."""
    longest = WINDOW * inputs.windows + LONG * inputs.long_texts
    source = inputs.folder / "source.txt"
    source.write_text(evaluation_text.english(CHARACTERS_A_TOKEN * longest))
    asked = {
        "source": str(source), "text": str(inputs.text), "tokens": str(inputs.tokens), "window": WINDOW,
        "windows": inputs.windows, "long": str(inputs.long), "long_tokens": LONG, "long_texts": inputs.long_texts,
        "echo": ECHO,
    }  # fmt: skip
    found, _ = ask_kvik(settings, "cut", **asked)
    predictions, references = evaluation_text.pairs(inputs.samples, settings.seed)
    inputs.pairs.write_text(json.dumps({"predictions": predictions, "references": references}))
    return dict(found)


# --- perplexity


def rates(seconds: float, tokens: int, done: Finished, warm_up: float = 0.0) -> dict[str, float]:
    """seconds: of the evaluation alone. whole_s: of the process, without a warm-up that the engine does not need."""
    return {
        "tok_s": tokens / seconds, "seconds": seconds, "whole_s": done.seconds - warm_up,
        "peak_rss_bytes": float(done.peak_rss_bytes),
    }  # fmt: skip


def ask_kvik(settings: Settings, mode: str, **more: Any) -> tuple[Any, Finished]:
    request = {"mode": mode, "model": str(settings.model), "threads": settings.threads, **more}
    python, env = settings.kvik_python, settings.kvik_env()
    return contenders.run_worker(python, "kvik_evaluation.py", request, env, timeout=TIMEOUT)


def ask_transformers(settings: Settings, mode: str, **more: Any) -> tuple[Any, Finished]:
    request = {"mode": mode, "model": str(settings.peers.bf16_folder()), "threads": settings.threads, **more}
    python = settings.peers.python("transformers")
    return contenders.run_worker(python, "transformers_evaluation.py", request, timeout=TIMEOUT)


def perplexity_kvik(settings: Settings, inputs: Inputs) -> Measurement:
    """The library's own function on the text: tokens, windows and intervals are in its time."""
    found, done = ask_kvik(settings, "perplexity", text=str(inputs.text), window=WINDOW)
    figures = rates(found["seconds"], inputs.windows * WINDOW, done, found["warm_up_s"])
    return Measurement(figures | {name: found[name] for name in ("perplexity", "standard_error")}, found)


def agreement_kvik(settings: Settings, inputs: Inputs) -> Measurement:
    """Kvik's losses on the very windows and tokens that llama-perplexity scores."""
    losses = inputs.folder / "losses.npy"
    found, _ = ask_kvik(settings, "losses", tokens=str(inputs.tokens), first=FIRST, out=str(losses))
    return Measurement({"perplexity": keep_losses(inputs, "kvik", np.load(losses))}, found)


def keep_losses(inputs: Inputs, engine: str, losses: Losses) -> float:
    """Writes them down; the perplexity they make."""
    if losses.shape != (inputs.windows,) or not np.isfinite(losses).all():
        raise BenchError(f"{engine} gave losses {list(losses.shape)}, not {inputs.windows} finite ones")
    np.save(inputs.losses(engine), losses)
    return float(np.exp(losses.mean() / SCORED))


def perplexity_llama(settings: Settings, inputs: Inputs, variant: str, flash: int) -> Measurement:
    done = run_child(
        [settings.peers.llama("llama-perplexity"), "-m", settings.peers.variant(variant), "-f", inputs.text,
         "-c", str(WINDOW), "-t", str(settings.threads), "-fa", "on" if flash else "off",
         "--chunks", str(inputs.windows), "-lv", "4"], timeout=TIMEOUT,
    )  # fmt: skip
    found = llama_perplexity.read(done.stdout, done.stderr, inputs.windows, SCORED)
    keep_losses(inputs, f"llama.cpp {variant} fa={flash}", found.nll)
    figures = {"perplexity": found.perplexity, "standard_error": found.error}
    return Measurement(rates(found.seconds, inputs.windows * WINDOW, done) | figures, {"said": done.stderr[-1000:]})


def perplexity_transformers(settings: Settings, inputs: Inputs) -> Measurement:
    losses = inputs.folder / "losses.npy"
    found, done = ask_transformers(settings, "perplexity", tokens=str(inputs.tokens), first=FIRST, out=str(losses))
    figures = rates(found["seconds"], inputs.windows * WINDOW, done, found["warm_up_s"])
    keep_losses(inputs, "transformers bf16", np.load(losses))
    return Measurement({**figures, "perplexity": found["perplexity"]}, found)


# --- divergence, LongPPL, metrics


def divergence_kvik(settings: Settings, inputs: Inputs, layout: str) -> Measurement:
    """A layout against the file's own, in lockstep over the text of the perplexity."""
    layouts = (REFERENCE, layout)
    found, done = ask_kvik(settings, "divergence", text=str(inputs.text), window=WINDOW, layouts=layouts)
    figures = rates(found["seconds"], inputs.windows * WINDOW, done, found["warm_up_s"])
    return Measurement(figures | {name: found[name] for name in ("kl_mean", "same_top")}, found)


def longppl(inputs: Inputs, engine: str, found: Any, done: Finished) -> Measurement:
    keys = Keys(found["value"], found["keys"])
    save_keys(inputs.keys(engine), keys)
    figures = rates(found["seconds"], found["tokens"], done, found["warm_up_s"])
    figures["keys"] = float(sum(map(len, keys.keys)))
    return Measurement(figures if keys.value is None else {**figures, "longppl": keys.value}, found)


def longppl_kvik(settings: Settings, inputs: Inputs) -> Measurement:
    found, done = ask_kvik(settings, "longppl", long=str(inputs.long), short=SHORT, slide=SLIDE)
    return longppl(inputs, "kvik", found, done)


def longppl_plain(settings: Settings, inputs: Inputs) -> Measurement:
    """One window after another, in transformers."""
    found, done = ask_transformers(settings, "longppl", long=str(inputs.long), short=SHORT, slide=SLIDE)
    return longppl(inputs, "plain", found, done)


def metric(settings: Settings, inputs: Inputs, name: str, kvik: bool) -> Measurement:
    """Pairs of texts a second: rouge's four kinds with F1; bleu of all together and of each."""
    asked = {"mode": name, "pairs": str(inputs.pairs), "repeat": settings.repeat}
    if kvik:
        found, _ = ask_kvik(settings, **asked)
    else:
        found, _ = contenders.run_worker(settings.peers.python("tools"), "metrics_worker.py", asked)
    return Measurement({"pairs_s": inputs.samples / middle(found["seconds"]), **found["figures"]}, found)


# --- all of them


def plan(settings: Settings, inputs: Inputs) -> dict[str, Job]:
    """Every job by name. Names begin with what --only and --skip go by."""
    peers = settings.peers

    def ours(measure: Callable[[Settings, Inputs], Measurement]) -> Job:
        return Job(lambda block: measure(settings, inputs), settings.need_kvik)

    def llama(variant: str, flash: int) -> Job:
        job = of_llama(
            settings, lambda: peers.variant(variant), lambda block: perplexity_llama(settings, inputs, variant, flash)
        )
        return job._replace(needs=lambda: (peers.llama("llama-perplexity"), peers.variant(variant)))

    def plain(measure: Callable[[Settings, Inputs], Measurement]) -> Job:
        return Job(lambda block: measure(settings, inputs), lambda: (peers.python("transformers"), peers.bf16_folder()))

    found = {"agreement kvik": ours(agreement_kvik), "perplexity kvik": ours(perplexity_kvik)}
    found |= {f"perplexity llama.cpp {name} fa={flash}": llama(name, flash) for name, flash in LLAMA}
    found |= {
        "perplexity transformers bf16": plain(perplexity_transformers),
        **{name: ours(partial(divergence_kvik, layout=layout)) for name, layout in LAYOUTS.items()},
        "longppl kvik": ours(longppl_kvik),
        "longppl plain": plain(longppl_plain),
    }
    for name, package in METRICS.items():
        found[f"{name} kvik"] = ours(partial(metric, name=name, kvik=True))
        found[f"{name} {package}"] = Job(
            lambda block, name=name: metric(settings, inputs, name, kvik=False), lambda: peers.python("tools")
        )
    return found
