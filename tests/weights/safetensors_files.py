"""Small safetensors files for tests, written by hand: every field may be wrong."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

INDEX = "model.safetensors.index.json"


def whole(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    """A file. header: JSON value, text or bytes. length: what the first 8 bytes say, when it is not the truth."""
    raw = header if isinstance(header, bytes) else (header if isinstance(header, str) else json.dumps(header)).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def entry(dtype: str, shape: Any, begin: Any, end: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def bf16(values: NDArray[np.float32]) -> bytes:
    """Truncated, so that the test knows the bits."""
    return (values.astype(np.float32).view(np.uint32) >> np.uint32(16)).astype(np.uint16).tobytes()


def raw(values: NDArray[Any], dtype: str) -> bytes:
    if dtype == "BF16":
        return bf16(values)
    return values.astype({"F32": np.float32, "F16": np.float16}[dtype]).tobytes()


def file_of(tensors: Mapping[str, NDArray[Any]], dtype: str = "F32", **dtypes: str) -> bytes:
    """A well-formed file; dtypes: of single tensors."""
    header, data = {}, b""
    for name, values in tensors.items():
        kind = dtypes.get(name, dtype)
        piece = raw(values, kind)
        header[name] = entry(kind, list(values.shape), len(data), len(data) + len(piece))
        data += piece
    return whole(header, data)


def write_folder(folder: Path, tensors: Mapping[str, NDArray[Any]], shards: int = 1, dtype: str = "F32") -> Path:
    """A folder of one file, or of shards that take the tensors in turn, with their index."""
    folder.mkdir(parents=True, exist_ok=True)
    if shards == 1:
        (folder / "model.safetensors").write_bytes(file_of(tensors, dtype))
        return folder
    names = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    weight_map = {name: names[i % shards] for i, name in enumerate(tensors)}
    for shard in names:
        part = {name: values for name, values in tensors.items() if weight_map[name] == shard}
        (folder / shard).write_bytes(file_of(part, dtype))
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return folder
