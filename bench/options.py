"""The options that every run has, and the folder its results go to."""

from __future__ import annotations

import argparse
from datetime import UTC, datetime
from pathlib import Path

from bench.peers import REPOSITORY, default_kvik_python, default_root

__all__ = ["results_folder", "run_parser"]


def run_parser(
    name: str, about: str | None, only: str, *, blocks: int, repeat: int, plots: bool
) -> argparse.ArgumentParser:
    """name: of the program. only: what --only takes."""
    parser = argparse.ArgumentParser(prog=f"bench/{name}.py", description=about)
    parser.add_argument("--blocks", type=int, default=blocks, help="blocks [%(default)s]; fewer only to try things")
    parser.add_argument("--repeat", type=int, default=repeat, help="repeats inside one measurement [%(default)s]")
    parser.add_argument("--only", help=only)
    parser.add_argument("--skip", help="what to leave out")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--root", type=Path, default=default_root(), help="folder of the peers [%(default)s]")
    parser.add_argument("--kvik-python", type=Path, default=default_kvik_python(), help="[%(default)s]")
    parser.add_argument("--seed", type=int, default=0, help="of the order of the blocks, and of what is drawn for them")
    parser.add_argument("--out", type=Path, help="folder for raw.json and the report [a new one in bench/results]")
    parser.add_argument("--table", type=Path, help="also write the report here")
    if plots:
        parser.add_argument("--plot", type=Path, help="also write the plot here (.svg or .png)")
    return parser


def results_folder(given: Path | None, before: str = "") -> Path:
    """--out, else a new one by the time, `before` in front of it; absolute, since workers run elsewhere."""
    fresh = REPOSITORY / "bench" / "results" / datetime.now(UTC).strftime(f"{before}%Y-%m-%d-%H%M%S")
    return (given or fresh).absolute()
