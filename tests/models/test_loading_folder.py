"""From a folder of safetensors to a model: names, facts, defaults, what is refused, what the store keeps."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models.hub_folder import CONFIG, HIDDEN, TOKENS, tensors, write_model, write_same_gguf
from safetensors.numpy import save_file
from weights.safetensors_files import entry, whole

import kvik
from kvik.models import llama
from kvik.models.config import Piece, TensorSpec
from kvik.models.loading import LoadedModel, load_model
from kvik.models.tensors import base_of, wanted_tensors
from kvik.weights.packing import Part, WantedTensor
from kvik.weights.store import ModelStore

GREEDY = kvik.SamplingParams(max_tokens=6, temperature=0.0)


@pytest.fixture(autouse=True)
def own_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVIK_HOME", str(tmp_path / "store"))


def load(path: Path, weights: str = "auto") -> LoadedModel:
    return load_model(path, weights, lambda *_: None)  # type: ignore[arg-type]


def answer(path: Path, **options: Any) -> tuple[int, ...]:
    llm = kvik.LLM(path, engine=kvik.EngineParams(threads=1), **options)
    return tuple(llm.generate([[1, 2, 3, 4]], GREEDY)[0].choices[0].token_ids)


def refused(path: Path, match: str, tensor: str | None = None) -> None:
    with pytest.raises(kvik.DataError, match=match) as caught:
        load(path)
    assert caught.value.tensor == tensor and "\n" not in str(caught.value)
    assert str(path) in str(caught.value.path)
    assert ModelStore().list() == [], "a refused source leaves nothing in the store"


# --- what is loaded


def test_a_folder_and_a_gguf_of_the_same_weights(tmp_path: Path) -> None:
    weights = tensors()
    folder = load(write_model(tmp_path / "m", weights, rms_norm_eps=float(np.float32(1e-5))))
    file = load(write_same_gguf(tmp_path / "m.gguf", weights))
    assert folder.config == file.config and folder.parameters == file.parameters
    assert folder.parameters == sum(v.size for v in weights.values())
    assert folder.weights.tensors.keys() == file.weights.tensors.keys()
    for name, tensor in folder.weights.tensors.items():
        assert np.array_equal(tensor.data, file.weights.tensors[name].data), name
    assert answer(tmp_path / "m") == answer(tmp_path / "m.gguf") == answer(tmp_path / "m", executor="torch")
    text = "a cab; abba!"
    assert folder.tokenizer.encode(text) == file.tokenizer.encode(text)


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_shards_and_dtypes(tmp_path: Path, dtype: str) -> None:
    one = load(write_model(tmp_path / "one", dtype=dtype))
    many = load(write_model(tmp_path / "many", shards=3, dtype=dtype))
    assert {t.layout.name for t in one.weights.tensors.values() if not t.vector} == {dtype}
    for name, tensor in one.weights.tensors.items():
        assert np.array_equal(tensor.data, many.weights.tensors[name].data)
    assert many.source.nbytes == sum(p.stat().st_size for p in (tmp_path / "many").glob("*.safetensors"))


@pytest.mark.parametrize("shards", ["10KB", "1GB"])
def test_what_transformers_saves(tmp_path: Path, shards: str) -> None:
    """Their files, index and config.json as they write them."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    path = write_model(tmp_path / "m")
    (path / "model.safetensors").unlink()
    sizes = {key: CONFIG[key] for key in CONFIG if key not in ("architectures", "model_type", "rope_theta")}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**sizes)).to(torch.bfloat16)
    model.save_pretrained(path, max_shard_size=shards)
    assert (len(list(path.glob("*.safetensors"))) > 1) == (shards == "10KB")
    found, state = load(path), model.state_dict()
    specs = {spec.name: spec.hf for spec in llama.tensors(found.config)}
    assert specs.keys() == found.weights.tensors.keys()
    for name, tensor in found.weights.tensors.items():
        assert np.array_equal(tensor.floats(), state[specs[name]].float().numpy())
    assert found.config.num_kv_heads == 2 and found.source.tensor_types["BF16"][1] == 2 * found.parameters


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_quantized_on_load(tmp_path: Path, weights: str) -> None:
    path = write_model(tmp_path / "m", dtype="BF16")
    exact, found = load(path), load(path, weights)
    for name, tensor in found.weights.tensors.items():
        difference = np.abs(tensor.floats() - exact.weights.tensors[name].floats()).max()
        assert difference == (
            0 if tensor.vector else pytest.approx(found.weights.notes["largest_error"][name], rel=1e-3)
        )


@pytest.mark.parametrize("base", ["", "language_model.model.", "model.language_model."])
def test_the_base_prefix_is_what_stands_before_the_embedding(tmp_path: Path, base: str) -> None:
    weights = tensors()
    expected = answer(write_model(tmp_path / "m", weights))
    renamed = {base + name.removeprefix("model."): values for name, values in weights.items()}
    assert answer(write_model(tmp_path / "other", renamed)) == expected
    assert answer(tmp_path / "other") == expected, "and the second start knows it too"


def test_names_of_a_definition_become_names_of_a_folder() -> None:
    rest = (Piece("h.0.c.weight", 4, 8, True), Piece("transformer.h.0.d.weight"))
    specs = [
        TensorSpec("embed", "token_embd.weight", "transformer.wte.weight", (9, 4)),
        TensorSpec("q", "blk.0.qkv.weight", rest, (8, 4), 2, keep_f32=True),
        TensorSpec("norm", Piece("n", 1, 3), "transformer.norm.weight", (2,), hf_offset=1.0),
        TensorSpec("head", "output.weight", "lm_head.weight", (9, 4)),
    ]
    assert wanted_tensors(specs, "") == [
        WantedTensor("embed", (Part("wte.weight"),), (9, 4)),
        WantedTensor("q", (Part("h.0.c.weight", 4, 8, True), Part("h.0.d.weight")), (8, 4), keep_f32=True),
        WantedTensor("norm", (Part("norm.weight"),), (2,), offset=1.0),
        WantedTensor("head", (Part("lm_head.weight"),), (9, 4)),
    ]
    assert wanted_tensors(specs, "a.transformer.")[3] == WantedTensor("head", (Part("a.lm_head.weight"),), (9, 4))
    assert wanted_tensors(specs, "transformer.a.")[3] == WantedTensor("head", (Part("lm_head.weight"),), (9, 4))
    assert wanted_tensors(specs, None)[1:3] == [
        WantedTensor("q", (Part("blk.0.qkv.weight"),), (8, 4), 2, keep_f32=True),
        WantedTensor("norm", (Part("n", 1, 3),), (2,)),
    ]
    path = Path("m")
    assert base_of(["wte.weight"], specs, path) == ""
    assert base_of(["a.b.wte.weight", "lwte.weight"], specs, path) == "a.b."
    assert base_of(["x"], specs, path) == "transformer."
    assert base_of(["wte.weight", "transformer.wte.weight"], specs, path) == "transformer."
    with pytest.raises(kvik.DataError, match=r"has several embeddings: a\.wte\.weight, b\.wte\.weight"):
        base_of(["a.wte.weight", "b.wte.weight"], specs, path)


def test_what_the_files_are(tmp_path: Path) -> None:
    weights = tensors()
    path = write_model(tmp_path / "my model", weights, dtype="BF16", license="mit", auto_map={"AutoModel": "evil.X"})
    (path / "evil.py").write_text("raise SystemExit('remote code ran')")
    for _ in range(2):  # read, and from the store
        found = load(path)
        assert (found.name, found.path, found.license, found.unused_defaults) == ("my model", path, "mit", ())
        assert (found.source.architecture, found.source.kind) == ("LlamaForCausalLM", "safetensors")
        assert found.source.tensor_types == {"BF16": (len(weights), 2 * found.parameters)}
        assert found.source.nbytes == (path / "model.safetensors").stat().st_size
        assert found.config.windows == (None, None) and found.matrix_bytes == found.weights.matrix_bytes()
    file = load(write_same_gguf(tmp_path / "m.gguf", weights)).source
    assert (file.architecture, file.kind, file.nbytes) == ("llama", "gguf", (tmp_path / "m.gguf").stat().st_size)
    assert file.tensor_types == {"F32": (len(weights), 4 * found.parameters)}


def test_of_experts_a_step_reads_those_it_uses(tmp_path: Path) -> None:
    found = load(write_model(tmp_path / "m"))
    packed = found.weights
    tensors = dict(packed.tensors) | {"layers.0.experts_gate": packed.tensors["layers.0.gate"]}
    config = replace(found.config, num_experts=8, experts_used=2)
    mixture = replace(found, config=config, weights=replace(packed, tensors=tensors))
    assert mixture.matrix_bytes == found.matrix_bytes + packed.tensors["layers.0.gate"].nbytes // 4


def test_windows_and_tuples_survive_the_store(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m", architectures=["MistralForCausalLM"], model_type="mistral", sliding_window=24)
    first, second = load(path), load(path)
    assert first.config == second.config and second.config.windows == (24, 24)
    assert hash(second.config) == hash(first.config)


def test_a_second_start_reads_no_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_model(tmp_path / "m", shards=2)
    expected = answer(path)

    def never(*_: object) -> None:
        raise AssertionError("read again")

    for name in ("kvik.weights.safetensors.read_safetensors", "kvik.models.reading.describe"):
        monkeypatch.setattr(name, never)
    assert answer(path) == expected


def test_a_changed_config_is_noticed(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m")
    before = load(path)
    write_model(path, rms_norm_eps=1e-3)
    after = load(path)
    assert (before.config.norm_eps, after.config.norm_eps) == (1e-5, 1e-3)


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("model.json", '"windows": [null', '"windows": [64'),
        ("model.json", '"base": "model."', '"base": "medel."'),
        ("model.json", '"source": {', '"sauce": {'),
        ("tokenizer/kvik_tokenizer.json", '"format"', '"fermat"'),
    ],
)
def test_what_the_store_keeps_is_made_again_when_damaged(tmp_path: Path, file: str, old: str, new: str) -> None:
    path = write_model(tmp_path / "m")
    load(path)
    kept = ModelStore().folder_for(path) / file
    whole_text = kept.read_text()
    assert old in whole_text
    kept.write_text(whole_text.replace(old, new, 1))
    load(path)
    assert kept.read_text() == whole_text


# --- licence, name, defaults


@pytest.mark.parametrize(
    ("readme", "license"),
    [
        ("---\nlicense: apache-2.0\ntags:\n- x\n---\n# M\n", "apache-2.0"),
        ("---\r\ntags: [x]\r\nlicense: mit\r\n---\r\n", "mit"),
        ("---\nlicense:\n- cc-by-4.0\n- mit\n---\n", "cc-by-4.0"),
        ("---\nlicense_name: x\n---\nlicense: mit\n", None),
        ("license: mit\n", None),
        ("---\nlicense: \xff\n---\n", None),
        ("", None),
    ],
)
def test_the_licence_of_the_model_card(tmp_path: Path, readme: str, license: str | None) -> None:
    path = write_model(tmp_path / "m")
    (path / "README.md").write_bytes(readme.encode("latin-1"))
    assert load(path).license == license


def test_a_model_card_that_is_no_file_says_no_licence(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m", license="mit")
    (path / "README.md").mkdir()
    assert load(path).license == "mit"
    loop = write_model(tmp_path / "n")
    (loop / "README.md").symlink_to("README.md")
    assert load(loop).license is None


def test_names_and_licences_steer_no_terminal(tmp_path: Path) -> None:
    loaded = load(write_model(tmp_path / "a\x1b[2Jb\nc", license="mit\x1b]0;title\x07\x9b"))
    assert (loaded.name, loaded.license) == (r"a\x1b[2Jb\nc", r"mit\x1b]0;title\x07\x9b")


def test_a_faulty_chat_template_names_the_model(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m")
    (path / "chat_template.jinja").write_text("{% if %}")
    llm = kvik.LLM(path, engine=kvik.EngineParams(threads=1))
    with pytest.raises(kvik.DataError, match=r"/m: chat template: .*line 1"):
        llm.chat([{"role": "user", "content": "a"}])


def test_the_name_of_a_folder_of_the_hub(tmp_path: Path) -> None:
    path = write_model(tmp_path / "models--org--tiny-model" / "snapshots" / "0f3a", _name_or_path="/home/me/base")
    assert load(path).name == "org/tiny-model"
    assert ModelStore().list()[0].name.startswith("org_tiny-model-")


@pytest.mark.parametrize(
    ("generation", "defaults", "unused"),
    [
        (None, {}, ()),
        ({"eos_token_id": [97], "temperature": None}, {}, ()),
        ({"temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0, "do_sample": True, "repetition_penalty": 1.0},
         {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0, "repetition_penalty": 1.0}, ()),
        ({"temperature": 0.6, "top_k": -1, "repetition_penalty": 1.05, "num_beams": 4},
         {"temperature": 0.6, "top_k": 0, "repetition_penalty": 1.05}, ("num_beams=4",)),
        ({"no_repeat_ngram_size": 3, "typical_p": 0.9, "epsilon_cutoff": 1e-4, "eta_cutoff": 2e-4, "guidance_scale": 2},
         {"no_repeat_ngram_size": 3, "typical_p": 0.9, "epsilon_cutoff": 1e-4, "eta_cutoff": 2e-4}, ("guidance_scale=2",)),
        ({"do_sample": False, "temperature": 0.6, "top_k": 20, "typical_p": 0.5}, {"temperature": 0.0}, ()),
        ({"do_sample": False, "repetition_penalty": 1.1, "no_repeat_ngram_size": 2},
         {"temperature": 0.0, "repetition_penalty": 1.1, "no_repeat_ngram_size": 2}, ()),
    ],
)  # fmt: skip
def test_generation_defaults(
    tmp_path: Path, generation: dict[str, Any] | None, defaults: dict[str, Any], unused: tuple[str, ...]
) -> None:
    path = write_model(tmp_path / "m", generation=generation)
    for _ in range(2):
        found = load(path)
        assert dict(found.defaults) == defaults and found.unused_defaults == unused


@pytest.mark.parametrize(
    ("generation", "match"),
    [
        ({"temperature": -1.0}, "temperature: temperature must be finite and at least 0"),
        ({"repetition_penalty": 0}, "repetition_penalty: repetition_penalty must be above 0"),
        ({"temperature": "0.5"}, "temperature: temperature must be a number"),
        ({"top_p": 2}, "top_p: top_p must be finite and in"),
        ({"top_k": 1.5}, "top_k: top_k must be an integer"),
        ({"top_k": 10**400}, "top_k: top_k must be in .*, got an integer of 1329 bits"),
        ({"min_p": True}, "min_p: min_p must be a number"),
        ({"do_sample": "yes"}, "do_sample must be true or false"),
    ],
)
def test_generation_defaults_that_are_refused(tmp_path: Path, generation: dict[str, Any], match: str) -> None:
    refused(write_model(tmp_path / "m", generation=generation), rf"generation_config\.json: {match}")


# --- what is refused


def test_json_files_that_are_refused(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m", generation={})
    for name in ("config.json", "generation_config.json"):
        good = (path / name).read_bytes()
        for bad, match in (
            (b"{", "is not JSON"), (b"[]", "must hold a JSON object"), (b'{"a":"\xff"}', r"not UTF-8.*at byte 6"),
            (b'{"a":1,"a":2}', "key 'a' stands twice"), (b'{"a":' + b"[" * 9999, "nested deeper"),
            (b" " * (1 << 20) + b"{}", "at most 1048576 are allowed"), (b"", "is empty"),
            (b"\xef\xbb\xbf{}", r"begins with a byte order mark.*at byte 0"),
            (b'{"a":' + b"9" * 4400 + b"}", r"has over 4300 digits \(at byte 5\)"),
        ):  # fmt: skip
            (path / name).write_bytes(bad)
            refused(path, rf"{name}: .*{match}")
        (path / name).write_bytes(good)
    (path / "config.json").unlink()
    refused(path, r"config\.json: no such file")
    (path / "config.json").mkdir()
    refused(path, r"config\.json: is a folder")


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"hidden_size": ...}, "hidden_size is missing"),
        ({"num_attention_heads": 3, "num_key_value_heads": 2}, "num_key_value_heads is 2, which does not divide"),
        ({"architectures": ["LlamaForCausalML"]}, "nearest is 'LlamaForCausalLM'"),
        ({"architectures": ...}, "architectures"),
    ],
)
def test_configurations_that_are_refused(tmp_path: Path, config: dict[str, Any], match: str) -> None:
    refused(write_model(tmp_path / "m", **config), rf"config\.json: .*{match}")


def test_a_vocabulary_smaller_than_the_tokenizer_s(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m", tensors(vocab=90), vocab_size=90, bos_token_id=None, eos_token_id=None)
    refused(
        path, r"added_tokens\[0\] is '<s>' with id 96, but the model's vocab_size is 90 and tokenizer_config.json: bos"
    )
    (path / "tokenizer_config.json").unlink()
    refused(path, r"tokenizer\.json: has 96 tokens but the model weights for 90")
    larger = write_model(tmp_path / "n", tensors(vocab=128), vocab_size=128)
    assert load(larger).tokenizer.vocab_size == len(TOKENS)


Change = Callable[[dict[str, Any]], object]


@pytest.mark.parametrize(
    ("change", "match", "tensor"),
    [
        (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), "is missing", "model.layers.1.mlp.up_proj.weight"),
        (lambda t: t.pop("model.embed_tokens.weight"), "is missing", "model.embed_tokens.weight"),
        (lambda t: t.update({"model.norm.weight": np.ones(5, np.float32)}), r"has shape \[5\]", "model.norm.weight"),
        (lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": np.ones(5, np.float32)}),
         "has no place in a llama model of 2 layers", "model.layers.0.self_attn.q_proj.bias"),
        (lambda t: t.update({"model.layers.2.input_layernorm.weight": np.ones(5, np.float32)}),
         "has no place in a llama model of 2 layers", "model.layers.2.input_layernorm.weight"),
        (lambda t: t.update({"lm_head.bias": np.ones(5, np.float32)}), "has no place in a llama", "lm_head.bias"),
        (lambda t: t.update({"model.norm.weight": np.full(HIDDEN, np.nan, np.float32)}),
         "the weight of element 0 is nan", "model.norm.weight"),
    ],
)  # fmt: skip
def test_tensors_that_are_refused(tmp_path: Path, change: Change, match: str, tensor: str) -> None:
    weights = tensors()
    change(weights)
    refused(write_model(tmp_path / "m", weights), match, tensor)


def test_a_tensor_without_a_place_is_refused_whatever_its_type(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.bias"
    folder = write_model(tmp_path / "m")
    save_file({**tensors(), name: np.ones(5)}, folder / "model.safetensors")  # float64
    refused(folder, "has no place in a llama model of 2 layers", name)


def test_a_missing_tensor_names_the_file_it_should_be_in(tmp_path: Path) -> None:
    weights = tensors()
    del weights["model.norm.weight"]
    for shards, file in ((1, "model.safetensors"), (2, "model.safetensors.index.json")):
        with pytest.raises(kvik.DataError) as caught:
            load(write_model(tmp_path / str(shards), weights, shards=shards))
        assert Path(caught.value.path).name == file


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_of_its_own_is_used_whatever_the_configuration_says(tmp_path: Path, tied: bool) -> None:
    weights = tensors()
    head = tensors(seed=1)["model.embed_tokens.weight"]
    own = write_model(tmp_path / "own", weights | {"lm_head.weight": head}, tie_word_embeddings=tied)
    model = load(own)
    assert not model.config.tied_embeddings
    assert np.array_equal(model.weights.tensors["head"].floats(), head)
    copy = {"lm_head.weight": weights["model.embed_tokens.weight"]}
    model = load(write_model(tmp_path / "copy", weights | copy, tie_word_embeddings=tied))
    assert model.config.tied_embeddings is tied


def test_a_head_of_the_embedding_s_bytes_in_another_shape_does_not_fit(tmp_path: Path) -> None:
    head = tensors()["model.embed_tokens.weight"].reshape(HIDDEN, -1)
    refused(write_model(tmp_path / "m", tensors() | {"lm_head.weight": head}), "shape", "lm_head.weight")


def test_a_dtype_that_is_needed_and_not_read(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m", {n: v for n, v in tensors().items() if n != "model.norm.weight"})
    raw = (path / "model.safetensors").read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    data = raw[8 + int.from_bytes(raw[:8], "little") :]
    header["model.norm.weight"] = entry("F8_E4M3", [HIDDEN], len(data), len(data) + HIDDEN)
    (path / "model.safetensors").write_bytes(whole(header, data + bytes(HIDDEN)))
    refused(path, "type F8_E4M3 is not supported; supported: F32, F16, BF16", "model.norm.weight")


def test_buffers_of_old_files_and_other_parts_of_a_larger_model_do_not_matter(tmp_path: Path) -> None:
    weights = tensors()
    expected = answer(write_model(tmp_path / "m", weights))
    more = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32),
        "lm_head.weight": weights["model.embed_tokens.weight"],
        "vision_tower.layers.0.q.weight": np.ones(3, np.float32),
    }
    assert answer(write_model(tmp_path / "n", weights | more)) == expected


def test_pickles_are_refused_by_name(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m")
    (path / "model.safetensors").rename(path / "pytorch_model.bin")
    with pytest.raises(kvik.DataError, match=r"only pytorch_model\.bin, which is a Python pickle"):
        load(path)


def test_the_config_of_these_tests_is_whole() -> None:
    assert CONFIG["num_attention_heads"] * CONFIG["head_dim"] == HIDDEN
