"""Bytes of a GGUF of the Llama family, read in a process of its own.

A child's peak memory, as the kernel counts it, is never below that of the process that started it (exec keeps the
larger of the two), so what measures must stay small, and gguf's reader takes 150 MB.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import NamedTuple

from bench import BenchError
from bench.common import run_child
from bench.peers import REPOSITORY

F16_BYTES = 2


class ModelBytes(NamedTuple):
    """weights: of all tensors; read: of those that decoding one token reads (all but an embedding table that is not
    also the head); kv_token: of keys and values of one token in f16."""

    weights: int
    read: int
    kv_token: int


def model_bytes(path: Path) -> ModelBytes:
    done = run_child([sys.executable, "-m", "bench.model_bytes", path], cwd=REPOSITORY)
    return ModelBytes(*json.loads(done.stdout))


def from_file(path: Path) -> ModelBytes:
    import gguf

    reader = gguf.GGUFReader(path)

    def field(name: str) -> int | None:
        found = reader.fields.get(f"llama.{name}")
        return None if found is None else int(found.contents())

    heads, hidden, layers = field("attention.head_count"), field("embedding_length"), field("block_count")
    if heads is None or hidden is None or layers is None:
        raise BenchError(f"{path} is not a model of the Llama family")
    size = field("attention.key_length") or hidden // heads
    kv_heads = field("attention.head_count_kv") or heads
    sizes = {tensor.name: int(tensor.n_bytes) for tensor in reader.tensors}
    whole = sum(sizes.values())
    return ModelBytes(
        weights=whole,
        read=whole - (sizes["token_embd.weight"] if "output.weight" in sizes else 0),
        kv_token=layers * kv_heads * size * 2 * F16_BYTES,
    )


if __name__ == "__main__":
    try:
        print(json.dumps(from_file(Path(sys.argv[1]))))
    except (BenchError, OSError, ValueError) as error:
        sys.exit(str(error))
