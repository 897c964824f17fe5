"""How far each engine's next-token distribution is from that of the dequantized weights, on the same tokens.

python -m bench.quality [--only …] --out FILE.json

Base: transformers in float32 on the dequantized weights. Text: pydoc_data.topics (standard library), cut into windows
of 512 tokens; the rows 256 to 510 of each window count, those llama-perplexity saves. Every engine sees the same token
ids. llama.cpp saves log-probabilities as 16-bit numbers and cuts them 16 nats below the best token; what it cuts counts
as one outcome as likely as in the base. The figure of its own F32 file, reported as well, is the noise of all that.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench import BenchError
from bench.common import markdown_table, number, run_child
from bench.peers import REPOSITORY, VARIANTS, Peers, chosen, default_kvik_python, default_root

WINDOW = 512
FIRST = WINDOW // 2
ROWS = WINDOW - 1 - FIRST
WINDOWS = 8
WORKERS = REPOSITORY / "bench" / "workers"
TOKENS_NAME = "quality-tokens.npy"
Windows = Iterator[np.ndarray]


@dataclass(frozen=True)
class Quality:
    """Against the base: mean KL divergence in nats per token and its standard error, perplexity over the base's, and
    the share of rows whose best token is the same."""

    kl: float
    kl_error: float
    perplexity: float
    base_perplexity: float
    same_best: float
    tokens: int


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """[rows, V] float32 to float64 log-probabilities."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return shifted


def divergence(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """KL(p ‖ q) of each row in nats, from log-probabilities [rows, V] float64.

    Where q is -inf it is unknown, not impossible: those tokens count as one outcome that q gives p's probability, and
    the rest of q is scaled to what is left. Without any -inf this is the plain definition of normalized q.
    """
    known = np.isfinite(q)
    mass = np.where(known, np.exp(p), 0.0)
    left = np.log(np.where(known, np.exp(q), 0.0).sum(axis=1)) - np.log(mass.sum(axis=1))
    gap: np.ndarray = (mass * np.where(known, p - np.where(known, q, 0.0), 0.0)).sum(axis=1)
    gap += left * mass.sum(axis=1)
    return gap


def compare(base: Windows, other: Windows, targets: np.ndarray) -> Quality:
    """base and other yield log-probabilities [ROWS, V] of each window; targets [windows, ROWS]: what came."""
    kl, base_nll, nll, same = [], [], [], []
    for p, q, wanted in zip(base, other, targets, strict=True):
        kl.append(divergence(p, q))
        rows = np.arange(len(wanted))
        base_nll.append(-p[rows, wanted])
        nll.append(-np.where(np.isfinite(q[rows, wanted]), q[rows, wanted], p[rows, wanted]))
        same.append(p.argmax(axis=1) == q.argmax(axis=1))
    gaps = np.concatenate(kl)
    return Quality(
        kl=float(gaps.mean()),
        kl_error=float(gaps.std(ddof=1) / gaps.size**0.5),
        perplexity=float(np.exp(np.concatenate(nll).mean())),
        base_perplexity=float(np.exp(np.concatenate(base_nll).mean())),
        same_best=float(np.concatenate(same).mean()),
        tokens=int(gaps.size),
    )


def saved_f32(path: Path, vocabulary: int, windows: int) -> Windows:
    """Log-probabilities of a file of raw float32 logits [windows × ROWS, V]."""
    logits = np.memmap(path, np.float32, "r", shape=(windows, ROWS, vocabulary))
    for window in logits:
        yield log_softmax(window)


class LlamaSaved:
    """The file of `llama-perplexity --kl-divergence-base`: token ids and 16-bit log-probabilities.

    "_logits_", int32 window, vocabulary, windows, the token ids; then per row float32 scale and lowest log-probability
    and one uint16 a token, log-probability = lowest + scale · number; 0 stands for everything lower, and becomes -inf.
    """

    def __init__(self, path: Path) -> None:
        data = np.memmap(path, np.uint8, "r")
        header = np.frombuffer(data[8:20], np.int32)
        if bytes(data[:8]) != b"_logits_" or header[0] != WINDOW:
            raise BenchError(f"{path} is not what llama-perplexity writes for windows of {WINDOW}")
        self.vocabulary, self.windows = int(header[1]), int(header[2])
        tokens_end = 20 + 4 * WINDOW * self.windows
        self.tokens = np.frombuffer(data[20:tokens_end], np.int32).reshape(self.windows, WINDOW)
        columns = 2 * ((self.vocabulary + 1) // 2) + 4
        self.rows = data[tokens_end:].view(np.uint16).reshape(self.windows, ROWS, columns)

    def log_probabilities(self) -> Windows:
        for window in self.rows:
            scale, lowest = np.ascontiguousarray(window[:, :4]).view(np.float32).astype(np.float64).T
            numbers = window[:, 4 : 4 + self.vocabulary]
            yield np.where(numbers > 0, numbers * scale[:, None] + lowest[:, None], -np.inf)


class Measure:
    """Runs the engines one after another; files of logits are deleted as soon as they are compared."""

    def __init__(self, peers: Peers, kvik_python: Path, kvik_model: Path | None, threads: int, windows: int) -> None:
        self.peers, self.kvik_python, self.kvik_model = peers, kvik_python, kvik_model
        self.threads, self.windows = threads, windows
        self.work = peers.work()
        self.tokens_path = self.work / TOKENS_NAME
        self.base_path = self.work / "base.f32"
        self.vocabulary = 0

    def contenders(self) -> dict[str, Callable[[], Windows]]:
        llama = {
            f"llama.cpp {name} fa={flash}": (lambda name=name, flash=flash: self.llama(name, flash))
            for name in (*VARIANTS, "F32")
            for flash in (0, 1)
        }
        model = self.peers.root / "models"
        return {
            "kvik": lambda: self.kvik("auto"),
            "kvik f32": lambda: self.kvik("f32"),
            **llama,
            "openvino Q4_1": lambda: self.openvino(self.peers.variant("Q4_1")),
            "openvino Q4_0": lambda: self.openvino(self.peers.variant("Q4_0")),
            "transformers bf16": lambda: self.worker(
                self.peers.python("transformers"), "transformers_worker.py",
                {"mode": "logits", "dtype": "bf16", "model": str(model / "dequantized")},
            ),
        }  # fmt: skip

    def run(self, only: Sequence[str]) -> dict[str, Quality | str]:
        """Quality of each named contender, or why it could not be measured."""
        found: dict[str, Quality | str] = {}
        self.prepare()
        for name, begin in self.contenders().items():
            if name not in only:
                continue
            try:
                base = saved_f32(self.base_path, self.vocabulary, self.windows)
                measured = compare(base, begin(), self.targets)
                found[name], text = measured, f"KL {number(measured.kl)}"
            except BenchError as error:
                found[name] = text = f"not measurable: {error}".splitlines()[0]
            print(f"quality: {name}: {text}", file=sys.stderr, flush=True)
        for path in (self.base_path, self.work / "other.f32", self.work / "other.kld"):
            path.unlink(missing_ok=True)
        return found

    def prepare(self) -> None:
        """Token ids from llama.cpp's tokenizer, base logits from transformers."""
        tokens = self.llama_file("Q4_1", 0).tokens
        if len(tokens) < self.windows:
            raise BenchError(f"the text has {len(tokens)} windows of {WINDOW} tokens, {self.windows} are wanted")
        np.save(self.tokens_path, tokens)
        self.targets = tokens[:, FIRST + 1 :]
        request = {"mode": "logits", "dtype": "f32", "model": str(self.peers.dequantized())}
        program = WORKERS / "transformers_worker.py"
        done = self.request(self.peers.python("transformers"), program, request, self.base_path)
        self.vocabulary = done["vocabulary"]

    def llama_file(self, variant: str, flash: int) -> LlamaSaved:
        from pydoc_data.topics import topics

        text = self.work / "quality-text.txt"
        text.write_text("\n\n".join(topics[key] for key in sorted(topics))[: 8 * WINDOW * (self.windows + 2)])
        out = self.work / "other.kld"
        run_child(
            [self.peers.llama("llama-perplexity"), "-m", self.peers.variant(variant), "-f", text, "-c", str(WINDOW),
             "-b", str(WINDOW), "--chunks", str(self.windows), "-t", str(self.threads),
             "-fa", "on" if flash else "off", "--kl-divergence-base", out]
        )  # fmt: skip
        return LlamaSaved(out)

    def llama(self, variant: str, flash: int) -> Windows:
        saved = self.llama_file(variant, flash)
        if not np.array_equal(saved.tokens, np.load(self.tokens_path)):
            raise BenchError(f"llama.cpp {variant} read other tokens than the base")
        yield from saved.log_probabilities()

    def request(self, python: Path, program: Path, request: dict[str, Any], out: Path) -> dict[str, Any]:
        full = {**request, "threads": self.threads, "windows": str(self.tokens_path), "first": FIRST, "out": str(out)}
        done = run_child([python, program, json.dumps(full)])
        result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
        if self.vocabulary and result["vocabulary"] != self.vocabulary:
            raise BenchError(f"{program.name} gives {result['vocabulary']} logits a token, not {self.vocabulary}")
        return result

    def worker(self, python: Path, program: str, request: dict[str, Any]) -> Windows:
        out = self.work / "other.f32"
        self.request(python, WORKERS / program, request, out)
        yield from saved_f32(out, self.vocabulary, self.windows)

    def kvik(self, weights: str) -> Windows:
        model = str(self.kvik_model or self.peers.variant("Q4_1"))
        return self.worker(self.kvik_python, "kvik_logits.py", {"model": model, "weights": weights})

    def openvino(self, model: Path) -> Windows:
        request = {"mode": "logits", "model": str(model), "folder": str(self.work / "openvino")}
        return self.worker(self.peers.python("openvino"), "openvino_worker.py", request)


def quality_table(found: dict[str, Quality | str]) -> str:
    rows = []
    for name, item in found.items():
        if isinstance(item, str):
            rows.append([name, item, "–", "–"])
        else:
            change = 100 * (item.perplexity / item.base_perplexity - 1)
            rows.append(
                [name, f"{item.kl:.6f} ± {item.kl_error:.6f}", f"{item.perplexity:.3f} ({change:+.2f} %)",
                 f"{100 * item.same_best:.2f} %"]
            )  # fmt: skip
    header = ["engine", "KL to the dequantized weights (nats)", "perplexity (change)", "same best token"]
    return markdown_table(header, rows)


def read_quality(path: Path) -> dict[str, Quality | str]:
    """What main wrote."""
    found = json.loads(path.read_text())["quality"]
    return {name: item if isinstance(item, str) else Quality(**item) for name, item in found.items()}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.quality", description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, default=default_root(), help="folder of the peers [%(default)s]")
    parser.add_argument("--kvik-python", type=Path, default=default_kvik_python())
    parser.add_argument("--model", type=Path, help="GGUF for Kvik [the peers' Q4_1 file]")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--windows", type=int, default=WINDOWS, help=f"windows of {WINDOW} tokens [%(default)s]")
    parser.add_argument("--only", help="contenders, with commas")
    parser.add_argument("--skip", help="contenders to leave out")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    options = parser.parse_args(argv)
    try:
        measure = Measure(Peers(options.root), options.kvik_python, options.model, options.threads, options.windows)
        found = measure.run(chosen(measure.contenders(), options.only, options.skip))
    except (BenchError, OSError) as error:
        print(f"quality: {error}", file=sys.stderr)
        return 1
    plain = {name: item if isinstance(item, str) else asdict(item) for name, item in found.items()}
    options.out.write_text(json.dumps({"windows": options.windows, "quality": plain}, indent=1))
    print(quality_table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
