"""Where the peers are: folders outside the project's environment, and what to say when one is missing."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from bench import BenchError

REPOSITORY = Path(__file__).resolve().parent.parent
DEFAULT_MODEL = "smollm2-135m"
VARIANTS = ("Q4_1", "Q8_0", "BF16", "Q4_0")
SIZES = ("1B", "4B", "8B")


def default_root() -> Path:
    """$KVIK_PEERS, else ~/.cache/kvik-peers."""
    return Path(os.environ.get("KVIK_PEERS") or Path.home() / ".cache" / "kvik-peers").expanduser().absolute()


def default_kvik_python() -> Path:
    """The Python Kvik is installed in: $KVIK_PYTHON, else the checkout's .venv."""
    return Path(os.environ.get("KVIK_PYTHON") or REPOSITORY / ".venv" / "bin" / "python")


@dataclass(frozen=True)
class Peers:
    """The folder that setup_peers.py fills; every path below it."""

    root: Path

    def llama(self, program: str) -> Path:
        """A program of llama.cpp: one of setup_peers.LLAMA_PROGRAMS."""
        return self.need(self.root / "llama.cpp" / "build" / "bin" / program, "llama.cpp")

    def python(self, peer: str) -> Path:
        """The Python of a peer's own environment: openvino, transformers, vllm or tools."""
        return self.need(self.root / peer / "bin" / "python", peer)

    def variant(self, name: str) -> Path:
        """The default model in one of VARIANTS, or F32."""
        return self.need(self.root / "models" / f"smollm2-135m.{name}.gguf", "models")

    def dequantized(self) -> Path:
        """The folder of transformers with the dequantized weights."""
        return self.need(self.root / "models" / "dequantized" / "config.json", "transformers").parent

    def bf16_folder(self) -> Path:
        """The same weights in bf16, as a folder of safetensors with its tokenizer."""
        return self.need(self.root / "models" / f"{DEFAULT_MODEL}-bf16" / "config.json", "transformers").parent

    def q4_k_m(self) -> Path:
        """A random-weight model of 1B in Q4_K_M."""
        return self.need(self.root / "models" / "random-1b.Q4_K_M.gguf", "q4_k_m")

    def sized(self, size: str) -> Path:
        """A random-weight model, one of SIZES."""
        return self.need(self.root / "models" / f"random-{size.lower()}.Q4_1.gguf", "sizes")

    def bandwidth(self) -> Path:
        """The program that measures read bandwidth."""
        return self.need(self.root / "bin" / "bandwidth", "bandwidth")

    def work(self) -> Path:
        """A folder for intermediate files."""
        folder = self.root / "work"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def need(self, path: Path, step: str) -> Path:
        if not path.exists():
            raise BenchError(f"{path} is missing: run `python3 bench/setup_peers.py --root {self.root} --only {step}`")
        return path


def chosen(names: Iterable[str], only: str | None, skip: str | None) -> list[str]:
    """The names that --only and --skip leave, in their own order.

    Both are lists with commas; a part stands for the name itself and for every name that goes on after it with a space.
    A part that stands for nothing is refused.
    """
    names = list(names)

    def matching(text: str) -> set[str]:
        found = set()
        for part in (part.strip() for part in text.split(",")):
            fits = {name for name in names if name == part or name.startswith(part + " ")}
            if not fits:
                raise BenchError(f"there is no {part!r}; there are: {', '.join(names)}")
            found |= fits
        return found

    picked = matching(only) if only else set(names)
    dropped = matching(skip) if skip else set()
    return [name for name in names if name in picked - dropped]


def launch(module: str) -> int:
    """Go on as `module` in the environment of the peers' tools, which has numpy, matplotlib and gguf; argv stays."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--root", type=Path, default=default_root())
    root = parser.parse_known_args()[0].root.expanduser().absolute()
    try:
        python = Peers(root).python("tools")
    except BenchError as error:
        say(f"bench: {error}")
        return 1
    path = os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH"))))
    os.execve(python, [str(python), "-m", module, *sys.argv[1:]], {**os.environ, "PYTHONPATH": path})


def say(text: str) -> None:
    """Progress, beside the report on standard output."""
    print(text, file=sys.stderr, flush=True)


def run_command(work: Callable[[], int]) -> int:
    """The exit code of a benchmark's command: what went wrong is one line. Being told to end stops its children too."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    try:
        return work()
    except (BenchError, OSError) as error:
        say(f"bench: {error}")
        return 1
    except KeyboardInterrupt:
        say("bench: stopped")
        return 130
