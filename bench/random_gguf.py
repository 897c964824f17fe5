"""Writes a random-weight model of Llama shape: speed depends on the shape and the bytes, not on the weights.

python bench/random_gguf.py SOURCE.gguf SIZE Q4_1|F16 OUT.gguf      the tokenizer comes from SOURCE, padded
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

SEED = 20_240_601
BLOCK = 32
BLOCK_BYTES = 20  # scale f16, minimum f16, 32 nibbles
LEVELS_STD = (255 / 12) ** 0.5  # of a uniform 0..15
CHUNK_BLOCKS = 1 << 20
UNUSED_TOKEN = 5


@dataclass(frozen=True)
class Shape:
    """Sizes of a model; the head is tied where `tied`."""

    layers: int
    hidden: int
    feed_forward: int
    heads: int
    kv_heads: int
    head_size: int
    tied: bool
    vocabulary: int = 128_256
    context: int = 8_192
    rope_theta: float = 500_000.0


SHAPES = {  # those of Llama 3.2 1B; a 4B between its neighbours; Llama 3 8B
    "1B": Shape(16, 2048, 8192, 32, 8, 64, tied=True),
    "4B": Shape(32, 3072, 9216, 24, 8, 128, tied=True),
    "8B": Shape(32, 4096, 14336, 32, 8, 128, tied=False),
}


def q4_1_blocks(rng: np.random.Generator, count: int, std: float) -> np.ndarray:
    """count random Q4_1 blocks [count, 20] uint8 whose weights have mean 0 and about the given standard deviation."""
    blocks = np.empty((count, BLOCK_BYTES), np.uint8)
    scale = (std / LEVELS_STD * rng.uniform(0.8, 1.2, count)).astype(np.float16)
    blocks[:, 0:2] = scale.view(np.uint8).reshape(count, 2)
    blocks[:, 2:4] = (-7.5 * scale.astype(np.float32)).astype(np.float16).view(np.uint8).reshape(count, 2)
    blocks[:, 4:] = np.frombuffer(rng.bytes(count * 16), np.uint8).reshape(count, 16)
    return blocks


def q4_1_tensor(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    """A random matrix [rows, bytes of a row] uint8; outputs of a row keep the scale of its inputs."""
    count = rows * columns // BLOCK
    data = np.empty((count, BLOCK_BYTES), np.uint8)
    for first in range(0, count, CHUNK_BLOCKS):
        part = data[first : first + CHUNK_BLOCKS]
        part[:] = q4_1_blocks(rng, len(part), columns**-0.5)
    return data.reshape(rows, columns // BLOCK * BLOCK_BYTES)


def f16_tensor(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    """A random matrix [rows, columns] float16; outputs of a row keep the scale of its inputs."""
    return (rng.standard_normal((rows, columns), np.float32) * np.float32(columns**-0.5)).astype(np.float16)


def tensors(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes (rows first) in file order; one dimension means a norm in F32."""
    h, q, kv = shape.hidden, shape.heads * shape.head_size, shape.kv_heads * shape.head_size
    yield "token_embd.weight", (shape.vocabulary, h)
    for i in range(shape.layers):
        yield f"blk.{i}.attn_norm.weight", (h,)
        yield f"blk.{i}.attn_q.weight", (q, h)
        yield f"blk.{i}.attn_k.weight", (kv, h)
        yield f"blk.{i}.attn_v.weight", (kv, h)
        yield f"blk.{i}.attn_output.weight", (h, q)
        yield f"blk.{i}.ffn_norm.weight", (h,)
        yield f"blk.{i}.ffn_gate.weight", (shape.feed_forward, h)
        yield f"blk.{i}.ffn_up.weight", (shape.feed_forward, h)
        yield f"blk.{i}.ffn_down.weight", (h, shape.feed_forward)
    yield "output_norm.weight", (h,)
    if not shape.tied:
        yield "output.weight", (shape.vocabulary, h)


def write(source: Path, size: str, kind: str, path: Path) -> None:
    """Write the model of that size and kind; one tensor at a time, and in place only once it is whole."""
    import gguf

    fresh = path.with_suffix(".new")
    writer = gguf.GGUFWriter(fresh, "llama")
    writer.add_name(f"Kvik random {size}, seed {SEED}")
    writer.add_file_type(getattr(gguf.LlamaFileType, f"MOSTLY_{kind}"))
    add_sizes(writer, SHAPES[size])
    add_tokenizer(writer, gguf.GGUFReader(source).fields, SHAPES[size].vocabulary)
    add_weights(writer, kind, list(tensors(SHAPES[size])))
    writer.close()
    fresh.replace(path)


def add_sizes(writer: Any, shape: Shape) -> None:
    writer.add_block_count(shape.layers)
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.hidden)
    writer.add_feed_forward_length(shape.feed_forward)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_size)
    writer.add_value_length(shape.head_size)
    writer.add_rope_dimension_count(shape.head_size)
    writer.add_rope_freq_base(shape.rope_theta)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(shape.vocabulary)


def add_tokenizer(writer: Any, fields: Any, vocabulary: int) -> None:
    """The tokenizer of another file's fields, padded."""
    words = list(fields["tokenizer.ggml.tokens"].contents())
    kinds = list(fields["tokenizer.ggml.token_type"].contents())
    missing = vocabulary - len(words)
    writer.add_tokenizer_model(fields["tokenizer.ggml.model"].contents())
    writer.add_tokenizer_pre(fields["tokenizer.ggml.pre"].contents())
    writer.add_token_list(words + [f"<|unused_{i}|>" for i in range(missing)])
    writer.add_token_types(kinds + [UNUSED_TOKEN] * missing)
    writer.add_token_merges(fields["tokenizer.ggml.merges"].contents())
    writer.add_bos_token_id(int(fields["tokenizer.ggml.bos_token_id"].contents()))
    writer.add_eos_token_id(int(fields["tokenizer.ggml.eos_token_id"].contents()))
    writer.add_add_bos_token(False)
    writer.add_add_space_prefix(False)


def add_weights(writer: Any, kind: str, layout: list[tuple[str, tuple[int, ...]]]) -> None:
    """Header, then tensor after tensor: none but the one being written is held."""
    import gguf

    for name, dims in layout:
        if len(dims) == 1:
            writer.add_tensor_info(name, dims, np.dtype(np.float32), dims[0] * 4)
        elif kind == "F16":
            writer.add_tensor_info(name, dims, np.dtype(np.float16), dims[0] * dims[1] * 2)
        else:
            row_bytes = dims[1] // BLOCK * BLOCK_BYTES
            writer.add_tensor_info(
                name, (dims[0], row_bytes), np.dtype(np.uint8), dims[0] * row_bytes, gguf.GGMLQuantizationType.Q4_1
            )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for index, (_, dims) in enumerate(layout):
        rng = np.random.default_rng([SEED, index])
        writer.write_tensor_data(np.ones(dims, np.float32) if len(dims) == 1 else KINDS[kind](rng, *dims))


KINDS: dict[str, Callable[[np.random.Generator, int, int], np.ndarray]] = {"Q4_1": q4_1_tensor, "F16": f16_tensor}

if __name__ == "__main__":
    if len(sys.argv) != 5 or sys.argv[2] not in SHAPES or sys.argv[3] not in KINDS:
        sys.exit(
            f"usage: python bench/random_gguf.py SOURCE.gguf {{{','.join(SHAPES)}}} {{{','.join(KINDS)}}} OUT.gguf"
        )
    write(Path(sys.argv[1]), sys.argv[2], sys.argv[3], Path(sys.argv[4]))
