"""What is told of a model before anything of it is packed, against what packing it then makes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from models.small_models import CONTEXT, LAYERS, TEMPLATE, shapes, write_folder, write_gguf

from kvik.errors import DataError
from kvik.models.facts import TensorGroup, read_facts
from kvik.models.loading import load_model
from kvik.weights.store import ModelStore

MIXED = {"token_embd": "Q8_0", "attn_v": "F16", "ffn_down": "Q4_0"}


@pytest.fixture
def store(tmp_path, monkeypatch) -> ModelStore:
    monkeypatch.setenv("KVIK_HOME", str(tmp_path / "store"))
    return ModelStore()


def by_name(groups: tuple[TensorGroup, ...]) -> dict[tuple[str, str | None], TensorGroup]:
    return {(group.type, group.layout): group for group in groups}


@pytest.mark.parametrize("weights", ["auto", "f32", "bf16", "int8", "int4"])
@pytest.mark.parametrize("kind", ["gguf", "folder"])
def test_layouts_bytes_and_errors_are_those_of_the_packed_weights(tmp_path, store, kind, weights) -> None:
    path = write_gguf(tmp_path / "m.gguf", MIXED) if kind == "gguf" else write_folder(tmp_path / "m")
    before = read_facts(path, weights)
    assert not store.root.exists() and before.refused is None
    packed = load_model(path, weights, lambda *_: None, store).weights
    assert before.packed_bytes == packed.nbytes
    layouts: dict[str, int] = {}
    for group in before.groups:
        layouts[group.layout] = layouts.get(group.layout, 0) + group.packed_bytes
    assert layouts == packed.bytes_by_layout()
    errors = packed.notes["largest_error"]
    after = by_name(read_facts(path, weights, errors).groups)
    for name, group in by_name(before.groups).items():
        assert after[name].exact is not None
        if group.exact is None:
            assert weights in ("bf16", "int8", "int4")
        else:
            assert group.exact and after[name].exact
    if weights == "auto":
        assert all(group.exact for group in before.groups)
    assert max((group.largest_error or 0 for group in after.values()), default=0) == max(errors.values(), default=0)


def test_types_are_counted_as_the_file_has_them(tmp_path) -> None:
    facts = read_facts(write_gguf(tmp_path / "m.gguf", MIXED), "int8")
    groups = by_name(facts.groups)
    assert {name: group.tensors for name, group in groups.items()} == {
        ("Q8_0", "int8"): 1, ("F32", "vector"): 2 * LAYERS + 1, ("Q4_1", "int8_min"): 5 * LAYERS,
        ("F16", "int8"): LAYERS, ("Q4_0", "int8"): LAYERS,
    }  # fmt: skip
    assert groups["F16", "int8"].bytes == LAYERS * 32 * 64 * 2
    assert facts.parameters == sum(int(np.prod(shape)) for shape in shapes().values())
    assert facts.bytes == facts.path.stat().st_size > sum(group.bytes for group in facts.groups)


def test_what_a_gguf_file_says(tmp_path) -> None:
    facts = read_facts(write_gguf(tmp_path / "m.gguf", extra={"general.license": "mit"}), "auto")
    assert (facts.name, facts.architecture, facts.family, facts.license) == ("a small one", "llama", "llama", "mit")
    assert facts.config is not None and facts.config.windows == (32,) * LAYERS
    assert facts.config.context_length == CONTEXT and facts.config.rope.theta == 50_000
    assert facts.kv_bytes_per_token == LAYERS * 2 * 2 * 16 * 2 and facts.vocabulary == 98
    assert facts.defaults == {"temperature": 0.5} and facts.unused_defaults == ()


def test_what_a_folder_says(tmp_path) -> None:
    facts = read_facts(write_folder(tmp_path / "small"), "auto")
    assert (facts.name, facts.architecture, facts.family) == ("small", "LlamaForCausalLM", "llama")
    assert facts.license == "mit" and facts.chat_template is None and facts.config.windows == (None,) * LAYERS
    assert facts.defaults == {"temperature": 0.4, "repetition_penalty": 1.1} and facts.unused_defaults == (
        "num_beams=4",
    )
    assert by_name(facts.groups)["F16", "f16"].exact


class TestTemplate:
    def told(self, path: Path, template: str | None):
        return read_facts(write_gguf(path / "m.gguf", template=template), "auto").chat_template

    def test_roles_are_those_whose_words_it_writes(self, tmp_path) -> None:
        told = self.told(tmp_path, TEMPLATE)
        assert told.first_line == "{# small #}" and told.refused is None
        assert told.roles == ("system", "user", "assistant", "tool")

    def test_refused_and_ignored_roles_are_not_among_them(self, tmp_path) -> None:
        template = (
            "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}"
            "{% elif m.role != 'tool' %}{{ m.content }}{% endif %}{% endfor %}"
        )
        assert self.told(tmp_path, template).roles == ("user", "assistant")

    def test_a_faulty_one_is_told(self, tmp_path) -> None:
        told = self.told(tmp_path, "{% for %}")
        assert told.roles == () and told.refused

    def test_none(self, tmp_path) -> None:
        assert self.told(tmp_path, None) is None


class TestRefused:
    def test_a_family_that_is_not_here(self, tmp_path) -> None:
        extra = {"general.license": "other"}
        facts = read_facts(write_gguf(tmp_path / "m.gguf", architecture="mamba", extra=extra), "auto")
        assert facts.family is None and facts.config is None and facts.packed_bytes is None
        assert "'mamba' is not supported; nearest is" in facts.refused
        assert (facts.architecture, facts.license, facts.name) == ("mamba", "other", "a small one")
        assert by_name(facts.groups)["Q4_1", None].tensors == 7 * LAYERS + 1

    def test_a_folder_of_such_a_family(self, tmp_path) -> None:
        facts = read_facts(write_folder(tmp_path / "m", architecture="BertModel"), "auto")
        assert facts.architecture == "BertModel" and "BertModel" in facts.refused

    def test_a_folder_whose_configuration_is_missing(self, tmp_path) -> None:
        folder = write_folder(tmp_path / "m")
        (folder / "config.json").unlink()
        facts = read_facts(folder, "auto")
        assert facts.architecture is None and "config.json" in facts.refused and facts.groups[0].type == "F16"

    def test_a_type_that_cannot_be_read_is_shown_beside_those_that_can(self, tmp_path, monkeypatch) -> None:
        from kvik.models import facts as module
        from kvik.weights import tensor_file
        from kvik.weights.ggml_types import GGMLType

        left = frozenset({GGMLType.F32, GGMLType.Q4_1})
        for where in (module, tensor_file):
            monkeypatch.setattr(where, "SUPPORTED", left)
        facts = read_facts(write_gguf(tmp_path / "m.gguf", MIXED), "auto")
        groups = by_name(facts.groups)
        assert facts.packed_bytes is None and "type Q8_0 is not supported" in facts.refused
        assert groups["Q8_0", "unreadable"].tensors == 1 and groups["Q4_0", "unreadable"].tensors == LAYERS
        assert groups["Q4_1", "int4_min"].packed_bytes > 0 and facts.config is not None

    def test_no_file(self, tmp_path) -> None:
        path = tmp_path / "m.gguf"
        path.write_bytes(b"GGUF\x03\x00")
        with pytest.raises(DataError, match=r"m\.gguf"):
            read_facts(path, "auto")
