"""What `models show` tells of every family, from both kinds of source, against what packing then makes."""

from __future__ import annotations

from pathlib import Path

import pytest
from oracles.random_models.folder import save_folder
from oracles.random_models.gguf_file import write_gguf
from oracles.random_models.model import KINDS, random_model
from oracles.random_models.shapes import wide

from kvik.models.facts import read_facts
from kvik.models.loading import load_model
from kvik.weights.store import ModelStore

NEEDED = ("gemma3", "gpt2", "mixtral")  # norms of heads, pieces and transposed matrices, stacked experts


@pytest.mark.parametrize("source", ["gguf", "folder"])
@pytest.mark.parametrize("kind", [k if k in NEEDED else pytest.param(k, marks=pytest.mark.slow) for k in KINDS])
def test_facts_are_those_of_the_packed_model(kind: str, source: str, tmp_path: Path) -> None:
    model = random_model(wide(kind))
    made = write_gguf(model, tmp_path / "m.gguf") if source == "gguf" else save_folder(model, tmp_path / "m")
    facts = read_facts(made, "int8")
    assert facts.refused is None
    loaded = load_model(made, "int8", lambda *_: None, ModelStore(tmp_path / "store"))
    assert facts.config == loaded.config and facts.parameters == loaded.parameters
    assert facts.packed_bytes == loaded.weights.nbytes
    layouts: dict[str, int] = {}
    for group in facts.groups:
        layouts[str(group.layout)] = layouts.get(str(group.layout), 0) + group.packed_bytes
    assert layouts == loaded.weights.bytes_by_layout()
    assert sum(group.tensors for group in facts.groups) == sum(
        count for count, _ in loaded.source.tensor_types.values()
    )
