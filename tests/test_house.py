"""The order of the house: imports point downward only, and the base install imports no heavy library."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parent.parent / "src" / "kvik"

FLOORS = [
    {"errors", "params"},
    {"_native", "files", "ops"},
    {"jsonl", "text", "weights", "cache", "decoding"},
    {"models", "planning"},
    {"engine", "speculation"},
    {"llm"},
    {"async_llm"},
    {"evaluation", "prompting", "server"},
    {"tuning"},
    {"cli"},
]
FLOOR = {room: height for height, rooms in enumerate(FLOORS) for room in rooms}
# torch_ops and its readers are the extra `torch`; the hub is `hub`, pictures are `plots`, the server is `serve`, metrics are `eval`.
BASE = {"numpy", "tokenizers", "jinja2", "typer", "rich", "prompt_toolkit", "click", "llguidance"}
EXTRAS = {
    "ops/torch_attention.py": {"torch"},
    "ops/torch_cache.py": {"torch"},
    "ops/torch_eviction.py": {"torch"},
    "ops/torch_ops.py": {"torch"},
    "ops/torch_pages.py": {"torch"},
    "ops/torch_rounding.py": {"torch"},
    "engine/executors.py": {"torch"},
    "evaluation/metrics/encoder.py": {"torch", "transformers", "safetensors"},
    "weights/fetch.py": {"huggingface_hub"},
    "evaluation/metrics/code_bleu/trees.py": {"tree_sitter"},
    "evaluation/metrics/translation.py": {"sacrebleu"},
    "evaluation/metrics/words.py": {"nltk"},
    "cli/bench_plot.py": {"matplotlib"},
    "cli/compare_plot.py": {"matplotlib"},
    "cli/divergence_plot.py": {"matplotlib"},
    "cli/pictures.py": {"matplotlib"},
    "cli/doctor.py": {"torch"},
    "server/app.py": {"fastapi", "starlette"},
    "server/body.py": {"starlette"},
    "server/metrics.py": {"prometheus_client"},
    "server/responding.py": {"starlette"},
    "server/running.py": {"fastapi", "uvicorn"},
}
FILES = sorted(SOURCE.rglob("*.py"))


def imports(path: Path) -> list[tuple[str, int]]:
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            # `from kvik import x` names a room only where x is one
            if node.module == "kvik":
                found += [(f"kvik.{alias.name}", node.lineno) for alias in node.names]
            else:
                found.append((node.module, node.lineno))
    return found


def room_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_point_downward(path: Path) -> None:
    room = room_of(path)
    if room == "__init__":  # the public names
        return
    assert room in FLOOR, f"{room} is a room the house does not know: give it a floor in this test"
    for module, line in imports(path):
        parts = module.split(".")
        if parts[0] != "kvik" or len(parts) < 2 or parts[1] not in FLOOR:
            continue
        assert FLOOR[parts[1]] <= FLOOR[room], f"{path.name}:{line} imports upward: {module}"
        if parts[1] != room:
            assert FLOOR[parts[1]] < FLOOR[room] or room in ("params", "ops"), (
                f"{path.name}:{line} imports sideways: {module}"
            )


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_are_dependencies(path: Path) -> None:
    allowed = BASE | EXTRAS.get(str(path.relative_to(SOURCE)), set()) | set(sys.stdlib_module_names) | {"kvik"}
    for module, line in imports(path):
        assert module.split(".")[0] in allowed, f"{path.name}:{line} imports {module}"


def test_the_library_imports_nothing_heavy() -> None:
    code = (
        "import sys, kvik, kvik.llm; "
        "print(','.join(sorted({'torch', 'transformers', 'gguf', 'rich', 'typer', 'jinja2', 'prompt_toolkit', 'llguidance'} "
        "& set(sys.modules))))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
